"""Record learning curves of random configurations, for `studies.benchmarks.early_stopping`.

python -m studies.benchmarks.record_curves --dataset fashion_mnist --out curves.csv.gz

Trials are trained without early stopping. The file has one row per trial and epoch, with the
trial's number, its parameters and the epoch's metrics. A trial number determines the configuration,
whatever the number of trials. Trials that are in the file are not trained again.
"""

import csv
import gzip
import io
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
import torch
import tyro

from batchcam.config import Dataset, TrialConfig
from batchcam.data.dataset import load_data
from batchcam.data.prepared import PreparedData
from batchcam.data.preprocessing import to_device
from batchcam.data.splits import Split, stratified_split
from batchcam.errors import ConfigError, DivergedError
from batchcam.prototypes import class_prototypes
from batchcam.training.fit import Metrics, fit
from studies.space import SearchSpace, feasible_strides, suggest
from studies.trial import trial_config

_PARAMETERS = (
    "metric",
    "lambda_class",
    "lambda_proto",
    "lambda_batch",
    "learning_rate",
    "weight_decay",
)
_METRICS = ("val_accuracy", "cam_ssim", "cam_ssim_ceiling", "images_per_second", "seconds")
COLUMNS = ("dataset", "number", *_PARAMETERS, "epoch", *_METRICS)
"""Columns of the CSV file."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Recording:
    """Record learning curves of random configurations."""

    out: Path
    """A .csv.gz file to which finished trials are appended."""
    dataset: Dataset = "fashion_mnist"
    trials: int = 120
    """Number of configurations, sampled at random from the studies' search space."""
    epochs: int = 16
    """Epochs per trial."""
    resolution: int = 14
    """Side of the model's input, in pixels."""
    train_images: int = 2000
    """Number of training images, stratified by class."""
    validation_images: int = 1000
    """Number of validation images, stratified by class."""
    seed: int = 0
    """Seed of the configurations and of the subset; a trial's number is its training seed."""


def main() -> None:
    """Record the learning curves that the command line requests."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    record(tyro.cli(Recording))


def record(recording: Recording) -> None:
    """Train the trials that are not in the file, and append each one when it ends.

    A trial whose training diverges is recorded up to the last epoch before.

    Raises:
        BatchCamError: the settings or the data cannot be used.
    """
    torch.set_num_threads(1)
    base = TrialConfig(
        dataset=recording.dataset,
        resolution=recording.resolution,
        epochs=recording.epochs,
        device="cpu",
    )
    prepared = subset(base, recording.train_images, recording.validation_images, recording.seed)
    recording.out.parent.mkdir(parents=True, exist_ok=True)
    done = {int(row["number"]) for row in _rows(recording.out, recording.dataset)}
    for number, params in enumerate(configurations(recording, prepared.dataset.channels)):
        if number in done:
            continue
        config = replace(trial_config(base, params), seed=number)
        curve = _train(config, prepared)
        _append(recording.out, config, number, curve)
        last = curve[-1] if curve else {}
        _log.info("%s %d: %s", recording.dataset, number, _formatted("val_accuracy", last))


def configurations(recording: Recording, channels: int) -> Iterator[dict[str, Any]]:
    """Yield each trial's parameters, sampled at random by `studies.space.suggest`."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = SearchSpace(resolutions=(recording.resolution,))
    strides = feasible_strides(space, channels)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=recording.seed))
    for _ in range(recording.trials):
        yield suggest(study.ask(), space, strides)


def subset(
    config: TrialConfig, train_images: int, validation_images: int, seed: int
) -> PreparedData:
    """Return a stratified subset of a data set, with prototypes computed from the subset.

    Raises:
        ConfigError: the requested number is not less than the number of images.
    """
    data = load_data(config)

    def part(split: Split, count: int) -> Split:
        if not 0 < count < len(split):
            raise ConfigError(
                f"cannot take a subset of {count} images from {len(split)}; request at least 1 "
                f"and at most {len(split) - 1}."
            )
        _, index = stratified_split(split.labels, count / len(split), seed)
        return Split(split.images[index], split.labels[index])

    data = replace(
        data,
        train=part(data.train, train_images),
        validation=part(data.validation, validation_images),
    )
    train, validation = (
        class_prototypes(*to_device(split, torch.device("cpu")), data.num_classes)
        for split in (data.train, data.validation)
    )
    return PreparedData(data, train, validation)


def _train(config: TrialConfig, prepared: PreparedData) -> list[Metrics]:
    """Return the metrics of each epoch, up to the last one before training diverges."""
    curve: list[Metrics] = []
    try:
        fit(config, lambda report: curve.append(dict(report.metrics)), prepared=prepared)
    except DivergedError as error:
        _log.info("%s", error)
    return curve


def _formatted(name: str, metrics: Metrics) -> str:
    return f"{name} {metrics[name]:.4f}" if name in metrics else "diverged"


def _rows(path: Path, dataset: str) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with gzip.open(path, "rt", newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["dataset"] == dataset]


def _append(path: Path, config: TrialConfig, number: int, curve: list[Metrics]) -> None:
    """Append a trial as a gzip member in one write, so that the file is never left half written."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    if not path.is_file():
        writer.writeheader()
    shared = {name: _rounded(getattr(config, name)) for name in _PARAMETERS}
    for metrics in curve:
        row = {"dataset": config.dataset, "number": number} | shared
        row |= {"epoch": int(metrics["epoch"])}
        row |= {name: _rounded(metrics[name]) for name in _METRICS}
        writer.writerow(row)
    with path.open("ab") as file:
        file.write(gzip.compress(text.getvalue().encode(), mtime=0))


def _rounded(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


if __name__ == "__main__":
    main()
