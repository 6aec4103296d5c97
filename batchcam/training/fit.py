"""Training: one configuration in, a trained model and its history out.

:func:`fit` is the whole interface. It hands metrics and state of each epoch to `on_epoch`; what
happens to them is up to the caller.
"""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from batchcam.config import EXTRA_TERMS, TrialConfig
from batchcam.data.prepared import PreparedData, prepare
from batchcam.data.preprocessing import Preprocess, batches
from batchcam.devices import keep_freed_memory, resolve_device
from batchcam.errors import ConfigError, DivergedError, check_format
from batchcam.losses import ExtraTerms, TermContext, build_terms, check_masks, used_terms
from batchcam.models import (
    ExplainableModel,
    check_explainable,
    create_model,
    feature_grid,
    resolve_output_stride,
)
from batchcam.training.evaluate import Evaluation, Evaluator
from batchcam.training.recording import RecordedGradients
from batchcam.training.step import TrainingStep, records_steps

Metrics = dict[str, float]

_PLACES = ("device", "data_root", "cuda_graphs")
"""Fields that a resumed run may change: where it runs and how, not what it computes."""

STATE_FORMAT = 1
"""The newest format of a saved state that this version reads, and the one that it writes."""


@dataclass(frozen=True)
class EpochReport:
    """The state of a run after an epoch.

    Attributes:
        epoch: epochs finished, counted from 1.
        metrics: flat and numeric: `epoch`; `loss` and its terms `loss_<name>` (means over the
            epoch, before weighting; names are those of :data:`batchcam.losses.TERMS`);
            `val_accuracy`, `cam_ssim`, `cam_ssim_sample`, `cam_ssim_ceiling`;
            `images_per_second` (training without evaluation) and `seconds` (the whole epoch).
        evaluation: of the validation split.
        prototypes_PRR: the validation prototypes that its CAMs were compared with, on the CPU.
        save_state: writes the state that `fit(..., state=path)` resumes from.
    """

    epoch: int
    metrics: Metrics
    evaluation: Evaluation
    prototypes_PRR: Tensor
    save_state: Callable[[Path], None]


@dataclass(frozen=True)
class Hardware:
    """The kind of device that trained a run ("cpu", "cuda" or "mps"), and PyTorch's threads."""

    device: str
    threads: int


@dataclass(frozen=True)
class TrialResult:
    """A finished run: the model after its last epoch, and the metrics of every epoch.

    Attributes:
        config: the run.
        model: the trained model, in `eval` mode.
        prepared: data and prototypes.
        preprocess: maps uint8 images to the model's input.
        grid: rows and columns of the CAM grid.
        history: the metrics of every epoch.
        evaluation: of the validation split, after the last epoch.
        hardware: where the last epoch was trained; on a CPU, results depend on its threads.
        extra_terms: the user's own loss terms, with their weights.
    """

    config: TrialConfig
    model: ExplainableModel
    prepared: PreparedData
    preprocess: Preprocess
    grid: tuple[int, int]
    history: list[Metrics]
    evaluation: Evaluation
    hardware: Hardware
    extra_terms: ExtraTerms = field(default=())

    @property
    def metrics(self) -> Metrics:
        """The metrics of the last epoch."""
        return self.history[-1]

    @property
    def evaluator(self) -> Evaluator:
        """What evaluates the model as it was evaluated in training: explainer and precision."""
        return Evaluator(self.model, self.preprocess, self.config.cam, self.config.precision)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device


def fit(
    config: TrialConfig,
    on_epoch: Callable[[EpochReport], bool | None] | None = None,
    *,
    prepared: PreparedData | None = None,
    terms: ExtraTerms = (),
    state: Path | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> TrialResult:
    """Train a model as `config` says, and evaluate it on the validation split after each epoch.

    On one kind of CPU and with one number of threads, the result is a function of the configuration
    (and of `terms`) alone, to the last bit, also if a run is interrupted and resumes from a saved
    state. The global random state is left unchanged.

    Args:
        config: the run.
        on_epoch: called after each epoch; returning True ends training there.
        prepared: data and prototypes, if they are loaded already; see
            :func:`batchcam.data.prepared.prepare`.
        terms: loss terms of your own, each with its weight > 0, summed after those of `config`.
        state: a file that `EpochReport.save_state` wrote, to resume from.
        on_step: called after each step with the steps done in this epoch and its total.

    Raises:
        BatchCamError: the data, the backbone, the device or the saved state cannot be used, or the
            loss is no longer finite.

    Example:
        >>> from batchcam import TrialConfig, fit
        >>> result = fit(TrialConfig(dataset="digits", resolution=14, epochs=1, device="cpu"))
        >>> result.metrics["val_accuracy"] > 0.5
        True
    """
    prepared = prepared or prepare(config)
    device = resolve_device(config.device)
    with _own_random_state(device):
        torch.manual_seed(config.seed)
        trainer = Trainer(config, prepared, device, terms)
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
                trainer.validation.prototypes_PRR.cpu(),
                trainer.save_state,
            )
            if on_epoch is not None and on_epoch(report):
                break
    assert evaluation is not None
    return trainer.result(evaluation)


