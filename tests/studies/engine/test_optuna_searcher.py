import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import BaseStorage, InMemoryStorage, RDBStorage
from optuna.trial import FrozenTrial, TrialState
from ray import cloudpickle
from ray.tune.search import Searcher

from studies.benchmarks.dummy import curve, space
from studies.engine.optuna_internals import StoredTrials
from studies.engine.optuna_searcher import EPOCHS_MISSING, OptunaSearcher, enqueue
from studies.engine.optuna_storage import STORAGE_VARIABLE, open_optuna_study
from studies.engine.protocol import OUT_OF_MEMORY, Objective
from studies.engine.sampler import ReproducibleTPE
from studies.objectives import ACCURACY, SIMILARITY

EPOCHS = 4
ONE = (ACCURACY,)
BOTH = (ACCURACY, SIMILARITY)

Open = Callable[[int], tuple[optuna.Study, BaseStorage]]
Make = Callable[..., OptunaSearcher]


@pytest.fixture(
    params=[
        "memory",
        "journal",
        pytest.param("sqlite", marks=pytest.mark.faults),
        pytest.param("postgresql", marks=pytest.mark.faults),
    ]
)
def open_study(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Open]:
    """Return a function that opens the test's study as each new driver does."""
    if request.param == "sqlite":
        monkeypatch.setenv(STORAGE_VARIABLE, f"sqlite:///{tmp_path}/secret.db")
    elif request.param == "postgresql":
        monkeypatch.setenv(STORAGE_VARIABLE, request.getfixturevalue("postgresql").new_database())
    memory = InMemoryStorage()
    opened: list[BaseStorage] = []

    def open_study(num_objectives: int) -> tuple[optuna.Study, BaseStorage]:
        sampler = ReproducibleTPE(0)
        if request.param != "memory":
            study, storage = open_optuna_study(
                tmp_path, "s", ["maximize"] * num_objectives, sampler
            )
            opened.append(storage)
            return study, storage
        study = optuna.create_study(
            study_name="s",
            storage=memory,
            sampler=sampler,
            directions=["maximize"] * num_objectives,
            load_if_exists=True,
        )
        return study, memory

    yield open_study
    for storage in opened:
        if isinstance(storage, RDBStorage):
            storage.remove_session()
            storage.engine.dispose()


@pytest.fixture(params=[ONE, BOTH], ids=["one", "both"])
def objectives(request: pytest.FixtureRequest) -> tuple[Objective, ...]:
    records: tuple[Objective, ...] = request.param
    return records


@pytest.fixture
def make(open_study: Open, objectives: tuple[Objective, ...]) -> Make:
    """Return a function that makes a searcher for the test's study, as each new driver does."""

    def make(num_trials: int = 3, **changes: Any) -> OptunaSearcher:
        study, storage = open_study(len(objectives))
        options = {"objectives": objectives, "max_epochs": EPOCHS, "num_trials": num_trials}
        return OptunaSearcher(study, storage, space, **{**options, **changes})

    return make


@pytest.fixture
def trials(open_study: Open, objectives: tuple[Objective, ...]) -> Callable[[], list[FrozenTrial]]:
    """Return a function that reads Optuna's trials."""
    return lambda: open_study(len(objectives))[0].trials


def suggest(bridge: OptunaSearcher, trial_id: str) -> dict[str, Any]:
    config = bridge.suggest(trial_id)
    assert isinstance(config, dict)
    return config


def run(bridge: OptunaSearcher, trial_id: str, epochs: int = EPOCHS) -> dict[str, Any]:
    """Run a trial of `epochs` epochs by Ray's calls of the searcher; return its configuration."""
    config = suggest(bridge, trial_id)
    for epoch in range(1, epochs + 1):
        result = curve(config["x"], config["y"], epoch)
        # Ray passes the report that stops a trial only to on_trial_complete.
        if epoch < epochs or epochs == EPOCHS:
            bridge.on_trial_result(trial_id, result)
    bridge.on_trial_complete(trial_id, result)
    return config


def test_trial_that_ran_to_its_end_is_complete_with_its_objectives(
    make: Make, trials: Callable[[], list[FrozenTrial]], objectives: tuple[Objective, ...]
) -> None:
    config = run(make(), "a")
    (trial,) = trials()
    last = curve(config["x"], config["y"], EPOCHS)
    assert trial.state == TrialState.COMPLETE
    assert trial.values == [last[each.name] for each in objectives]
    assert (trial.number, trial.params["x"]) == (config["number"], config["x"])
    assert sorted(trial.intermediate_values) == [1, 2, 3, 4]
    assert trial.constraints == {}


