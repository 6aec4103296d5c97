"""The settings of a study: what a user says on the command line, checked before anything starts."""

import json
import math
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import tyro

from batchcam.config import TrialConfig
from batchcam.errors import ConfigError, suggest_names
from studies.space import SearchSpace

OBJECTIVES = ("val_accuracy", "cam_ssim", "images_per_second")
"""Metrics that a study can maximise; the first one given also decides early stopping."""

SETTINGS_FILE = "study.json"
"""Where, in the study's folder, its settings are kept for `--resume`."""

_OF_THE_RUN = ("out", "resume", "address", "cpus_per_trial", "gpus_per_trial")
"""Settings that say how a study is run, not what it is: on resuming, these may be others."""


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """Search for the Batch-CAM configurations that classify best and explain best.

    Trials are scheduled by Ray Tune and proposed by Optuna. The outcome is written to
    <out>/<study>: trials.csv, pareto.json, the best bundles, and a README.md.

    Raises:
        ConfigError: a value that cannot work, with the value and the remedy.
    """

    study: str | None = None
    """Name of the study; by default bcpl-<dataset>-<date>-<time>."""
    out: Path = Path("results")
    """Folder in which the study's folder is made; on a cluster, one that all nodes share."""
    resume: bool = False
    """Go on with the study of this name, by the settings that it was started with."""

    dataset: str = TrialConfig.dataset
    """digits, mnist, fashion_mnist or imagefolder."""
    data_root: str | None = None
    """Where the data set's files are; searched before $BATCHCAM_DATA and ./data."""
    num_trials: int = 8
    """Configurations to try."""
    max_epochs: int = 5
    """Epochs of a trial that is not stopped early."""
    min_epochs: int = 3
    """Epochs before a trial may be stopped early."""
    objectives: tuple[str, ...] = OBJECTIVES[:2]
    """What to maximise; more than one gives a Pareto front."""
    space: Annotated[SearchSpace, tyro.conf.arg(name="")] = field(default_factory=SearchSpace)

    batch_size: int = TrialConfig.batch_size
    precision: str = TrialConfig.precision
    """fp32, bf16 or fp16."""
    pretrained: bool = False
    """Start every trial from timm's pretrained weights."""
    seed: int = 0
    """Seed of the search and of every trial."""

    address: str | None = None
    """Ray cluster to run on; by default $RAY_ADDRESS, else a local one that is started."""
    cpus_per_trial: float | None = None
    """CPUs of a trial, which set its threads; by default 1, or a GPU's share of the CPUs."""
    gpus_per_trial: float | None = None
    """GPUs of a trial, fractions allowed; by default 1 where the cluster has any."""
    max_failures: int = 2
    """How often a failed trial goes on from its last checkpoint before it counts as failed."""
    wandb_project: str = "batchcam"
    """W&B project of the runs."""

    def __post_init__(self) -> None:
        if self.study is not None and (
            not self.study or "/" in self.study or self.study.startswith(".")
        ):
            raise ConfigError(f"study={self.study!r} must be a plain name, for it names a folder.")
        if self.resume and self.study is None:
            raise ConfigError("--resume needs --study, the name of the study to go on with.")
        for name in ("num_trials", "max_epochs", "min_epochs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.max_failures < 0:
            raise ConfigError(f"max_failures={self.max_failures} must be 0 or more.")
        if not self.objectives:
            raise ConfigError(f"objectives is empty; choose among {', '.join(OBJECTIVES)}.")
        for objective in self.objectives:
            if objective not in OBJECTIVES:
                raise ConfigError(
                    f"objective {objective!r} is unknown; choose among {', '.join(OBJECTIVES)}."
                    + suggest_names(objective, OBJECTIVES)
                )
        if len(set(self.objectives)) < len(self.objectives):
            raise ConfigError(f"objectives={self.objectives} names a value twice; name each once.")
        for name in ("cpus_per_trial", "gpus_per_trial"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name}={value} must be a finite number >= 0.")
        if self.cpus_per_trial == 0:
            raise ConfigError("cpus_per_trial=0 would let every trial start at once; give it CPUs.")
        self.base_config()  # Judges the fields that every trial takes over.

    def base_config(self) -> TrialConfig:
        """Return the configuration that all trials share, before the search decides the rest."""
        return TrialConfig(
            dataset=self.dataset,
            data_root=None if self.data_root is None else str(Path(self.data_root).resolve()),
            epochs=self.max_epochs,
            batch_size=self.batch_size,
            precision=self.precision,
            pretrained=self.pretrained,
            seed=self.seed,
        )

    def named(self) -> "StudySettings":
        """Return these settings with a name, made from the time if none was given."""
        if self.study is not None:
            return self
        now = datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
        return replace(self, study=f"bcpl-{self.dataset}-{now}")

    def save(self) -> None:
        """Keep these settings in the study's folder."""
        content = asdict(self) | {"out": str(self.out)}
        path = self.folder / SETTINGS_FILE
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def resumed(self) -> "StudySettings":
        """Return the settings that the study of this name was started with, to go on by them.

        Raises:
            ConfigError: there is no such study, or a setting was given that differs from its.
        """
        path = self.folder / SETTINGS_FILE
        if not path.is_file():
            raise ConfigError(
                f"there is no study to resume in {self.folder}; check --study and --out."
            )
        saved = _load(path)
        for each in fields(self):
            given, began = getattr(self, each.name), getattr(saved, each.name)
            if each.name not in _OF_THE_RUN and given not in (began, getattr(_DEFAULTS, each.name)):
                raise ConfigError(
                    f"study {self.study!r} was started with {each.name}={began!r}, not {given!r}; "
                    "resume it without naming that, or start another study."
                )
        return replace(saved, **{name: getattr(self, name) for name in _OF_THE_RUN})

    @property
    def folder(self) -> Path:
        """The study's folder, absolute."""
        assert self.study is not None
        return self.out.resolve() / self.study


_DEFAULTS = StudySettings()


def _load(path: Path) -> StudySettings:
    """Read what :meth:`StudySettings.save` wrote; JSON has lists where settings have tuples."""

    def tuples(values: dict[str, Any]) -> dict[str, Any]:
        return {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
        }

    try:
        content = tuples(json.loads(path.read_text(encoding="utf-8")))
        space = SearchSpace(**tuples(content.pop("space")))
        return StudySettings(**content | {"out": Path(content["out"]), "space": space})
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} does not hold a study's settings: {error}") from error
