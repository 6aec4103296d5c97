from pathlib import Path
from typing import Any

import pytest
from ray import tune

from studies.scheduler import make_scheduler

pytestmark = pytest.mark.usefixtures("local_ray")

EPOCHS = 6


def learn(params: dict[str, Any]) -> None:
    """Report what a trial of known quality would, counting epochs as after a restart."""
    for epoch in range(params["start"] + 1, EPOCHS + 1):
        tune.report({"epoch": epoch, "val_accuracy": params["quality"]})


def last_epochs(folder: Path, trials: list[dict[str, Any]], min_epochs: int = 2) -> list[int]:
    """Run trials one after the other, and return how far each came."""
    results = tune.Tuner(
        learn,
        param_space=tune.grid_search(trials),
        tune_config=tune.TuneConfig(
            scheduler=make_scheduler("val_accuracy", min_epochs, EPOCHS),
            max_concurrent_trials=1,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(storage_path=str(folder), verbose=0),
    ).fit()
    return [(results[index].metrics or {})["epoch"] for index in range(len(results))]


def test_worse_half_is_stopped_at_the_rungs(tmp_path: Path) -> None:
    qualities = (0.5, 0.9, 0.1, 0.95)
    trials = [{"start": 0, "quality": quality} for quality in qualities]
    assert last_epochs(tmp_path, trials) == [6, 6, 2, 6]


def test_rungs_are_epochs_and_not_reports(tmp_path: Path) -> None:
    # The second trial goes on from epoch 3: its first report is beyond the first rung, and the
    # next rung is at epoch 4, which is its first report.
    trials = [{"start": 0, "quality": 0.9}, {"start": 3, "quality": 0.1}]
    assert last_epochs(tmp_path, trials) == [6, 4]


def test_no_trial_is_stopped_before_the_grace_period(tmp_path: Path) -> None:
    trials = [{"start": 0, "quality": quality} for quality in (0.9, 0.1)]
    assert last_epochs(tmp_path, trials, min_epochs=99) == [6, 6]
