"""Tests of figures: their content, and identical files for identical figures."""

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from batchcam.figures import class_cams, class_rows, misclassified, overlay, save, tile

MAPS = torch.linspace(0, 1, 3 * 8 * 8).view(3, 8, 8)
NAMES = ("ape", "bee", "a name far too long")


def _texts(figure: Figure) -> list[str]:
    texts = [figure.get_suptitle()]
    for axis in figure.axes:
        texts += [axis.get_title(), axis.get_xlabel(), axis.get_ylabel()]
    return [text for text in texts if text]


def test_class_cams_stand_under_their_prototypes_with_ssim_and_ceiling() -> None:
    ssim, ceiling = torch.tensor([0.5, torch.nan, 0.25]), torch.tensor([0.75, 0.8, 1.0])
    figure = class_cams(MAPS.flip(0), MAPS, NAMES, ssim, ceiling, "a title")
    assert len(figure.axes) == 6
    texts = _texts(figure)
    assert {"a title", "prototype", "ape", "bee", "a name far …"} <= set(texts)
    assert {"0.50 / 0.75", "nan / 0.80", "0.25 / 1.00"} <= set(texts)
    shown = [np.asarray(axis.images[0].get_array()) for axis in figure.axes]
    assert np.array_equal(shown[0], MAPS[0].numpy())
    assert np.array_equal(shown[3], MAPS[2].numpy())


def test_misclassified_says_what_was_taken_for_what() -> None:
    confusion = torch.tensor([[5, 1, 3], [0, 7, 0], [2, 2, 1]])
    figure = misclassified(MAPS, MAPS, confusion, NAMES, "errors")
    texts = _texts(figure)
    assert f"4 wrong,\n3 as {NAMES[2]}" in texts
    assert "none" in texts
    assert "4 wrong,\n2 as ape" in texts
    assert confusion[0, 0] == 5  # Not modified.


def test_no_more_than_twenty_classes_are_drawn() -> None:
    maps = torch.rand(25, 8, 8)
    figure = class_rows([("CAM", maps, None)], [str(n) for n in range(25)], "many")
    assert len(figure.axes) == 20


@pytest.mark.parametrize("channels", [1, 3])
def test_an_overlay_shows_the_image_twice_and_the_map_once(channels: int) -> None:
    image = np.full((channels, 14, 14), 99, np.uint8)
    figure = overlay(image, torch.rand(14, 14), "seven (98.0%)")
    assert [len(axis.images) for axis in figure.axes] == [1, 2]
    assert figure.get_suptitle() == "seven (98.0%)"


def test_a_tile_is_prototypes_above_cams_in_colour() -> None:
    picture = tile(torch.zeros(3, 8, 8), torch.ones(3, 8, 8))
    assert picture.dtype == np.uint8
    assert picture.shape == (2 * 56, 3 * 56, 3)
    assert (picture[:56] == picture[0, 0]).all()
    assert (picture[56:] == picture[-1, -1]).all()
    assert picture[0, 0].sum() > picture[-1, -1].sum()  # Bright is 1, dark is 0.


def test_a_tile_of_large_maps_is_not_enlarged() -> None:
    assert tile(torch.zeros(2, 64, 64), torch.ones(2, 64, 64)).shape == (128, 128, 3)


def test_the_same_figure_is_the_same_file(tmp_path: Path) -> None:
    for name in ("one.png", "two.png"):
        save(class_rows([("CAM", MAPS, None)], NAMES, "t"), tmp_path / name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    with Image.open(tmp_path / "one.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 100


def test_a_map_of_zeros_is_drawn_as_empty() -> None:
    maps = torch.stack([torch.zeros(8, 8), torch.rand(8, 8)])
    figure = class_rows([("CAM", maps, None)], ["a", "b"], "one is empty")
    empty, full = figure.axes
    assert not empty.images
    assert [text.get_text() for text in empty.texts] == ["empty"]
    assert len(full.images) == 1
    assert not full.texts
