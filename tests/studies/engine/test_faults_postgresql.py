import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import InMemoryStorage, RDBStorage
from optuna.trial import TrialState

from studies.benchmarks.dummy import curve, space
from studies.engine import retry as patience
from studies.engine.ledger import LEDGER, Ledger
from studies.engine.optuna_searcher import OptunaSearcher
from studies.engine.optuna_storage import STORAGE_VARIABLE, open_optuna_study
from studies.engine.retry import StorageLostError
from studies.engine.sampler import ReproducibleTPE
from studies.objectives import ACCURACY, SIMILARITY
from tests.studies.conftest import RAY_CPUS, PostgreSQL
from tests.studies.engine.test_crash import IN_OPTUNA, after
from tests.studies.engine.test_crash import run as start

pytestmark = pytest.mark.faults

EPOCHS = 4
TRIALS = 5
SECONDS_AWAY = 5


@pytest.fixture
def make(
    postgresql: PostgreSQL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], OptunaSearcher]]:
    monkeypatch.setenv(STORAGE_VARIABLE, postgresql.new_database())
    opened = []

    def make() -> OptunaSearcher:
        study, storage = open_optuna_study(tmp_path, "s", ["maximize"] * 2, ReproducibleTPE(0))
        opened.append(storage)
        return OptunaSearcher(
            study,
            storage,
            space,
            objectives=(ACCURACY, SIMILARITY),
            max_epochs=EPOCHS,
            num_trials=TRIALS,
        )

    yield make
    for storage in opened:
        assert isinstance(storage, RDBStorage)
        storage.remove_session()
        storage.engine.dispose()


def steps(bridge: OptunaSearcher) -> Iterator[dict[str, Any]]:
    """Run trials without Ray, and yield before each call of the searcher.

    Yields the configuration after a proposal, and an empty dictionary otherwise.
    """
    for number in range(TRIALS):
        yield {}
        config = bridge.suggest("a")
        assert isinstance(config, dict)
        yield config
        last = EPOCHS if number % 2 else 2
        for epoch in range(1, last + 1):
            result = curve(config["x"], config["y"], epoch)
            if epoch < last:
                bridge.on_trial_result("a", result)
                yield {}
        bridge.on_trial_complete("a", result, error=number == 3)


def run(bridge: OptunaSearcher) -> list[dict[str, Any]]:
    return [config for config in steps(bridge) if config]


def away(server: PostgreSQL) -> threading.Thread:
    """Stop the server; return the thread that starts it again after a while."""
    server.stop()

    def start() -> None:
        time.sleep(SECONDS_AWAY)
        server.start()

    friend = threading.Thread(target=start)
    friend.start()
    return friend


@pytest.mark.parametrize("moment", [0, 1, 2, 7, 13])
def test_database_that_is_away_is_waited_for(
    moment: int,
    make: Callable[[], OptunaSearcher],
    postgresql: PostgreSQL,
    caplog: pytest.LogCaptureFixture,
) -> None:
    bridge, configs = make(), []
    for step, config in enumerate(steps(bridge)):
        configs += [config] if config else []
        if step == moment:
            friend = away(postgresql)
    friend.join()
    gone, back = (
        record.getMessage() for record in caplog.records if record.name.startswith("studies")
    )
    assert gone.startswith("Optuna's storage cannot be used (")
    assert "secret" not in gone
    assert back.startswith("Optuna's storage is back after ")

    trials = make()._study.trials
    assert [trial.number for trial in trials] == list(range(TRIALS))
    assert [trial.state for trial in trials] == [
        TrialState.PRUNED,
        TrialState.COMPLETE,
        TrialState.PRUNED,
        TrialState.FAIL,
        TrialState.PRUNED,
    ]
    assert [sorted(trial.intermediate_values) for trial in trials] == [
        [1, 2],
        [1, 2, 3, 4],
        [1, 2],
        [1, 2, 3],
        [1, 2],
    ]
    # The proposals are those of a study whose storage was never away.
    memory = InMemoryStorage()
    study = optuna.create_study(
        storage=memory, directions=["maximize"] * 2, sampler=ReproducibleTPE(0)
    )
    assert configs == run(
        OptunaSearcher(
            study,
            memory,
            space,
            objectives=(ACCURACY, SIMILARITY),
            max_epochs=EPOCHS,
            num_trials=TRIALS,
        )
    )


def test_database_that_stays_away_ends_the_study_to_be_resumed(
    make: Callable[[], OptunaSearcher], postgresql: PostgreSQL, monkeypatch: pytest.MonkeyPatch
) -> None:
    bridge = make()
    config = bridge.suggest("a")
    postgresql.stop()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(patience, "RETRY_SECONDS", 1.0)
            with pytest.raises(StorageLostError, match=r"Optuna's storage .*--resume") as lost:
                bridge.on_trial_result("a", curve(0.5, 0.5, 1))
            assert "secret" not in str(lost.value)
    finally:
        postgresql.start()
    again = make()
    assert again.suggest("b") == config


def test_database_that_comes_back_late_is_opened(
    make: Callable[[], OptunaSearcher], postgresql: PostgreSQL
) -> None:
    friend = away(postgresql)
    bridge = make()
    friend.join()
    assert bridge.suggest("a") is not None


def test_study_whose_database_is_away_for_20_s_goes_on(
    postgresql: PostgreSQL, environment: dict[str, str], shared_ray: str, tmp_path: Path
) -> None:
    address, folder = postgresql.new_database(), tmp_path / "study"
    command = ["-m", "studies.benchmarks.dummy", "--out", folder, "--trials", 6, "--epochs", 6]
    command += ["--seconds", 0.2, "--cpus", RAY_CPUS, "--address", shared_ray]
    driver = start(command, tmp_path / "log", environment | {STORAGE_VARIABLE: address})
    moment = after(folder, 8)
    try:
        while not moment(driver):
            assert driver.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.05)
        postgresql.stop()
        try:
            time.sleep(20)
            assert driver.poll() is None, (tmp_path / "log").read_text()
        finally:
            postgresql.start()
        assert driver.wait(timeout=300) == 0, (tmp_path / "log").read_text()
    finally:
        driver.kill()
    log = (tmp_path / "log").read_text()
    assert "Optuna's storage cannot be used (" in log
    assert "Optuna's storage is back after " in log

    trials = Ledger(folder / LEDGER).trials
    assert [trial.number for trial in trials] == list(range(6))
    for trial in trials:
        assert [report["epoch"] for report in trial.reports] == list(range(1, trial.epoch + 1))
    storage = RDBStorage(address)
    told = optuna.load_study(study_name="dummy", storage=storage).trials
    assert [trial.state for trial in told] == [IN_OPTUNA[str(trial.state)] for trial in trials]
    storage.remove_session()
    storage.engine.dispose()
