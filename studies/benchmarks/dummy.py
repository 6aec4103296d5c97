"""Trials without a model, for what is asked of the engine and not of the training.

python -m studies.benchmarks.dummy --out FOLDER --trials 32 --epochs 8 --seconds 0.05

Two parameters decide a learning curve in each of two objectives that pull apart. The trials report
and keep checkpoints as real ones do; the command may be killed at any moment and run again, and
goes on.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import ray
import tyro

from studies.engine.checkpoints import Checkpoints
from studies.engine.ledger import Ledger
from studies.engine.protocol import RESUMES_AT, Metrics, report, report_again
from studies.engine.retry import retry_in_trial
from studies.engine.run import Search, run_search
from studies.monitoring.progress import on_terminal
from studies.objectives import ACCURACY, SIMILARITY
from studies.planning.ray_cluster import WORKER_ENVIRONMENT
from studies.planning.resources import TrialResources, slots


@dataclass(frozen=True, kw_only=True)
class DummyStudy:
    """Run trials without a model."""

    out: Path
    """Folder of the study; one that has a part of it goes on."""
    trials: int = 32
    """How many."""
    epochs: int = 8
    """Epochs of a trial that is not stopped early."""
    min_epochs: int = 1
    """Epochs before a trial may be stopped early."""
    seconds: float = 0.05
    """How long an epoch takes."""
    cpus: int = 1
    """CPUs of a trial."""
    slots: int = 1
    """Trials at a time on a local Ray; where it is one, the outcome is reproducible."""
    address: str | None = None
    """A Ray that runs, to be joined; by default a local one is started."""
    seed: int = 0
    """Of the search."""

    def search(self) -> Search:
        """Return the search."""
        return Search(
            name="dummy",
            key="dummy",
            space=space,
            first_points=[{"x": 0.5, "y": 0.5}],
            objectives=(ACCURACY, SIMILARITY),
            min_epochs=self.min_epochs,
            max_epochs=self.epochs,
            num_trials=self.trials,
            seed=self.seed,
        )

    def trainable(self) -> Callable[[dict[str, Any]], None]:
        """Return what Ray runs for each trial."""
        return partial(
            run_dummy,
            checkpoints=str(self.out.resolve() / "checkpoints"),
            epochs=self.epochs,
            seconds=self.seconds,
        )


def space(trial: optuna.Trial) -> dict[str, Any]:
    """Draw a trial's two parameters; one of them only where the other is large."""
    x = trial.suggest_float("x", 0.0, 1.0)
    return {"x": x, "y": trial.suggest_float("y", 0.0, 1.0) if x > 0.2 else 0.0}


def curve(x: float, y: float, epoch: int) -> Metrics:
    """Return the metrics of an epoch: accuracy grows with x, SSIM with y, each at a price."""
    grown = 1 - math.exp(-epoch / (1 + 2 * x))
    return {
        "epoch": epoch,
        "val_accuracy": (0.5 + 0.5 * x - 0.2 * y**2) * grown,
        "cam_ssim": (0.3 + 0.6 * y - 0.2 * x**2) * grown,
        "cam_ssim_ceiling": 1.0,
        "images_per_second": 1.0,
    }


def run_dummy(params: dict[str, Any], *, checkpoints: str, epochs: int, seconds: float) -> None:
    """Go through the epochs of a curve as a real trial does, checkpoints included."""
    kept = Checkpoints(f"{checkpoints}/{params['trial_id']}")
    with kept.newest() as state:
        history: list[Metrics] = [] if state is None else json.loads(state.read_text())
    report_again(history, params[RESUMES_AT])
    for epoch in range(len(history) + 1, epochs + 1):
        time.sleep(seconds)
        history.append(curve(params["x"], params["y"], epoch))
        write = partial(Path.write_text, data=json.dumps(history))
        retry_in_trial(partial(kept.save, epoch, write), kept.folder)
        report(history[-1])


def main(study: DummyStudy) -> Ledger:
    """Run the study, and return its ledger."""
    study.out.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"address": study.address}
    if study.address is None:
        cpus = study.slots * study.cpus
        options = {"address": "local", "num_cpus": cpus, "include_dashboard": False}
    ray.init(log_to_driver=False, runtime_env={"env_vars": WORKER_ENVIRONMENT}, **options)
    resources = TrialResources(study.cpus, 0, study.cpus)
    try:
        search = study.search()
        return run_search(
            search,
            study.out,
            study.trainable(),
            resources.request,
            lambda: slots(resources),
            progress=on_terminal(search),
        )
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main(tyro.cli(DummyStudy))
