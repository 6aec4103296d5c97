"""Measures peak memory and speed of a trial on a few batches, in this process.

Needs neither Ray nor Optuna, so that a machine without them can measure. :mod:`probing` measures
each kind of trial of a study, on its cluster.
"""

import resource
import sys
from dataclasses import dataclass, replace

import numpy as np
import torch

from batchcam.config import TrialConfig
from batchcam.data.prepared import PreparedData
from batchcam.data.splits import Split
from batchcam.devices import evaluation_batch, is_out_of_memory, resolve_device
from batchcam.errors import first_line
from batchcam.training.fit import fit
from studies.engine.cgroups import total_memory

_BATCHES = 3
_GPU_CONTEXT_BYTES = 600 * 2**20
"""Memory of a GPU per process that PyTorch does not count, where it cannot be measured."""
_MAX_GPU_CONTEXT_BYTES = 3 * 2**30
"""The most that a process takes; a larger difference is the memory of other processes."""


@dataclass(frozen=True)
class Probe:
    """The measurement of one backbone at one resolution and output stride.

    Attributes:
        config: the measured configuration, with all searched loss terms on: the most expensive one.
        threads: number of CPU threads.
        train_images_per_second: training speed, without the first epoch.
        validation_images_per_second: speed of the validation, accuracy and CAMs.
        peak_bytes: peak memory of the device; on a CPU, of the process.
        device_bytes: total memory of the device; on a CPU, what the process may use: of the
            machine, or of its container.
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
    """Train and validate a few batches of a configuration, and return its memory and speed.

    Validates at least one batch of an evaluation, which is larger than one of training.

    Needs a process of its own: on a CPU, the peak memory is that of the process. On a GPU no other
    process should run: all memory that PyTorch has not reserved is taken for this process's.
    """
    torch.set_num_threads(threads)
    device = resolve_device(config.device)
    few = prepared.with_splits(
        train=_first(prepared.dataset.train, _BATCHES * config.batch_size),
        validation=_first(
            prepared.dataset.validation, max(config.batch_size, evaluation_batch(device))
        ),
    )
    try:
        # Three epochs: the first two include work that is done once, the second the recording.
        result = fit(replace(config, epochs=3, compile=False), prepared=few)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
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
        free, total = torch.cuda.mem_get_info(device)
        context = context_bytes(total - free, torch.cuda.memory_reserved(device))
        return torch.cuda.max_memory_reserved(device) + context + stored, total
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak *= 1 if sys.platform == "darwin" else 1024
    return peak, total_memory()


def context_bytes(used: int, reserved: int) -> int:
    """Return what a process takes of a GPU besides PyTorch's tensors: CUDA's context and kernels.

    Args:
        used: bytes of the GPU that are in use.
        reserved: bytes of the GPU that PyTorch has reserved.

    Returns:
        The difference. If it is not plausible for one process, as where others use the GPU or the
        driver does not tell, the usual size.
    """
    measured = used - reserved
    return measured if 0 < measured <= _MAX_GPU_CONTEXT_BYTES else _GPU_CONTEXT_BYTES


def _first(split: Split, count: int) -> Split:
    return split.take(np.arange(min(count, len(split))))
