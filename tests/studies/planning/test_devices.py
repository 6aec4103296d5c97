"""Check that trials run on the device that their resources give them, or say why they cannot."""

from pathlib import Path

import pytest
import ray
import torch

from batchcam.config import TrialConfig
from batchcam.errors import ConfigError
from studies.planning.devices import check_device, trial_device
from studies.planning.ray_cluster import errors_of_tasks


@pytest.mark.parametrize(
    ("device", "gpus", "expected"),
    [
        ("auto", 0.0, "cpu"),
        ("auto", 0.25, "cuda"),
        ("cpu", 0.0, "cpu"),
        ("mps", 0.0, "mps"),
        ("cuda:0", 1.0, "cuda:0"),
    ],
)
def test_device_follows_from_the_gpus_unless_it_is_given(
    device: str, gpus: float, expected: str
) -> None:
    assert trial_device(TrialConfig(device=device), gpus) == expected


@pytest.mark.parametrize(
    ("config", "gpus", "message"),
    [
        (TrialConfig(device="cpu"), 0.5, "'cpu' contradicts the 0.5 GPUs .* --gpus-per-trial 0"),
        (TrialConfig(device="cuda"), 0.0, "'cuda' contradicts the 0 GPUs .* above 0"),
        (TrialConfig(precision="fp16"), 0.0, "fp16.* needs CUDA"),
    ],
)
def test_contradictions_are_refused(config: TrialConfig, gpus: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        trial_device(config, gpus)


def test_half_precision_is_for_gpus() -> None:
    assert trial_device(TrialConfig(precision="fp16"), 1.0) == "cuda"


def test_cpu_needs_no_check() -> None:
    check_device("cpu")


@pytest.mark.xdist_group("ray")
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_gpu_that_ray_gave_and_pytorch_cannot_use_is_named_with_driver_wheel_and_remedies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 470.82.01\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    ray.init(address="local", num_cpus=1, num_gpus=3, include_dashboard=False, log_to_driver=False)
    try:
        task = ray.remote(num_gpus=1)(check_device)
        with pytest.raises(ConfigError) as raised, errors_of_tasks():
            ray.get(task.remote("cuda"))
        message = str(raised.value)
        assert message.startswith("Ray gave GPU 0 of node ")
        assert "NVIDIA driver 470.82.01, " in message
        assert f"torch.version.cuda={torch.version.cuda}" in message
        assert message.endswith("or train on CPUs with --gpus-per-trial 0.")
    finally:
        ray.shutdown()
