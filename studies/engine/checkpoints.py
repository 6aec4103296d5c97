"""The saved states of one trial, and its picture, in a shared folder or an object store.

A state is complete or absent: it is written under a temporary name first, and its final name
carries its digest. A damaged state is skipped in favour of the one before, so two are kept.
"""

import hashlib
import logging
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import PIL.Image
import pyarrow.fs

from studies.engine.storage import copy_file, open_storage

log = logging.getLogger(__name__)

_KEPT = 2
PICTURE = "cams.png"
"""Name of the picture's file."""
_NAME = re.compile(r"epoch_(\d{6})\.([0-9a-f]{16})\.pt")


class Checkpoints:
    """The saved states of a trial.

    Args:
        folder: a path, or a URI such as `s3://bucket/study/trial`.

    Every method raises OSError if the storage cannot be used.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     checkpoints = Checkpoints(f"{folder}/trial")
        ...     checkpoints.save(1, lambda path: path.write_text("weights"))
        ...     with checkpoints.newest() as path:
        ...         print(path.read_text())
        weights
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._fs, self._root = open_storage(folder)

    def save(self, epoch: int, write: Callable[[Path], object]) -> None:
        """Save the state that `write` writes to a given path, and delete all but the newest two.

        Args:
            epoch: the number of finished epochs.
            write: writes the state to the path that it is called with.
        """
        with tempfile.TemporaryDirectory() as scratch:
            source = Path(scratch) / "state.pt"
            write(source)
            name = f"epoch_{epoch:06d}.{_digest(source)}.pt"
            self._fs.create_dir(self._root)
            partial = f"{self._root}/.{name}.partial"
            pyarrow.fs.copy_files(
                str(source), partial, destination_filesystem=self._fs, use_threads=False
            )
            self._fs.move(partial, f"{self._root}/{name}")
        # An earlier state of this epoch must be damaged: otherwise it would have been resumed from.
        others = [old for _, old in self._names() if old != name]
        again = [old for old in others if old.startswith(f"epoch_{epoch:06d}.")]
        for old in [*again, *[old for old in others if old not in again][_KEPT - 1 :]]:
            self._fs.delete_file(f"{self._root}/{old}")

    def save_picture(self, image: npt.NDArray[np.uint8]) -> None:
        """Save an RGB picture of the trial, `(height, width, 3)`, replacing the previous one."""
        with tempfile.TemporaryDirectory() as scratch:
            source = Path(scratch) / PICTURE
            PIL.Image.fromarray(image).save(source)
            copy_file(str(source), f"{self.folder}/{PICTURE}")

    @contextmanager
    def newest(self) -> Iterator[Path | None]:
        """Yield the newest undamaged state as a local file, or None if there is none."""
        with tempfile.TemporaryDirectory() as scratch:
            yield self._fetch(Path(scratch) / "state.pt")

    def _fetch(self, target: Path) -> Path | None:
        for digest, name in self._names():
            with (
                self._fs.open_input_stream(f"{self._root}/{name}") as source,
                target.open("wb") as file,
            ):
                shutil.copyfileobj(source, file)
            if _digest(target) == digest:
                return target
            log.warning("%s/%s is damaged; using the state before it", self._root, name)
        return None

    def _names(self) -> list[tuple[str, str]]:
        """Return (digest, file name) of each state, newest first."""
        selector = pyarrow.fs.FileSelector(self._root, allow_not_found=True)
        found = [_NAME.fullmatch(info.base_name) for info in self._fs.get_file_info(selector)]
        matches = sorted((match for match in found if match), key=lambda match: -int(match[1]))
        return [(match[2], match[0]) for match in matches]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
