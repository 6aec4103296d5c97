"""Check the engine on a trainable without images, in a study that was killed and resumed."""

import json
import math
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from studies.engine.halving import ParetoHalving
from studies.engine.journal import open_journal
from studies.engine.ledger import LEDGER, Ledger, TrialHistory
from studies.engine.optuna_storage import JOURNAL
from studies.engine.protocol import gains, has_diverged
from tests.studies.conftest import ROOT
from tests.studies.engine import descent

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.faults]

IN_OPTUNA = {
    "completed": TrialState.COMPLETE,
    "stopped": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}


def drive(folder: Path, address: str, environment: dict[str, str]) -> "subprocess.Popen[bytes]":
    """Start a driver of the study."""
    with (folder.parent / "log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", descent.__name__, str(folder), address],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


@pytest.fixture(scope="module")
def folder(
    shared_ray: str, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return the folder of a study whose driver was killed, and that another driver resumed."""
    folder = tmp_path_factory.mktemp("generic") / "study"
    ledger = folder / LEDGER
    driver = drive(folder, shared_ray, environment)
    try:
        while not ledger.exists() or ledger.read_bytes().count(b"\n") < 12:
            assert driver.poll() is None, (folder.parent / "log").read_text()
            time.sleep(0.005)
        driver.send_signal(signal.SIGKILL)
        assert driver.wait(timeout=30) == -signal.SIGKILL
    finally:
        driver.kill()
    before = ledger.read_bytes()
    assert any(trial.state is None for trial in Ledger(ledger).trials)
    again = drive(folder, shared_ray, environment)
    try:
        assert again.wait(timeout=120) == 0, (folder.parent / "log").read_text()
    finally:
        again.kill()
    # Resuming appends to the ledger, and removes at most an incomplete last line.
    assert ledger.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    return folder


@pytest.fixture(scope="module")
def trials(folder: Path) -> list[TrialHistory]:
    return Ledger(folder / LEDGER).trials


@pytest.fixture(scope="module")
def study(folder: Path) -> optuna.Study:
    storage = optuna.storages.JournalStorage(open_journal(folder / JOURNAL))
    return optuna.load_study(study_name=descent.SEARCH_NAME, storage=storage)


def test_ledger_has_every_number_of_every_epoch_once(trials: list[TrialHistory]) -> None:
    assert [trial.number for trial in trials] == list(range(descent.TRIALS))
    for trial in trials:
        # The ledger has none of the values that Ray adds to results.
        expected = [descent.metrics(trial.params, epoch + 1) for epoch in range(trial.epoch)]
        assert repr(trial.reports) == repr(expected)  # NaN is not equal to itself.
        assert list(trial.params) == ["rate", "decay", "trial_id", "number"]
    assert any(math.isnan(trial.reports[-1]["undefined"]) for trial in trials if trial.reports)


def test_early_stopping_followed_the_directions(folder: Path, trials: list[TrialHistory]) -> None:
    halving = ParetoHalving(min_epochs=1, max_epochs=descent.EPOCHS)
    stopped = {
        number
        for number, report in Ledger(folder / LEDGER).reports
        if not halving.judge(
            number, int(report["epoch"]), tuple(gains([report], descent.OBJECTIVES)[0])
        )
    }
    assert stopped
    assert {trial.number for trial in trials if trial.state == "stopped"} == stopped
    completed = [trial for trial in trials if trial.state == "completed"]
    assert completed
    assert all(trial.epoch == descent.EPOCHS for trial in completed)


def test_trial_that_diverged_was_not_tried_again(
    trials: list[TrialHistory], study: optuna.Study
) -> None:
    failed = [trial for trial in trials if trial.state == "failed"]
    assert failed[0].number == 0
    assert all(has_diverged(trial.error) for trial in failed)
    assert not any(trial.user_attrs for trial in study.trials)


def test_optuna_knows_directions_states_and_values(
    trials: list[TrialHistory], study: optuna.Study
) -> None:
    assert [each.name for each in study.directions] == ["MINIMIZE", "MAXIMIZE", "MAXIMIZE"]
    assert [trial.state for trial in study.trials] == [IN_OPTUNA[str(t.state)] for t in trials]
    for told, trial in zip(study.trials, trials, strict=True):
        assert told.params.items() <= trial.params.items()
        assert told.intermediate_values == {
            int(report["epoch"]): report["gap"] for report in trial.reports
        }
        if trial.state == "completed":
            last = trial.reports[-1]
            assert told.values == [last["gap"], last["gentleness"], last["thrift"]]


def test_pareto_front_is_that_of_the_directions(
    trials: list[TrialHistory], study: optuna.Study
) -> None:
    def beats(one: TrialHistory, other: TrialHistory) -> bool:
        a, b = one.reports[-1], other.reports[-1]
        pairs = [(-a["gap"], -b["gap"]), (a["gentleness"], b["gentleness"])]
        pairs.append((a["thrift"], b["thrift"]))
        return all(x >= y for x, y in pairs) and any(x > y for x, y in pairs)

    completed = [trial for trial in trials if trial.state == "completed"]
    front = {t.number for t in completed if not any(beats(other, t) for other in completed)}
    assert {trial.number for trial in study.best_trials} == front


def test_checkpoints_are_kept_under_the_ids(folder: Path, trials: list[TrialHistory]) -> None:
    for trial in trials:
        saved = sorted((folder / "checkpoints" / trial.params["trial_id"]).glob("*.pt"))
        if not saved:
            assert trial.epoch == 0
            continue
        history = json.loads(saved[-1].read_text())
        assert repr(history[: trial.epoch]) == repr(trial.reports)
        assert all(b["epoch"] == a["epoch"] + 1 for a, b in pairwise(history))