def test_trial_that_was_stopped_early_is_pruned_with_every_epoch(
    make: Make, trials: Callable[[], list[FrozenTrial]], objectives: tuple[Objective, ...]
) -> None:
    config = run(make(), "a", epochs=3)
    (trial,) = trials()
    assert trial.state == TrialState.PRUNED
    assert trial.intermediate_values == {
        epoch: curve(config["x"], config["y"], epoch)["val_accuracy"] for epoch in (1, 2, 3)
    }
    assert trial.constraints == ({} if objectives == ONE else {EPOCHS_MISSING: 1})


def test_more_is_proposed_after_many_that_were_stopped(make: Make) -> None:
    bridge = make(num_trials=24)
    configs = [run(bridge, str(n), epochs=EPOCHS if n % 4 == 0 else n % 4) for n in range(24)]
    assert len({config["x"] for config in configs}) == 24
    assert bridge.suggest("more") == Searcher.FINISHED


def test_proposals_do_not_depend_on_how_often_the_study_was_opened(
    make: Make, objectives: tuple[Objective, ...]
) -> None:
    sampler = ReproducibleTPE(0)
    memory = InMemoryStorage()
    study = optuna.create_study(
        storage=memory, directions=["maximize"] * len(objectives), sampler=sampler
    )
    whole = OptunaSearcher(
        study, memory, space, objectives=objectives, max_epochs=EPOCHS, num_trials=16
    )
    for number in range(16):
        epochs = 2 if number % 3 else EPOCHS
        assert run(make(num_trials=16), "a", epochs) == run(whole, str(number), epochs)


def test_trial_that_did_not_end_with_numbers_has_failed(
    make: Make, trials: Callable[[], list[FrozenTrial]]
) -> None:
    good = {"epoch": EPOCHS, "val_accuracy": 0.9, "cam_ssim": 0.9}
    ends: list[tuple[dict[str, Any] | None, bool]] = [
        (good, True),
        (good | {"val_accuracy": math.nan}, False),
        (good | {"val_accuracy": math.inf, "epoch": 2}, False),
        ({"epoch": EPOCHS, "cam_ssim": 0.9}, False),
        ({"val_accuracy": 0.9, "cam_ssim": 0.9}, False),
        ({}, False),
        (None, True),
    ]
    bridge = make(num_trials=9)
    for number, (last, error) in enumerate(ends):
        assert suggest(bridge, "a")["number"] == number
        bridge.on_trial_complete("a", last, error)
    assert [trial.state for trial in trials()] == [TrialState.FAIL] * len(ends)
    run(bridge, "b")


def test_trials_that_a_crash_cut_are_proposed_first_as_they_were(make: Make) -> None:
    first = make(num_trials=5)
    run(first, "a")
    cut = [suggest(first, "b"), suggest(first, "c")]
    second = make(num_trials=5)
    assert [suggest(second, "x"), suggest(second, "y")] == cut
    assert suggest(second, "z")["number"] == 3
    # The same holds if the second driver is killed too.
    third = make(num_trials=5)
    assert [suggest(third, "x"), suggest(third, "y")] == cut


def test_trial_that_was_cut_as_it_was_drawn_is_drawn_as_it_would_have_been(
    make: Make, open_study: Open, objectives: tuple[Objective, ...]
) -> None:
    study, _ = open_study(len(objectives))
    x = study.ask().suggest_float("x", 0.0, 1.0)
    study.ask()
    bridge = make()
    drawn = [suggest(bridge, "a"), suggest(bridge, "b")]
    whole = optuna.create_study(sampler=ReproducibleTPE(0))
    assert drawn == [{**space(whole.ask()), "number": number} for number in (0, 1)]
    assert drawn[0]["x"] == x


def test_points_are_tried_first_and_are_put_in_once(
    make: Make, open_study: Open, objectives: tuple[Objective, ...]
) -> None:
    points = [{"x": 0.5, "y": 0.25}, {"x": 0.125}]
    for _ in range(2):
        enqueue(open_study(len(objectives))[0], points)
    bridge = make()
    configs = [suggest(bridge, trial_id) for trial_id in "ab"]
    assert configs == [{**points[0], "number": 0}, {"x": 0.125, "y": 0.0, "number": 1}]
    enqueue(open_study(len(objectives))[0], points)
    assert suggest(make(), "c") == configs[0]
    study, _ = open_study(len(objectives))
    assert len(study.trials) == 2


def test_more_is_to_come_while_trials_run_and_nothing_after(make: Make) -> None:
    bridge = make(num_trials=2)
    config = suggest(bridge, "a")
    run(bridge, "b")
    assert bridge.suggest("c") is None
    bridge.on_trial_complete("a", curve(config["x"], config["y"], EPOCHS))
    assert bridge.suggest("c") == Searcher.FINISHED
    # The trials of earlier drivers count.
    assert make(num_trials=2).suggest("d") == Searcher.FINISHED
    assert suggest(make(num_trials=3), "d")["number"] == 2


