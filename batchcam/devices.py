"""Which device a model runs on, and in which precision."""

import ctypes
import os
from contextlib import AbstractContextManager, nullcontext

import torch

from batchcam.errors import ConfigError


def resolve_device(name: str) -> torch.device:
    """Return the device called `name`; "auto" is CUDA where there is one, else the CPU.

    Raises:
        ConfigError: no such device exists on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(
            f"device={name!r} is no device; use auto, cpu, cuda, cuda:N or mps."
        ) from error
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise ConfigError(
                f"device={name!r} is not there: this machine has {count} CUDA devices; use auto "
                "or cpu."
            )
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f"device={name!r} is not there; use auto or cpu.")
    elif device.type not in ("cpu", "mps"):
        raise ConfigError(f"device={name!r} is not supported; use auto, cpu, cuda, cuda:N or mps.")
    return device


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Return the context in which forward passes run: fp32 as they are, else autocast.

    Raises:
        ConfigError: fp16 is asked for where gradients cannot be scaled for it.
    """
    if precision == "fp32":
        return nullcontext()
    if precision == "fp16" and device.type != "cuda":
        raise ConfigError(f"precision='fp16' needs CUDA, not {device.type}; use bf16 or fp32.")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    return torch.autocast(device.type, dtype=dtype)


def compile_mode(device: torch.device) -> str | None:
    """Return the mode of `torch.compile`: with CUDA graphs where there is CUDA, else its default.

    Graphs hold the features' two passes, the many small kernels of a step. The head and the CAMs,
    which are differentiated twice, stay outside.
    """
    return "reduce-overhead" if device.type == "cuda" else None


def prefers_channels_last(device: torch.device, precision: str) -> bool:
    """Whether convolutions run faster channels last: on CUDA's tensor cores, in half precision."""
    return device.type == "cuda" and precision != "fp32"


def evaluation_batch(device: torch.device) -> int:
    """Return how many images to evaluate at a time: few kernels on a GPU, small tensors else."""
    return 128 if device.type == "cpu" else 512


def keep_freed_memory() -> bool:
    """Have this process keep the memory that tensors on the CPU no longer need, for those to come.

    glibc gives large blocks back to the system, so each step asks for them again and waits for
    their pages. The process then stays as large as it once was, which is no larger than without.

    Returns:
        Whether it does: not with another C library than glibc, and not where the environment
        already says what is to be done (`MALLOC_MMAP_MAX_`, `MALLOC_TRIM_THRESHOLD_`, or
        `GLIBC_TUNABLES`).
    """
    if os.environ.keys() & {"MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"}:
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError, OSError):
        return False
    return bool(mallopt(_TRIM_THRESHOLD, -1) and mallopt(_MMAP_MAX, 0))


_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""Of `mallopt`: the free memory from which some is given back, -1 for none; blocks apart."""
