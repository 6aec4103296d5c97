"""Training: one configuration in, a trained model and its history out.

`fit` is the whole interface. What happens to the metrics and the state of each epoch is the
caller's affair: they are handed out through `on_epoch`.
"""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from batchcam.config import TrialConfig
from batchcam.data.prepared import PreparedData, prepare
from batchcam.data.preprocessing import Preprocess, batches, to_device
from batchcam.devices import keep_freed_memory, resolve_device
from batchcam.errors import ConfigError, DivergedError
from batchcam.models import (
    ExplainableModel,
    check_explainable,
    create_model,
    feature_grid,
    resolve_output_stride,
)
from batchcam.training.evaluate import Evaluation, evaluate
from batchcam.training.step import TrainingStep

Metrics = dict[str, float]


@dataclass(frozen=True)
class EpochReport:
    """What is known after an epoch.

    Attributes:
        epoch: epochs finished, counted from 1.
        metrics: flat and numeric; `epoch`, `loss` and its terms `loss_class`, `loss_proto`,
            `loss_batch`, `loss_energy`, `loss_exchange` (means over the epoch, before weighting),
            `val_accuracy`, `cam_ssim`, `cam_ssim_sample`, `cam_ssim_ceiling`, `images_per_second`
            (training proper, evaluation excluded) and `seconds` (the whole epoch).
        evaluation: of the validation split.
        prototypes_PRR: the validation prototypes it was compared with.
        save_state: writes the state that `fit(..., state=path)` goes on from.
    """

    epoch: int
    metrics: Metrics
    evaluation: Evaluation
    prototypes_PRR: Tensor
    save_state: Callable[[Path], None]


@dataclass(frozen=True)
class TrialResult:
    """A finished run: the model after its last epoch, and the metrics of every epoch."""

    config: TrialConfig
    model: ExplainableModel
    prepared: PreparedData
    preprocess: Preprocess
    grid: tuple[int, int]
    history: list[Metrics]
    evaluation: Evaluation

    @property
    def metrics(self) -> Metrics:
        """The metrics of the last epoch."""
        return self.history[-1]


