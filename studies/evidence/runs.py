"""Runs of a study, each recorded in a JSON file, so that an interrupted study can be resumed.

A run's file is written atomically when the run ends. A run that has a file is not repeated.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from batchcam.config import TrialConfig
from batchcam.errors import ConfigError
from batchcam.provenance import command_line, git_commit, package_versions
from studies.evidence.workers import Workers


@dataclass(frozen=True, kw_only=True)
class Run:
    """A configuration to train, with its study, method and stage."""

    study: str
    """Name of the set of runs that are compared with each other, for example "decoy_mnist"."""
    method: str
    """The method's name in tables and figures."""
    stage: str
    """"settings" and "selection" choose learning rate and λ on the validation split; "final" runs
    are evaluated on the test split."""
    config: TrialConfig
    beyond: Mapping[str, float] = field(default_factory=dict)
    """Training options outside `TrialConfig`: weights of other methods' losses, changed data."""

    def path(self, root: Path) -> Path:
        """Return the path of the run's file under the results folder `root`."""
        config = self.config
        lambdas = [config.lambda_proto, config.lambda_batch, config.lambda_energy]
        if config.lambda_exchange:
            lambdas.append(config.lambda_exchange)
        weights = "-".join(f"{value:g}" for value in (*lambdas, *self.beyond.values()))
        method = re.sub(r"[^a-z0-9]+", "-", self.method.lower()).strip("-")
        return root / "runs" / self.study / self.stage / f"{method}_{weights}_{config.seed}.json"


def complete(
    root: Path,
    runs: Sequence[Run],
    measure: Callable[[Run], Mapping[str, Any]],
    workers: Workers | None = None,
) -> list[dict[str, Any]]:
    """Execute the runs that have no file yet, and return the contents of the files of all runs.

    Args:
        root: results folder.
        runs: executed in this order.
        measure: trains and evaluates a run; its result becomes `metrics` in the run's file.
        workers: where runs are executed; None means in this process.

    Raises:
        ConfigError: a file was made with a configuration other than its run's.
    """
    workers = workers or Workers()
    missing = [run for run in runs if not run.path(root).is_file()]
    finished(root, runs)  # Raises on files of another configuration before hours are spent.
    # Read the commit before the runs: another one may be checked out while they execute.
    origin = {
        "git_commit": git_commit(),
        "versions": package_versions(),
        "command": command_line(),
        "threads": workers.threads,
    }
    for done, (number, metrics) in enumerate(workers.map(measure, missing), start=1):
        run = missing[number]
        content = {
            "study": run.study,
            "method": run.method,
            "stage": run.stage,
            "seed": run.config.seed,
            "metrics": dict(metrics),
            "config": _recorded(run.config),
            "beyond": dict(run.beyond),
            **origin,
        }
        path = run.path(root)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=1) + "\n")
        partial.replace(path)
        print(f"{done} of {len(missing)}: {path.relative_to(root)}", flush=True)
    return [_read(run, root) for run in runs]


def finished(root: Path, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return the contents of the files of those runs that have one.

    Raises:
        ConfigError: a file was made with a configuration other than its run's.
    """
    return [_read(run, root) for run in runs if run.path(root).is_file()]


def _read(run: Run, root: Path) -> dict[str, Any]:
    path = run.path(root)
    content: dict[str, Any] = json.loads(path.read_text())
    # Fields that were added after the file was written get their default.
    recorded = _recorded(TrialConfig.from_dict(content["config"]))
    for name, requested in _recorded(run.config).items():
        if recorded[name] != requested:
            raise ConfigError(
                f"{path} was made with {name}={recorded[name]!r}, not {requested!r}; "
                "remove it to repeat the run, or request the same settings."
            )
    return content


def state_of(run: Run, root: Path) -> Path:
    """Return the path of a run's training state under the results folder `root`.

    Runs that differ only in stage, study or method share one training, and so one state. States
    are not published: a run's metrics are in its file, and a missing state is reproduced by
    training again, bit for bit on the same kind of machine.
    """
    trained = {**_recorded(run.config), **run.beyond}
    digest = hashlib.sha256(json.dumps(trained, sort_keys=True).encode()).hexdigest()
    return root / "models" / f"{digest[:16]}.pt"


_ALWAYS_RECORDED = frozenset(
    [
        "dataset",
        "val_fraction",
        "split_seed",
        "backbone",
        "resolution",
        "output_stride",
        "pretrained",
        "metric",
        "cam",
        "lambda_class",
        "lambda_proto",
        "lambda_batch",
        "lambda_energy",
        "lambda_exchange",
        "prototype",
        "clusters",
        "epochs",
        "batch_size",
        "learning_rate",
        "weight_decay",
        "optimizer",
        "schedule",
        "precision",
        "compile",
        "device",
        "seed",
    ]
)
"""The fields that recorded runs have. A field that is newer is left out while it has its default,
so that files and digests of earlier runs stay valid."""


def _recorded(config: TrialConfig) -> dict[str, Any]:
    """Return the fields that a result depends on: all but the data's location."""
    default = TrialConfig()
    return {
        name: value
        for name, value in config.as_dict().items()
        if name in _ALWAYS_RECORDED or (name != "data_root" and value != getattr(default, name))
    }
