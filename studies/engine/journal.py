"""The journal file of Optuna's study, which stays readable after crashes and failed writes.

The format is that of Optuna's own journal, one JSON object a line, so that Optuna Dashboard and
`optuna.storages.journal.JournalFileBackend` open the file while a study runs. Writers exclude each
other by Optuna's lock file. Only the writing differs: Optuna appends to a line that a crash or a
full disk cut short, and cannot read the file afterwards.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from optuna.storages.journal import (
    BaseJournalBackend,
    JournalFileBackend,
    JournalFileSymlinkLock,
)


class Journal(BaseJournalBackend):
    """Optuna's journal backend for a file, which is created if it does not exist.

    Several processes may use it at a time. A lock that another process holds for 30 seconds counts
    as one of a dead process.
    """

    def __init__(self, path: Path) -> None:
        # The lock is a link to the journal. A relative one would not lead there, and Optuna could
        # not see its age.
        self._path = path.absolute()
        self._reader = JournalFileBackend(str(self._path))
        self._lock = JournalFileSymlinkLock(str(self._path))

    def read_logs(self, log_number_from: int) -> Iterable[dict[str, Any]]:
        """Return the events from this number on; a last line that is cut short is not one."""
        return self._reader.read_logs(log_number_from)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append events as whole lines, and return once they are on the disk.

        First removes a last line that was cut short by an earlier failure.

        Raises:
            OSError: the file cannot be written. The call may be repeated.
        """
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        self._lock.acquire()
        try:
            _drop_torn_line(self._path)
            with self._path.open("ab") as file:
                file.write(lines.encode())
                file.flush()
                os.fsync(file.fileno())
        finally:
            self._lock.release()


def open_journal(path: Path) -> Journal:
    """Open a study's journal for its only driver, after removing what a crash left.

    A crash leaves a lock, and a last line that is cut short. Whoever opens the journal of a running
    study uses :class:`Journal` itself: it would break the driver's lock otherwise.
    """
    Path(f"{path}.lock").unlink(missing_ok=True)
    journal = Journal(path)
    _drop_torn_line(path)
    return journal


def _drop_torn_line(path: Path) -> None:
    """Remove a last line that does not end with a line feed."""
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return
        file.seek(-1, os.SEEK_END)
        if file.read() == b"\n":
            return
    whole = path.read_bytes().rfind(b"\n") + 1
    with path.open("r+b") as file:
        file.truncate(whole)
