from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from batchcam.errors import ConfigError
from studies.engine import optuna_storage as proposals
from studies.engine.optuna_storage import (
    JOURNAL,
    STORAGE_VARIABLE,
    open_optuna_study,
    storage_kind,
)
from studies.engine.retry import StorageLostError
from studies.engine.sampler import ReproducibleTPE
from tests.studies.conftest import PostgreSQL


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
    with pytest.raises(ConfigError, match=r"driver is not installed.*\.\[postgresql\]") as refused:
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
