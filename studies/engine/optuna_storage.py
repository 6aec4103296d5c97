"""Open the storage of Optuna's study.

The storage is a journal file beside the results, or a database if `BATCHCAM_OPTUNA_STORAGE` names
one. The address may hold a password, so it comes from the environment only, and is written nowhere.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import optuna
import sqlalchemy.exc
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from sqlalchemy.engine import make_url

from batchcam.errors import ConfigError
from studies.engine.journal import Journal, open_journal
from studies.engine.protocol import Direction
from studies.engine.retry import retry

JOURNAL = "optuna.journal"
STORAGE_VARIABLE = "BATCHCAM_OPTUNA_STORAGE"

_OPEN_SECONDS = 20.0


STORAGE_ERRORS = (OSError, optuna.exceptions.StorageInternalError, sqlalchemy.exc.DBAPIError)
"""What a storage raises that is temporarily gone."""


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

    For the study's only driver: a lock and a torn line that a crash left in the journal are
    removed. Returns the study and its storage.

    Raises:
        ConfigError: the database's driver is missing, or its address or encoding is wrong.
        StorageLostError: the database does not answer.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def open_study() -> tuple[optuna.Study, BaseStorage]:
        if storage_kind() == "journal":
            open_journal(folder / JOURNAL)
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
    """Open the storage of Optuna's study: the journal in the folder, or the database.

    A driver may be using the storage at the same time.

    Raises:
        ConfigError: the database's driver is missing, or its encoding is wrong.
    """
    kind = storage_kind()
    if kind == "journal":
        return JournalStorage(Journal(folder / JOURNAL))
    try:
        # Pre-ping: a connection that died while the server was away is replaced, not used.
        return RDBStorage(os.environ[STORAGE_VARIABLE], engine_kwargs={"pool_pre_ping": True})
    except ImportError as error:
        raise ConfigError(
            f"{STORAGE_VARIABLE} names a {kind} database, whose driver is not installed; "
            "for PostgreSQL: name postgresql+psycopg://…, and run pip install '.[postgresql]' "
            "in a checkout of batchcam."
        ) from error
    except TypeError as error:
        # Where a database says nothing of its encoding, psycopg hands out bytes for texts.
        if kind != "postgresql":
            raise
        raise ConfigError(
            f"{STORAGE_VARIABLE} names a database whose encoding is SQL_ASCII, which is none; name "
            "one that was made by createdb --encoding=UTF8 --template=template0."
        ) from error
