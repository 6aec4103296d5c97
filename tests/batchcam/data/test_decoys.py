"""Tests of decoys: their corner, their grey, and their relation to the class of the image."""

import os

import numpy as np
import pytest

from batchcam.config import TrialConfig
from batchcam.data.dataset import load_data
from batchcam.data.decoys import MAX_CLASSES, PATCH, paint_decoys, paint_random_decoys
from batchcam.data.splits import Split

SIDE = 12


@pytest.fixture
def blank() -> Split:
    labels = np.arange(400, dtype=np.int64) % 10
    return Split(np.full((400, 1, SIDE, SIDE), 7, np.uint8), labels)


def test_a_decoy_fills_one_corner_with_the_grey_of_the_class_shown(blank: Split) -> None:
    painted = paint_decoys(blank, blank.labels, np.random.default_rng(0))
    assert painted.masks is not None
    seen = set()
    for image, mask, label in zip(painted.images[:, 0], painted.masks, blank.labels, strict=True):
        assert mask.sum() == PATCH**2
        assert (image[mask] == 255 - 25 * label).all()
        assert (image[~mask] == 7).all()
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        seen.add((int(rows[0]), int(columns[0])))
        assert len(rows) == len(columns) == PATCH
    assert seen == {(0, 0), (0, SIDE - PATCH), (SIDE - PATCH, 0), (SIDE - PATCH, SIDE - PATCH)}
    assert (blank.images == 7).all()
    assert blank.masks is None


def test_colours_are_painted_alike_in_every_channel(blank: Split) -> None:
    colours = Split(np.repeat(blank.images, 3, axis=1), blank.labels)
    painted = paint_decoys(colours, blank.labels, np.random.default_rng(0))
    grey = paint_decoys(blank, blank.labels, np.random.default_rng(0))
    assert (painted.images == grey.images).all()


def test_random_decoys_say_nothing_of_the_class(blank: Split) -> None:
    painted = paint_random_decoys(blank, 10, np.random.default_rng(0))
    assert painted.masks is not None
    shown = (255 - painted.images[:, 0][painted.masks].reshape(400, -1)[:, 0].astype(int)) // 25
    assert set(shown) == set(range(10))
    assert 20 < (shown == blank.labels).sum() < 65  # Expected 40; four standard deviations are 24.


@pytest.mark.parametrize(
    ("shown", "message"),
    [
        (np.zeros(3, np.int64), "give a class for each of the 400 images"),
        (
            np.full(400, MAX_CLASSES),
            "classes from 11 to 11; decoys have grey values for classes 0 to 10",
        ),
        (np.full(400, -1), "classes from -1 to -1"),
    ],
)
def test_what_cannot_be_shown_is_refused(
    blank: Split, shown: np.ndarray[tuple[int], np.dtype[np.int64]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        paint_decoys(blank, shown, np.random.default_rng(0))


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_the_data_sets_differ_from_their_originals_in_the_decoys_alone(name: str) -> None:
    if not os.environ.get("BATCHCAM_DATA"):
        pytest.skip("BATCHCAM_DATA does not name a folder with the real files")
    original = load_data(TrialConfig.from_dict({"dataset": name}))
    decoyed = load_data(TrialConfig.from_dict({"dataset": f"decoy_{name}"}))
    for part in ("train", "validation", "test"):
        clean, painted = original.split(part), decoyed.split(part)
        assert painted.masks is not None
        assert (clean.labels == painted.labels).all()
        assert (clean.images[:, 0] == painted.images[:, 0])[~painted.masks].all()
        greys = painted.images[:, 0][painted.masks].reshape(len(painted), -1)
        agree = (greys == (255 - 25 * painted.labels)[:, None]).all(axis=1).mean()
        assert agree == 1 if part != "test" else 0.08 < agree < 0.12
