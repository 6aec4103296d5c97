"""What a trial costs, measured on a batch before any is paid for: memory, and images per second."""

import os
import resource
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import OutOfMemoryError, WorkerCrashedError

from batchcam.config import TrialConfig
from batchcam.data.prepared import PreparedData
from batchcam.data.splits import Split
from batchcam.devices import resolve_device
from batchcam.training.fit import fit
from studies.space import SWITCHED, SearchSpace, Strides

_BATCHES = 3
_GPU_CONTEXT_BYTES = 600 * 2**20
"""What CUDA itself takes of a device in each process, which PyTorch does not count."""


@dataclass(frozen=True)
class Probe:
    """What was measured of one backbone at one resolution and output stride.

    Attributes:
        config: the dearest configuration of its kind: every searched loss term on.
        threads: CPU threads it was measured with.
        train_images_per_second: forward, backward and step, after the first batch.
        validation_images_per_second: accuracy and CAMs.
        peak_bytes: of the device's memory; of the process, where the device is the CPU.
        device_bytes: the memory that the device has in all.
        device: "cuda" or "cpu".
        error: why it could not run, in which case the rest is 0.
    """

    config: TrialConfig
    threads: int
    train_images_per_second: float = 0.0
    validation_images_per_second: float = 0.0
    peak_bytes: int = 0
    device_bytes: int = 0
    device: str = "cpu"
    error: str | None = None

    def epoch_seconds(self, prepared: PreparedData) -> float:
        """Return how long an epoch takes, with its validation."""
        data = prepared.dataset
        return (
            len(data.train) / self.train_images_per_second
            + len(data.validation) / self.validation_images_per_second
        )


def probe_configs(base: TrialConfig, space: SearchSpace, strides: Strides) -> Iterator[TrialConfig]:
    """Give the dearest configuration of each backbone, resolution and output stride."""
    metric = "ssim" if "ssim" in space.metrics else space.metrics[0]
    weights: dict[str, Any] = {f"lambda_{name}": float(name in space.switched) for name in SWITCHED}
    for (backbone, resolution), options in strides.items():
        for stride in options:
            yield replace(
                base,
                backbone=backbone,
                resolution=resolution,
                output_stride=stride,
                metric=metric,
                **weights,
            )


def probe(config: TrialConfig, prepared: PreparedData, threads: int) -> Probe:
    """Train a few batches of a configuration, and measure.

    Runs in a process of its own, for on the CPU the peak of the process is what is measured.
    """
    torch.set_num_threads(threads)
    device = resolve_device(config.device)
    few = prepared.with_splits(
        train=_first(prepared.dataset.train, _BATCHES * config.batch_size),
        validation=_first(prepared.dataset.validation, config.batch_size),
    )
    try:
        # Two epochs: the first pays for what is done once.
        result = fit(replace(config, epochs=2, compile=False), prepared=few)
    except (torch.OutOfMemoryError, MemoryError) as error:
        return Probe(config, threads, device=device.type, error=str(error).splitlines()[0])
    last = result.metrics
    train_seconds = len(few.dataset.train) / last["images_per_second"]
    peak, total = _memory(device, prepared)
    return Probe(
        config,
        threads,
        last["images_per_second"],
        len(few.dataset.validation) / max(1e-9, last["seconds"] - train_seconds),
        peak,
        total,
        device.type,
    )


def probe_all(
    configs: Sequence[TrialConfig], prepared: PreparedData, cpus: float, gpus: float
) -> list[Probe]:
    """Probe configurations one after the other on the Ray cluster that is joined.

    Each probe holds `gpus` whole GPUs and `cpus` CPUs, and so has them for itself. One whose
    process is killed, by Ray or by the kernel, has found that memory does not suffice.
    """
    # max_calls: a process of its own for each. max_retries: what was killed would be again.
    remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_calls=1, max_retries=0)(probe)
    shared = ray.put(prepared)
    threads = max(1, int(cpus))

    def run(config: TrialConfig) -> Probe:
        try:
            found: Probe = ray.get(remote.remote(config, shared, threads))
        except (OutOfMemoryError, WorkerCrashedError) as error:
            device = "cuda" if gpus else "cpu"
            return Probe(config, threads, device=device, error=str(error).splitlines()[0])
        return found

    return [run(config) for config in configs]


def _memory(device: torch.device, prepared: PreparedData) -> tuple[int, int]:
    """Return the peak and the whole of the memory that trials on this device share, in bytes."""
    if device.type == "cuda":
        data = prepared.dataset
        stored = data.train.images.nbytes + data.validation.images.nbytes  # Probed with a part.
        peak = torch.cuda.max_memory_reserved(device) + _GPU_CONTEXT_BYTES + stored
        return peak, torch.cuda.get_device_properties(device).total_memory
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak *= 1 if sys.platform == "darwin" else 1024
    return peak, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _first(split: Split, count: int) -> Split:
    return split.take(np.arange(min(count, len(split))))
