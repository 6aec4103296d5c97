import numpy as np
import pytest

from studies.outcome.report.importance import MIN_TRIALS, importance


@pytest.fixture(autouse=True)
def _one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("studies.outcome.report.importance._ROUNDS", 1)


def points(count: int) -> list[dict[str, float | str]]:
    draw = np.random.default_rng(1)
    return [
        {
            "decides": float(draw.uniform()),
            "idle": float(draw.uniform()),
            "word": str(draw.choice(["a", "b"])),
            "constant": 1.0,
        }
        for _ in range(count)
    ]


def test_what_decides_comes_first_and_what_is_constant_does_not_come() -> None:
    trials = points(40)
    values = [3 * float(trial["decides"]) + (trial["word"] == "b") for trial in trials]
    found = importance(trials, values)
    assert found is not None
    assert [row["parameter"] for row in found.rows] == ["decides", "word", "idle"]
    assert found.explained > 0.7
    first, _, last = found.rows
    assert first["low"] > last["high"]
    assert last["mean"] == pytest.approx(0, abs=0.05)


def test_noise_explains_nothing() -> None:
    values = np.random.default_rng(2).uniform(size=30).tolist()
    found = importance(points(30), values)
    assert found is not None
    assert found.explained < 0.1


def test_it_comes_back_with_its_seed() -> None:
    trials = points(12)
    values = [float(trial["decides"]) for trial in trials]
    assert importance(trials, values, seed=3) == importance(trials, values, seed=3)


def test_too_few_trials_or_equal_ones_say_nothing() -> None:
    trials = points(MIN_TRIALS)
    assert importance(trials[1:], list(range(MIN_TRIALS - 1))) is None
    assert importance(trials, [0.5] * MIN_TRIALS) is None
    assert importance([{"same": 1.0}] * MIN_TRIALS, list(range(MIN_TRIALS))) is None
