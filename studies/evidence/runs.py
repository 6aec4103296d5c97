"""Runs that are made once: a file for each, so that a study goes on where it stopped.

A run's file appears when the run has ended, whole or not at all. What is there is not made again.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from batchcam.config import TrialConfig
from batchcam.errors import ConfigError
from batchcam.provenance import command_line, git_commit, package_versions


@dataclass(frozen=True, kw_only=True)
class Run:
    """A configuration to train, and what it stands for in a study."""

    study: str
    """A set of runs that are compared with each other, as "decoy_mnist"."""
    method: str
    """What people call the method."""
    stage: str
    """"selection": by which λ is chosen, on validation images. "final": the test is read."""
    config: TrialConfig
    beyond: Mapping[str, float] = field(default_factory=dict)
    """Weights of losses that `config` does not have, those of other methods."""

    def path(self, root: Path) -> Path:
        """Return the run's file under a folder of results."""
        config = self.config
        own = (config.lambda_proto, config.lambda_batch, config.lambda_energy)
        weights = "-".join(f"{value:g}" for value in (*own, *self.beyond.values()))
        method = re.sub(r"[^a-z0-9]+", "-", self.method.lower()).strip("-")
        return root / "runs" / self.study / self.stage / f"{method}_{weights}_{config.seed}.json"


def complete(
    root: Path, runs: list[Run], measure: Callable[[Run], Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Make the runs that have no file yet, and return what the files of all of them hold.

    Args:
        root: a folder of results.
        runs: in the order in which they are made.
        measure: trains and judges a run; its numbers become `metrics` of the run's file.

    Raises:
        ConfigError: a file holds another configuration than its run's, which is to be made anew.
    """
    for number, run in enumerate(runs, start=1):
        path = run.path(root)
        if path.is_file():
            continue
        # The commit before the run: another may be checked out while it lasts.
        origin = {
            "git_commit": git_commit(),
            "versions": package_versions(),
            "command": command_line(),
            "threads": torch.get_num_threads(),
        }
        print(f"{number} of {len(runs)}: {path.relative_to(root)}", flush=True)
        content = {
            "study": run.study,
            "method": run.method,
            "stage": run.stage,
            "seed": run.config.seed,
            "metrics": dict(measure(run)),
            "config": _recorded(run.config),
            "beyond": dict(run.beyond),
            **origin,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=1) + "\n")
        partial.replace(path)
    return [_read(run, root) for run in runs]


def finished(root: Path, runs: list[Run]) -> list[dict[str, Any]]:
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


def _recorded(config: TrialConfig) -> dict[str, Any]:
    """Return the fields that a result depends on; where the data lie is no such field."""
    return {name: value for name, value in config.as_dict().items() if name != "data_root"}
