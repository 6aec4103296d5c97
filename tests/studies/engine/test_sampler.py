import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage
from optuna.testing.pytest_samplers import BasicSamplerTestCase, MultiObjectiveSamplerTestCase
from optuna.trial import TrialState, create_trial

from studies.engine import sampler
from studies.engine.journal import open_journal
from studies.engine.optuna_internals import StoredTrials
from studies.engine.protocol import Direction
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
    """Run trials, opening the study again for each; return the proposals."""
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
    # More trials than the ten random ones that TPE starts with.
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
    assert draw(StoredTrials(again, cut).take_up(running.number)) == expected


def test_draws_of_one_trial_are_independent() -> None:
    study = make(InMemoryStorage(), 0)
    trial = study.ask()
    drawn = [trial.suggest_float(f"x{index}", 0.0, 1.0) for index in range(20)]
    assert len(set(drawn)) == 20
    assert min(drawn) < 0.3 < 0.7 < max(drawn)


SPACE: dict[str, BaseDistribution] = {
    "x": optuna.distributions.FloatDistribution(0.0, 1.0),
    "rate": optuna.distributions.FloatDistribution(1e-4, 1e-1, log=True),
    "kind": optuna.distributions.CategoricalDistribution(("a", "b", "c")),
}
DEPTH = optuna.distributions.IntDistribution(1, 9)


def mixed_history(directions: Sequence[Direction], count: int = 60) -> optuna.Study:
    """Return a study with trials in every state; pruned ones are as the searcher records them."""
    study = optuna.create_study(directions=list(directions), sampler=ReproducibleTPE(3))
    drawn = random.Random(0)
    for _ in range(count):
        params: dict[str, Any] = {"x": drawn.random(), "rate": 10 ** drawn.uniform(-4, -1)}
        params["kind"] = drawn.choice("abc")
        space = dict(SPACE)
        if params["kind"] == "b":
            params["depth"], space["depth"] = drawn.randint(1, 9), DEPTH
        epochs = drawn.randint(1, 7)
        curve = {epoch: drawn.random() for epoch in range(1, epochs + 1)}
        values = [drawn.random() for _ in directions]
        state = drawn.choice(
            [TrialState.COMPLETE] * 3
            + [TrialState.PRUNED] * 3
            + [TrialState.FAIL, TrialState.RUNNING]
        )
        several = len(directions) > 1
        pruned_values = None if several else [curve[epochs]]
        study.add_trial(
            create_trial(
                state=state,
                values={TrialState.COMPLETE: values, TrialState.PRUNED: pruned_values}.get(state),
                params=params,
                distributions=space,
                intermediate_values=curve,
                constraints=(
                    {"epochs_missing": 8.0 - epochs}
                    if several and state == TrialState.PRUNED
                    else {}
                ),
            )
        )
    return study


@pytest.mark.parametrize(
    ("directions", "known", "expected"),
    [
        (
            ["maximize"],
            400,
            [
                {"x": 0.2439992073039256, "rate": 0.0028119498055895987, "kind": "a"},
                {"x": 0.46429128003642384, "rate": 0.011080526520554393, "kind": "a"},
                {"x": 0.19011677271427993, "rate": 0.0016236744526528589, "kind": "a"},
            ],
        ),
        (
            ["maximize"],
            20,
            [
                {"x": 0.552805376481847, "rate": 0.09586503006357357, "kind": "a"},
                {"x": 0.46057927588492764, "rate": 0.011614805120455257, "kind": "a"},
                {"x": 0.5302152394279926, "rate": 0.011646338913609266, "kind": "a"},
            ],
        ),
        (
            ["maximize", "minimize"],
            400,
            [
                {"x": 0.5086530345741682, "rate": 0.04306456394742992, "kind": "c"},
                {"x": 0.2720529503587359, "rate": 0.03543355617685041, "kind": "c"},
                {"x": 0.9954381928765762, "rate": 0.031218345740773968, "kind": "c"},
            ],
        ),
        (
            ["maximize", "minimize"],
            20,
            [
                {"x": 0.27084645047250755, "rate": 0.0037672067581311815, "kind": "c"},
                {"x": 0.15676949302671528, "rate": 0.0039647293608235405, "kind": "a"},
                {"x": 0.9902898615077408, "rate": 0.0013186916723433087, "kind": "c"},
            ],
        ),
    ],
)
def test_draws_from_trials_of_all_states_are_those_of_earlier_versions(
    directions: list[Direction],
    known: int,
    expected: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Otherwise a study that an earlier version began would be resumed with other proposals.
    monkeypatch.setattr(sampler, "_KNOWN", known)
    study = mixed_history(directions)
    # Rounding differs between processors.
    assert [draw(study.ask()) for _ in expected] == [pytest.approx(each) for each in expected]


def test_enqueued_value_out_of_range_does_not_stop_the_draws() -> None:
    study = make(InMemoryStorage(), 3)
    study.enqueue_trial({"x": 1.5})
    first = study.ask()
    with pytest.warns(UserWarning, match="out of range"):
        decided = draw(first)
    tell(study, first, decided)
    for _ in range(11):
        trial = study.ask()
        tell(study, trial, draw(trial))
    assert study.trials[0].params["x"] == 1.5
    assert 0 <= study.trials[-1].params["x"] <= 1


def test_trials_of_two_studies_are_kept_apart() -> None:
    shared = ReproducibleTPE(3)
    drawn = []
    for name, worse in (("one", 0.0), ("two", 1.0)):
        alone = optuna.create_study(study_name=name, direction="maximize", sampler=shared)
        separate = optuna.create_study(direction="maximize", sampler=ReproducibleTPE(3))
        for study in (alone, separate):
            for _ in range(12):
                trial = study.ask()
                study.tell(trial, abs(worse - trial.suggest_float("x", 0.0, 1.0)))
        assert [trial.params for trial in alone.trials] == [t.params for t in separate.trials]
        drawn.append(alone.trials[-1].params["x"])
    assert drawn[0] != drawn[1]


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
    """Compare with the draws of commit 346d551, so that a study of that time resumes unchanged."""
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
        elif number % 13 != 12:  # Otherwise the trial keeps running.
            tell(study, trial, drawn[-1])
    assert drawn[36:] == [
        {"x": 0.43877845067055876, "rate": 0.00011106336395066693, "kind": "a"},
        {"x": 0.32099844085955154, "rate": 0.08818565257763719, "kind": "a"},
        {"x": 0.31804087438889406, "rate": 0.04290216815350638, "kind": "a"},
        {"x": 0.6385283921801387, "rate": 0.013965277693627617, "kind": "a"},
    ]


class TestOptunasSuite(BasicSamplerTestCase, MultiObjectiveSamplerTestCase):
    """Run Optuna's test suite for samplers.

    Its tests of relative sampling are left out, because our sampler draws every parameter
    independently. Its tests of samplers that refuse several objectives are left out too.
    """

    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        return lambda: ReproducibleTPE(0)

    multi_objective_sampler = sampler
