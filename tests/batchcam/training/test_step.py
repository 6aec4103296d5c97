"""Tests of one training step: its losses, its learning rate, and no waiting for the GPU."""

from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from pytorch_msssim import SSIM
from torch import Tensor, nn

from batchcam.config import Metric, Optimizer, TrialConfig
from batchcam.data.prepared import PreparedData
from batchcam.data.preprocessing import to_device
from batchcam.devices import prefers_channels_last
from batchcam.models import create_model, resolve_output_stride
from batchcam.training.fit import Trainer
from batchcam.training.step import make_optimizer, make_schedule

# --- Losses equal those of a plain implementation ---------------------------------------------


def _plain_simple_cnn(weights: dict[str, Tensor]) -> tuple[nn.Module, nn.Module]:
    """Return SimpleCNN's features and head as plain layers, in the order of its docstring."""
    features = nn.Sequential()
    for inside, outside in ((1, 32), (32, 32), (0, 0), (32, 64), (64, 64)):
        if inside == 0:
            features.append(nn.MaxPool2d(2))
            continue
        features.append(nn.Conv2d(inside, outside, 3, padding=1, bias=False))
        features.extend([nn.BatchNorm2d(outside), nn.ReLU()])
    head = nn.Sequential(nn.AdaptiveAvgPool2d(7), nn.Flatten(), nn.Linear(64 * 49, 10))
    kept = {name.removeprefix("convolutions."): weight for name, weight in weights.items()}
    names = {"weight": "2.weight", "bias": "2.bias"}
    head.load_state_dict({new: kept.pop(f"classifier.{old}") for old, new in names.items()})
    features.load_state_dict(kept)
    return features.to(memory_format=torch.contiguous_format), head


def _plain_loss(
    logits: Tensor, features: Tensor, labels: Tensor, prototypes: Tensor, config: TrialConfig
) -> Tensor:
    """Return the loss of Eqs. 11 and 12, with the maps of Eqs. 3-6 computed class by class."""
    scores = logits.gather(1, labels[:, None]).sum()
    (gradients,) = torch.autograd.grad(scores, features, create_graph=True)
    ssim = SSIM(data_range=1.0, channel=1, win_size=7, win_sigma=1.5)

    def distance(mean_features: Tensor, mean_gradients: Tensor, label: Tensor) -> Tensor:
        weights = mean_gradients.mean(dim=(1, 2))
        cam = F.relu((weights[:, None, None] * mean_features).sum(dim=0))
        size = prototypes.shape[-2:]
        cam = F.interpolate(cam[None, None], size=size, mode="bilinear", align_corners=False)
        cam = cam / (cam.max() + 1e-6)
        prototype = prototypes[label][None, None]
        if config.metric == "ssim":
            return torch.as_tensor(1 - ssim(cam, prototype))
        return (
            (cam - prototype).abs().mean() if config.metric == "l1" else F.mse_loss(cam, prototype)
        )

    proto = [distance(a, g, y) for a, g, y in zip(features, gradients, labels, strict=True)]
    batch = [
        distance(features[labels == y].mean(dim=0), gradients[labels == y].mean(dim=0), y)
        for y in torch.arange(len(prototypes))
        if (labels == y).any()
    ]
    return (
        config.lambda_class * F.cross_entropy(logits, labels)
        + config.lambda_proto * torch.stack(proto).mean()
        + config.lambda_batch * torch.stack(batch).sum()
    )


_RATE = 0.005
"""Small, because differences by rounding grow from step to step."""


