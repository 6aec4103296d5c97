"""Measure the utilisation of a study's trial slots, and its throughput in short trials.

python -m studies.benchmarks.busy_slots --out results/busy_slots

Trains SimpleCNN on digits in real trials, run by the study engine with checkpoints and W&B
(offline). The baseline is the same training as a plain Ray function trainable with Ray's default
settings. Engine and baseline run one after the other, in one process, on one local Ray cluster.
"""

import json
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import ray
import tyro
from ray import tune

from batchcam.config import TrialConfig
from batchcam.data.prepared import PreparedData, prepare
from batchcam.provenance import command_line, git_commit, package_versions
from batchcam.training.fit import fit
from studies.engine.ledger import Ledger
from studies.engine.run import Search, run_search
from studies.monitoring.progress import on_terminal
from studies.monitoring.wandb_runs import Tracking
from studies.objectives import ACCURACY, SIMILARITY
from studies.planning.ray_cluster import WORKER_ENVIRONMENT
from studies.planning.resources import TrialResources, alive_nodes, slots
from studies.trial import TrialSettings, run_trial


@dataclass(frozen=True, kw_only=True)
class BusySlots:
    """Measure slot utilisation, and trials per minute of the engine and of plain Ray."""

    out: Path
    """Output folder for measured.json."""
    trials: int = 32
    """Trials per measurement."""
    seconds: float = 10.0
    """Approximate training time of a trial when utilisation is measured."""
    slots: int = 2
    """Concurrent trials: the number of CPUs of the local Ray cluster."""
    seed: int = 0
    """Seed of every trial."""


def main(settings: BusySlots) -> None:
    """Measure, write measured.json, and print it."""
    os.environ["WANDB_MODE"] = "offline"
    base = TrialConfig(resolution=14, epochs=1, device="cpu", seed=settings.seed)
    prepared = prepare(base)
    fit(base, prepared=prepared)  # Caches the SSIM ceiling, as a study does for all its trials.
    ray.init(
        address="local",
        num_cpus=settings.slots,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": WORKER_ENVIRONMENT},
    )
    try:
        short, short_wall = by_engine(settings, base, prepared)
        epoch = sum(sum(report["seconds"] for report in t.reports) for t in short.trials)
        epochs = max(1, round(settings.seconds / (epoch / settings.trials)))
        plain_wall = by_plain_ray(settings, base)
        long, wall = by_engine(settings, TrialConfig(**{**vars(base), "epochs": epochs}), prepared)
    finally:
        ray.shutdown()
    trained = sum(sum(report["seconds"] for report in t.reports) for t in long.trials)
    measured = {
        "busy": trained / (settings.slots * wall),
        "trial_seconds": trained / settings.trials,
        "epochs": epochs,
        "wall_seconds": wall,
        "short_trial_seconds": epoch / settings.trials,
        "trials_per_minute": 60 * settings.trials / short_wall,
        "plain_trials_per_minute": 60 * settings.trials / plain_wall,
        "ratio": plain_wall / short_wall,
        "trials": settings.trials,
        "slots": settings.slots,
        "seed": settings.seed,
        "git_commit": git_commit(),
        "versions": package_versions("ray", "optuna", "wandb"),
        "command": command_line(),
    }
    settings.out.mkdir(parents=True, exist_ok=True)
    (settings.out / "measured.json").write_text(json.dumps(measured, indent=2) + "\n")
    print(json.dumps(measured, indent=2))


def by_engine(
    settings: BusySlots, base: TrialConfig, prepared: PreparedData
) -> tuple[Ledger, float]:
    """Run trials by the study engine without early stopping.

    Returns:
        The ledger, and the wall time in seconds.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        resources = TrialResources(1, 0, 1)
        tracking = Tracking("batchcam", "busy", folder, "offline")
        trial_settings = TrialSettings(base, resources, str(folder / "checkpoints"), tracking)
        trainable = tune.with_parameters(run_trial, settings=trial_settings, prepared=prepared)
        search = Search(
            name="busy",
            key=f"busy{base.epochs}",
            space=space,
            objectives=(ACCURACY, SIMILARITY),
            min_epochs=base.epochs,
            max_epochs=base.epochs,
            num_trials=settings.trials,
            seed=settings.seed,
        )
        started = time.perf_counter()
        ledger = run_search(
            search,
            folder,
            trainable,
            resources.request,
            lambda: slots(alive_nodes(), resources),
            progress=on_terminal(search),
        )
        return ledger, time.perf_counter() - started


def by_plain_ray(settings: BusySlots, base: TrialConfig) -> float:
    """Run the same trials with Ray Tune as in its manual; return the wall time in seconds."""
    with tempfile.TemporaryDirectory() as scratch:
        tuner = tune.Tuner(
            partial(plain_trial, base=base.as_dict()),
            param_space={"learning_rate": tune.loguniform(1e-3, 5e-3)},
            tune_config=tune.TuneConfig(num_samples=settings.trials),
            run_config=tune.RunConfig(storage_path=scratch, verbose=0),
        )
        started = time.perf_counter()
        tuner.fit()
        return time.perf_counter() - started


def plain_trial(params: dict[str, Any], base: Mapping[str, Any]) -> None:
    """Train a trial and report the metrics of each epoch to Ray."""
    config = TrialConfig(**{**base, **params})
    fit(config, lambda report: tune.report(dict(report.metrics)))


def space(trial: optuna.Trial) -> dict[str, Any]:
    """Sample only a learning rate, so that all trials cost the same."""
    return {"learning_rate": trial.suggest_float("learning_rate", 1e-3, 5e-3, log=True)}


if __name__ == "__main__":
    main(tyro.cli(BusySlots))
