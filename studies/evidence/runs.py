"""Runs that are made once: a file for each, so that a study goes on where it stopped.

A run's file appears when the run has ended, whole or not at all. What is there is not made again.
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
    """A configuration to train, and what it stands for in a study."""

    study: str
    """A set of runs that are compared with each other, as "decoy_mnist"."""
    method: str
    """What people call the method."""
    stage: str
    """"settings" and "selection": by which learning rate and λ are chosen, on validation images.
    "final": the test is read."""
    config: TrialConfig
    beyond: Mapping[str, float] = field(default_factory=dict)
    """What else it was trained with: weights of other methods' losses, changes to the data."""

    def path(self, root: Path) -> Path:
        """Return the run's file under a folder of results."""
        config = self.config
        own = [config.lambda_proto, config.lambda_batch, config.lambda_energy]
        if config.lambda_exchange:
            own.append(config.lambda_exchange)
        weights = "-".join(f"{value:g}" for value in (*own, *self.beyond.values()))
        method = re.sub(r"[^a-z0-9]+", "-", self.method.lower()).strip("-")
        return root / "runs" / self.study / self.stage / f"{method}_{weights}_{config.seed}.json"


def complete(
    root: Path,
    runs: Sequence[Run],
    measure: Callable[[Run], Mapping[str, Any]],
    workers: Workers | None = None,
) -> list[dict[str, Any]]:
    """Make the runs that have no file yet, and return what the files of all of them hold.

    Args:
        root: a folder of results.
        runs: in the order in which they are begun.
        measure: trains and judges a run; its numbers become `metrics` of the run's file.
        workers: where runs are made; None: here.

    Raises:
        ConfigError: a file holds another configuration than its run's, which is to be made anew.
    """
    workers = workers or Workers()
    missing = [run for run in runs if not run.path(root).is_file()]
    finished(root, runs)  # Refuses those of other settings, before hours are spent.
    # The commit before the runs: another may be checked out while they last.
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
    """Return what the files hold of those runs that are made.

    Raises:
        ConfigError: as :func:`complete`.
    """
    return [_read(run, root) for run in runs if run.path(root).is_file()]


def _read(run: Run, root: Path) -> dict[str, Any]:
    path = run.path(root)
    content: dict[str, Any] = json.loads(path.read_text())
    # A field that is newer than the file had its default then.
    made = _recorded(TrialConfig.from_dict(content["config"]))
    for name, wanted in _recorded(run.config).items():
        if made[name] != wanted:
            raise ConfigError(
                f"{path} was made with {name}={made[name]!r}, not {wanted!r}; "
                "remove it, or ask for the same settings."
            )
    return content


def state_of(run: Run, root: Path) -> Path:
    """Return where a run's trained model is kept, so that it is trained once.

    A run for choosing λ and the final one of the same seed are one training. Not for sharing: what
    a run found is in its file, and without its model it is trained again, to the same bit on the
    same kind of machine.
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
    """Return the fields that a result depends on; the folder of the data is none of them."""
    default = TrialConfig()
    return {
        name: value
        for name, value in config.as_dict().items()
        if name in _ALWAYS_RECORDED or (name != "data_root" and value != getattr(default, name))
    }
