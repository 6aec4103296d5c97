"""Tests of the contract that every data set in memory passes, and of its splits and digest."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from batchcam.config import TrialConfig
from batchcam.data.dataset import ImageData, load_data
from batchcam.data.preprocessing import Preprocess
from batchcam.errors import DataError

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Known:
    """The expected properties of a data set."""

    channels: int
    side: int
    classes: int
    images: int
    """The number of images in all splits together."""
    sha256: str | None = None


KNOWN = {
    "digits": Known(1, 8, 10, 1797),
    "grey pictures": Known(1, 14, 3, 30),
    "colour pictures": Known(3, 14, 3, 30),
    "pictures with a test folder": Known(3, 14, 3, 60),
    "mnist": Known(1, 28, 10, 70_000),
    "fashion_mnist": Known(1, 28, 10, 70_000),
    "decoy_mnist": Known(1, 28, 10, 70_000),
    "decoy_fashion_mnist": Known(1, 28, 10, 70_000),
}


def _write_pictures(root: Path, mode: str, parts: tuple[str, ...]) -> None:
    generator = np.random.default_rng(0)
    for part in parts:
        for number, name in enumerate(("ape", "bee", "cat")):
            folder = root / part / name
            folder.mkdir(parents=True)
            for index in range(10):
                # Shorter sides 10 to 19: their median, 14.5, is rounded down to 14.
                shape = (10 + index, 30) if mode == "L" else (10 + index, 30, 3)
                pixels = generator.integers(80 * number, 80 * number + 80, shape)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")


@pytest.fixture(scope="module", params=sorted(KNOWN))
def name(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


@pytest.fixture(scope="module")
def config(name: str, tmp_path_factory: pytest.TempPathFactory) -> TrialConfig:
    if "pictures" in name:
        root = tmp_path_factory.mktemp("pictures")
        parts = ("train", "test") if "test" in name else ("train",)
        _write_pictures(root, "L" if name == "grey pictures" else "RGB", parts)
        return TrialConfig(dataset="imagefolder", data_root=str(root), val_fraction=0.25)
    if name != "digits" and not os.environ.get("BATCHCAM_DATA"):
        pytest.skip("BATCHCAM_DATA does not name a folder with the real files")
    return TrialConfig.from_dict({"dataset": name, "val_fraction": 0.25})


@pytest.fixture(scope="module")
def data(config: TrialConfig) -> ImageData:
    return load_data(config)


def test_splits_are_uint8_pictures_and_int64_labels(name: str, data: ImageData) -> None:
    known = KNOWN[name]
    assert data.num_classes == len(data.class_names) == known.classes
    assert data.channels == known.channels
    assert sum(len(data.split(split)) for split in SPLITS) == known.images
    for split in SPLITS:
        images, labels = data.split(split).images, data.split(split).labels
        assert images.dtype == np.uint8
        assert labels.dtype == np.int64
        assert images.shape == (len(labels), known.channels, known.side, known.side)
        assert set(labels) == set(range(known.classes))


def test_the_validation_split_is_the_stratified_share_of_the_training_set(
    data: ImageData,
) -> None:
    kept = np.bincount(data.train.labels)
    held = np.bincount(data.validation.labels)
    assert (held == [round(0.25 * int(total)) for total in kept + held]).all()


def test_no_image_is_in_two_of_the_splits_cut_from_one(name: str, data: ImageData) -> None:
    digests = {split: {image.tobytes() for image in data.split(split).images} for split in SPLITS}
    if "mnist" in name:
        # The published training set contains a few duplicates. The splits differ by index.
        assert len(digests["train"] & digests["validation"]) < 20
        return
    assert not digests["train"] & digests["validation"]
    assert not digests["train"] & digests["test"]
    assert not digests["validation"] & digests["test"]


def test_loading_again_gives_the_same(config: TrialConfig, data: ImageData) -> None:
    again = load_data(config)
    assert again.sha256 == data.sha256
    for split in SPLITS:
        assert np.array_equal(again.split(split).images, data.split(split).images)
        assert np.array_equal(again.split(split).labels, data.split(split).labels)


def test_another_split_seed_moves_only_the_validation_split(
    config: TrialConfig, data: ImageData
) -> None:
    values = config.as_dict() | {"split_seed": 1}
    other = load_data(TrialConfig(**values))
    assert other.sha256 == data.sha256
    assert np.array_equal(other.test.images, data.test.images)
    assert not np.array_equal(other.validation.images, data.validation.images)


def test_mean_and_deviation_are_those_of_the_training_pixels(data: ImageData) -> None:
    scaled = data.train.images.astype(np.float32) / 255
    assert len(data.mean) == len(data.std) == data.channels
    # The published constants of MNIST and Fashion-MNIST cover all 60,000 images, rounded.
    tolerance = 1e-6 if data.name in ("digits", "imagefolder") else 2e-3
    mean, std = scaled.mean(axis=(0, 2, 3)), scaled.std(axis=(0, 2, 3))
    np.testing.assert_allclose(data.mean, mean, atol=tolerance)
    np.testing.assert_allclose(data.std, std, atol=tolerance)


def test_preprocessed_training_pictures_are_standard(data: ImageData) -> None:
    preprocess = Preprocess(data.train.images.shape[-1], data.mean, data.std)
    x = preprocess(torch.tensor(data.train.images[:2000]))
    assert x.dtype == torch.float32
    assert x.mean().abs() < 0.05
    assert (x.std() - 1).abs() < 0.05


# --- Splits, digest and normalisation --------------------------------------------------------


def test_the_digest_sees_a_single_pixel(tmp_path: Path) -> None:
    _write_pictures(tmp_path, "L", ("train",))
    config = TrialConfig(dataset="imagefolder", data_root=str(tmp_path))
    before = load_data(config).sha256
    path = tmp_path / "train" / "ape" / "4.png"  # 14 pixels high, so cropped, not resized.
    with Image.open(path) as picture:
        changed = picture.copy()
    changed.putpixel((15, 7), 255)
    changed.save(path)
    assert load_data(config).sha256 != before


def test_an_unknown_split_is_refused(tiny_data: ImageData) -> None:
    with pytest.raises(DataError, match="split 'dev' is unknown; choose train, validation or test"):
        tiny_data.split("dev")


def test_a_constant_channel_is_not_scaled_up(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for index in range(9):
            path = tmp_path / "train" / name / f"{index}.png"
            Image.new("RGB", (9, 9), (index * 25, 7, 0)).save(path)
    data = load_data(TrialConfig(dataset="imagefolder", data_root=str(tmp_path)))
    assert data.std[1:] == (1.0, 1.0)
    assert data.std[0] != 1.0
    x = Preprocess(9, data.mean, data.std)(torch.tensor(data.test.images))
    assert x.isfinite().all()


@pytest.mark.parametrize("count", [1, 2])
def test_classes_too_small_to_split_are_refused(
    make_pictures: Callable[..., Path], count: int
) -> None:
    # One image is too few for a test split. Of two, one is left, too few for a validation split.
    config = TrialConfig(dataset="imagefolder", data_root=str(make_pictures(count=count)))
    with pytest.raises(DataError, match="class 0 has a single training image"):
        load_data(config)
