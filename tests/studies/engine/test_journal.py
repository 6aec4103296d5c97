import json
import os
import resource
import threading
import time
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults

import optuna
import optuna_dashboard
import pytest
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.testing.pytest_storages import StorageTestCase
from optuna.trial import TrialState

from studies.engine.journal import Journal, open_journal
from studies.engine.optuna_storage import JOURNAL, open_optuna_storage
from studies.engine.retry import retry
from tests.studies.engine.test_optuna_storage import open_study
from tests.studies.engine.test_sampler import draw


def test_journal_that_was_cut_goes_on_from_the_line_before(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    draw(study.ask())
    path = tmp_path / JOURNAL
    whole = path.read_bytes()
    for kept in range(len(whole) - 1, whole[:-1].rfind(b"\n") + 1, -20):
        path.write_bytes(whole[:kept])
        study = open_study(tmp_path)
        (trial,) = study.trials
        assert "rate" in trial.params
        assert "kind" not in trial.params
        study.ask()
        assert len(open_study(tmp_path).trials) == 2


def test_disk_that_is_full_for_a_while_does_not_tear_the_journal(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    for _ in range(20):
        draw(study.ask())
    path = tmp_path / JOURNAL
    size = path.stat().st_size + 10
    room, unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)

    def make_room() -> None:
        for _ in range(1000):
            if path.stat().st_size == size:
                break
            time.sleep(0.01)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, unlimited))

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, unlimited))
    friend = threading.Thread(target=make_room)
    friend.start()
    try:
        assert retry(study.ask, "the journal").number == 20
    finally:
        friend.join()
    assert len(open_study(tmp_path).trials) == 21


def test_lock_of_a_process_that_was_killed_is_removed(tmp_path: Path) -> None:
    open_study(tmp_path)
    (tmp_path / f"{JOURNAL}.lock").symlink_to(tmp_path / JOURNAL)
    done = threading.Thread(target=lambda: open_study(tmp_path).ask(), daemon=True)
    done.start()
    done.join(timeout=20)
    assert not done.is_alive()
    assert len(open_study(tmp_path).trials) == 1


def test_journal_that_is_not_there_is_made(tmp_path: Path) -> None:
    open_journal(tmp_path / "new").append_logs([{"a": 1}])
    assert (tmp_path / "new").read_text() == '{"a":1}\n'


class TestContractOfOptuna(StorageTestCase):
    """Run the whole test suite of Optuna for storages."""

    @pytest.fixture
    def storage(self, tmp_path: Path) -> BaseStorage:
        return JournalStorage(Journal(tmp_path / JOURNAL))


def test_optunas_own_backend_writes_the_same_bytes(tmp_path: Path) -> None:
    logs: list[dict[str, Any]] = [{"op_code": 0, "name": "é", "value": None}, {"op_code": 1}]
    Journal(tmp_path / "ours").append_logs(logs)
    JournalFileBackend(str(tmp_path / "optunas")).append_logs(logs)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "optunas").read_bytes()


def test_optunas_own_backend_reads_and_writes_a_running_study(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    storage = JournalStorage(JournalFileBackend(str(tmp_path / JOURNAL)))
    other = optuna.load_study(study_name="s", storage=storage)
    for number in range(3):
        draw(study.ask())
        assert other.trials[-1] == study.trials[-1]
        other.tell(number, [1.0, 2.0])
        assert study.trials[-1].values == [1.0, 2.0]
    # A last line that is not written completely yet.
    with (tmp_path / JOURNAL).open("ab") as file:
        file.write(b'{"op_code":')
    assert len(other.trials) == 3
    study.ask()
    assert len(other.trials) == 4


def test_optuna_dashboard_follows_a_running_study(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    storage = JournalStorage(JournalFileBackend(str(tmp_path / JOURNAL)))
    application = optuna_dashboard.wsgi(storage)
    draw(study.ask())
    study.tell(0, [1.0, 2.0])
    study.ask()

    def ask(path: str, query: str = "") -> Any:
        environ: dict[str, Any] = {"PATH_INFO": path, "QUERY_STRING": query}
        setup_testing_defaults(environ)
        return json.loads(b"".join(application(environ, lambda *_: None)))

    (summary,) = ask("/api/studies")["study_summaries"]
    trials = ask(f"/api/studies/{summary['study_id']}", "after=0")["trials"]
    assert [trial["state"] for trial in trials] == ["Complete", "Running"]
    assert trials[0]["values"] == [1.0, 2.0]


def test_lock_of_a_living_writer_is_waited_for(tmp_path: Path) -> None:
    journal = Journal(tmp_path / JOURNAL)
    other = JournalFileSymlinkLock(str(tmp_path / JOURNAL))
    other.acquire()
    writer = threading.Thread(target=lambda: journal.append_logs([{"a": 1}]), daemon=True)
    writer.start()
    writer.join(timeout=0.3)
    assert writer.is_alive()
    assert (tmp_path / JOURNAL).read_bytes() == b""
    other.release()
    writer.join(timeout=20)
    assert (tmp_path / JOURNAL).read_text() == '{"a":1}\n'
    assert not os.path.lexists(tmp_path / f"{JOURNAL}.lock")


def test_reader_leaves_the_lock_and_the_unfinished_line_of_the_driver(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    study.ask()
    lock = JournalFileSymlinkLock(str(tmp_path / JOURNAL))
    lock.acquire()
    with (tmp_path / JOURNAL).open("ab") as file:
        file.write(b'{"op_code":')
    reader = optuna.load_study(study_name="s", storage=open_optuna_storage(tmp_path))
    assert [trial.state for trial in reader.trials] == [TrialState.RUNNING]
    assert (tmp_path / JOURNAL).read_bytes().endswith(b'{"op_code":')
    lock.release()  # Raises if the reader removed the lock.


def test_lock_of_a_journal_with_a_relative_path_leads_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Optuna reads the age of a lock from the link's target, and waits forever if it is missing.
    monkeypatch.chdir(tmp_path)
    Path("results").mkdir()
    seen: list[Path] = []

    journal = Journal(Path("results") / JOURNAL)
    fsync = os.fsync

    def look(descriptor: int) -> None:
        seen.append((tmp_path / "results" / f"{JOURNAL}.lock").resolve(strict=True))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", look)
    journal.append_logs([{"a": 1}])
    assert seen == [tmp_path / "results" / JOURNAL]
