"""The card that the suite runs on: its name, driver and memory."""

import os
import platform
import subprocess
from collections.abc import Iterator

import torch

from batchcam.devices import nvidia_driver, resolve_device
from batchcam.errors import ConfigError
from studies.benchmarks.gpu.parts import Row, Setup, Skipped


def describe(setup: Setup) -> Iterator[Row]:
    """Yield one row: the card, its driver, and the versions that they depend on."""
    common = {
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    if not setup.cuda:
        yield {"card": platform.processor() or platform.machine(), **common}
        return
    try:
        device = resolve_device("cuda")
    except ConfigError as error:
        raise Skipped(f"{error} PyTorch is built for CUDA {torch.version.cuda}.") from error
    properties = torch.cuda.get_device_properties(device)
    yield {
        "card": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "driver": nvidia_driver(),
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        **common,
    }


def used_memory() -> int | None:
    """Return the bytes of the first GPU that are in use, or None where nvidia-smi does not run."""
    query = ["--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    try:
        done = subprocess.run(
            ["nvidia-smi", *query], capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return int(done.stdout) * 2**20