def test_no_more_is_proposed_than_may_live(make: Make) -> None:
    bridge = make(num_trials=3, max_concurrent_trials=lambda: 2)
    first = suggest(bridge, "a")
    suggest(bridge, "b")
    assert bridge.suggest("c") is None
    bridge.on_trial_complete("a", curve(first["x"], first["y"], EPOCHS))
    assert suggest(bridge, "c")["number"] == 2


def test_trial_without_enough_memory_is_proposed_again_until_there_is_no_more(
    make: Make, trials: Callable[[], list[FrozenTrial]]
) -> None:
    shares = [2, 4, None]
    asked = []

    def enlarge(number: int) -> int | None:
        asked.append(number)
        return shares.pop(0)

    bridge = make(num_trials=2, enlarge=enlarge)
    run(bridge, "other")
    first = suggest(bridge, "a")
    for trial_id, following in (("a", "b"), ("b", "c")):
        bridge.on_trial_result(trial_id, curve(first["x"], first["y"], 1))
        bridge.on_trial_complete(trial_id, {"epoch": 1, OUT_OF_MEMORY: True})
        assert trials()[1].state == TrialState.RUNNING
        assert suggest(bridge, following) == first
    bridge.on_trial_complete("c", {"epoch": 0, OUT_OF_MEMORY: True})
    assert trials()[1].state == TrialState.FAIL
    assert trials()[1].intermediate_values == {1: curve(first["x"], first["y"], 1)["val_accuracy"]}
    assert asked == [1, 1, 1]
    assert bridge.suggest("d") == Searcher.FINISHED


def test_trial_that_failed_is_tried_once_more_and_does_not_count(
    make: Make, trials: Callable[[], list[FrozenTrial]]
) -> None:
    bridge = make(num_trials=2)
    failed = suggest(bridge, "a")
    bridge.on_trial_complete("a", error=True)
    for _ in range(2):
        bridge = make(num_trials=2)
        bridge.propose_again(0)
        bridge.propose_again(0)
        assert bridge.num_trials == 3
    again = run(bridge, "b")
    assert again == {**failed, "number": 1}
    run(bridge, "c")
    assert bridge.suggest("d") == Searcher.FINISHED
    bridge = make(num_trials=2)
    bridge.propose_again(0)
    assert bridge.suggest("e") == Searcher.FINISHED
    states = [TrialState.FAIL, TrialState.COMPLETE, TrialState.COMPLETE]
    assert [trial.state for trial in trials()] == states


def test_end_that_is_told_twice_is_told_once(
    make: Make, trials: Callable[[], list[FrozenTrial]]
) -> None:
    bridge = make()
    config = run(bridge, "a", epochs=2)
    before = trials()
    last = curve(config["x"], config["y"], EPOCHS)
    assert bridge.tell(0, last) == "completed"
    assert bridge.is_told(0)
    assert trials() == before


def test_end_whose_telling_was_cut_is_told_again(
    make: Make, open_study: Open, trials: Callable[[], list[FrozenTrial]]
) -> None:
    bridge = make()
    config = suggest(bridge, "a")
    study, storage = open_study(len(bridge._objectives))
    (running,) = study.trials
    StoredTrials(study, storage).take_up(running.number).set_constraint(EPOCHS_MISSING, 1)
    bridge.on_trial_complete("a", curve(config["x"], config["y"], 3))
    (trial,) = trials()
    assert (trial.state, trial.constraints) == (TrialState.PRUNED, {EPOCHS_MISSING: 1})


def test_report_that_comes_again_changes_nothing(
    make: Make, trials: Callable[[], list[FrozenTrial]]
) -> None:
    bridge = make()
    config = suggest(bridge, "a")
    for epoch in (1, 2, 1, 2):
        bridge.on_trial_result("a", curve(config["x"], config["y"], epoch))
    assert sorted(trials()[0].intermediate_values) == [1, 2]


def test_bridge_that_ray_pickles_says_nothing_of_the_storage(make: Make, tmp_path: Path) -> None:
    bridge = make()
    suggest(bridge, "a")
    pickled = cloudpickle.dumps(bridge)  # type: ignore[no-untyped-call]
    for word in (b"secret", b"me:", b"postgresql", b"sqlite", bytes(tmp_path)):
        assert word not in pickled
    bridge.save(str(tmp_path / "saved"))
    assert not (tmp_path / "saved").exists()
