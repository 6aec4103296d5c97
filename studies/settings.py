"""The settings of a study: what a user says on the command line, checked before anything starts."""

import json
import math
import secrets
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import tyro

from batchcam.config import TrialConfig
from batchcam.errors import ConfigError, FormatError, check_format, suggest_names
from studies import paths
from studies.engine.optuna_storage import STORAGE_VARIABLE, storage_kind
from studies.engine.protocol import Objective
from studies.objectives import ACCURACY, OBJECTIVES, SIMILARITY, objectives_of
from studies.space import SearchSpace

FORMAT = 1
"""The newest format of study.json that this version reads, and the one that it writes."""

_OF_THE_END = ("confirm", "seeds")
"""Settings of what comes after the search: where they are named on resuming, they hold."""

_OF_THE_RUN = ("out", "resume", "extend", "dry_run", "address", "cpus_per_trial", "gpus_per_trial")
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
    dry_run: bool = False
    """Measure what a trial of each kind takes, say what the study will cost, and start nothing."""
    extend: int = 0
    """Go on with the study of this name, and try so many configurations more."""
    storage: str | None = None
    """Where trials keep their checkpoints, and the study a copy of its memory: a folder or an
    address such as s3://bucket/folder; by default the study's folder."""
    confirm: int = 0
    """Train so many of the best again with fresh seeds, and the best without explanation, and
    choose by their means."""
    seeds: int = 3
    """Fresh seeds for each of those."""
    warm_start: tuple[Path, ...] = ()
    """Bundles of earlier studies, whose configurations are tried first."""

    dataset: str = TrialConfig.dataset
    """digits, mnist, fashion_mnist, decoy_mnist, decoy_fashion_mnist or imagefolder."""
    data_root: str | None = None
    """Where the data set's files are; searched before $BATCHCAM_DATA and ./data."""
    num_trials: int = 8
    """Configurations to try."""
    max_epochs: int = 5
    """Epochs of a trial that is not stopped early."""
    min_epochs: int = 3
    """Epochs before a trial may be stopped early."""
    objectives: tuple[str, ...] = (ACCURACY.name, SIMILARITY.name)
    """What to maximise, the first one leads early stopping; more than one gives a Pareto front."""
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
    """CPUs of a trial, which set its threads; by default 1, or a GPU's share of the CPUs, or as
    many as go with the memory that a trial was measured to take."""
    gpus_per_trial: float | None = None
    """GPUs of a trial, fractions allowed; by default what it was measured to need, where there are
    any."""
    max_failures: int = 2
    """How often a failed trial goes on from its last checkpoint before it counts as failed."""
    wandb_project: str = "batchcam"
    """W&B project of the runs."""

    key: Annotated[str, tyro.conf.Suppress] = ""
    """What the ids of the trials begin with; made when the study begins."""
    optuna_storage: Annotated[str, tyro.conf.Suppress] = "journal"
    """The kind of storage that Optuna's study was begun in; its address is not kept."""

    def __post_init__(self) -> None:
        if self.study is not None and (
            not self.study or "/" in self.study or self.study.startswith(".")
        ):
            raise ConfigError(f"study={self.study!r} must be a plain name, for it names a folder.")
        if self.goes_on and self.study is None:
            raise ConfigError(
                "--resume and --extend need --study, the name of the study to go on with."
            )
        for name in ("extend", "confirm"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be 0 or more.")
        if self.seeds < 2:
            raise ConfigError(
                f"seeds={self.seeds} must be at least 2: one run says nothing of the spread."
            )
        if self.storage is not None and "@" in self.storage:
            raise ConfigError(
                "--storage must hold no key or password, for it is written down; give them in the "
                "environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)."
            )
        if self.storage is not None and "?" in self.storage:
            raise ConfigError(
                f"storage={self.storage!r} must be a plain address; name the server of an object "
                "store in the environment (AWS_ENDPOINT_URL)."
            )
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

    @property
    def objective_records(self) -> tuple[Objective, ...]:
        """The objectives, with their titles, directions and formats."""
        return objectives_of(self.objectives)

    @property
    def goes_on(self) -> bool:
        """Whether this is to go on with a study that exists."""
        return self.resume or self.extend > 0

    def named(self) -> "StudySettings":
        """Return these settings with a name, made from the time if none was given."""
        if self.study is not None:
            return self
        now = datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
        return replace(self, study=f"bcpl-{self.dataset}-{now}")

    def begun(self) -> "StudySettings":
        """Return the settings of a study that begins now: with a key of its own."""
        return replace(self._anywhere(), key=secrets.token_hex(4), optuna_storage=storage_kind())

    def _anywhere(self) -> "StudySettings":
        """Return these settings with a storage that is the same one in every folder."""
        if self.storage is None or "://" in self.storage:
            return self
        return replace(self, storage=str(Path(self.storage).resolve()))

    def save(self) -> None:
        """Keep these settings in the study's folder."""
        content = {"format": FORMAT, **asdict(self)} | {
            "out": str(self.out),
            "warm_start": [str(path.resolve()) for path in self.warm_start],
        }
        path = self.folder / paths.SETTINGS
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)

    def resumed(self) -> "StudySettings":
        """Return the settings that the study of this name was started with, to go on by them.

        Raises:
            ConfigError: there is no such study, or a setting was given that differs from its.
        """
        path = self.folder / paths.SETTINGS
        if not path.is_file():
            raise ConfigError(
                f"there is no study to resume in {self.folder}; check --study, --out and --storage."
            )
        saved = load_settings(path)
        for each in fields(self):
            given, began = getattr(self._anywhere(), each.name), getattr(saved, each.name)
            free = (*_OF_THE_RUN, *_OF_THE_END)
            if each.name not in free and given not in (began, getattr(_DEFAULTS, each.name)):
                remedy = (
                    "use --extend to add trials."
                    if each.name == "num_trials"
                    else "resume it without naming that, or start another study."
                )
                raise ConfigError(
                    f"study {self.study!r} was started with {each.name}={began!r}, not {given!r}; "
                    + remedy
                )
        if saved.optuna_storage != storage_kind():
            raise ConfigError(
                f"study {self.study!r} keeps Optuna's trials in {saved.optuna_storage}, but "
                f"{STORAGE_VARIABLE} names {storage_kind()}; set it as it was."
            )
        here = {name: getattr(self, name) for name in _OF_THE_RUN}
        for name in _OF_THE_END:
            if (given := getattr(self, name)) != getattr(_DEFAULTS, name):
                here[name] = given
        return replace(saved, **here, num_trials=saved.num_trials + self.extend)

    @property
    def optuna_name(self) -> str:
        """The name of Optuna's study; in a database, which others share, with the key."""
        name = self.study or ""
        return name if self.optuna_storage == "journal" else f"{name}-{self.key}"

    @property
    def checkpoints(self) -> str:
        """The folder, or address, under which each trial has a folder for its checkpoints."""
        folder = self.folder / paths.CHECKPOINTS
        return self.copy_of(folder) or str(folder)

    def copy_of(self, path: Path) -> str | None:
        """Return where in the storage a path of the study's folder is; None without a storage."""
        if self.storage is None:
            return None
        return f"{self.storage.rstrip('/')}/{self.study}/{path.relative_to(self.folder)}"

    @property
    def folder(self) -> Path:
        """The study's folder, absolute."""
        assert self.study is not None
        return self.out.resolve() / self.study


_DEFAULTS = StudySettings()


def load_settings(path: Path) -> StudySettings:
    """Read what :meth:`StudySettings.save` wrote.

    Raises:
        ConfigError: the file does not hold a study's settings.
        FormatError: the file has a newer format.
    """

    def tuples(
        values: dict[str, Any],
    ) -> dict[str, Any]:  # JSON has lists where settings have tuples.
        return {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
        }

    try:
        content = tuples(json.loads(path.read_text(encoding="utf-8")))
        check_format(path, content.pop("format", None), FORMAT)
        space = SearchSpace(**tuples(content.pop("space")))
        paths = {
            "out": Path(content["out"]),
            "warm_start": tuple(map(Path, content["warm_start"])),
        }
        return StudySettings(**content | paths | {"space": space})
    except FormatError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} does not hold a study's settings: {error}") from error
