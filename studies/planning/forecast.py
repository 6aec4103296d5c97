"""What a study will cost, from what its kinds of trials were measured to cost; `--dry-run`."""

from collections.abc import Sequence
from dataclasses import dataclass

import optuna
from rich import box
from rich.console import Console
from rich.table import Table

from batchcam.config import TrialConfig
from batchcam.data.prepared import PreparedData
from studies.planning.probe import Probe
from studies.planning.resources import TrialResources
from studies.settings import StudySettings
from studies.space import Strides, suggest
from studies.trial import trial_config


@dataclass(frozen=True)
class Forecast:
    """What a study will cost.

    Attributes:
        trials: configurations to try.
        at_a_time: how many run at once on the cluster as it is.
        most_epochs: of all trials, if none is stopped early.
        fewest_epochs: if early stopping halves at every rung.
        most_hours: of wall time, for `most_epochs`.
        fewest_hours: for `fewest_epochs`.
        peak_bytes: memory of the largest trial.
    """

    trials: int
    at_a_time: int
    most_epochs: int
    fewest_epochs: int
    most_hours: float
    fewest_hours: float
    peak_bytes: int


def sample_configs(settings: StudySettings, strides: Strides, count: int) -> list[TrialConfig]:
    """Draw configurations at random from the study's space."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=settings.seed))
    drawn = [suggest(study.ask(), settings.space, strides) for _ in range(count)]
    return [trial_config(settings.base_config(), params) for params in drawn]


def forecast(
    settings: StudySettings,
    configs: Sequence[TrialConfig],
    probes: Sequence[Probe],
    prepared: PreparedData,
    at_a_time: int,
) -> Forecast:
    """Add up what sampled configurations will cost, each at the pace of its kind."""
    by_kind = {_kind(each.config): each for each in probes if each.error is None}
    measured = [by_kind[_kind(config)] for config in configs if _kind(config) in by_kind]
    epoch_seconds = [each.epoch_seconds(prepared) for each in measured]
    mean_seconds = sum(epoch_seconds) / max(1, len(epoch_seconds))
    most = settings.num_trials * settings.max_epochs
    fewest = round(settings.num_trials * _halved_epochs(settings.min_epochs, settings.max_epochs))

    def hours(epochs: int) -> float:
        return epochs * mean_seconds / at_a_time / 3600

    return Forecast(
        settings.num_trials,
        at_a_time,
        most,
        fewest,
        hours(most),
        hours(fewest),
        max((each.peak_bytes for each in measured), default=0),
    )


def print_forecast(
    console: Console,
    settings: StudySettings,
    probes: Sequence[Probe],
    resources: TrialResources,
    result: Forecast,
) -> None:
    """Print what was measured, and what follows from it."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("backbone", no_wrap=True)
    for column in ("pixels", "stride", "training/s", "validation/s", "memory", "fit"):
        table.add_column(column, justify="right", no_wrap=True)
    for each in probes:
        config = each.config
        row = [config.backbone, f"{config.resolution}", f"{config.output_stride or 'own'}"]
        if each.error is None:
            row += [
                f"{each.train_images_per_second:,.0f}",
                f"{each.validation_images_per_second:,.0f}",
                f"{each.peak_bytes / 2**30:.1f} GiB",
                f"{each.device_bytes // each.peak_bytes}",
            ]
        else:
            row += ["out of memory", "", "", "0"]
        table.add_row(*row)
    console.print(table)
    threads = probes[0].threads
    console.print(
        f"Images per second, peak memory, and how many trials fit by it on a "
        f"{probes[0].device.upper()}; every searched loss on, batches of {settings.batch_size}, "
        f"{threads} CPU thread{'s' if threads > 1 else ''}."
    )
    console.print(
        f"Each trial asks for {resources.cpus:g} CPU and {resources.gpus:g} GPU: "
        f"{result.at_a_time} at a time; the largest takes {result.peak_bytes / 2**30:.1f} GiB."
    )
    console.print(
        f"{result.trials} trials: {result.most_epochs} epochs in {_time(result.most_hours)} if "
        f"none is stopped early, {result.fewest_epochs} in {_time(result.fewest_hours)} if half "
        "are at every rung. Nothing was started."
    )


def _time(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.1f} min"


def _kind(config: TrialConfig) -> tuple[str, int, int | None]:
    return config.backbone, config.resolution, config.output_stride


def _halved_epochs(min_epochs: int, max_epochs: int) -> float:
    """Return the mean epochs of a trial, of which half are stopped at each rung."""
    rung = min(min_epochs, max_epochs)
    mean, alive = float(rung), 1.0
    while rung < max_epochs:
        following = min(2 * rung, max_epochs)
        alive /= 2
        mean += alive * (following - rung)
        rung = following
    return mean
