"""Tests of the sources of data sets: valid and invalid IDX files, and a user's own pictures."""

import gzip
import hashlib
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn
from urllib.error import URLError

import numpy as np
import pytest
from PIL import Image

from batchcam.data import sources
from batchcam.data.sources import LOADERS, read_picture
from batchcam.errors import DataError

TRAIN_IMAGES = "train-images-idx3-ubyte"
SIZES = {"train": 40, "t10k": 20}


def _idx_content(seed: int) -> dict[str, bytes]:
    """Return the four IDX files of a small data set, with their headers."""
    generator = np.random.default_rng(seed)
    content = {}
    for part, count in SIZES.items():
        header = b"".join(n.to_bytes(4, "big") for n in (2051, count, 28, 28))
        pixels = generator.integers(0, 256, count * 28 * 28, dtype=np.uint8)
        content[f"{part}-images-idx3-ubyte"] = header + pixels.tobytes()
        header = b"".join(n.to_bytes(4, "big") for n in (2049, count))
        labels = (np.arange(count) % 10).astype(np.uint8)
        content[f"{part}-labels-idx1-ubyte"] = header + labels.tobytes()
    return content


CONTENT = {"MNIST": _idx_content(0), "FashionMNIST": _idx_content(1)}


def _write(root: Path, folder: str = "MNIST", *, compress: bool = False) -> Path:
    raw = root / folder / "raw"
    raw.mkdir(parents=True)
    for name, content in CONTENT[folder].items():
        if compress:
            (raw / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (raw / name).write_bytes(content)
    return raw


def _no_download(*_: object) -> NoReturn:
    raise URLError("no route to host")


@pytest.fixture
def small_idx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Register the small files as the published ones, unset BATCHCAM_DATA, block the network."""
    tables: Mapping[str, Mapping[str, tuple[int, str]]] = {
        folder: {
            name: (len(content), hashlib.sha256(content).hexdigest())
            for name, content in files.items()
        }
        for folder, files in CONTENT.items()
    }
    monkeypatch.setattr(sources, "_IDX_FILES", tables)
    monkeypatch.setattr(sources, "_download", _no_download)
    monkeypatch.delenv("BATCHCAM_DATA", raising=False)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


# --- IDX files -------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_idx")
@pytest.mark.parametrize("compress", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize(
    ("name", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")]
)
def test_idx_files_are_read_pixel_by_pixel(
    tmp_path: Path, name: str, folder: str, compress: bool
) -> None:
    _write(tmp_path / "root", folder, compress=compress)
    train, test, class_names = LOADERS[name](str(tmp_path / "root"))
    assert len(class_names) == 10
    for split, part in ((train, "train"), (test, "t10k")):
        assert split.images.shape == (SIZES[part], 1, 28, 28)
        assert split.images.dtype == np.uint8
        assert split.labels.dtype == np.int64
        content = CONTENT[folder][f"{part}-images-idx3-ubyte"]
        assert split.images.tobytes() == content[16:]
        assert split.labels.tolist() == [n % 10 for n in range(SIZES[part])]


@pytest.mark.usefixtures("small_idx")
def test_the_data_root_comes_before_the_variable_before_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    roots = {name: tmp_path / name for name in ("given", "variable")}
    roots["data"] = tmp_path / "cwd" / "data"
    for root in roots.values():
        _write(root)
    monkeypatch.setenv("BATCHCAM_DATA", str(roots["variable"]))
    # The error names the damaged file, and so shows which folder was read.
    for name in ("given", "variable", "data"):
        path = roots[name] / "MNIST" / "raw" / TRAIN_IMAGES
        path.write_bytes(b"damaged")
        with pytest.raises(DataError, match=f"{path} has 7 bytes"):
            LOADERS["mnist"](str(roots["given"]))
        for file in path.parent.iterdir():
            file.unlink()
    with pytest.raises(DataError, match="MNIST was not found"):
        LOADERS["mnist"](str(roots["given"]))


@pytest.mark.usefixtures("small_idx")
def test_the_variable_alone_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path / "variable")
    monkeypatch.setenv("BATCHCAM_DATA", str(tmp_path / "variable"))
    train, _, _ = LOADERS["mnist"](None)
    assert len(train) == 40


@pytest.mark.usefixtures("small_idx")
def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    _write(tmp_path / "root")
    train, _, _ = LOADERS["mnist"]("~/root")
    assert len(train) == 40


@pytest.mark.usefixtures("small_idx")
def test_nothing_found_is_one_error_that_lists_what_was_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATCHCAM_DATA", str(tmp_path / "variable"))
    with pytest.raises(DataError) as caught:
        LOADERS["mnist"](str(tmp_path / "given"))
    message = str(caught.value)
    tried = [tmp_path / "given", tmp_path / "variable", tmp_path / "cwd" / "data"]
    positions = [message.index(f"{root / 'MNIST' / 'raw'}: no such files") for root in tried]
    assert positions == sorted(positions)
    assert f"download to {tmp_path / 'given'}: URLError" in message
    assert TRAIN_IMAGES in message
    assert "--data-root" in message
    assert "BATCHCAM_DATA=<root>" in message


@pytest.mark.usefixtures("small_idx")
def test_debian_s_package_is_a_place_for_fashion_mnist() -> None:
    place = Path("/usr/share/datasets/fashion-mnist")
    if place.exists():
        pytest.skip("the package is installed")
    with pytest.raises(DataError, match=f"{place}: no such files"):
        LOADERS["fashion_mnist"](None)


@pytest.mark.usefixtures("small_idx")
@pytest.mark.parametrize("given", ["~/root", None], ids=["data-root", "working directory"])
def test_a_download_goes_to_the_data_root_and_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str | None
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    asked = []

    def download(folder: str, root: Path) -> None:
        asked.append(root)
        _write(root, folder)

    monkeypatch.setattr(sources, "_download", download)
    train, _, _ = LOADERS["mnist"](given)
    assert asked == [tmp_path / "root" if given else tmp_path / "cwd" / "data"]
    assert len(train) == 40


def test_a_download_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = []

    def fake(root: str, *, download: bool) -> NoReturn:
        waits.append((root, download, socket.getdefaulttimeout()))
        raise URLError("timed out")

    monkeypatch.setattr("torchvision.datasets.MNIST", fake)
    before = socket.getdefaulttimeout()
    with pytest.raises(URLError):
        sources._download("MNIST", tmp_path)
    ((root, download, wait),) = waits
    assert (root, download) == (str(tmp_path), True)
    assert wait is not None
    assert wait > 0
    assert socket.getdefaulttimeout() == before


@pytest.mark.usefixtures("small_idx")
def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    raw = _write(tmp_path / "root")
    path = raw / TRAIN_IMAGES
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=rf"{path} has 31375 bytes, expected 31376.*Delete"):
        LOADERS["mnist"](str(tmp_path / "root"))


@pytest.mark.usefixtures("small_idx")
def test_an_altered_byte_is_found(tmp_path: Path) -> None:
    raw = _write(tmp_path / "root")
    path = raw / "t10k-labels-idx1-ubyte"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match=rf"{path} is not the published file: its SHA-256.*restore"):
        LOADERS["mnist"](str(tmp_path / "root"))


@pytest.mark.usefixtures("small_idx")
def test_a_missing_neighbour_is_not_looked_for_elsewhere(tmp_path: Path) -> None:
    raw = _write(tmp_path / "root")
    _write(tmp_path / "cwd" / "data")
    (raw / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match=r"MNIST/raw/train-labels.* is missing, though other"):
        LOADERS["mnist"](str(tmp_path / "root"))


@pytest.mark.usefixtures("small_idx")
@pytest.mark.parametrize("damage", ["cut", "no gzip", "flipped"])
def test_a_damaged_gzip_file_is_refused(tmp_path: Path, damage: str) -> None:
    raw = _write(tmp_path / "root", compress=True)
    path = raw / f"{TRAIN_IMAGES}.gz"
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(
        {
            "cut": content[:middle],
            "no gzip": b"plain text",
            "flipped": content[:middle] + bytes(8) + content[middle + 8 :],
        }[damage]
    )
    with pytest.raises(DataError, match=rf"{path} (cannot be read|is not the published file)"):
        LOADERS["mnist"](str(tmp_path / "root"))


# --- A user's own pictures -------------------------------------------------------------------

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
