"""A replica of a study's ledger and journal in storage that outlives the driver's machine.

Object stores cannot append to an object. Each snapshot is one more object, which holds what was
added to both files since the last snapshot, so that both are of the same moment. Every `_PARTS`
snapshots, one holds both files whole, and the older ones are deleted.
"""

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.fs
from ray import tune
from ray.tune.experiment import Trial

from batchcam.errors import ConfigError
from studies.engine.ledger import LEDGER
from studies.engine.optuna_storage import JOURNAL
from studies.engine.retry import retry
from studies.engine.storage import cannot_keep, open_storage

FILES = (LEDGER, JOURNAL)

_REPORTS_SECONDS = 5.0
"""How old the replica may be while there are reports only; checkpoints hold these too."""

_PARTS = 100
"""Snapshots until one is written that holds both files whole."""

Part = dict[str, tuple[int, str]]
"""For each file, the offset in bytes, and the text from there on."""

_NAME = re.compile(r"(\d{8})\.(whole|part)\.json")


class Replica(tune.Callback):
    """Keeps the replica up to date; on construction, restores local files that are behind it.

    Local files are missing or behind on a new machine, for example. The replica is up to date
    whenever a trial starts or ends, and at most a few seconds behind in between: the epochs that
    it lacks are in the trials' checkpoints, and are reported again from there.

    Args:
        folder: the study's folder on the driver's machine.
        place: the folder or URI of the replica.

    Raises:
        ConfigError: local study and replica have diverged, the replica is damaged, or `place`
            cannot be read.
        StorageLostError: raised by any method if `place` could not be written for a long time.
    """

    def __init__(self, folder: Path, place: str) -> None:
        self._folder = folder
        self._place = place
        self._fs, self._root = _open(place)
        self._written = 0
        self._sizes = dict.fromkeys(FILES, 0)
        self._due = 0.0
        self._restore()

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing: Ray pickles its callbacks, and this one holds keys of object stores."""
        return {}

    def flush(self) -> None:
        """Copy what was added since the last snapshot; return once it is stored."""
        whole = self._written % _PARTS == 0
        if whole:
            self._sizes = dict.fromkeys(FILES, 0)
        added = {name: self._whole_lines(name, self._sizes[name]) for name in FILES}
        if any(added.values()):
            content = {
                name: {"from": self._sizes[name], "text": text.decode()}
                for name, text in added.items()
            }
            name = f"{self._written:08d}.{'whole' if whole else 'part'}.json"
            retry(lambda: self._put(name, json.dumps(content).encode()), self._place)
            self._written += 1
            for file, text in added.items():
                self._sizes[file] += len(text)
        self._due = time.monotonic() + _REPORTS_SECONDS

    def on_trial_start(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Copy a proposal before there is a checkpoint of its trial."""
        del iteration, trials, trial, info
        self.flush()

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """Copy the reports of the last seconds."""
        del iteration, trials, trial, result, info
        if time.monotonic() >= self._due:
            self.flush()

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Copy the end of a trial."""
        del iteration, trials, trial, info
        self.flush()

    def on_trial_error(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Copy the failure of a trial."""
        del iteration, trials, trial, info
        self.flush()

    def _whole_lines(self, name: str, begin: int = 0) -> bytes:
        """Return a file's content from an offset on, without an unfinished last line."""
        path = self._folder / name
        if not path.exists():
            return b""
        with path.open("rb") as file:
            file.seek(begin)
            content = file.read()
        return content[: content.rfind(b"\n") + 1]

    def _put(self, name: str, content: bytes) -> None:
        self._fs.create_dir(self._root)
        partial = f"{self._root}/.{name}.partial"
        with self._fs.open_output_stream(partial) as file:
            file.write(content)
        self._fs.move(partial, f"{self._root}/{name}")
        if ".whole." in name:
            for older in self._names():
                if older < name:
                    self._fs.delete_file(f"{self._root}/{older}")

    def _names(self) -> list[str]:
        selector = pyarrow.fs.FileSelector(self._root, allow_not_found=True)
        names = [info.base_name for info in self._fs.get_file_info(selector)]
        return sorted(name for name in names if _NAME.fullmatch(name))

    def _restore(self) -> None:
        """Restore the local files where they are behind the replica."""
        try:
            names = self._names()
            parts = [self._read(name) for name in names]
        except OSError as error:
            raise cannot_keep(self._place, error) from error
        if not names:
            return
        self._written = int(names[-1][:8]) + 1
        # The next snapshot holds both files whole, since they may be ahead of the replica.
        self._written += -self._written % _PARTS
        replicas = {name: _joined(self._place, name, names, parts) for name in FILES}
        local = {name: self._whole_lines(name) for name in FILES}
        if all(replicas[name].startswith(local[name]) for name in FILES):
            self._folder.mkdir(parents=True, exist_ok=True)
            for name in FILES:
                if replicas[name] != local[name]:
                    partial = self._folder / f"{name}.partial"
                    partial.write_bytes(replicas[name])
                    partial.replace(self._folder / name)
        elif not all(local[name].startswith(replicas[name]) for name in FILES):
            raise ConfigError(
                f"the study in {self._folder} and its replica in {self._place} have diverged: two "
                "drivers resumed it. Delete the one you do not want."
            )

    def _read(self, name: str) -> Part:
        with self._fs.open_input_stream(f"{self._root}/{name}") as file:
            content = file.read()
        try:
            found = json.loads(content)
            return {file: (int(found[file]["from"]), found[file]["text"]) for file in FILES}
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{name} in {self._place} is damaged ({error!r}); restore it from a backup, or "
                "start another study."
            ) from error


def _joined(place: str, file: str, names: Sequence[str], parts: Sequence[Part]) -> bytes:
    """Return a file's content, joined from the snapshots."""
    content = b""
    for name, part in zip(names, parts, strict=True):
        if ".whole." in name:
            content = b""
        begin, text = part[file]
        if begin != len(content):
            raise ConfigError(
                f"{name} in {place} does not continue the snapshot before it: an object was "
                "deleted; restore it from a backup, or start another study."
            )
        content += text.encode()
    return content


def _open(place: str) -> tuple[pyarrow.fs.FileSystem, str]:
    try:
        return open_storage(place)
    except (OSError, ValueError) as error:
        raise cannot_keep(place, error) from error
