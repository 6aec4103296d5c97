"""Devices and precisions: found where there, refused by name where not."""

import pytest
import torch

from batchcam.devices import autocast, resolve_device
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
    with pytest.raises(ConfigError, match=f"device='{name}' is not there.*0 CUDA.*auto or cpu"):
        resolve_device(name)


def test_a_cuda_device_beyond_the_last_is_refused() -> None:
    with pytest.raises(ConfigError, match="device='cuda:99' is not there: this machine has"):
        resolve_device("cuda:99")


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has MPS")
def test_mps_is_refused_where_there_is_none() -> None:
    with pytest.raises(ConfigError, match="device='mps' is not there; use auto or cpu"):
        resolve_device("mps")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", ""])
def test_what_is_no_device_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"device='{name}' is no device; use auto, cpu, cuda"):
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