def fit(
    config: TrialConfig,
    on_epoch: Callable[[EpochReport], bool | None] | None = None,
    *,
    prepared: PreparedData | None = None,
    state: Path | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> TrialResult:
    """Train a model as `config` says, and evaluate it on the validation split after each epoch.

    On one kind of CPU, with one number of threads, the outcome is a function of the configuration
    alone, to the last bit, and stays so when a run is cut and goes on from a saved state. The
    global random state is left as it was.

    Args:
        config: the run.
        on_epoch: called after each epoch; returning True ends training there.
        prepared: data and prototypes, if they are loaded already; see
            :func:`batchcam.data.prepared.prepare`.
        state: a file that `EpochReport.save_state` wrote, to go on from.
        on_step: called after each step with the steps done in this epoch and its total.

    Raises:
        BatchCamError: the data, the backbone, the device or the saved state cannot be used, or the
            loss is no longer finite.
    """
    prepared = prepared or prepare(config)
    device = resolve_device(config.device)
    with _own_random_state(device):
        torch.manual_seed(config.seed)
        trainer = Trainer(config, prepared, device)
        evaluation: Evaluation | None = None
        if state is not None:
            trainer.load_state(state)
            if trainer.epoch >= config.epochs:
                evaluation = trainer.validate()
        while trainer.epoch < config.epochs:
            evaluation = trainer.run_epoch(on_step)
            report = EpochReport(
                trainer.epoch,
                trainer.history[-1],
                evaluation,
                trainer.validation_prototypes.cpu(),
                trainer.save_state,
            )
            if on_epoch is not None and on_epoch(report):
                break
    assert evaluation is not None
    return trainer.result(evaluation)


def restore(
    config: TrialConfig, state: Path, *, prepared: PreparedData | None = None
) -> TrialResult:
    """Return the run that a saved state holds, as it stood then, without training further.

    Raises:
        ConfigError: the state cannot be read, or belongs to another configuration.
    """
    prepared = prepared or prepare(config)
    device = resolve_device(config.device)
    with _own_random_state(device):
        trainer = Trainer(config, prepared, device)
        trainer.load_state(state)
        return trainer.result(trainer.validate())


def _own_random_state(device: torch.device) -> AbstractContextManager[None]:
    """Return a context at whose end the global random state is what it was before."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


class Trainer:
    """The state of a run between its epochs: what :func:`fit` goes through them with."""

    def __init__(self, config: TrialConfig, prepared: PreparedData, device: torch.device) -> None:
        if device.type == "cpu":
            keep_freed_memory()
        data = prepared.dataset
        self.config = config
        self._prepared = prepared
        self.epoch = 0
        self.history: list[Metrics] = []
        self._device = device
        self.preprocess = Preprocess(config.resolution, data.mean, data.std)
        self._train = (*to_device(data.train, device), prepared.prototype_index("train").to(device))
        self._validation = to_device(data.validation, device)
        self._validation_groups = prepared.prototype_index("validation").to(device)
        self.validation_prototypes = prepared.prototypes("validation", config.resolution).to(device)

        stride = resolve_output_stride(
            config.backbone, config.resolution, data.channels, config.output_stride
        )
        self.grid = feature_grid(config.backbone, config.resolution, data.channels, stride)
        model = create_model(
            config.backbone, data.num_classes, data.channels, stride, config.pretrained
        )
        check_explainable(model, config.resolution, data.channels)
        self._steps = -(-len(data.train) // config.batch_size)
        prototypes = prepared.prototypes("train", config.resolution).to(device)
        size = (config.resolution, config.resolution)
        self.step = TrainingStep(
            model,
            prototypes,
            config,
            config.epochs * self._steps,
            device,
            off_support_CHW=prepared.off_support_mask(self.grid).to(device)
            if config.lambda_energy
            else None,
            off_support_CRR=prepared.off_support_mask(size).to(device)
            if config.lambda_exchange
            else None,
        )
        self.model = self.step.model

    def run_epoch(self, on_step: Callable[[int, int], None] | None) -> Evaluation:
        """Train for one epoch, validate, and append the metrics to the history."""
        started = time.perf_counter()
        means = self._train_epoch(on_step)
        trained = time.perf_counter() - started
        losses = {name: value.item() for name, value in means.items()}
        self._refuse_divergence(losses)
        evaluation = self.validate()
        # What the last step did shows only here: its own loss was that of the weights before it.
        self._refuse_divergence({"cam_ssim": evaluation.cam_ssim})
        ceiling = self._prepared.ceiling(self.config.resolution, self.grid)  # Sought for once.
        self.epoch += 1
        self.history.append(
            {
                "epoch": self.epoch,
                **losses,
                "val_accuracy": evaluation.accuracy,
                "cam_ssim": evaluation.cam_ssim,
                "cam_ssim_sample": evaluation.cam_ssim_sample,
                "cam_ssim_ceiling": ceiling.mean().item(),
                "images_per_second": len(self._train[1]) / trained,
                "seconds": time.perf_counter() - started,
            }
        )
        return evaluation

    def _refuse_divergence(self, values: Metrics) -> None:
        if not all(math.isfinite(value) for value in values.values()):
            shown = ", ".join(f"{name} {value:.3g}" for name, value in values.items())
            raise DivergedError(
                f"training diverged in epoch {self.epoch + 1} ({shown}); lower learning_rate "
                f"(now {self.config.learning_rate:g}) or the lambdas."
            )

    def _train_epoch(self, on_step: Callable[[int, int], None] | None) -> dict[str, Tensor]:
        count = len(self._train[0])
        # Of the epoch alone, so that a resumed run sees the batches that it would have seen.
        generator = torch.Generator().manual_seed(
            (self.config.seed * 1_000_003 + self.epoch) % 2**63
        )
        order = torch.randperm(count, generator=generator).to(self._device)
        sums: dict[str, Tensor] = {}
        self.model.train()
        for number, (images, labels, groups) in enumerate(
            batches(self._train, self.config.batch_size, order), start=1
        ):
            for name, value in self.step(self.preprocess(images), labels, groups).items():
                sums[name] = sums.get(name, torch.zeros_like(value)) + value * len(labels)
            if on_step is not None:
                on_step(number, self._steps)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return {name: (value / count).cpu() for name, value in sums.items()}

    def validate(self) -> Evaluation:
        """Evaluate on the validation split; CAMs take gradients, weights take no step."""
        return evaluate(
            self.model,
            *self._validation,
            self.validation_prototypes,
            self.preprocess,
            prototype_index=self._validation_groups,
            cam=self.config.cam,
            precision=self.config.precision,
        )

    def result(self, evaluation: Evaluation) -> TrialResult:
        """Return the run as it stands."""
        return TrialResult(
            config=self.config,
            model=self.model.eval(),
            prepared=self._prepared,
            preprocess=self.preprocess,
            grid=self.grid,
            history=self.history,
            evaluation=evaluation,
        )

    def save_state(self, path: Path) -> None:
        """Write all that the next epoch depends on; readable without unpickling code."""
        state = {
            "config": self.config.as_dict(),
            "epoch": self.epoch,
            "history": self.history,
            **self.step.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": (
                torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None
            ),
        }
        partial_path = path.with_suffix(".partial")
        torch.save(state, partial_path)
        partial_path.replace(path)

    def load_state(self, path: Path) -> None:
        """Go on from a file that :meth:`save_state` wrote for the same configuration."""
        state = load_state(path)
        mine = self.config.as_dict()
        # A field that is newer than the state had its default then.
        saved = TrialConfig().as_dict() | state["config"]
        differing = [
            name
            for name, value in mine.items()
            if name not in ("device", "data_root") and saved[name] != value
        ]
        if differing:
            name = differing[0]
            raise ConfigError(
                f"{path} was saved with {name}={saved[name]!r}, not {mine[name]!r}; "
                "go on with the same configuration, or start anew without the saved state."
            )
        self.epoch = state["epoch"]
        self.history = state["history"]
        self.step.load_state_dict(state)
        torch.set_rng_state(state["rng"].cpu())
        if self._device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"].cpu(), self._device)


def load_state(path: Path) -> dict[str, Any]:
    """Read a saved state: tensors and plain values, nothing that runs.

    Raises:
        ConfigError: the file is missing, damaged, or no saved state.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # Damaged archives raise whatever their first bad byte leads to.
        raise ConfigError(
            f"{path} cannot be read as a saved state ({type(error).__name__}); start anew without "
            "it."
        ) from error
    if not isinstance(state, dict) or "optimizer" not in state:
        raise ConfigError(f"{path} is no saved state of a run; start anew without it.")
    return state
