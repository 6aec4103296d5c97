import math
from typing import Any

import numpy as np
import pytest
from ray import tune

from batchcam.errors import ConfigError, DivergedError
from studies.engine.protocol import (
    OUT_OF_MEMORY,
    REPORTED,
    Objective,
    gains,
    has_diverged,
    has_objectives,
    report,
    report_again,
    report_out_of_memory,
    reported_metrics,
)

LOSS = Objective("loss", "validation loss", "minimize", ".2f")
F1 = Objective("f1", "F1", short="best_f1")


@pytest.fixture
def reported(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Return the list of what a trainable in this process reports to Ray."""
    found: list[dict[str, Any]] = []
    monkeypatch.setattr(tune, "report", found.append)
    return found


def test_report_comes_back_without_what_ray_adds(reported: list[dict[str, Any]]) -> None:
    metrics: dict[str, Any] = {
        "epoch": 2,
        "f1": np.float32(0.5),
        "loss": math.inf,
        "count": np.int64(3),
    }
    report(metrics)
    (result,) = reported
    found = reported_metrics(result | {"time_total_s": 3.0, "training_iteration": 1})
    assert found == metrics
    # JSON cannot encode NumPy's numbers.
    assert [type(value) for value in found.values()] == [int, float, float, int]


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"f1": 0.5}, "no 'epoch'; give the number of finished epochs"),
        ({"epoch": 1, "f1": "0.5"}, "metric 'f1' is '0.5'; report numbers only"),
        ({"epoch": 1, "f1": None}, "metric 'f1' is None; report numbers only"),
        ({"epoch": 1, "done": 1}, "metric 'done' has a name that Ray or the engine uses"),
        ({"epoch": 1, "time_total_s": 1.0}, "metric 'time_total_s' has a name"),
        ({"epoch": 1, "trial_id": 7}, "metric 'trial_id' has a name"),
    ],
)
def test_report_that_cannot_be_recorded_is_refused(
    reported: list[dict[str, Any]], metrics: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        report(metrics)
    assert reported == []


def test_epochs_of_a_checkpoint_are_reported_after_the_last_known_one(
    reported: list[dict[str, Any]],
) -> None:
    history = [{"epoch": epoch, "f1": epoch / 10} for epoch in (1, 2, 3)]
    assert report_again(history, 1) == 3
    assert [result["epoch"] for result in reported] == [2, 3]
    assert report_again([], 4) == 4


def test_out_of_memory_is_no_report_of_an_epoch(reported: list[dict[str, Any]]) -> None:
    report_out_of_memory(2)
    assert reported == [{"epoch": 2, OUT_OF_MEMORY: True}]
    assert REPORTED not in reported[0]


def test_gains_are_to_be_maximised() -> None:
    rows = [{"loss": 0.5, "f1": 0.25, "epoch": 1.0}, {"loss": 2.0, "f1": 0.75, "epoch": 2.0}]
    assert gains(rows, (LOSS, F1)).tolist() == [[-0.5, 0.25], [-2.0, 0.75]]
    assert gains([], (LOSS, F1)).shape == (0, 2)


def test_objectives_must_be_finite() -> None:
    assert has_objectives({"loss": 1.0, "f1": 0.5}, (LOSS, F1))
    assert not has_objectives({"loss": 1.0}, (LOSS, F1))
    assert not has_objectives({"loss": math.nan, "f1": 0.5}, (LOSS, F1))


def test_objective_has_a_short_name_and_a_format() -> None:
    assert (LOSS.short, F1.short) == ("loss", "best_f1")
    assert (LOSS.show(0.126), F1.show(0.5)) == ("0.13", "0.5000")


def test_direction_is_one_of_two() -> None:
    wrong: Any = "min"
    with pytest.raises(ConfigError, match="'loss' has the direction 'min'; choose 'maximize'"):
        Objective("loss", "loss", wrong)


def test_diverged_trial_is_known_by_the_last_line_of_its_error() -> None:
    error = DivergedError("training diverged in epoch 1")
    assert has_diverged(f"{type(error).__module__}.{type(error).__name__}: {error}")
    assert not has_diverged("OSError: the node was lost")
    assert not has_diverged(None)
