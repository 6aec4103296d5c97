"""Tests of devices and precisions: available ones are chosen, others are refused by name."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from batchcam import devices
from batchcam.devices import (
    autocast,
    cuda_error,
    describe_cuda,
    is_out_of_memory,
    nvidia_driver,
    release_memory,
    resolve_device,
)
from batchcam.errors import ConfigError

no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")


def test_the_cpu_is_always_there() -> None:
    assert resolve_device("cpu") == torch.device("cpu")


def test_auto_is_cuda_where_there_is_one() -> None:
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert resolve_device("auto").type == expected


@no_cuda
@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:3"])
def test_cuda_is_refused_where_there_is_none(name: str) -> None:
    with pytest.raises(ConfigError, match=f"device='{name}' is not available.*0 CUDA.*auto or cpu"):
        resolve_device(name)


def test_a_cuda_device_beyond_the_last_is_refused() -> None:
    with pytest.raises(ConfigError, match="device='cuda:99' is not available: this machine has"):
        resolve_device("cuda:99")


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has MPS")
def test_mps_is_refused_where_there_is_none() -> None:
    with pytest.raises(
        ConfigError, match="device='mps' is not available on this machine; use auto or cpu"
    ):
        resolve_device("mps")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", ""])
def test_what_is_no_device_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"device='{name}' is not a device; use auto, cpu, cuda"):
        resolve_device(name)


def test_a_device_that_cannot_train_is_refused() -> None:
    with pytest.raises(ConfigError, match="device='meta' is not supported; use auto"):
        resolve_device("meta")


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", "float32"), ("bf16", "bfloat16")])
def test_matrix_products_run_in_the_precision_asked_for(precision: str, dtype: str) -> None:
    with autocast(torch.device("cpu"), precision):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == getattr(torch, dtype)


def test_fp16_is_refused_without_cuda() -> None:
    with pytest.raises(ConfigError, match="precision='fp16' needs CUDA, not cpu; use bf16 or fp32"):
        autocast(torch.device("cpu"), "fp16")


def _resident_after_freeing(variables: dict[str, str]) -> int:
    """Return the MiB still resident after a process allocates and frees 16 blocks of 16 MiB."""
    program = (
        "import resource, torch\n"
        "from batchcam.devices import keep_freed_memory\n"
        "def resident():\n"
        "    with open('/proc/self/statm') as file:\n"
        "        return int(file.read().split()[1]) * resource.getpagesize()\n"
        "print(keep_freed_memory())\n"
        "before = resident()\n"
        "blocks = [torch.ones(16 << 20, dtype=torch.uint8) for _ in range(16)]\n"
        "del blocks\n"
        "print((resident() - before) >> 20)\n"
    )
    environment = {**os.environ, **variables}
    ended = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    kept, resident = ended.stdout.split()
    assert kept == str(not variables)
    return int(resident)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_memory_that_is_freed_is_kept_unless_the_environment_says_otherwise() -> None:
    assert _resident_after_freeing({}) > 200
    assert _resident_after_freeing({"MALLOC_TRIM_THRESHOLD_": "131072"}) < 100


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_kept_memory_is_returned_when_it_is_asked_for() -> None:
    """Allocates in a thread, as a trial does, blocks larger and smaller than a thread's heap."""
    program = (
        "import resource, threading, torch\n"
        "from batchcam.devices import keep_freed_memory, release_memory\n"
        "def resident():\n"
        "    with open('/proc/self/statm') as file:\n"
        "        return int(file.read().split()[1]) * resource.getpagesize() >> 20\n"
        "def work():\n"
        "    for size, count in ((128 << 20, 3), (1 << 20, 300), (16 << 10, 9000)):\n"
        "        blocks = [torch.ones(size, dtype=torch.uint8) for _ in range(count)]\n"
        "keep_freed_memory()\n"
        "before = resident()\n"
        "for _ in range(2):\n"
        "    thread = threading.Thread(target=work)\n"
        "    thread.start()\n"
        "    thread.join()\n"
        "kept = resident() - before\n"
        "release_memory()\n"
        "print(kept, resident() - before)\n"
    )
    variables = {"MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"}
    environment = {name: value for name, value in os.environ.items() if name not in variables}
    ended = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    kept, returned = map(int, ended.stdout.split())
    assert kept > 400
    assert returned < 150  # The ends of the heaps of two threads stay, 64 MiB each.


def test_code_that_an_earlier_run_compiled_is_compiled_again() -> None:
    compilations = []

    def backend(module: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        compilations.append(module)
        return module

    compiled = torch.compile(lambda x: x + 1, backend=backend)
    for _ in range(2):
        compiled(torch.zeros(2))
    assert len(compilations) == 1
    release_memory()
    compiled(torch.zeros(2))
    assert len(compilations) == 2


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        torch.AcceleratorError("CUDA error: out of memory"),
        MemoryError(),
        OSError(12, "Cannot allocate memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("MPS backend out of memory (MPS allocated: 18.00 GB)"),
    ],
    ids=lambda error: str(error)[:40],
)
def test_every_failed_allocation_is_out_of_memory(error: Exception) -> None:
    assert is_out_of_memory(error)
    wrapped = RuntimeError("backend='inductor' raised:")
    wrapped.__cause__ = error
    assert is_out_of_memory(wrapped)


def test_the_cpus_allocator_is_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        ValueError("the buffer is out of memory order"),
        OSError(28, "No space left on device"),
    ],
    ids=str,
)
def test_other_errors_are_not_out_of_memory(error: Exception) -> None:
    assert not is_out_of_memory(error)


@no_cuda
def test_cuda_that_cannot_be_used_has_a_reason() -> None:
    reason = cuda_error()
    assert reason is not None
    assert "NVIDIA driver" in reason or "not compiled with CUDA" in reason


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA")
def test_cuda_that_computes_has_no_error() -> None:
    assert cuda_error() is None


def test_full_device_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "ones", fail)
    assert cuda_error() is None


MODULES = (
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.82.01  Wed Oct 27 21:21:55 UTC 2021\n",
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  470.82.01  Release Build\n",
)


@pytest.mark.parametrize("text", MODULES)
@pytest.mark.parametrize("fails", [False, True], ids=["no nvidia-smi", "nvidia-smi fails"])
def test_driver_is_known_without_nvidia_smi(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, fails: bool
) -> None:
    if fails:
        _write_nvidia_smi(tmp_path, "echo NVIDIA-SMI 1.2.3 has failed; exit 9")
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "version").write_text(text + "GCC version:  gcc version 9.3.0\n")
    monkeypatch.setattr(devices, "_DRIVER_FILE", tmp_path / "version")
    assert nvidia_driver() == "470.82.01"
    expected = f"NVIDIA driver 470.82.01, PyTorch {torch.__version__} with torch.version.cuda="
    assert describe_cuda() == f"{expected}{torch.version.cuda}"


def test_driver_is_asked_of_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write_nvidia_smi(tmp_path, "echo 535.54; echo 535.54")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert nvidia_driver() == "535.54"


def test_missing_driver_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(devices, "_DRIVER_FILE", tmp_path / "gone")
    assert nvidia_driver() is None
    assert describe_cuda().startswith("no NVIDIA driver found, PyTorch ")


def _write_nvidia_smi(folder: Path, commands: str) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{commands}\n")
    program.chmod(0o755)
