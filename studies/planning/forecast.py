"""The forecast of a study's cost from probes: epochs, hours and memory; `--dry-run`."""

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
    """The cost of a study.

    Attributes:
        trials: number of configurations to try.
        at_a_time: number of trials that run at once on the cluster.
        max_epochs: epochs of all trials together if none is stopped early.
        min_epochs: epochs of all trials together if early stopping ends half of them at every rung.
        max_hours: wall time of `max_epochs`.
        min_hours: wall time of `min_epochs`.
        peak_bytes: peak memory of the largest sampled trial, in bytes.
    """

    trials: int
    at_a_time: int
    max_epochs: int
    min_epochs: int
    max_hours: float
    min_hours: float
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
    """Return the cost of a study from a sample of its configurations.

    Args:
        settings: of the study.
        configs: the sample; its mean time per epoch is taken as that of all trials.
        probes: measurements; a configuration has the speed of the probe with its backbone,
            resolution and output stride.
        prepared: the data, whose sizes set the time of an epoch.
        at_a_time: number of trials that the cluster can run at once.
    """
    at_a_time = min(at_a_time, settings.num_trials)
    by_model = {_model(each.config): each for each in probes if each.error is None}
    measured = [by_model[_model(config)] for config in configs if _model(config) in by_model]
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
    """Print a table of the probes, the resources of a trial, and the forecast."""
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
        f"Images per second, peak memory, and how many trials fit into the memory of a "
        f"{probes[0].device.upper()}; all searched losses on, batches of {settings.batch_size}, "
        f"{threads} CPU thread{'s' if threads > 1 else ''}."
    )
    console.print(
        f"Each trial requests {resources.cpus:g} CPU and {resources.gpus:g} GPU, so that "
        f"{result.at_a_time} run at a time; the largest takes {result.peak_bytes / 2**30:.1f} GiB."
    )
    console.print(
        f"{result.trials} trials: {result.max_epochs} epochs in {_time(result.max_hours)} if "
        f"none is stopped early; {result.min_epochs} in {_time(result.min_hours)} if half "
        "are stopped at every rung. No trial was started."
    )


def _time(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.1f} min"


def _model(config: TrialConfig) -> tuple[str, int, int | None]:
    return config.backbone, config.resolution, config.output_stride


def _halved_epochs(min_epochs: int, max_epochs: int) -> float:
    """Return the mean epochs of a trial if half of the trials are stopped at each rung."""
    rung = min(min_epochs, max_epochs)
    mean, alive = float(rung), 1.0
    while rung < max_epochs:
        following = min(2 * rung, max_epochs)
        alive /= 2
        mean += alive * (following - rung)
        rung = following
    return mean
