import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from batchcam.errors import ConfigError
from studies.engine import optuna_storage as proposals
from studies.engine.optuna_storage import (
    JOURNAL,
    STORAGE_VARIABLE,
    open_journal,
    open_optuna_study,
    storage_kind,
)
from studies.engine.retry import StorageLostError, retry
from studies.engine.sampler import ReproducibleTPE
from tests.studies.conftest import PostgreSQL
from tests.studies.engine.test_sampler import draw


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("", "journal"),
        ("sqlite:///a/file", "sqlite"),
        ("postgresql+psycopg://me:secret@host:5432/database", "postgresql"),
    ],
)
def test_kind_of_storage_is_told_without_its_address(
    address: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(STORAGE_VARIABLE, address)
    assert storage_kind() == kind


@pytest.mark.parametrize(
    "address",
    [
        "me:secret@host/database",
        "postgresql+psycopg//secret@host",
        "postgres://me:secret@host/database",
    ],
)
def test_malformed_address_is_refused_without_repeating_it(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(STORAGE_VARIABLE, address)
    with pytest.raises(ConfigError, match="is no database address; it looks like") as refused:
        storage_kind()
    assert "secret" not in str(refused.value)
    assert refused.value.__suppress_context__


def test_database_without_its_driver_is_refused_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(STORAGE_VARIABLE, "postgresql+pg8000://me:secret@host/database")
    with pytest.raises(ConfigError, match=r"driver is not installed.*psycopg\[binary\]") as refused:
        open_optuna_study(tmp_path, "s", ["maximize"] * 2, ReproducibleTPE(0))
    assert "secret" not in str(refused.value)


def test_database_without_an_encoding_is_refused_with_the_remedy(
    postgresql: PostgreSQL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(STORAGE_VARIABLE, postgresql.new_database("SQL_ASCII"))
    with pytest.raises(ConfigError, match=r"SQL_ASCII.*createdb --encoding=UTF8") as refused:
        open_optuna_study(tmp_path, "s", ["maximize"] * 2, ReproducibleTPE(0))
    assert "secret" not in str(refused.value)


def test_database_that_does_not_answer_is_given_up_without_its_address(
    tmp_path: Path, free_port: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proposals, "_OPEN_SECONDS", 0.5)
    address = f"postgresql+psycopg://me:secret@127.0.0.1:{free_port()}/database"
    monkeypatch.setenv(STORAGE_VARIABLE, address)
    with pytest.raises(StorageLostError, match="Optuna's storage cannot be used") as lost:
        open_optuna_study(tmp_path, "s", ["maximize"] * 2, ReproducibleTPE(0))
    assert "secret" not in str(lost.value)


def open_study(folder: Path, seed: int = 0) -> optuna.Study:
    study, _ = open_optuna_study(folder, "s", ["maximize"] * 2, ReproducibleTPE(seed))
    return study


def test_study_is_made_once_and_opened_again(tmp_path: Path) -> None:
    open_study(tmp_path).ask()
    again = open_study(tmp_path)
    assert (tmp_path / JOURNAL).is_file()
    assert [trial.state for trial in again.trials] == [TrialState.RUNNING]
    assert again.directions == [optuna.study.StudyDirection.MAXIMIZE] * 2


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


def test_optunas_own_backend_reads_the_journal_while_it_is_written(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    for _ in range(3):
        study.tell(study.ask(), [0.5, 0.5])
    theirs = optuna.load_study(
        study_name="s", storage=JournalStorage(JournalFileBackend(str(tmp_path / JOURNAL)))
    )
    assert len(theirs.trials) == 3
    study.tell(study.ask(), [0.7, 0.1])
    assert theirs.trials[-1].values == [0.7, 0.1]
