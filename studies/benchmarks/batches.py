"""Random batches, and the trainer's own step on them; its cost does not depend on the images."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from batchcam.config import LAMBDAS, Precision, TrialConfig
from batchcam.data.dataset import ImageData
from batchcam.data.prepared import PreparedData
from batchcam.data.preprocessing import to_device
from batchcam.data.splits import Split
from batchcam.explainers import EXPLAINERS
from batchcam.losses import build_terms
from batchcam.training.fit import Trainer
from batchcam.training.recording import RecordedGradients
from batchcam.training.step import records_steps

CROSS_ENTROPY = "cross-entropy"
LOSSES: Mapping[str, Mapping[str, Any]] = {
    CROSS_ENTROPY: {},
    **{
        f"{name}, {metric.upper()}": {weight: 0.1, "metric": metric}
        for name, weight in {"BCPL": "lambda_batch", "Prototype Loss": "lambda_proto"}.items()
        for metric in ("l1", "l2", "ssim")
    },
}
"""The seven training conditions of the paper (Section 3.5), as fields of TrialConfig."""
EXTENSIONS: Mapping[str, Mapping[str, Any]] = {
    **{name: LOSSES[name] for name in (CROSS_ENTROPY, "BCPL, L1")},
    "BCPL, L1, HiResCAM": {"lambda_batch": 0.1, "cam": "hires_cam"},
    "prototype energy": {"lambda_energy": 1.0},
    "prototype exchange": {"lambda_exchange": 1.0},
}
"""Losses that the paper does not have, beside two that it has."""


def random_data(images: int, num_classes: int, side: int, seed: int = 0) -> PreparedData:
    """Return grey noise of `side` pixels square, with equally frequent classes."""
    generator = np.random.default_rng(seed)

    def split(count: int) -> Split:
        pixels = generator.integers(0, 256, (count, 1, side, side), dtype=np.uint8)
        return Split(pixels, generator.permutation(np.arange(count) % num_classes))

    names = tuple(str(label) for label in range(num_classes))
    data = ImageData("noise", names, (0.5,), (0.29,), split(images), split(8), split(8), "")
    prototypes = torch.from_numpy(generator.random((num_classes, side, side), dtype=np.float32))
    return PreparedData(data, prototypes, prototypes)


@dataclass(frozen=True)
class Bench:
    """A trainer and one batch. All losses train the same model: nothing else differs."""

    trainer: Trainer
    images: Tensor
    labels: Tensor
    device: torch.device

    @classmethod
    def build(cls, config: TrialConfig, device: torch.device, num_classes: int = 10) -> "Bench":
        """Return a bench of `config`'s model, batch size, precision and compilation."""
        count = max(config.batch_size, num_classes)  # Supports need images of every class.
        prepared = random_data(count, num_classes, config.resolution, config.seed)
        torch.manual_seed(config.seed)
        trainer = Trainer(config, prepared, device)
        trainer.model.train()
        images, labels = to_device(prepared.dataset.train, device)
        batch = slice(config.batch_size)
        return cls(trainer, images[batch], labels[batch], device)

    def step(self, loss: Mapping[str, Any]) -> Callable[[], None]:
        """Return a function that trains on the batch once, as `batchcam.fit` does.

        Args:
            loss: fields of TrialConfig, such as the values of :data:`LOSSES`; weights that are
                not named are 0, but for the cross-entropy's.
        """
        off = dict.fromkeys(LAMBDAS, 0.0) | {"lambda_class": 1.0}
        config = replace(self.trainer.config, **{**off, **loss})
        terms = build_terms(replace(self.trainer.context, config=config))
        explainer = EXPLAINERS[config.cam]

        step = self.trainer.step

        def gradients(_: Tensor) -> Tensor:
            step.terms = terms
            step.explainer = explainer
            losses = step.gradients(self.trainer.preprocess(self.images), self.labels)
            return torch.stack(list(losses.values()))

        compute: Callable[[Tensor], Tensor] = gradients
        if records_steps(config, self.device):
            compute = RecordedGradients(gradients, self.trainer.model.parameters())

        def run() -> None:
            compute(self.labels)
            step.advance()

        return run


def config(
    backbone: str,
    batch_size: int,
    *,
    compiled: bool = False,
    recorded: bool = False,
    precision: Precision = "fp32",
) -> TrialConfig:
    """Return the configuration of a bench at 28x28 pixels, with a learning rate near 0."""
    return TrialConfig(
        backbone=backbone,
        batch_size=batch_size,
        compile=compiled,
        cuda_graphs=recorded,
        precision=precision,
        schedule="constant",
        learning_rate=1e-6,
    )


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Return the peak memory of tensors during `run`, in bytes, above the memory before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    for _ in range(2):  # The first recording lacks the release of tensors from before: gradients.
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            run()
    results = recorded.profiler.kineto_results
    changes = [event for event in results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    held = np.cumsum([event.nbytes() for event in changes])
    return int(held.max(initial=0))
