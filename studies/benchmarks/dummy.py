"""Run a study of dummy trials without a model, to test and measure the engine alone.

python -m studies.benchmarks.dummy --out FOLDER --trials 32 --epochs 8 --seconds 0.05

Two parameters determine the learning curves of two conflicting objectives. Dummy trials report
metrics and save checkpoints as real ones do. The same command resumes a study that was killed at
any moment.
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
from studies.planning.resources import TrialResources, alive_nodes, slots


@dataclass(frozen=True, kw_only=True)
class DummyStudy:
    """Run a study of dummy trials."""

    out: Path
    """Folder of the study; an unfinished study in it is resumed."""
    trials: int = 32
    """Number of trials."""
    epochs: int = 8
    """Epochs of a trial that is not stopped early."""
    min_epochs: int = 1
    """Epochs before a trial may be stopped early."""
    seconds: float = 0.05
    """Duration of an epoch."""
    cpus: int = 1
    """CPUs per trial."""
    slots: int = 1
    """Concurrent trials on a local Ray cluster; with 1, the result is reproducible."""
    address: str | None = None
    """Address of a running Ray cluster; None starts a local one."""
    seed: int = 0
    """Seed of the search."""

    def search(self) -> Search:
        """Return the engine's settings of this study."""
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
        """Return the function that Ray runs for each trial."""
        return partial(
            run_dummy,
            checkpoints=str(self.out.resolve() / "checkpoints"),
            epochs=self.epochs,
            seconds=self.seconds,
        )


def space(trial: optuna.Trial) -> dict[str, Any]:
    """Sample x, and y if x > 0.2; y is 0 otherwise."""
    x = trial.suggest_float("x", 0.0, 1.0)
    return {"x": x, "y": trial.suggest_float("y", 0.0, 1.0) if x > 0.2 else 0.0}


def curve(x: float, y: float, epoch: int) -> Metrics:
    """Return the metrics of an epoch: x raises accuracy and lowers SSIM, y the opposite."""
    progress = 1 - math.exp(-epoch / (1 + 2 * x))
    return {
        "epoch": epoch,
        "val_accuracy": (0.5 + 0.5 * x - 0.2 * y**2) * progress,
        "cam_ssim": (0.3 + 0.6 * y - 0.2 * x**2) * progress,
        "cam_ssim_ceiling": 1.0,
        "images_per_second": 1.0,
    }


def run_dummy(params: dict[str, Any], *, checkpoints: str, epochs: int, seconds: float) -> None:
    """Report the epochs of a curve to Ray and save checkpoints, as a real trial does."""
    saved = Checkpoints(f"{checkpoints}/{params['trial_id']}")
    with saved.newest() as state:
        history: list[Metrics] = [] if state is None else json.loads(state.read_text())
    report_again(history, params[RESUMES_AT])
    for epoch in range(len(history) + 1, epochs + 1):
        time.sleep(seconds)
        history.append(curve(params["x"], params["y"], epoch))
        write = partial(Path.write_text, data=json.dumps(history))
        retry_in_trial(partial(saved.save, epoch, write), saved.folder)
        report(history[-1])


def main(study: DummyStudy) -> Ledger:
    """Run or resume the study, and return its ledger."""
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
            lambda: slots(alive_nodes(), resources),
            progress=on_terminal(search),
        )
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main(tyro.cli(DummyStudy))
