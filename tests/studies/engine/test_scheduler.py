import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import tune
from ray.tune.schedulers import TrialScheduler

from studies.engine.protocol import OUT_OF_MEMORY, report
from studies.engine.scheduler import ParetoASHA
from studies.objectives import ACCURACY, SIMILARITY

EPOCHS = 6
OBJECTIVES = (ACCURACY, SIMILARITY)


def learn(params: dict[str, Any]) -> None:
    """Report a trial of constant quality, from the epoch after `start` on, as after a resume."""
    for epoch in range(params["start"] + 1, EPOCHS + 1):
        accuracy, ssim = params["quality"]
        report({"epoch": epoch, "val_accuracy": accuracy, "cam_ssim": ssim})


def last_epochs(
    folder: Path, qualities: list[tuple[float, float]], starts: list[int] | None = None
) -> list[int]:
    """Run trials one after the other, and return the last epoch of each."""
    starts = starts or [0] * len(qualities)
    trials = [
        {"number": number, "quality": quality, "start": start}
        for number, (quality, start) in enumerate(zip(qualities, starts, strict=True))
    ]
    results = tune.Tuner(
        learn,
        param_space=tune.grid_search(trials),
        tune_config=tune.TuneConfig(
            scheduler=ParetoASHA(objectives=OBJECTIVES, min_epochs=2, max_epochs=EPOCHS),
            max_concurrent_trials=1,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(storage_path=str(folder), verbose=0),
    ).fit()
    return [(results[index].metrics or {})["epoch"] for index in range(len(results))]


def judge(scheduler: ParetoASHA, number: int, result: dict[str, Any]) -> str:
    """Pass a result to the scheduler as Ray does."""
    trial: Any = SimpleNamespace(config={"number": number})
    controller: Any = None
    return scheduler.on_trial_result(controller, trial, result)


@pytest.mark.xdist_group("ray")
@pytest.mark.usefixtures("local_ray")
def test_ray_stops_what_is_behind_in_every_objective(tmp_path: Path) -> None:
    # The fifth trial has the worst accuracy and the best SSIM. The last one's accuracy is NaN.
    qualities = [(0.5, 0.5), (0.9, 0.6), (0.1, 0.1), (0.95, 0.7), (0.05, 0.9), (math.nan, 0.9)]
    assert last_epochs(tmp_path, qualities) == [6, 6, 2, 6, 6, 1]


@pytest.mark.xdist_group("ray")
@pytest.mark.usefixtures("local_ray")
def test_rungs_are_epochs_and_not_reports(tmp_path: Path) -> None:
    # The second trial resumes after epoch 3. Its first report, at epoch 4, is past the first rung
    # and at the second.
    assert last_epochs(tmp_path, [(0.9, 0.9), (0.1, 0.1)], starts=[0, 3]) == [6, 4]


def test_no_trial_is_stopped_before_the_grace_period() -> None:
    scheduler = ParetoASHA(objectives=OBJECTIVES, min_epochs=99, max_epochs=EPOCHS)
    for number, quality in enumerate((0.9, 0.1)):
        for epoch in range(1, EPOCHS + 1):
            result = {"epoch": epoch, "val_accuracy": quality, "cam_ssim": quality}
            assert judge(scheduler, number, result) == TrialScheduler.CONTINUE


def test_replayed_reports_count() -> None:
    scheduler = ParetoASHA(objectives=OBJECTIVES, min_epochs=2, max_epochs=EPOCHS)
    good = {"epoch": 2, "val_accuracy": 0.9, "cam_ssim": 0.9, "loss": 0.1}
    poor = {"epoch": 2, "val_accuracy": 0.1, "cam_ssim": 0.1}
    assert scheduler.replay(0, good)
    assert not scheduler.replay(1, poor)
    assert judge(scheduler, 2, poor | {"cam_ssim": 0.2}) == TrialScheduler.CONTINUE
    assert judge(scheduler, 3, poor) == TrialScheduler.STOP
    # A replayed report is not judged again when the trial repeats it.
    assert judge(scheduler, 0, poor) == TrialScheduler.CONTINUE


def test_a_result_without_an_objective_is_refused() -> None:
    scheduler = ParetoASHA(objectives=OBJECTIVES, min_epochs=2, max_epochs=EPOCHS)
    with pytest.raises(ValueError, match="trial 7 reported no cam_ssim, which early stopping"):
        judge(scheduler, 7, {"epoch": 1, "val_accuracy": 0.5})
    with pytest.raises(ValueError, match="trial 7 reported no epoch and no val_accuracy"):
        judge(scheduler, 7, {"cam_ssim": 0.5})


def test_a_trial_that_ended_without_a_report_is_left_alone() -> None:
    scheduler = ParetoASHA(objectives=OBJECTIVES, min_epochs=2, max_epochs=EPOCHS)
    assert judge(scheduler, 0, {"done": True}) == TrialScheduler.CONTINUE


def test_what_is_no_report_of_an_epoch_stops_and_is_not_judged() -> None:
    scheduler = ParetoASHA(objectives=OBJECTIVES, min_epochs=2, max_epochs=EPOCHS)
    assert judge(scheduler, 0, {OUT_OF_MEMORY: True}) == TrialScheduler.STOP
    result = {"epoch": 2, "val_accuracy": 0.9, "cam_ssim": 0.9}
    assert judge(scheduler, 0, result) == TrialScheduler.CONTINUE
