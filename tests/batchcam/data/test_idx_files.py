"""Tests of the loading of IDX files: places, downloads, and damaged files."""

import gzip
import hashlib
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn
from urllib.error import URLError

import numpy as np
import pytest

from batchcam.data import idx_files
from batchcam.data.sources import LOADERS
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
    monkeypatch.setattr(idx_files, "_IDX_FILES", tables)
    monkeypatch.setattr(idx_files, "_download", _no_download)
    monkeypatch.delenv("BATCHCAM_DATA", raising=False)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


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

    monkeypatch.setattr(idx_files, "_download", download)
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
        idx_files._download("MNIST", tmp_path)
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
