"""Device and precision of a run, and the settings that suit them."""

import ctypes
import gc
import os
import re
import subprocess
import sys
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from batchcam.errors import ConfigError, first_line


def resolve_device(name: str) -> torch.device:
    """Return the device called `name`; "auto" is CUDA where there is one, else the CPU.

    Raises:
        ConfigError: no such device exists on this machine.

    Example:
        >>> resolve_device("cpu")
        device(type='cpu')
        >>> resolve_device("gpu")
        Traceback (most recent call last):
        batchcam.errors.ConfigError: device='gpu' is not a device; use auto, cpu, ...
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(
            f"device={name!r} is not a device; use auto, cpu, cuda, cuda:N or mps."
        ) from error
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise ConfigError(
                f"device={name!r} is not available: this machine has {count} CUDA devices "
                f"({describe_cuda()}); use auto or cpu."
            )
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f"device={name!r} is not available on this machine; use auto or cpu.")
    elif device.type not in ("cpu", "mps"):
        raise ConfigError(f"device={name!r} is not supported; use auto, cpu, cuda, cuda:N or mps.")
    return device


def cuda_error() -> str | None:
    """Return why PyTorch cannot compute on the first CUDA device, or None if it can.

    Runs a kernel, because CUDA may be available and yet have no kernels for the device. A device
    that has no memory left is usable: the error is left to the one who allocates.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # The error says the same.
            torch.ones(1, device="cuda").add_(1).item()
    except (RuntimeError, AssertionError) as error:  # AssertionError: a wheel without CUDA.
        return None if is_out_of_memory(error) else first_line(error)
    return None


def describe_cuda() -> str:
    """Return the versions that decide whether PyTorch can use a GPU: the driver's and PyTorch's."""
    version = nvidia_driver()
    driver = "no NVIDIA driver found" if version is None else f"NVIDIA driver {version}"
    return f"{driver}, PyTorch {torch.__version__} with torch.version.cuda={torch.version.cuda}"


def nvidia_driver() -> str | None:
    """Return the version of the NVIDIA driver of this machine, or None if none is found.

    Asks nvidia-smi, and reads /proc/driver/nvidia/version if nvidia-smi is missing or fails.
    """
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        text = done.stdout
    except (OSError, subprocess.SubprocessError):
        try:
            text = _DRIVER_FILE.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None
    found = re.search(r"\b\d+\.\d+(\.\d+)?\b", text)
    return found[0] if found else None


_DRIVER_FILE = Path("/proc/driver/nvidia/version")
"""Describes the loaded kernel module: "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.54"."""


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Return the context of forward passes: autocast, or an empty context for fp32.

    Raises:
        ConfigError: fp16 on a device other than CUDA, where gradients cannot be scaled for it.

    Example:
        >>> weights = torch.ones(2, 2)
        >>> with autocast(torch.device("cpu"), "bf16"):
        ...     print((weights @ weights).dtype)
        torch.bfloat16
    """
    if precision == "fp32":
        return nullcontext()
    if precision == "fp16" and device.type != "cuda":
        raise ConfigError(f"precision='fp16' needs CUDA, not {device.type}; use bf16 or fp32.")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    return torch.autocast(device.type, dtype=dtype)


def prefers_channels_last(device: torch.device, precision: str) -> bool:
    """Return whether convolutions run faster in channels-last format: CUDA in half precision.

    Example:
        >>> prefers_channels_last(torch.device("cuda"), "bf16")
        True
    """
    return device.type == "cuda" and precision != "fp32"


def evaluation_batch(device: torch.device) -> int:
    """Return the batch size for evaluation: large on a GPU, small for the caches of a CPU.

    Example:
        >>> evaluation_batch(torch.device("cpu")), evaluation_batch(torch.device("cuda"))
        (128, 512)
    """
    return 128 if device.type == "cpu" else 512


_OUT_OF_MEMORY = (
    "out of memory",  # torch.AcceleratorError: CUDA error, CUDA driver error, MPS backend
    "can't allocate memory",  # the allocator of the CPU
    "not enough memory: you tried to allocate",
    "cannot allocate memory",  # the operating system
    "alloc_failed",  # CUBLAS_, CUDNN_, CUSOLVER_, CUSPARSE_STATUS_ALLOC_FAILED
    "device_allocation_failed",  # CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED
    "failed to allocate memory",
)


_WITHOUT_A_REASON = ("status_internal_error", "status_not_initialized", "execution_failed")
"""What cuDNN and cuBLAS also report when they cannot allocate, beside other faults."""

_FULL = 64 * 2**20
"""A GPU with fewer free bytes has no room for the workspace of a library."""


def _cuda_is_full() -> bool:
    if not torch.cuda.is_available():
        return False
    try:
        return torch.cuda.mem_get_info()[0] < _FULL
    except RuntimeError:  # Not even the question fits.
        return True


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory could not be allocated, on a device or the host.

    PyTorch raises `torch.OutOfMemoryError` only for its own allocator of device memory. Other
    allocators and libraries raise `torch.AcceleratorError` or `RuntimeError`, and are told by their
    message. cuDNN reports an internal error where a GPU is full, which counts where fewer than
    64 MiB are free. `torch.compile` raises errors of its own, so causes are examined too.

    Example:
        >>> is_out_of_memory(RuntimeError("CUDA error: out of memory"))
        True
        >>> is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
        False
    """
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        if isinstance(cause, torch.OutOfMemoryError | MemoryError):
            return True
        text = str(cause).lower()
        if isinstance(cause, RuntimeError | OSError) and any(t in text for t in _OUT_OF_MEMORY):
            return True
        if any(t in text for t in _WITHOUT_A_REASON) and _cuda_is_full():
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def keep_freed_memory() -> bool:
    """Stop glibc from returning freed memory to the system, for this process.

    By default glibc returns large blocks, so that each step requests them again and waits for page
    faults. With this setting the process stays at its peak size, which does not grow.

    Returns:
        Whether the setting was made. It is not made with another C library than glibc, nor if the
        environment sets `MALLOC_MMAP_MAX_`, `MALLOC_TRIM_THRESHOLD_` or `GLIBC_TUNABLES`.
    """
    if os.environ.keys() & {"MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"}:
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError, OSError):
        return False
    return bool(mallopt(_TRIM_THRESHOLD, -1) and mallopt(_MMAP_MAX, 0))


def release_memory() -> None:
    """Return the memory of finished work to the device and to the system, for this process.

    For a process that runs one training after another: the next one, and other processes of the
    device, find the memory free. Tensors that are still in use are not affected. Compiled code is
    dropped; what is used again is compiled again.

    On the CPU, glibc returns whole free pages, also after :func:`keep_freed_memory`, which concerns
    automatic returns only. It keeps the end of the heap of each thread, at most 64 MiB; large
    blocks are in the heap of the process. With another C library nothing is returned there.
    """
    if "torch._dynamo" in sys.modules:  # Else nothing was compiled.
        torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, TypeError, OSError):
        return
    trim(ctypes.c_size_t(0))


_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""Parameters of `mallopt`: the amount of free memory above which some is returned (-1: never), and
the number of blocks that are mapped separately."""
