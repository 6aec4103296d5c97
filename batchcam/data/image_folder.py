"""A user's own pictures: folders of picture files, one folder per class."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from batchcam.data.splits import Loaded, Pixels, Split, stratified_split
from batchcam.errors import DataError

_MAX_STORED_SIDE = 256
"""Pixels. Pictures are stored at most this large in memory; training resizes them."""

_DEEP_GREY = ("I;16", "I;16B", "I;16L", "I;16N", "I")
"""Pillow's modes of 16-bit grey, by byte order. Pillow's own conversion clips them at 255."""


def load_image_folder(data_root: str | None) -> Loaded:
    """Load `<data-root>/train/<class>/*` and, if there, `<data-root>/test/<class>/*`.

    Pictures are grey if all of them are, else RGB. Each is scaled by its shorter side and cropped
    to its central square. The side is the median of the shorter sides of the training pictures, at
    most 256 pixels. Without a test folder a fixed fifth of each class is held out for testing.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as root:
        ...     for name in ("cats/1", "cats/2", "dogs/1", "dogs/2"):
        ...         path = Path(root, "train", name).with_suffix(".png")
        ...         path.parent.mkdir(parents=True, exist_ok=True)
        ...         Image.new("RGB", (40, 32), "red").save(path)
        ...     train, test, class_names = load_image_folder(root)
        >>> train.images.shape, len(test), class_names
        ((2, 3, 32, 32), 2, ('cats', 'dogs'))
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

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.new("RGB", (40, 30), "red").save(f"{folder}/photo.png")
        ...     pixels = read_picture(f"{folder}/photo.png", side=28, grey=False)
        >>> pixels.shape, pixels[:, 0, 0].tolist()
        ((3, 28, 28), [255, 0, 0])
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
