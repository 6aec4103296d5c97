"""Loaders of data sets. Each finds, checks and reads one data set into uint8 arrays.

A loader takes the user's data root, or None, and returns the training set, the test set and the
class names. To add a data set, write its loader and name it in `LOADERS`.
"""

import gzip
import hashlib
import os
import socket
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from batchcam.data.decoys import paint_decoys, paint_random_decoys
from batchcam.data.splits import Pixels, Split, stratified_split
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

Loaded = tuple[Split, Split, tuple[str, ...]]


def _load_digits(data_root: str | None) -> Loaded:
    """Return scikit-learn's handwritten digits: 1,797 images of 8x8, a fixed fifth of them test."""
    del data_root  # The images ship with scikit-learn.
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)[:, None]
    labels = bunch.target.astype(np.int64)
    kept, held = stratified_split(labels, fraction=0.2, seed=0)
    names = tuple(str(digit) for digit in range(10))
    digits = Split(images, labels)
    return digits.take(kept), digits.take(held), names


def _load_mnist(data_root: str | None) -> Loaded:
    train, test = _load_idx("MNIST", data_root)
    return train, test, tuple(str(digit) for digit in range(10))


def _load_fashion_mnist(data_root: str | None) -> Loaded:
    train, test = _load_idx("FashionMNIST", data_root)
    return train, test, _FASHION_CLASSES


def _load_decoy_mnist(data_root: str | None) -> Loaded:
    return _with_decoys(_load_mnist(data_root))


def _load_decoy_fashion_mnist(data_root: str | None) -> Loaded:
    return _with_decoys(_load_fashion_mnist(data_root))


def _with_decoys(loaded: Loaded) -> Loaded:
    """Paint decoys that show the class in training and a random class in the test.

    They are the same at every call.
    """
    train, test, class_names = loaded
    generator = np.random.default_rng(0)
    painted = paint_decoys(train, train.labels, generator)
    return painted, paint_random_decoys(test, len(class_names), generator), class_names


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


# --- A user's own pictures -------------------------------------------------------------------

_MAX_STORED_SIDE = 256
"""Pixels. Pictures are stored at most this large in memory; training resizes them."""

_DEEP_GREY = ("I;16", "I;16B", "I;16L", "I;16N", "I")
"""Pillow's modes of 16-bit grey, by byte order. Pillow's own conversion clips them at 255."""


def _load_imagefolder(data_root: str | None) -> Loaded:
    """Load `<data-root>/train/<class>/*` and, if there, `<data-root>/test/<class>/*`.

    Pictures are grey if all of them are, else RGB. Each is scaled by its shorter side and cropped
    to its central square. The side is the median of the shorter sides of the training pictures, at
    most 256 pixels. Without a test folder a fixed fifth of each class is held out for testing.
    """
    if data_root is None:
        raise DataError(
            "dataset imagefolder needs --data-root: a folder with train/<class>/* and, if you have "
            "one, test/<class>/*."
        )
    root = Path(data_root).expanduser().resolve()
    class_names, train_files = _list_pictures(root / "train")
    test_files: list[tuple[str, int]] | None = None
    if (root / "test").is_dir():
        test_names, test_files = _list_pictures(root / "test")
        if test_names != class_names:
            raise DataError(
                f"{root / 'test'} has the classes {', '.join(test_names)}, but "
                f"{root / 'train'} has {', '.join(class_names)}; give both the same class folders."
            )
    grey, shorter_sides = True, []
    for path, _ in train_files + (test_files or []):
        with _open_picture(path) as picture:
            grey = grey and picture.mode in ("1", "L", "LA", "F", *_DEEP_GREY)
            shorter_sides.append(min(picture.size))
    side = int(min(np.median(shorter_sides[: len(train_files)]), _MAX_STORED_SIDE))
    train = _read_pictures(train_files, side, grey)
    if test_files is not None:
        return train, _read_pictures(test_files, side, grey), class_names
    kept, held = stratified_split(train.labels, fraction=0.2, seed=0)
    return train.take(kept), train.take(held), class_names


def _list_pictures(folder: Path) -> tuple[tuple[str, ...], list[tuple[str, int]]]:
    from torchvision.datasets import ImageFolder

    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; imagefolder needs <data-root>/train/<class>/*.")
    try:
        listing = ImageFolder(str(folder))
    except FileNotFoundError as error:  # No class folder at all, or a class without pictures.
        raise DataError(
            f"{folder}: {error}. Every class needs a folder of its own with pictures in it; add "
            "pictures or remove the empty folder."
        ) from error
    if len(listing.classes) < 2:
        raise DataError(
            f"{folder} has the single class {listing.classes[0]!r}; a classifier needs at least 2."
        )
    return tuple(listing.classes), list(listing.samples)


def _open_picture(path: str | Path) -> Image.Image:
    try:
        return Image.open(path)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{path} cannot be read as a picture: {error}. Repair or remove it."
        ) from error


def read_picture(path: str | Path, side: int, grey: bool) -> Pixels:
    """Read a picture file as uint8 `(C, side, side)`: upright, scaled, cropped to its centre.

    Args:
        path: the file.
        side: pixels; the shorter side of the picture is scaled to it.
        grey: return one channel instead of three. 16-bit grey keeps its upper 8 bits.

    Raises:
        DataError: the file is missing, or Pillow cannot read it as a picture.
    """
    with _open_picture(path) as opened:
        try:
            opened.load()
            picture = ImageOps.exif_transpose(opened) or opened
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(
                f"{path} cannot be read as a picture: {error}. Repair or remove it."
            ) from error
    if picture.mode in _DEEP_GREY:
        picture = Image.fromarray((np.asarray(picture).clip(0, 65535) // 256).astype(np.uint8))
    picture = picture.convert("L" if grey else "RGB")
    picture = ImageOps.fit(picture, (side, side), Image.Resampling.BILINEAR)
    pixels = np.array(picture, dtype=np.uint8)
    return pixels[None] if grey else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _read_pictures(files: list[tuple[str, int]], side: int, grey: bool) -> Split:
    images = np.stack([read_picture(path, side, grey) for path, _ in files])
    return Split(images, np.array([label for _, label in files], dtype=np.int64))


LOADERS: Mapping[str, Callable[[str | None], Loaded]] = {
    "digits": _load_digits,
    "mnist": _load_mnist,
    "fashion_mnist": _load_fashion_mnist,
    "decoy_mnist": _load_decoy_mnist,
    "decoy_fashion_mnist": _load_decoy_fashion_mnist,
    "imagefolder": _load_imagefolder,
}
