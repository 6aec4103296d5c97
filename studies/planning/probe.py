"""Measures peak memory and speed of a trial on a few batches, in this process.

Needs neither Ray nor Optuna, so that a machine without them can measure. :mod:`probing` measures
each kind of trial of a study, on its cluster.
"""

import os
import resource
import sys
from dataclasses import dataclass, replace

import numpy as np
import torch

from batchcam.config import TrialConfig
from batchcam.data.prepared import PreparedData
from batchcam.data.splits import Split
from batchcam.devices import resolve_device
from batchcam.errors import first_line
from batchcam.training.fit import fit

_BATCHES = 3
_GPU_CONTEXT_BYTES = 600 * 2**20
"""Memory that CUDA takes of a device per process, which PyTorch does not count."""


@dataclass(frozen=True)
class Probe:
    """The measurement of one backbone at one resolution and output stride.

    Attributes:
        config: the measured configuration, with all searched loss terms on: the most expensive one.
        threads: number of CPU threads.
        train_images_per_second: training speed, without the first epoch.
        validation_images_per_second: speed of the validation, accuracy and CAMs.
        peak_bytes: peak memory of the device; on a CPU, of the process.
        device_bytes: total memory of the device.
        device: "cuda" or "cpu".
        error: why the configuration could not run; the numbers are 0 then. None: it ran.
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
        """Return the seconds of an epoch with its validation."""
        data = prepared.dataset
        return (
            len(data.train) / self.train_images_per_second
            + len(data.validation) / self.validation_images_per_second
        )


def probe(config: TrialConfig, prepared: PreparedData, threads: int) -> Probe:
    """Train a few batches of a configuration, and return its memory and speed.

    Needs a process of its own: on a CPU, the peak memory is that of the process.
    """
    torch.set_num_threads(threads)
    device = resolve_device(config.device)
    few = prepared.with_splits(
        train=_first(prepared.dataset.train, _BATCHES * config.batch_size),
        validation=_first(prepared.dataset.validation, config.batch_size),
    )
    try:
        # Two epochs, because the first one includes work that is done once.
        result = fit(replace(config, epochs=2, compile=False), prepared=few)
    except (torch.OutOfMemoryError, MemoryError) as error:
        return Probe(config, threads, device=device.type, error=first_line(error))
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


def _memory(device: torch.device, prepared: PreparedData) -> tuple[int, int]:
    """Return the peak memory of this process and the total memory of its device, in bytes."""
    if device.type == "cuda":
        data = prepared.dataset
        stored = data.train.images.nbytes + data.validation.images.nbytes  # The probe had a part.
        peak = torch.cuda.max_memory_reserved(device) + _GPU_CONTEXT_BYTES + stored
        return peak, torch.cuda.get_device_properties(device).total_memory
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak *= 1 if sys.platform == "darwin" else 1024
    return peak, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _first(split: Split, count: int) -> Split:
    return split.take(np.arange(min(count, len(split))))
