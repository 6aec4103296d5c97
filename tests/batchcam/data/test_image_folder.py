"""Tests of the loading of a user's own pictures."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from batchcam.data.image_folder import read_picture
from batchcam.data.sources import LOADERS
from batchcam.errors import DataError

MakePictures = Callable[..., Path]


def test_pictures_without_a_test_folder_are_split_class_by_class(
    make_pictures: MakePictures,
) -> None:
    train, test, class_names = LOADERS["imagefolder"](str(make_pictures(count=5)))
    assert class_names == ("bright", "dark")
    assert np.bincount(train.labels).tolist() == [4, 4]
    assert np.bincount(test.labels).tolist() == [1, 1]
    # Each label matches its picture: class 1 is the brighter one.
    for split in (train, test):
        assert split.images[split.labels == 1].min() >= 100
        assert split.images[split.labels == 0].max() < 100


def test_a_test_folder_is_the_test_split(make_pictures: MakePictures) -> None:
    root = make_pictures(parts=("train", "test"), count=3)
    train, test, _ = LOADERS["imagefolder"](str(root))
    assert len(train) == len(test) == 6


def test_pictures_are_squares_of_the_median_shorter_side(make_pictures: MakePictures) -> None:
    # Heights 12 to 16, width 20: the median of the shorter sides is 14.
    train, test, _ = LOADERS["imagefolder"](str(make_pictures(count=5)))
    assert train.images.shape[1:] == test.images.shape[1:] == (1, 14, 14)


def test_large_pictures_are_kept_at_256_pixels(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for index in range(2):
            Image.new("L", (300, 400), index).save(tmp_path / "train" / name / f"{index}.png")
    train, _, _ = LOADERS["imagefolder"](str(tmp_path))
    assert train.images.shape[1:] == (1, 256, 256)


def test_one_coloured_picture_makes_the_data_set_coloured(make_pictures: MakePictures) -> None:
    root = make_pictures()
    Image.new("RGB", (20, 20), (255, 0, 0)).save(root / "train" / "dark" / "red.png")
    train, test, _ = LOADERS["imagefolder"](str(root))
    images = np.concatenate([train.images, test.images])
    assert images.shape[1] == 3
    assert any((image == np.array([255, 0, 0])[:, None, None]).all() for image in images)


def test_pictures_of_sixteen_bits_keep_their_upper_eight(tmp_path: Path) -> None:
    pixels = np.array([[0, 255], [256, 65535]], np.uint16)
    Image.fromarray(pixels).save(tmp_path / "deep.png")
    assert read_picture(tmp_path / "deep.png", 2, grey=True).tolist() == [[[0, 0], [1, 255]]]
    assert read_picture(tmp_path / "deep.png", 2, grey=False).shape == (3, 2, 2)


def test_a_folder_of_sixteen_bit_pictures_is_grey(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for index in range(2):
            pixels = np.full((9, 9), 256 * 50, np.uint16)
            Image.fromarray(pixels).save(tmp_path / "train" / name / f"{index}.png")
    train, _, _ = LOADERS["imagefolder"](str(tmp_path))
    assert train.images.shape == (2, 1, 9, 9)
    assert (train.images == 50).all()


@pytest.mark.parametrize("order", ["<", ">"], ids=["little-endian", "big-endian"])
def test_a_deep_tiff_of_either_byte_order_is_read(tmp_path: Path, order: str) -> None:
    path = tmp_path / "deep.tif"
    _write_deep_tiff(path, order)
    for grey in (True, False):
        pixels = read_picture(path, 2, grey=grey)
        assert pixels[0].tolist() == [[0, 0], [1, 255]]


def _write_deep_tiff(path: Path, order: str) -> None:
    """Write 2x2 grey pixels of 16 bits. Pillow writes only one byte order."""
    magic = {"<": b"II", ">": b"MM"}[order]
    pixels = np.array([0, 255, 256, 65535], f"{order}u2").tobytes()
    # Width, height, bits per sample, compression (none), photometric interpretation (grey),
    # strip offset, rows per strip, strip size.
    entries = [(256, 2), (257, 2), (258, 16), (259, 1), (262, 1), (273, 8), (278, 2), (279, 8)]
    body = magic + np.array([42], f"{order}u2").tobytes() + np.array([16], f"{order}u4").tobytes()
    body += pixels + np.array([len(entries)], f"{order}u2").tobytes()
    for tag, value in entries:
        body += np.array([tag, 4], f"{order}u2").tobytes()
        body += np.array([1, value], f"{order}u4").tobytes()
    path.write_bytes(body + bytes(4))


def test_a_rotated_photograph_is_put_upright(tmp_path: Path) -> None:
    picture = Image.new("L", (32, 16), 0)
    picture.paste(255, (0, 0, 16, 16))  # The left half is white.
    exif = Image.Exif()
    exif[0x0112] = 6  # Shown rotated 90° clockwise: the left side becomes the top.
    picture.save(tmp_path / "photo.jpg", exif=exif, quality=95)
    pixels = read_picture(tmp_path / "photo.jpg", 16, grey=True)[0]
    assert pixels[:6].min() > 200
    assert pixels[-6:].max() < 55


def test_a_wide_picture_is_cut_to_its_middle(tmp_path: Path) -> None:
    pixels = np.zeros((4, 12), np.uint8)
    pixels[:, 4:8] = 200
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    assert (read_picture(tmp_path / "wide.png", 4, grey=True) == 200).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
@pytest.mark.parametrize("grey", [True, False])
def test_every_common_kind_of_picture_is_read(tmp_path: Path, mode: str, grey: bool) -> None:
    path = tmp_path / ("picture.jpg" if mode == "CMYK" else "picture.png")
    Image.new("L", (10, 10), 255).convert(mode).save(path)
    pixels = read_picture(path, 8, grey)
    assert pixels.shape == (1 if grey else 3, 8, 8)
    assert pixels.dtype == np.uint8
    assert (pixels >= 250).all()


def test_a_picture_file_of_text_is_refused(make_pictures: MakePictures) -> None:
    root = make_pictures()
    (root / "train" / "dark" / "note.png").write_text("not a picture")
    with pytest.raises(DataError, match=r"note\.png cannot be read as a picture.*remove it"):
        LOADERS["imagefolder"](str(root))


def test_a_picture_that_is_cut_short_is_refused(make_pictures: MakePictures) -> None:
    root = make_pictures()
    path = root / "train" / "dark" / "0.png"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(DataError, match=r"0\.png cannot be read as a picture.*Repair or remove"):
        LOADERS["imagefolder"](str(root))


def test_a_missing_picture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.png cannot be read as a picture"):
        read_picture(tmp_path / "gone.png", 8, grey=True)


def test_a_picture_that_cannot_be_opened_is_refused(make_pictures: MakePictures) -> None:
    root = make_pictures()
    # A dangling link fails for root too; file permissions do not.
    (root / "train" / "dark" / "link.png").symlink_to(root / "nowhere.png")
    with pytest.raises(DataError, match=r"link\.png cannot be read as a picture"):
        LOADERS["imagefolder"](str(root))


def test_an_empty_class_folder_is_refused(make_pictures: MakePictures) -> None:
    root = make_pictures()
    (root / "train" / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty.*remove the empty folder"):
        LOADERS["imagefolder"](str(root))


def test_a_folder_without_classes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match="Every class needs a folder of its own"):
        LOADERS["imagefolder"](str(tmp_path))


def test_a_single_class_is_refused(make_pictures: MakePictures) -> None:
    with pytest.raises(
        DataError, match="has the single class 'cats'; a classifier needs at least 2"
    ):
        LOADERS["imagefolder"](str(make_pictures(("cats",))))


def test_a_class_of_one_picture_is_refused(make_pictures: MakePictures) -> None:
    with pytest.raises(DataError, match="single training image; it needs at least 2"):
        LOADERS["imagefolder"](str(make_pictures(count=1)))


def test_test_classes_that_differ_from_the_training_classes_are_refused(
    make_pictures: MakePictures,
) -> None:
    root = make_pictures(("cats", "dogs"))
    make_pictures(("cats", "cows"), parts=("test",))
    with pytest.raises(DataError, match=r"test has the classes cats, cows, but .*cats, dogs"):
        LOADERS["imagefolder"](str(root))


def test_pictures_need_a_data_root() -> None:
    with pytest.raises(DataError, match="imagefolder needs --data-root: a folder with train/"):
        LOADERS["imagefolder"](None)


def test_a_data_root_without_a_training_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train is not a folder; imagefolder needs <data-root>"):
        LOADERS["imagefolder"](str(tmp_path))
