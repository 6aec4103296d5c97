import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState
from ray.tune.schedulers import TrialScheduler

from studies.benchmarks.dummy import curve, space
from studies.engine.ledger import Ledger, TrialHistory
from studies.engine.optuna_searcher import OptunaSearcher, enqueue, how_ended
from studies.engine.optuna_storage import open_optuna_study
from studies.engine.protocol import OUT_OF_MEMORY, RESOURCE_MULTIPLIER, Objective
from studies.engine.recovery import recover
from studies.engine.sampler import ReproducibleTPE
from studies.engine.scheduler import ParetoASHA
from studies.objectives import ACCURACY, SIMILARITY

MIN_EPOCHS = 2
EPOCHS = 5
TRIALS = 6
BOTH = (ACCURACY, SIMILARITY)

IN_OPTUNA = {
    "completed": TrialState.COMPLETE,
    "stopped": TrialState.PRUNED,
    "failed": TrialState.FAIL,
    None: TrialState.RUNNING,
}


class Killed(BaseException):
    """Raised in place of killing the driver."""


class Driver:
    """A driver without Ray, which makes the same calls in the same order as one with Ray.

    Args:
        folder: the study's folder.
        objectives: the study's objectives.
        num_trials: the study's number of trials.
        fails: numbers of trials that fail in their second epoch.
        large: numbers of trials that need twice the memory from their second epoch on.
    """

    def __init__(
        self,
        folder: Path,
        objectives: tuple[Objective, ...] = BOTH,
        num_trials: int = TRIALS,
        fails: frozenset[int] = frozenset(),
        large: frozenset[int] = frozenset(),
    ) -> None:
        self.ledger = Ledger(folder / "ledger.jsonl")
        self.study, storage = open_optuna_study(
            folder, "s", [each.direction for each in objectives], ReproducibleTPE(0)
        )
        enqueue(self.study, [{"x": 0.5, "y": 0.5}])
        self.scheduler = ParetoASHA(objectives=BOTH, min_epochs=MIN_EPOCHS, max_epochs=EPOCHS)
        self.bridge = OptunaSearcher(
            self.study,
            storage,
            self._configure,
            objectives=objectives,
            max_epochs=EPOCHS,
            num_trials=num_trials,
            enlarge=self._enlarge,
        )
        self.suggested: list[int] = []
        self._objectives = objectives
        self._fails = fails
        self._large = large

    def recover(self) -> None:
        recover(self.ledger, self.bridge, self.scheduler, EPOCHS)

    def run(self, slots: int) -> None:
        """Run trials, `slots` at a time, until there are no more."""
        running: list[Iterator[None]] = []
        while True:
            while len(running) < slots:
                name = f"of Ray {len(self.suggested)}"
                config = self.bridge.suggest(name)
                if not isinstance(config, dict):
                    break
                self.suggested.append(config["number"])
                running.append(self._live(name, config))
            if not running:
                return
            trial = running.pop(0)
            if next(trial, "ended") != "ended":
                running.append(trial)

    def _live(self, name: str, config: dict[str, Any]) -> Iterator[None]:
        number, ledger = config["number"], self.ledger
        ledger.propose({key: value for key, value in config.items() if key != RESOURCE_MULTIPLIER})
        yield
        result: dict[str, Any] = {}
        for epoch in range(self._history(number).epoch + 1, EPOCHS + 1):
            if epoch == 2 and number in self._fails:
                self.bridge.on_trial_complete(name, error=True)
                ledger.end(number, "failed", "the reason")
                return
            if epoch > 1 and number in self._large and config[RESOURCE_MULTIPLIER] == 1:
                self.bridge.on_trial_complete(name, {"epoch": epoch - 1, OUT_OF_MEMORY: True})
                assert self._history(number).resource_multiplier == 2
                return
            result = curve(config["x"], config["y"], epoch)
            going_on = self._judge(number, result)
            if going_on:
                self.bridge.on_trial_result(name, result)
            ledger.report(number, result)
            if not going_on:
                break
            yield
        self.bridge.on_trial_complete(name, result)
        ledger.end(number, how_ended(result, self._objectives, EPOCHS, error=False))

    def _judge(self, number: int, result: dict[str, Any]) -> bool:
        trial: Any = SimpleNamespace(config={"number": number})
        controller: Any = None
        decision = self.scheduler.on_trial_result(controller, trial, result)
        return decision == TrialScheduler.CONTINUE

    def _configure(self, trial: optuna.Trial) -> dict[str, Any]:
        history = self.ledger.get(trial.number)
        return {**space(trial), RESOURCE_MULTIPLIER: history.resource_multiplier if history else 1}

    def _enlarge(self, number: int) -> int | None:
        share = 2 * self._history(number).resource_multiplier
        self.ledger.enlarge(number, share)
        return share

    def _history(self, number: int) -> TrialHistory:
        history = self.ledger.get(number)
        assert history is not None
        return history


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Count a driver's writes in `count`; kill the driver after write number `last`, if it is set.

    The ledger and Optuna's journal both call fsync once for each line, so that calls are counted.
    """
    found = SimpleNamespace(count=0, last=None)

    def fsync(file: int) -> None:
        del file
        found.count += 1
        if found.count == found.last:
            raise Killed

    monkeypatch.setattr(os, "fsync", fsync)
    return found


def outcome(driver: Driver) -> list[tuple[Any, ...]]:
    return [
        (t.number, t.params, t.reports, t.state, t.resource_multiplier)
        for t in driver.ledger.trials
    ]


def in_optuna(driver: Driver) -> list[tuple[Any, ...]]:
    return [
        (t.state, t.params, t.values, t.intermediate_values, t.constraints)
        for t in driver.study.trials
    ]


def check_agreement(driver: Driver) -> list[FrozenTrial]:
    """Check that the ledger and Optuna agree on every trial; return the running trials."""
    known = {trial.number: trial.state for trial in driver.ledger.trials}
    told = [trial for trial in driver.study.trials if trial.state != TrialState.WAITING]
    assert known.keys() <= {trial.number for trial in told}
    for trial in told:
        assert trial.state == IN_OPTUNA[known.get(trial.number)], trial.number
    return [trial for trial in told if trial.state == TrialState.RUNNING]


def check_whole(driver: Driver) -> None:
    """Check that every trial of a study has ended, and that no event is recorded twice."""
    assert not check_agreement(driver)
    for trial in driver.ledger.trials:
        assert [report["epoch"] for report in trial.reports] == list(range(1, trial.epoch + 1))
        assert (trial.state == "completed") == (trial.epoch == EPOCHS)
    seen = Counter((number, metrics["epoch"]) for number, metrics in driver.ledger.reports)
    assert set(seen.values()) == {1}


def kill(folder: Path, writes: SimpleNamespace, after: int, slots: int, **options: Any) -> bool:
    """Run a driver and kill it after `after` writes; return False if it ended before."""
    folder.mkdir(exist_ok=True)
    writes.count, writes.last = 0, after
    try:
        driver = Driver(folder, **options)
        driver.recover()
        driver.run(slots)
    except Killed:
        return True
    finally:
        writes.last = None
    return False


def resume(folder: Path, slots: int, **options: Any) -> Driver:
    """Recover a study, run it to its end, check both, and return the driver."""
    driver = Driver(folder, **options)
    driver.recover()
    running = [trial.number for trial in check_agreement(driver)]
    driver.run(slots)
    # Interrupted trials come first, in order. Only trials that need more memory come twice.
    assert driver.suggested[: len(running)] == running
    large = options.get("large", frozenset())
    again = [number for number, count in Counter(driver.suggested).items() if count > 1]
    assert set(again) <= large
    check_whole(driver)
    return driver


@pytest.mark.parametrize(
    ("objectives", "num_trials"),
    # The larger study has more trials than the ten random ones that TPE starts with.
    [(BOTH, TRIALS), (BOTH[:1], 13)],
    ids=["both", "one"],
)
def test_study_cut_after_any_write_ends_as_one_that_was_not(
    objectives: tuple[Objective, ...], num_trials: int, tmp_path: Path, writes: SimpleNamespace
) -> None:
    options: dict[str, Any] = {"slots": 1, "objectives": objectives, "num_trials": num_trials}
    (tmp_path / "whole").mkdir()
    whole = resume(tmp_path / "whole", **options)
    count = writes.count
    states = Counter(trial.state for trial in whole.ledger.trials)
    assert states["completed"] >= 1
    assert states["stopped"] >= 2
    for after in range(1, count + 1):
        folder = tmp_path / str(after)
        assert kill(folder, writes, after, **options)
        cut = resume(folder, **options)
        assert outcome(cut) == outcome(whole), after
        assert list(cut.ledger.reports) == list(whole.ledger.reports)
        assert in_optuna(cut) == in_optuna(whole), after


def test_resuming_what_has_ended_does_nothing(tmp_path: Path, writes: SimpleNamespace) -> None:
    del writes
    first = resume(tmp_path, slots=1)
    before = (tmp_path / "ledger.jsonl").read_bytes(), first.study.trials
    again = resume(tmp_path, slots=1)
    assert again.suggested == []
    assert ((tmp_path / "ledger.jsonl").read_bytes(), again.study.trials) == before


def test_parallel_study_cut_after_any_write_loses_nothing(
    tmp_path: Path, writes: SimpleNamespace
) -> None:
    after = 0
    while True:
        after += 1
        folder = tmp_path / str(after)
        if not kill(folder, writes, after, slots=3):
            break
        cut = resume(folder, slots=3)
        assert [trial.number for trial in cut.ledger.trials] == list(range(TRIALS))
    assert after > 60


def test_study_that_is_cut_again_as_it_recovers_loses_nothing(
    tmp_path: Path, writes: SimpleNamespace
) -> None:
    after = 0
    while True:
        after += 3
        folder = tmp_path / str(after)
        if not kill(folder, writes, after, slots=2):
            break
        for again in (1, 2, 3, 5):
            if not kill(folder, writes, again, slots=2):
                break
        cut = resume(folder, slots=2)
        assert [trial.number for trial in cut.ledger.trials] == list(range(TRIALS))
    assert after > 60


def test_trial_that_failed_is_tried_once_more_wherever_the_study_was_cut(
    tmp_path: Path, writes: SimpleNamespace
) -> None:
    options: dict[str, Any] = {"slots": 2, "fails": frozenset({0}), "large": frozenset({2})}
    after = 0
    while True:
        after += 1
        folder = tmp_path / str(after)
        was_cut = kill(folder, writes, after, **options)
        for _ in range(2):  # If the trial fails after the kill, only the second resume retries it.
            last = resume(folder, **options)
        retries = [trial for trial in last.study.trials if "retry_of" in trial.user_attrs]
        (retry,) = retries
        failed = last.study.trials[0]
        assert (retry.user_attrs, retry.params) == ({"retry_of": 0}, failed.params)
        assert failed.state == TrialState.FAIL
        assert retry.state in (TrialState.COMPLETE, TrialState.PRUNED)
        states = Counter(trial.state == "failed" for trial in last.ledger.trials)
        assert states == {True: 1, False: TRIALS}
        if not was_cut:
            break
    assert after > 60


def test_trial_keeps_the_memory_that_it_was_given(tmp_path: Path, writes: SimpleNamespace) -> None:
    del writes
    driver = resume(tmp_path, slots=1, large=frozenset({0}))
    assert driver.suggested[:3] == [0, 0, 1]
    assert [trial.resource_multiplier for trial in driver.ledger.trials] == [2, 1, 1, 1, 1, 1]
    assert Ledger(tmp_path / "ledger.jsonl").trials[0].resource_multiplier == 2


def test_trial_that_was_to_be_stopped_when_the_driver_died_is_stopped(
    tmp_path: Path, writes: SimpleNamespace
) -> None:
    del writes
    driver = Driver(tmp_path)
    for name, metrics in (("a", (0.9, 0.9)), ("b", (0.5, 0.5)), ("c", (0.1, 0.1))):
        config = driver.bridge.suggest(name)
        assert isinstance(config, dict)
        driver.ledger.propose(
            {key: value for key, value in config.items() if key != RESOURCE_MULTIPLIER}
        )
        report = {
            "epoch": MIN_EPOCHS,
            **dict(zip((each.name for each in BOTH), metrics, strict=True)),
        }
        going_on = driver._judge(config["number"], report)
        driver.ledger.report(config["number"], report)
        assert going_on == (name == "a")
    again = Driver(tmp_path)
    again.recover()
    assert [trial.number for trial in check_agreement(again)] == [0]
    assert [trial.state for trial in again.ledger.trials] == [None, "stopped", "stopped"]
    assert again.study.trials[2].intermediate_values == {MIN_EPOCHS: 0.1}


def test_trial_whose_last_report_is_there_has_ended(
    tmp_path: Path, writes: SimpleNamespace
) -> None:
    del writes
    driver = Driver(tmp_path)
    config = driver.bridge.suggest("a")
    assert isinstance(config, dict)
    driver.ledger.propose(
        {key: value for key, value in config.items() if key != RESOURCE_MULTIPLIER}
    )
    for epoch in range(1, EPOCHS + 1):
        driver.ledger.report(0, curve(config["x"], config["y"], epoch))
    again = Driver(tmp_path)
    again.recover()
    assert check_agreement(again) == []
    assert again.ledger.trials[0].state == "completed"
    values = curve(config["x"], config["y"], EPOCHS)
    assert again.study.trials[0].values == [values[each.name] for each in BOTH]


def test_number_that_was_none_is_a_failure_and_is_tried_once_more(
    tmp_path: Path, writes: SimpleNamespace
) -> None:
    del writes
    driver = Driver(tmp_path)
    config = driver.bridge.suggest("a")
    assert isinstance(config, dict)
    driver.ledger.propose(
        {key: value for key, value in config.items() if key != RESOURCE_MULTIPLIER}
    )
    driver.ledger.report(0, curve(0.5, 0.5, 1) | {"cam_ssim": float("nan")})
    again = Driver(tmp_path)
    again.recover()
    assert check_agreement(again) == []
    assert again.ledger.trials[0].state == "failed"
    (failed, retry) = again.study.trials
    assert (failed.state, retry.state) == (TrialState.FAIL, TrialState.WAITING)
    assert again.bridge.num_trials == TRIALS + 1


@pytest.mark.parametrize(
    ("error", "tried_again"),
    [
        ("batchcam.errors.DivergedError: training diverged in epoch 1", False),
        ("OSError: the node was lost", True),
    ],
)
def test_trial_that_diverged_is_not_tried_again(
    tmp_path: Path, error: str, tried_again: bool
) -> None:
    driver = Driver(tmp_path)
    config = driver.bridge.suggest("a")
    assert isinstance(config, dict)
    driver.ledger.propose(
        {key: value for key, value in config.items() if key != RESOURCE_MULTIPLIER}
    )
    driver.bridge.on_trial_complete("a", error=True)
    driver.ledger.end(0, "failed", error)
    again = Driver(tmp_path)
    again.recover()
    retries = [trial for trial in again.study.trials if "retry_of" in trial.user_attrs]
    assert bool(retries) == tried_again
