"""Kill drivers at random moments: a resumed study must end like an uninterrupted one."""

import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

import batchcam
from studies.engine.journal import open_journal
from studies.engine.ledger import LEDGER, Ledger, TrialHistory
from studies.engine.optuna_storage import JOURNAL
from tests.studies.conftest import RAY_CPUS, ROOT

pytestmark = [pytest.mark.timeout(900), pytest.mark.faults]

IN_OPTUNA = {
    "completed": TrialState.COMPLETE,
    "stopped": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}


def events(folder: Path) -> int:
    path = folder / LEDGER
    return path.read_bytes().count(b"\n") if path.exists() else 0


def run(command: list[Any], log: Path, environment: dict[str, str], **options: Any) -> Any:
    log.parent.mkdir(exist_ok=True)
    with log.open("a") as file:
        return subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            **options,
        )


def kill_at(
    command: list[Any],
    folder: Path,
    environment: dict[str, str],
    moment: Callable[[subprocess.Popen[bytes]], bool],
) -> bool:
    """Run a study and kill it when `moment` returns true; return False if it ended before."""
    driver = run(command, folder.parent / "log", environment)
    try:
        while driver.poll() is None:
            if moment(driver):
                driver.kill()
                return True
            time.sleep(0.002)
        assert driver.returncode == 0, (folder.parent / "log").read_text()
        return False
    finally:
        driver.kill()
        driver.wait(timeout=30)


def after(folder: Path, count: int, delay: float = 0.0) -> Callable[[Any], bool]:
    """Return a moment that comes `delay` seconds after the ledger has `count` more events."""
    goal = events(folder) + count

    def moment(_: Any) -> bool:
        if events(folder) < goal:
            return False
        time.sleep(delay)
        return True

    return moment


def never(_: Any) -> bool:
    """Return False: a moment that never comes, so that a study runs to its end."""
    return False


def check_whole(folder: Path, num_trials: int, max_epochs: int, study_name: str) -> None:
    """Check the ledger and Optuna's states of a finished study, however often it was killed."""
    lines = [json.loads(line) for line in (folder / LEDGER).read_text().splitlines()]
    seen = Counter(
        (line["number"], line["metrics"]["epoch"]) for line in lines if "metrics" in line
    )
    assert set(seen.values()) == {1}
    for event in ("proposed", "ended"):
        counted = Counter(line["number"] for line in lines if line["event"] == event)
        assert counted == dict.fromkeys(range(num_trials), 1)
    trials = Ledger(folder / LEDGER).trials
    for trial in trials:
        assert [report["epoch"] for report in trial.reports] == list(range(1, trial.epoch + 1))
        assert (trial.state == "completed") == (trial.epoch == max_epochs)
    storage = optuna.storages.JournalStorage(open_journal(folder / JOURNAL))
    told = optuna.load_study(study_name=study_name, storage=storage).trials
    assert [trial.state for trial in told] == [IN_OPTUNA[t.state] for t in trials if t.state]


def outcome(trials: list[TrialHistory]) -> list[tuple[Any, ...]]:
    """Return what must not depend on the moment of a kill."""
    return [(trial.number, trial.params, trial.reports, trial.state) for trial in trials]


def test_studies_killed_at_random_moments_end_as_one_that_was_not(
    environment: dict[str, str], shared_ray: str, tmp_path: Path
) -> None:
    """Kill the driver ten times, the first time while the study starts.

    One trial runs at a time, so that the order of events is fixed. The first two drivers start
    their own Ray, which dies with them. The others join a Ray that outlives them.
    """
    chance = random.Random(0)
    words = ["--trials", 16, "--epochs", 8, "--seconds", 0.1, "--cpus", RAY_CPUS]
    shared = ["--address", shared_ray]
    module = ["-m", "studies.benchmarks.dummy"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert not kill_at([*module, "--out", whole, *words, *shared], whole, environment, never)

    command = [*module, "--out", cut, *words]
    # The first kill comes at a random time, whatever the driver does then.
    due = time.monotonic() + chance.uniform(2, 6)
    assert kill_at(command, cut, environment, lambda _: time.monotonic() > due)
    for kill in range(1, 10):
        moment = after(cut, chance.randint(3, 10), chance.uniform(0, 0.15))
        where = shared if kill > 1 else []
        assert kill_at([*command, *where], cut, environment, moment)
    assert not kill_at([*command, *shared], cut, environment, never)
    check_whole(cut, 16, 8, "dummy")
    assert outcome(Ledger(cut / LEDGER).trials) == outcome(Ledger(whole / LEDGER).trials)


def test_parallel_studies_killed_at_random_moments_lose_nothing(
    environment: dict[str, str], shared_ray: str, tmp_path: Path
) -> None:
    """Run three trials at a time: their order is random, but no event is lost or duplicated."""
    chance = random.Random(1)
    cut = tmp_path / "cut"
    command: list[Any] = ["-m", "studies.benchmarks.dummy", "--out", cut]
    command += ["--trials", 20, "--epochs", 4, "--seconds", 0.1]
    alone, shared = ["--slots", RAY_CPUS], ["--address", shared_ray]
    for where in (alone, shared, shared):
        moment = after(cut, chance.randint(5, 20), chance.uniform(0, 0.15))
        assert kill_at([*command, *where], cut, environment, moment)
    assert not kill_at([*command, *shared], cut, environment, never)
    check_whole(cut, 20, 4, "dummy")


def test_real_study_killed_three_times_ends_as_one_that_was_not(
    environment: dict[str, str], shared_ray: str, tmp_path: Path
) -> None:
    """Kill three drivers. The first one's own Ray dies with it; the others join one that stays."""
    chance = random.Random(2)
    words = ["--num-trials", 4, "--max-epochs", 3, "--min-epochs", 1, "--resolutions", 14]
    script = ROOT / "studies" / "bcpl_sweep.py"
    shared = ["--address", shared_ray]

    def command(study: str, *more: Any) -> list[Any]:
        return [script, "--out", tmp_path, "--study", study, "--cpus-per-trial", 2, *more]

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert not kill_at(command("whole", *words, *shared), whole, environment, never)

    for how in (words, ["--resume", *shared], ["--resume", *shared]):
        moment = after(cut, chance.randint(1, 4), chance.uniform(0, 1))
        assert kill_at(command("cut", *how), cut, environment, moment)
    assert not kill_at(command("cut", "--resume", *shared), cut, environment, never)

    check_whole(cut, 4, 3, "cut")
    timed = ("images_per_second", "seconds")
    both = [Ledger(folder / LEDGER).trials for folder in (whole, cut)]
    for trial in [trial for trials in both for trial in trials]:
        trial.params.pop("trial_id")
        for report in trial.reports:
            for name in timed:
                del report[name]
    assert outcome(both[1]) == outcome(both[0])
    assert batchcam.load(cut / "best" / "knee").metrics["study"] == "cut"
