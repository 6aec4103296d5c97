"""The settings of a study: the flags of the command line, and study.json, which resuming reads."""

import json
import math
import secrets
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from batchcam.config import Dataset, Precision, TrialConfig
from batchcam.errors import ConfigError, FormatError, check_format, suggest_names
from studies import paths
from studies.engine.optuna_storage import STORAGE_VARIABLE, storage_kind
from studies.engine.protocol import Objective
from studies.objectives import ACCURACY, OBJECTIVES, SIMILARITY, objectives_of
from studies.planning.resources import check_gpus
from studies.space import SearchSpace

FORMAT = 1
"""The newest format of study.json that this version reads, and the one that it writes."""

_AFTER_SEARCH = ("confirm", "seeds")
"""Settings of what follows the search. They may be overridden on resume."""

_PER_RUN = (
    "out",
    "resume",
    "extend",
    "dry_run",
    "address",
    "cpus_per_trial",
    "gpus_per_trial",
    "cuda_graphs",
)
"""Settings of how a study is run, not of what it is. study.json's values are ignored on resume."""

if TYPE_CHECKING:
    ObjectiveName = str
else:
    ObjectiveName = Literal[tuple(OBJECTIVES)]  # For the choices in --help.


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """Search for the Batch-CAM configurations that classify best and explain best.

    Optuna proposes trials, and Ray Tune runs them. The results are written to <out>/<study>:
    trials.csv, pareto.json, the best bundles, README.md and report.html.

    Raises:
        ConfigError: a value is invalid; the message has the value and the remedy.
    """

    study: str | None = None
    """Name of the study, and of its folder; by default bcpl-<dataset>-<date>-<time>."""
    out: Path = Path("results")
    """Folder that holds the study's folder. On a cluster, all nodes must share it."""
    resume: bool = False
    """Resume the study of this name with the settings that it was started with."""
    dry_run: bool = False
    """Measure time and memory of a trial, print how long the study will take, and start nothing."""
    extend: int = 0
    """Resume the study of this name, and try this many configurations more."""
    storage: str | None = None
    """Folder, or address such as s3://bucket/folder, for checkpoints and a replica of the study.
    By default checkpoints are in the study's folder, and there is no replica."""
    confirm: int = 0
    """Train this many of the best configurations again with fresh seeds, and choose by the means.
    The best cross-entropy baseline is trained again with them. 0: choose by the search alone."""
    seeds: int = 3
    """Fresh seeds per configuration that --confirm trains again, at least 2."""
    warm_start: tuple[Path, ...] = ()
    """Bundles whose configurations are tried first."""

    dataset: Dataset = TrialConfig.dataset
    """Data set. `digits` comes with scikit-learn; `imagefolder` reads the pictures in data_root."""
    data_root: str | None = None
    """Folder of the data set's files; searched before $BATCHCAM_DATA and ./data."""
    num_trials: int = 8
    """Number of configurations to try."""
    max_epochs: int = 5
    """Epochs of a trial that early stopping does not end."""
    min_epochs: int = 3
    """Epochs that every trial trains before early stopping may end it."""
    objectives: tuple[ObjectiveName, ...] = (ACCURACY.name, SIMILARITY.name)
    """Metrics to maximise; several give a Pareto front. The first one leads early stopping."""
    space: Annotated[SearchSpace, tyro.conf.arg(name="")] = field(default_factory=SearchSpace)

    batch_size: int = TrialConfig.batch_size
    """Images per step."""
    precision: Precision = TrialConfig.precision
    """Precision of the forward pass; bf16 and fp16 are by autocast, fp16 on CUDA only."""
    pretrained: bool = False
    """Start every trial from timm's pretrained weights."""
    seed: int = 0
    """Seed of the search, and of every trial's training."""

    address: str | None = None
    """Address of a Ray cluster; by default $RAY_ADDRESS, else a local one is started."""
    cpus_per_trial: float | None = None
    """CPUs of a trial, and its threads. By default 1, or more if a trial's memory requires it.
    With GPUs, by default the node's CPUs in proportion to the trial's part of a GPU."""
    gpus_per_trial: float | None = None
    """GPUs of a trial; a fraction shares a GPU, 0 trains on CPUs.
    By default one, or a part if its memory allows that and several trials are left for each GPU."""
    cuda_graphs: bool = True
    """Record the training steps on a GPU and replay them, which is faster, with the same results.
    Off for a backbone that cannot be recorded."""
    max_failures: int = 2
    """Restarts of a trial from its last checkpoint after errors, before it counts as failed."""
    wandb_project: str = "batchcam"
    """W&B project of the runs."""

    key: Annotated[str, tyro.conf.Suppress] = ""
    """Prefix of the trials' ids, random, made when the study begins."""
    optuna_storage: Annotated[str, tyro.conf.Suppress] = "journal"
    """Kind of Optuna's storage when the study began.
    Its address, which may hold a password, is not saved."""

    def __post_init__(self) -> None:
        if self.study is not None and (
            not self.study or "/" in self.study or self.study.startswith(".")
        ):
            raise ConfigError(
                f"study={self.study!r} names a folder; choose a name without / and leading dot."
            )
        if self.resumes and self.study is None:
            raise ConfigError(
                "--resume and --extend need --study, the name of the study to resume."
            )
        for name in ("extend", "confirm"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be 0 or more.")
        if self.seeds < 2:
            raise ConfigError(
                f"seeds={self.seeds} must be at least 2: one run does not show the spread."
            )
        if self.storage is not None and "@" in self.storage:
            raise ConfigError(
                "--storage must hold no key or password, because study.json records it; set "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment."
            )
        if self.storage is not None and "?" in self.storage:
            raise ConfigError(
                f"storage={self.storage!r} must be an address without options; name the server of "
                "an object store in AWS_ENDPOINT_URL in the environment."
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
        cpus, gpus = self.cpus_per_trial, self.gpus_per_trial
        if cpus is not None and not (math.isfinite(cpus) and cpus >= 0):
            raise ConfigError(f"cpus_per_trial={cpus} must be a finite number >= 0.")
        if gpus is not None:
            check_gpus(gpus)
        if self.cpus_per_trial == 0:
            raise ConfigError("cpus_per_trial=0 would start all trials at once; set it above 0.")
        self.base_config()  # Validates the fields that every trial inherits.

    def base_config(self) -> TrialConfig:
        """Return the configuration that all trials share; the search sets the other fields."""
        return TrialConfig(
            dataset=self.dataset,
            data_root=None if self.data_root is None else str(Path(self.data_root).resolve()),
            epochs=self.max_epochs,
            batch_size=self.batch_size,
            precision=self.precision,
            pretrained=self.pretrained,
            cuda_graphs=self.cuda_graphs,
            seed=self.seed,
        )

    @property
    def objective_records(self) -> tuple[Objective, ...]:
        """The objectives, with their titles, directions and formats."""
        return objectives_of(self.objectives)

    @property
    def resumes(self) -> bool:
        """Whether these settings resume a study that exists."""
        return self.resume or self.extend > 0

    def named(self) -> "StudySettings":
        """Return these settings with a name, made from data set and time if none was given."""
        if self.study is not None:
            return self
        now = datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
        return replace(self, study=f"bcpl-{self.dataset}-{now}")

    def begun(self) -> "StudySettings":
        """Return the settings of a study that begins now, with a new key."""
        return replace(
            self._with_absolute_storage(), key=secrets.token_hex(4), optuna_storage=storage_kind()
        )

    def _with_absolute_storage(self) -> "StudySettings":
        """Return these settings with an absolute path of the storage."""
        if self.storage is None or "://" in self.storage:
            return self
        return replace(self, storage=str(Path(self.storage).resolve()))

    def save(self) -> None:
        """Write these settings to study.json in the study's folder."""
        content = {"format": FORMAT, **asdict(self)} | {
            "out": str(self.out),
            "warm_start": [str(path.resolve()) for path in self.warm_start],
        }
        path = self.folder / paths.SETTINGS
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)

    def resumed(self) -> "StudySettings":
        """Return the settings that the study of this name was started with, for resuming it.

        Raises:
            ConfigError: there is no such study, or a given setting differs from the study's.
        """
        path = self.folder / paths.SETTINGS
        if not path.is_file():
            raise ConfigError(
                f"{self.folder} holds no study to resume; check --study, --out and --storage."
            )
        saved = load_settings(path)
        for each in fields(self):
            given, began = (
                getattr(self._with_absolute_storage(), each.name),
                getattr(saved, each.name),
            )
            free = (*_PER_RUN, *_AFTER_SEARCH)
            if each.name not in free and given not in (began, getattr(_DEFAULTS, each.name)):
                remedy = (
                    "use --extend to add trials."
                    if each.name == "num_trials"
                    else "resume it without that setting, or start another study."
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
        here = {name: getattr(self, name) for name in _PER_RUN}
        for name in _AFTER_SEARCH:
            if (given := getattr(self, name)) != getattr(_DEFAULTS, name):
                here[name] = given
        return replace(saved, **here, num_trials=saved.num_trials + self.extend)

    @property
    def optuna_name(self) -> str:
        """Name of Optuna's study; in a database, which others may share, it ends in the key."""
        name = self.study or ""
        return name if self.optuna_storage == "journal" else f"{name}-{self.key}"

    @property
    def checkpoints(self) -> str:
        """Folder or address under which each trial has a folder for its checkpoints."""
        folder = self.folder / paths.CHECKPOINTS
        return self.replica_of(folder) or str(folder)

    def replica_of(self, path: Path) -> str | None:
        """Return the storage's address of a path in the study's folder; None without a storage."""
        if self.storage is None:
            return None
        return f"{self.storage.rstrip('/')}/{self.study}/{path.relative_to(self.folder)}"

    @property
    def folder(self) -> Path:
        """Absolute path of the study's folder."""
        assert self.study is not None
        return self.out.resolve() / self.study


_DEFAULTS = StudySettings()


def load_settings(path: Path) -> StudySettings:
    """Read study.json, which :meth:`StudySettings.save` writes.

    Raises:
        ConfigError: the file does not hold the settings of a study.
        FormatError: the file has a newer format than this version reads.
    """

    def tuples(values: dict[str, Any]) -> dict[str, Any]:  # JSON has lists instead of tuples.
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
        raise ConfigError(
            f"{path} does not hold the settings of a study: {error}; restore it from a backup, or "
            "start another study."
        ) from error
