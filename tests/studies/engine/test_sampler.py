from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage
from optuna.testing.pytest_samplers import BasicSamplerTestCase, MultiObjectiveSamplerTestCase
from optuna.trial import TrialState

from studies.engine import sampler
from studies.engine.optuna_storage import open_journal
from studies.engine.sampler import ReproducibleTPE


def draw(trial: optuna.Trial) -> dict[str, Any]:
    """Draw from a conditional space as real trials do."""
    decided: dict[str, Any] = {"x": trial.suggest_float("x", 0.0, 1.0)}
    decided["rate"] = trial.suggest_float("rate", 1e-4, 1e-1, log=True)
    decided["kind"] = trial.suggest_categorical("kind", ("a", "b", "c"))
    if decided["kind"] == "b":
        decided["depth"] = trial.suggest_int("depth", 1, 9)
    return decided


def tell(study: optuna.Study, trial: optuna.Trial, decided: dict[str, Any]) -> None:
    study.tell(trial, [decided["x"], decided["rate"] - decided["x"] ** 2])


def run(storage: Callable[[], BaseStorage], seed: int, count: int = 16) -> list[dict[str, Any]]:
    """Run trials, the study opened anew for each."""
    proposed = []
    for _ in range(count):
        study = make(storage(), seed)
        trial = study.ask()
        proposed.append(draw(trial))
        tell(study, trial, proposed[-1])
    return proposed


def make(storage: BaseStorage, seed: int) -> optuna.Study:
    return optuna.create_study(
        study_name="s",
        storage=storage,
        sampler=ReproducibleTPE(seed),
        directions=["maximize", "maximize"],
        load_if_exists=True,
    )


def test_same_history_has_the_same_proposals(tmp_path: Path) -> None:
    # More than the ten random ones that TPE starts with.
    study = make(InMemoryStorage(), 3)
    at_once = []
    for _ in range(16):
        trial = study.ask()
        at_once.append(draw(trial))
        tell(study, trial, at_once[-1])
    assert run(lambda: JournalStorage(open_journal(tmp_path / "one")), 3) == at_once
    assert len({str(each) for each in at_once}) == 16


def test_another_seed_has_other_proposals() -> None:
    first, second = InMemoryStorage(), InMemoryStorage()
    one, other = run(lambda: first, 3), run(lambda: second, 4)
    assert all(a["x"] != b["x"] for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("before", [0, 12])
def test_trial_that_was_cut_as_it_was_drawn_is_completed_as_it_would_have_been(
    before: int,
) -> None:
    whole = InMemoryStorage()
    *_, expected = run(lambda: whole, 3, before + 1)
    cut = InMemoryStorage()
    run(lambda: cut, 3, before)
    trial = make(cut, 3).ask()
    trial.suggest_float("x", 0.0, 1.0)
    again = make(cut, 3)
    (running,) = again.get_trials(states=[TrialState.RUNNING])
    assert draw(optuna.Trial(again, running._trial_id)) == expected


def test_draws_of_one_trial_are_independent() -> None:
    study = make(InMemoryStorage(), 0)
    trial = study.ask()
    drawn = [trial.suggest_float(f"x{index}", 0.0, 1.0) for index in range(20)]
    assert len(set(drawn)) == 20
    assert min(drawn) < 0.3 < 0.7 < max(drawn)


def test_sampler_is_shown_running_trials_the_best_and_the_latest_ended_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sampler, "_KNOWN", 4)
    study = optuna.create_study(directions=["maximize", "maximize"])
    for value in (9.0, 1.0, 2.0, 8.0, 3.0, 4.0, 5.0):
        study.tell(study.ask(), [value, value])
    running = study.ask()
    known = [trial.number for trial in sampler._worth_knowing(study)]
    assert known == [0, 3, 5, 6, running.number]


def test_draws_are_those_of_earlier_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values were drawn at commit 346d551: a study that began then goes on as it would have."""
    monkeypatch.setattr(sampler, "_KNOWN", 20)
    study = optuna.create_study(directions=["maximize"] * 2, sampler=ReproducibleTPE(7))
    drawn: list[dict[str, Any]] = []
    for number in range(40):
        trial = study.ask()
        drawn.append(draw(trial))
        if number % 5 == 4:
            study.tell(trial, state=TrialState.PRUNED)
        elif number % 11 == 10:
            study.tell(trial, state=TrialState.FAIL)
        elif number % 13 != 12:  # Else it runs on.
            tell(study, trial, drawn[-1])
    assert drawn[36:] == [
        {"x": 0.43877845067055876, "rate": 0.00011106336395066693, "kind": "a"},
        {"x": 0.32099844085955154, "rate": 0.08818565257763719, "kind": "a"},
        {"x": 0.31804087438889406, "rate": 0.04290216815350638, "kind": "a"},
        {"x": 0.6385283921801387, "rate": 0.013965277693627617, "kind": "a"},
    ]


class TestOptunasSuite(BasicSamplerTestCase, MultiObjectiveSamplerTestCase):
    """Optuna's own tests of samplers.

    Its tests of relative sampling are left out: the sampler draws every parameter independently.
    """

    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        return lambda: ReproducibleTPE(0)

    multi_objective_sampler = sampler
