"""Where Optuna's study is kept, and a sampler whose choices survive a crash.

By default a journal file beside the results, which Optuna Dashboard can open while the study runs;
with `BATCHCAM_OPTUNA_STORAGE` a database. The address may hold a password, so it comes from the
environment only, and is written nowhere.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy.exc
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import (
    BaseJournalBackend,
    JournalFileBackend,
    JournalFileSymlinkLock,
)
from sqlalchemy.engine import make_url

from batchcam.errors import ConfigError
from studies.engine.protocol import Direction
from studies.engine.retry import retry

JOURNAL = "optuna.journal"
STORAGE_VARIABLE = "BATCHCAM_OPTUNA_STORAGE"

_OPEN_SECONDS = 20.0


STORAGE_ERRORS = (OSError, optuna.exceptions.StorageInternalError, sqlalchemy.exc.DBAPIError)
"""What a storage raises that is gone for a while."""


def storage_kind() -> str:
    """Return "journal", or the kind of database that the environment names, without its address.

    Raises:
        ConfigError: the address cannot be one.
    """
    address = os.environ.get(STORAGE_VARIABLE)
    if not address:
        return "journal"
    try:
        url = make_url(address)
        url.get_dialect()  # Raises where there is no such kind.
        return url.get_backend_name()
    except sqlalchemy.exc.ArgumentError:
        # Not the address itself, which may hold a password.
        raise ConfigError(
            f"{STORAGE_VARIABLE} is no database address; it looks like "
            "postgresql+psycopg://user:password@host/database or sqlite:///file."
        ) from None


def open_optuna_study(
    folder: Path,
    study_name: str,
    directions: Sequence[Direction],
    sampler: optuna.samplers.BaseSampler,
) -> tuple[optuna.Study, BaseStorage]:
    """Open Optuna's study of this name, or create it with these directions of its objectives.

    Returns the study and the storage that it is kept in.

    Raises:
        ConfigError: the database's driver is missing, its address is wrong, or its encoding.
        StorageLostError: it does not answer.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def open_study() -> tuple[optuna.Study, BaseStorage]:
        storage = open_optuna_storage(folder)
        study = optuna.create_study(
            study_name=study_name,
            storage=storage,
            sampler=sampler,
            directions=list(directions),
            load_if_exists=True,
        )
        return study, storage

    return retry(open_study, "Optuna's storage", STORAGE_ERRORS, patience=_OPEN_SECONDS)


def open_optuna_storage(folder: Path) -> BaseStorage:
    """Open what Optuna's study is kept in: a journal in the folder, or the database that is named.

    Raises:
        ConfigError: the database's driver is missing, or its encoding is none.
    """
    kind = storage_kind()
    if kind == "journal":
        return JournalStorage(open_journal(folder / JOURNAL))
    try:
        # Pre-ping: a connection that died while the server was away is replaced, not used.
        return RDBStorage(os.environ[STORAGE_VARIABLE], engine_kwargs={"pool_pre_ping": True})
    except ImportError as error:
        raise ConfigError(
            f"{STORAGE_VARIABLE} names a {kind} database, whose driver is not installed; "
            "for PostgreSQL: pip install 'psycopg[binary]'."
        ) from error
    except TypeError as error:
        # Where a database says nothing of its encoding, psycopg hands out bytes for texts.
        if kind != "postgresql":
            raise
        raise ConfigError(
            f"{STORAGE_VARIABLE} names a database whose encoding is SQL_ASCII, which is none; name "
            "one that was made by createdb --encoding=UTF8 --template=template0."
        ) from error


class Journal(BaseJournalBackend):
    """Optuna's journal file, which stays readable if a write fails halfway, as on a full disk.

    Optuna's own backend would append to the torn line, and could not read the file afterwards. The
    file has Optuna's format.

    Args:
        path: the file; created if it does not exist.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = JournalFileSymlinkLock(str(path))
        self._file = JournalFileBackend(str(path), lock_obj=self._lock)

    def read_logs(self, log_number_from: int) -> Iterable[dict[str, Any]]:
        """Return the events from a number on."""
        return self._file.read_logs(log_number_from)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append events, after removing the torn line of an earlier attempt."""
        if _torn(self._path):
            self._lock.acquire()
            try:
                _drop_torn(self._path)
            finally:
                self._lock.release()
        self._file.append_logs(logs)


def _torn(path: Path) -> bool:
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


def _drop_torn(path: Path) -> None:
    whole = path.read_bytes().rfind(b"\n") + 1
    with path.open("r+b") as file:
        file.truncate(whole)


def open_journal(path: Path) -> Journal:
    """Open a journal after removing what a crash left: a torn line, and a lock."""
    Path(f"{path}.lock").unlink(missing_ok=True)
    journal = Journal(path)
    if _torn(path):
        _drop_torn(path)
    return journal
