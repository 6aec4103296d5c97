"""The device of a trial, which follows from the resources that Ray gives to the trial."""

import platform

import ray
import torch

from batchcam.config import TrialConfig
from batchcam.devices import autocast, cuda_error, describe_cuda
from batchcam.errors import ConfigError


def trial_device(config: TrialConfig, gpus: float) -> str:
    """Return the device on which a trial trains and is evaluated.

    A trial without GPUs must name the CPU: Ray does not hide a node's GPUs from it.

    Args:
        config: the configuration of a trial. Its device, unless "auto", is kept.
        gpus: GPUs of the trial; fractions share a device.

    Raises:
        ConfigError: the configuration has a device or a precision that contradicts the GPUs.
    """
    if config.device == "auto":
        device = "cuda" if gpus else "cpu"
    else:
        device = config.device
        if device.startswith("cuda") != bool(gpus):
            raise ConfigError(
                f"device={device!r} contradicts the {gpus:g} GPUs of a trial; use device=auto, or "
                f"{'--gpus-per-trial 0' if gpus else '--gpus-per-trial above 0'}."
            )
    if not gpus:
        autocast(torch.device(device), config.precision)  # Refuses fp16 on a CPU.
    return device


def check_device(device: str) -> None:
    """Check that PyTorch can use the GPU that Ray gave to this process, if `device` is CUDA.

    Raises:
        ConfigError: it cannot; the message names the GPU, the versions and the remedies.
    """
    if not device.startswith("cuda"):
        return
    reason = cuda_error()
    if reason is None:
        return
    ids = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
    raise ConfigError(
        f"Ray gave GPU {', '.join(ids) or 'none'} of node {platform.node()} to a trial, but "
        f"PyTorch cannot use it: {reason.rstrip('.')} ({describe_cuda()}). Install a PyTorch wheel "
        "for that driver, or a newer driver, on this node; or train on CPUs with "
        "--gpus-per-trial 0."
    )
