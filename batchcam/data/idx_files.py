"""MNIST and Fashion-MNIST from their four IDX files, which are found, checked and read.

The files are searched in the data root, $BATCHCAM_DATA, ./data and, for Fashion-MNIST, the folder
of Debian's package; then they are downloaded. Each must have the published size and SHA-256.
"""

import gzip
import hashlib
import os
import socket
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from batchcam.data.splits import Loaded, Split
from batchcam.errors import DataError

_FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)

_IDX_FILES: Mapping[str, Mapping[str, tuple[int, str]]] = {
    # File: its size in bytes and SHA-256, uncompressed, as first published.
    "MNIST": {
        "train-images-idx3-ubyte": (
            47040016,
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        ),
        "train-labels-idx1-ubyte": (
            60008,
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        ),
        "t10k-images-idx3-ubyte": (
            7840016,
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        ),
        "t10k-labels-idx1-ubyte": (
            10008,
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        ),
    },
    "FashionMNIST": {
        "train-images-idx3-ubyte": (
            47040016,
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        ),
        "train-labels-idx1-ubyte": (
            60008,
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        ),
        "t10k-images-idx3-ubyte": (
            7840016,
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        ),
        "t10k-labels-idx1-ubyte": (
            10008,
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        ),
    },
}

_DOWNLOAD_TIMEOUT = 30
"""Seconds without an answer after which a download fails."""


def load_mnist(data_root: str | None) -> Loaded:
    """Return MNIST: 60,000 and 10,000 grey images of 28x28; classes are digits.

    Raises:
        DataError: the files are missing and cannot be downloaded, or are damaged.
    """
    train, test = _load_idx("MNIST", data_root)
    return train, test, tuple(str(digit) for digit in range(10))


def load_fashion_mnist(data_root: str | None) -> Loaded:
    """Return Fashion-MNIST: 60,000 and 10,000 grey images of 28x28 of 10 kinds of clothing.

    Raises:
        DataError: see :func:`load_mnist`.
    """
    train, test = _load_idx("FashionMNIST", data_root)
    return train, test, _FASHION_CLASSES


def _load_idx(folder: str, data_root: str | None) -> tuple[Split, Split]:
    """Find, check and read the four IDX files of MNIST or Fashion-MNIST; download as a last resort.

    The first folder that has any of the files is used, and must have all four undamaged. Falling
    back to another copy would hide the damage.
    """
    expected = _IDX_FILES[folder]
    places = _candidate_folders(folder, data_root)
    for place in places:
        if any(_idx_path(place, name) for name in expected):
            return _read_idx_folder(place, expected)
    target = Path(data_root or "data").expanduser().resolve()
    tried = [f"  {place}: no such files" for place in places]
    try:
        _download(folder, target)
    except Exception as error:  # torchvision raises what urllib, ssl and gzip raise, and its own.
        tried.append(f"  download to {target}: {type(error).__name__}: {error}")
        raise DataError(
            f"{folder} was not found. Tried, in order:\n" + "\n".join(tried) + "\n"
            f"Put the files {', '.join(expected)} (or the same names with .gz) into "
            f"<root>/{folder}/raw and pass --data-root <root> or set BATCHCAM_DATA=<root>; or "
            "run once where the download works."
        ) from error
    return _read_idx_folder(target / folder / "raw", expected)


def _candidate_folders(folder: str, data_root: str | None) -> list[Path]:
    roots = [root for root in (data_root, os.environ.get("BATCHCAM_DATA"), "data") if root]
    places = [Path(root).expanduser().resolve() / folder / "raw" for root in roots]
    if folder == "FashionMNIST":
        places.append(Path("/usr/share/datasets/fashion-mnist"))  # Debian: dataset-fashion-mnist
    return list(dict.fromkeys(places))


def _download(folder: str, root: Path) -> None:
    from torchvision import datasets

    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_DOWNLOAD_TIMEOUT)  # torchvision has no timeout of its own.
    try:
        getattr(datasets, folder)(str(root), download=True)
    finally:
        socket.setdefaulttimeout(timeout)


def _idx_path(place: Path, name: str) -> Path | None:
    for path in (place / name, place / f"{name}.gz"):
        if path.is_file():
            return path
    return None


def _read_idx_folder(place: Path, expected: Mapping[str, tuple[int, str]]) -> tuple[Split, Split]:
    content = {name: _read_checked(place, name, *expected[name]) for name in expected}

    def split(prefix: str) -> Split:
        images = np.frombuffer(content[f"{prefix}-images-idx3-ubyte"], np.uint8, offset=16)
        labels = np.frombuffer(content[f"{prefix}-labels-idx1-ubyte"], np.uint8, offset=8)
        return Split(images.reshape(-1, 1, 28, 28), labels.astype(np.int64))

    return split("train"), split("t10k")


def _read_checked(place: Path, name: str, size: int, sha256: str) -> bytes:
    path = _idx_path(place, name)
    remedy = f"Delete the folder {place} to download it again, or restore the file."
    if path is None:
        raise DataError(f"{place / name} is missing, though other files are there. {remedy}")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}. {remedy}") from error
    if len(content) != size:
        raise DataError(f"{path} has {len(content)} bytes, expected {size}. {remedy}")
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise DataError(
            f"{path} is not the published file: its SHA-256 is {found}, expected {sha256}. {remedy}"
        )
    return content
