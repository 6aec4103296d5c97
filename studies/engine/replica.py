"""A study's memory beside its checkpoints, in the storage that outlives the driver's machine.

Object stores cannot append. What was added to the ledger and to Optuna's journal since last time is
put there as one more object, both parts of one moment, so that neither knows what the other does
not. Every so often an object holds everything, and those before it go.
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
"""How old the copy may be while there are reports only; checkpoints hold these too."""

_PARTS = 100
"""Objects until one is written that holds everything."""

Part = dict[str, tuple[int, str]]
"""For each file, from which byte on, and the text."""

_NAME = re.compile(r"(\d{8})\.(whole|part)\.json")


class Replica(tune.Callback):
    """Keeps the copy of a study's memory up to date; making one brings either side to the other.

    Where the driver's folder has lost the files, or is behind, as on a new machine, they come from
    the copy. The copy is up to date whenever a trial starts or ends, and a few seconds behind in
    between: the epochs that it lacks are in the trials' checkpoints, and reported again from there.

    Args:
        folder: the study's, on the driver's machine.
        place: where the copy is, a folder or a URI.

    Raises:
        ConfigError: the two have gone apart, the copy is damaged, or `place` cannot be read.
        StorageLostError: by any method; `place` could not be written for a long time.
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
        """Leave out everything: Ray pickles its callbacks, and this one has keys."""
        return {}

    def flush(self) -> None:
        """Copy what was added since last time; return once it is there."""
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
        """Copy what was proposed, before there is a checkpoint of it."""
        del iteration, trials, trial, info
        self.flush()

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """Copy the reports of some seconds."""
        del iteration, trials, trial, result, info
        if time.monotonic() >= self._due:
            self.flush()

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Copy that a trial ended."""
        del iteration, trials, trial, info
        self.flush()

    def on_trial_error(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Copy that a trial failed."""
        del iteration, trials, trial, info
        self.flush()

    def _whole_lines(self, name: str, begin: int = 0) -> bytes:
        """Return what a file holds from a byte on, without a line that is not at its end yet."""
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
        """Bring the files up to the copy, where they are behind it."""
        try:
            names = self._names()
            parts = [self._read(name) for name in names]
        except OSError as error:
            raise cannot_keep(self._place, error) from error
        if not names:
            return
        self._written = int(names[-1][:8]) + 1
        # What comes next holds everything, for the files may be ahead of the copy.
        self._written += -self._written % _PARTS
        copies = {name: _joined(self._place, name, names, parts) for name in FILES}
        mine = {name: self._whole_lines(name) for name in FILES}
        if all(copies[name].startswith(mine[name]) for name in FILES):
            self._folder.mkdir(parents=True, exist_ok=True)
            for name in FILES:
                if copies[name] != mine[name]:
                    partial = self._folder / f"{name}.partial"
                    partial.write_bytes(copies[name])
                    partial.replace(self._folder / name)
        elif not all(mine[name].startswith(copies[name]) for name in FILES):
            raise ConfigError(
                f"the study in {self._folder} and its copy in {self._place} have gone apart: two "
                "drivers went on with it. Move the one away that is not to be gone on with."
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
    """Return a file's content from its parts."""
    content = b""
    for name, part in zip(names, parts, strict=True):
        if ".whole." in name:
            content = b""
        begin, text = part[file]
        if begin != len(content):
            raise ConfigError(
                f"{name} in {place} does not follow on what is before it: an object was deleted; "
                "restore it from a backup, or start another study."
            )
        content += text.encode()
    return content


def _open(place: str) -> tuple[pyarrow.fs.FileSystem, str]:
    try:
        return open_storage(place)
    except (OSError, ValueError) as error:
        raise cannot_keep(place, error) from error