def restore(
    config: TrialConfig,
    state: Path,
    *,
    prepared: PreparedData | None = None,
    terms: ExtraTerms = (),
) -> TrialResult:
    """Return the run that a saved state holds, without training further.

    Raises:
        ConfigError: the state cannot be read, or belongs to another configuration.
    """
    prepared = prepared or prepare(config)
    device = resolve_device(config.device)
    with _own_random_state(device):
        trainer = Trainer(config, prepared, device, terms)
        trainer.load_state(state)
        return trainer.result(trainer.validate())


def _own_random_state(device: torch.device) -> AbstractContextManager[None]:
    """Return a context that restores the global random state at its end."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


class Trainer:
    """The state of a run between its epochs, which :func:`fit` advances.

    Attributes:
        config: the run.
        epoch: epochs finished.
        history: the metrics of every epoch finished.
        preprocess: maps uint8 images to the model's input.
        train: the training split, on the device.
        validation: the validation split, on the device.
        grid: rows and columns of the CAM grid.
        context: what the loss terms were built from.
        step: the training step.
        model: in training.
        gradients: replaces the model's gradients by those of training images, given by their
            indices, int64 `(N,)`; returns the losses by `step.loss_names`.
    """

    def __init__(
        self,
        config: TrialConfig,
        prepared: PreparedData,
        device: torch.device,
        terms: ExtraTerms = (),
    ) -> None:
        if device.type == "cpu":
            keep_freed_memory()
        dataset, resolution = prepared.dataset, config.resolution
        self.config = config
        self.epoch = 0
        self.history: list[Metrics] = []
        self.preprocess = Preprocess(resolution, dataset.mean, dataset.std)
        specs = [spec for spec, _ in used_terms(config, terms)]
        check_masks(specs, dataset)
        with_masks = any(spec.uses_masks for spec in specs)
        self.train = prepared.split("train", resolution, device, with_masks=with_masks)
        self.validation = prepared.split("validation", resolution, device)
        self._prepared = prepared
        self._device = device
        self._hardware = Hardware(device.type, torch.get_num_threads())
        self._extra_terms = tuple(terms)

        stride = resolve_output_stride(
            config.backbone, resolution, dataset.channels, config.output_stride
        )
        self.grid = feature_grid(config.backbone, resolution, dataset.channels, stride)
        model = create_model(
            config.backbone, dataset.num_classes, dataset.channels, stride, config.pretrained
        )
        check_explainable(model, resolution, dataset.channels)
        self._steps = -(-len(self.train) // config.batch_size)
        self.context = TermContext(config, prepared, self.grid, device, self.train.prototypes_PRR)
        built = build_terms(self.context, terms)
        total_steps = config.epochs * self._steps
        self.step = TrainingStep(model, built, config, total_steps, device)
        self.model = self.step.model
        self.gradients: Callable[[Tensor], Tensor] = self._batch_gradients
        if records_steps(config, device):
            self.gradients = RecordedGradients(self._batch_gradients, self.model.parameters())

    def run_epoch(self, on_step: Callable[[int, int], None] | None) -> Evaluation:
        """Train for one epoch, validate, and append the metrics to the history."""
        started = time.perf_counter()
        self._hardware = Hardware(self._device.type, torch.get_num_threads())
        means = self._train_epoch(on_step)
        trained = time.perf_counter() - started
        losses = {name: value.item() for name, value in means.items()}
        self._refuse_divergence(losses)
        evaluation = self.validate()
        # The loss of the last step is that of the weights before the step. What the step did to
        # the weights shows only here.
        self._refuse_divergence({"cam_ssim": evaluation.cam_ssim})
        # Computed after the first epoch, not before the first step, which it would delay.
        ceiling = self._prepared.ceiling(self.config.resolution, self.grid)
        self.epoch += 1
        self.history.append(
            {
                "epoch": self.epoch,
                **losses,
                "val_accuracy": evaluation.accuracy,
                "cam_ssim": evaluation.cam_ssim,
                "cam_ssim_sample": evaluation.cam_ssim_sample,
                "cam_ssim_ceiling": ceiling.mean().item(),
                "images_per_second": len(self.train) / trained,
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
        count = len(self.train)
        # Depends on the epoch alone, so that a resumed run draws the batches it would have drawn.
        generator = torch.Generator().manual_seed(
            (self.config.seed * 1_000_003 + self.epoch) % 2**63
        )
        order = torch.randperm(count, generator=generator).to(self._device)
        sums_L: Tensor | None = None
        self.model.train()
        for number, (chosen_N,) in enumerate(batches((order,), self.config.batch_size), start=1):
            losses_L = self.gradients(chosen_N) * len(chosen_N)
            self.step.advance()
            sums_L = losses_L if sums_L is None else sums_L + losses_L
            if on_step is not None:
                on_step(number, self._steps)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        assert sums_L is not None
        return dict(zip(self.step.loss_names, (sums_L / count).cpu(), strict=True))

    def _batch_gradients(self, chosen_N: Tensor) -> Tensor:
        split = self.train
        losses = self.step.gradients(
            self.preprocess(split.images_NCHW[chosen_N]),
            split.labels_N[chosen_N],
            split.prototype_index_N[chosen_N],
            None if split.masks_NRR is None else split.masks_NRR[chosen_N],
        )
        return torch.stack([losses[name] for name in self.step.loss_names])

    def validate(self) -> Evaluation:
        """Evaluate on the validation split; no weight is updated."""
        config = self.config
        evaluator = Evaluator(self.model, self.preprocess, config.cam, config.precision)
        return evaluator.evaluate(self.validation)

    def result(self, evaluation: Evaluation) -> TrialResult:
        """Return the run as it is now."""
        return TrialResult(
            config=self.config,
            model=self.model.eval(),
            prepared=self._prepared,
            preprocess=self.preprocess,
            grid=self.grid,
            history=self.history,
            evaluation=evaluation,
            hardware=self._hardware,
            extra_terms=self._extra_terms,
        )

    def save_state(self, path: Path) -> None:
        """Write everything that the next epoch depends on; readable without unpickling code."""
        state = {
            "format": STATE_FORMAT,
            "config": self.config.as_dict(),
            EXTRA_TERMS: self._extra_weights(),
            "epoch": self.epoch,
            "history": self.history,
            "hardware": asdict(self._hardware),
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
        """Resume from a file that :meth:`save_state` wrote for the same configuration."""
        state = load_state(path)
        mine = {**self.config.as_dict(), EXTRA_TERMS: self._extra_weights()}
        # A field that is newer than the state had its default then.
        saved = {
            **TrialConfig().as_dict(),
            **state["config"],
            EXTRA_TERMS: state.get(EXTRA_TERMS, {}),
        }
        differing = [
            name for name, value in mine.items() if name not in _PLACES and saved[name] != value
        ]
        if differing:
            name = differing[0]
            raise ConfigError(
                f"{path} was saved with {name}={saved[name]!r}, not {mine[name]!r}; "
                "resume with the same configuration, or start again without the saved state."
            )
        self.epoch = state["epoch"]
        self.history = state["history"]
        if "hardware" in state:  # Older states lack it.
            self._hardware = Hardware(**state["hardware"])
        self.step.load_state_dict(state)
        torch.set_rng_state(state["rng"].cpu())
        if self._device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"].cpu(), self._device)

    def _extra_weights(self) -> dict[str, float]:
        return {spec.name: float(weight) for spec, weight in self._extra_terms}


def load_state(path: Path) -> dict[str, Any]:
    """Read a saved state: tensors and plain values, nothing that runs.

    Raises:
        ConfigError: the file is missing, damaged, or not a saved state.
        FormatError: a newer version wrote the file.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # Damaged archives raise whatever their first bad byte leads to.
        raise ConfigError(
            f"{path} cannot be read as a saved state ({type(error).__name__}); start again "
            "without it."
        ) from error
    if not isinstance(state, dict) or "optimizer" not in state:
        raise ConfigError(f"{path} is not a saved state of a run; start again without it.")
    check_format(path, state.get("format"), STATE_FORMAT)
    return state
