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


def nvidia_smi(field: str) -> str | None:
    """Return a field of the first GPU as nvidia-smi prints it; None where it does not run."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