@pytest.mark.parametrize("metric", ["l1", "l2", "ssim"])
@pytest.mark.parametrize("backbone", ["simple_cnn", "resnet10t", "convnextv2_atto"])
def test_losses_are_those_of_the_plainest_program(
    tiny_prepared: PreparedData, tiny_config: TrialConfig, backbone: str, metric: Metric
) -> None:
    """Cover each optimisation: memory formats, closed forms, matrix products, fused optimisers."""
    config = replace(
        tiny_config,
        backbone=backbone,
        metric=metric,
        resolution=28,
        optimizer="sgd",  # Adam would turn gradients that are rounding errors into full steps.
        learning_rate=_RATE,
        lambda_proto=0.3,
        lambda_batch=0.1,
    )
    torch.manual_seed(0)
    trainer = Trainer(config, tiny_prepared, torch.device("cpu"))
    trainer.model.train()
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    features: Any
    head: Any
    if backbone == "simple_cnn":
        features, head = _plain_simple_cnn(weights)
        parameters = [*features.parameters(), *head.parameters()]
    else:
        stride = resolve_output_stride(backbone, config.resolution)
        options: Any = {} if stride is None else {"output_stride": stride}
        plain: Any = timm.create_model(backbone, num_classes=10, in_chans=1, **options)
        plain.load_state_dict({name.removeprefix("model."): w for name, w in weights.items()})
        features, head = plain.forward_features, plain.forward_head
        parameters = list(plain.parameters())
    optimizer = torch.optim.SGD(
        parameters, lr=_RATE, momentum=0.9, nesterov=True, weight_decay=config.weight_decay
    )
    schedule = make_schedule(optimizer, config, config.epochs * 7)

    images, labels = to_device(tiny_prepared.dataset.train, torch.device("cpu"))
    prototypes = tiny_prepared.prototypes("train", 28)
    for start in range(0, 128, 32):
        batch, targets = images[start : start + 32], labels[start : start + 32]
        found = trainer.step(trainer.preprocess(batch), targets)["loss"]

        pixels = F.interpolate(batch / 255, size=(28, 28), mode="bilinear", antialias=True)
        data = tiny_prepared.dataset
        maps = features((pixels - data.mean[0]) / data.std[0])
        wanted = _plain_loss(head(maps), maps, targets, prototypes, config)
        optimizer.zero_grad()
        torch.autograd.backward(wanted)
        optimizer.step()
        schedule.step()
        assert found.item() == pytest.approx(wanted.item(), rel=2e-4), start


# --- Learning rates and devices ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "precision", "channels_last"),
    [
        ("cpu", "fp32", False),
        ("cpu", "bf16", False),
        ("cuda", "fp32", False),
        ("cuda", "bf16", True),
    ],
)
def test_tensor_cores_have_channels_last(device: str, precision: str, channels_last: bool) -> None:
    assert prefers_channels_last(torch.device(device), precision) == channels_last


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_one_cycle_rises_to_the_rate_and_falls_to_nothing(
    tiny_config: TrialConfig, optimizer: Optimizer
) -> None:
    rates = _learning_rates(replace(tiny_config, optimizer=optimizer, schedule="one_cycle"))
    peak = rates.index(max(rates))
    assert max(rates) == pytest.approx(tiny_config.learning_rate, rel=0.02)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] < 0.01 * max(rates)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_constant_rate_stays(tiny_config: TrialConfig, optimizer: Optimizer) -> None:
    config = replace(tiny_config, optimizer=optimizer, schedule="constant")
    assert set(_learning_rates(config)) == {config.learning_rate}


def _learning_rates(config: TrialConfig, steps: int = 50) -> list[float]:
    """Return the learning rate of every step of a run."""
    optimizer = make_optimizer(create_model("simple_cnn"), config)
    schedule = make_schedule(optimizer, config, config.epochs * steps)
    rates = []
    for _ in range(config.epochs * steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


SYNCHRONISING = {
    "aten::item",
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
    "aten::nonzero",
    "aten::equal",
    "aten::unique_dim",
    "aten::_unique2",
}
"""Operators that make the host wait for the GPU, for their value or for their output shape."""


@pytest.mark.parametrize("backbone", ["simple_cnn", "convnextv2_atto"])
@pytest.mark.parametrize("metric", ["l1", "ssim"])
def test_a_step_waits_for_nothing(
    tiny_prepared: PreparedData, tiny_config: TrialConfig, backbone: str, metric: Metric
) -> None:
    """Check linear and non-linear heads for operators that make the host wait for a GPU."""
    config = replace(
        tiny_config,
        backbone=backbone,
        metric=metric,
        optimizer="sgd",  # On the CPU, unlike on a GPU, AdamW reads its step counter.
        resolution=28,
        lambda_proto=0.1,
        lambda_batch=0.1,
        lambda_exchange=0.1,
    )
    trainer = Trainer(config, tiny_prepared, torch.device("cpu"))
    images, labels = to_device(tiny_prepared.dataset.train, torch.device("cpu"))
    trainer.step(trainer.preprocess(images[:32]), labels[:32])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        trainer.step(trainer.preprocess(images[:32]), labels[:32])
    ran = {event.key for event in recorded.key_averages()}
    assert "aten::convolution" in ran
    assert not ran & SYNCHRONISING


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_waits_for_nothing_on_a_gpu(
    tiny_prepared: PreparedData, tiny_config: TrialConfig, precision: str
) -> None:
    device = torch.device("cuda")
    lambdas = {"lambda_proto": 0.1, "lambda_batch": 0.1, "lambda_exchange": 0.1}
    config = replace(tiny_config, precision=precision, **lambdas)  # type: ignore[arg-type]
    trainer = Trainer(config, tiny_prepared, device)
    images, labels = to_device(tiny_prepared.dataset.train, device)
    images, labels = images[:32], labels[:32]
    trainer.step(trainer.preprocess(images), labels)
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.step(trainer.preprocess(images), labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")
