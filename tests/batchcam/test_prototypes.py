"""Tests of prototypes, of their SSIM ceilings on a CAM grid, and of class supports."""

import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from batchcam.cam import render
from batchcam.config import TrialConfig
from batchcam.data.dataset import load_data
from batchcam.data.prepared import PreparedData
from batchcam.data.preprocessing import to_device
from batchcam.errors import DataError
from batchcam.prototypes import (
    class_prototypes,
    class_supports,
    min_max,
    resize_prototypes,
    ssim_ceiling,
)
from batchcam.similarity import ssim

seeds = st.integers(0, 2**16)


def test_the_mean_prototype_is_the_scaled_mean() -> None:
    images = torch.tensor([[[0, 2], [4, 6]], [[2, 4], [6, 8]], [[9, 9], [0, 0]]]).byte()
    prototypes = class_prototypes(images, torch.tensor([0, 0, 1]), 2)
    # Class 0: mean [[1, 3], [5, 7]], minus 1, divided by 6.
    expected = torch.tensor([[[0, 1 / 3], [2 / 3, 1]], [[1, 1], [0, 0]]])
    torch.testing.assert_close(prototypes, expected)


def test_the_median_prototype_ignores_the_odd_one_out() -> None:
    images = torch.tensor([[[0, 1, 2]], [[0, 1, 2]], [[200, 0, 90]]]).byte()
    prototypes = class_prototypes(images, torch.zeros(3, dtype=torch.int64), 1, kind="median")
    torch.testing.assert_close(prototypes, torch.tensor([[[0, 0.5, 1]]]))


def test_the_median_of_an_even_number_is_the_middle_of_the_middle_two() -> None:
    images = torch.tensor([[[0, 0, 10]], [[0, 2, 10]], [[0, 8, 10]], [[0, 10, 10]]]).byte()
    prototypes = class_prototypes(images, torch.zeros(4, dtype=torch.int64), 1, kind="median")
    torch.testing.assert_close(prototypes, torch.tensor([[[0, 0.5, 1]]]))


def test_a_median_of_many_large_pictures_is_possible() -> None:
    # One class has more than 2**24 pixels, the limit of a single torch.quantile.
    images = torch.zeros(260, 256, 256, dtype=torch.uint8)
    images[:, 0] = 255
    prototypes = class_prototypes(images, torch.zeros(260, dtype=torch.int64), 1, kind="median")
    assert prototypes.sum() == 256


def test_colour_is_averaged_to_grey() -> None:
    images = torch.tensor([[[[0, 90]], [[0, 0]], [[0, 30]]]]).byte()
    torch.testing.assert_close(
        class_prototypes(images, torch.tensor([0]), 1), torch.tensor([[[0.0, 1.0]]])
    )
    uneven = torch.tensor([[[[0, 90, 30]], [[0, 0, 30]], [[0, 30, 0]]]]).byte()
    torch.testing.assert_close(
        class_prototypes(uneven, torch.tensor([0]), 1), torch.tensor([[[0.0, 1.0, 0.5]]])
    )


def test_a_constant_class_has_an_empty_prototype() -> None:
    images = torch.full((2, 8, 8), 77, dtype=torch.uint8)
    assert class_prototypes(images, torch.tensor([0, 0]), 1).count_nonzero() == 0


def test_a_class_without_images_is_refused() -> None:
    with pytest.raises(DataError, match=r"class 1 has no image.*add images of it or remove"):
        class_prototypes(torch.zeros(2, 8, 8), torch.tensor([0, 2]), 3)


def test_an_unknown_kind_and_shapes_that_do_not_fit_are_refused() -> None:
    images, labels = torch.zeros(2, 8, 8), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="kind='mode' is unknown; choose one of mean, median"):
        class_prototypes(images, labels, 2, kind="mode")
    with pytest.raises(ValueError, match=r"got \(2, 8, 8\) and \(1,\)"):
        class_prototypes(images, labels[:1], 2)
    with pytest.raises(ValueError, match=r"expected images .* got \(8, 8\)"):
        class_prototypes(images[0], labels, 2)


@given(seeds, st.floats(-100, 100), st.floats(0.01, 100))
def test_min_max_spans_zero_to_one_whatever_the_scale(
    seed: int, offset: float, factor: float
) -> None:
    maps = torch.rand(3, 5, 4, generator=torch.Generator().manual_seed(seed)).double()
    scaled = min_max(offset + factor * maps)
    assert torch.equal(scaled.amin(dim=(1, 2)), torch.zeros(3).double())
    assert torch.equal(scaled.amax(dim=(1, 2)), torch.ones(3).double())
    torch.testing.assert_close(scaled, min_max(maps))


@given(seeds)
def test_the_order_of_images_does_not_matter(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (12, 1, 8, 8), generator=generator).byte()
    labels = torch.arange(12) % 3
    order = torch.randperm(12, generator=generator)
    for kind in ("mean", "median"):
        torch.testing.assert_close(
            class_prototypes(images[order], labels[order], 3, kind),
            class_prototypes(images, labels, 3, kind),
        )


def test_resized_prototypes_span_zero_to_one_again(tiny_prepared: PreparedData) -> None:
    resized = resize_prototypes(tiny_prepared.train_prototypes, 28)
    assert resized.shape == (10, 28, 28)
    assert torch.equal(resized.amin(dim=(1, 2)), torch.zeros(10))
    assert torch.equal(resized.amax(dim=(1, 2)), torch.ones(10))


# --- The ceiling -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prototypes(tiny_prepared: PreparedData) -> Tensor:
    return resize_prototypes(tiny_prepared.train_prototypes, 16)


def test_a_grid_of_the_full_resolution_reaches_one(prototypes: Tensor) -> None:
    assert (ssim_ceiling(prototypes, 16) > 0.99).all()


def test_a_finer_grid_has_a_higher_ceiling(prototypes: Tensor) -> None:
    ceilings = torch.stack([ssim_ceiling(prototypes, grid, steps=150) for grid in (2, 4, 8)])
    assert (ceilings.diff(dim=0) > 0).all()
    assert (ceilings <= 1).all()


def test_no_map_of_the_grid_is_above_the_ceiling(prototypes: Tensor) -> None:
    ceiling = ssim_ceiling(prototypes, 4)
    generator = torch.Generator().manual_seed(0)
    for sharpness in (0.5, 1, 2, 4, 8):
        for _ in range(100):
            maps = torch.rand(10, 4, 4, generator=generator) ** sharpness
            assert (ssim(render(maps, 16), prototypes) <= ceiling + 1e-3).all()


def test_more_steps_never_find_less(prototypes: Tensor) -> None:
    found = torch.stack([ssim_ceiling(prototypes, 16, steps=steps) for steps in range(1, 25)])
    assert (found.diff(dim=0) >= 0).all()


def test_the_ceiling_takes_rows_and_columns_apart(prototypes: Tensor) -> None:
    square = ssim_ceiling(prototypes[:2], (4, 4), steps=50)
    torch.testing.assert_close(ssim_ceiling(prototypes[:2], 4, steps=50), square)
    assert (ssim_ceiling(prototypes[:2], (4, 8), steps=50) > square).all()


def test_the_ceiling_is_found_where_gradients_are_off(prototypes: Tensor) -> None:
    with torch.no_grad():
        quiet = ssim_ceiling(prototypes[:1], 4, steps=20)
    assert torch.equal(quiet, ssim_ceiling(prototypes[:1], 4, steps=20))
    assert not quiet.requires_grad


@pytest.mark.skipif(
    not os.environ.get("BATCHCAM_DATA"),
    reason="BATCHCAM_DATA does not name a folder with the real files",
)
@pytest.mark.parametrize(
    ("dataset", "grid", "expected"),
    [
        ("mnist", 3, 0.41),
        ("mnist", 4, 0.48),
        ("mnist", 7, 0.84),
        ("mnist", 14, 0.99),
        ("fashion_mnist", 3, 0.46),
        ("fashion_mnist", 4, 0.59),
        ("fashion_mnist", 7, 0.84),
        ("fashion_mnist", 14, 0.96),
    ],
)
def test_ceilings_of_the_real_sets_are_those_measured_before(
    real_prototypes: dict[str, Tensor], dataset: str, grid: int, expected: float
) -> None:
    found = ssim_ceiling(real_prototypes[dataset], grid).mean().item()
    assert found == pytest.approx(expected, abs=0.02)


@pytest.fixture(scope="module")
def real_prototypes() -> dict[str, Tensor]:
    found = {}
    for dataset in ("mnist", "fashion_mnist"):
        data = load_data(TrialConfig(dataset=dataset))
        found[dataset] = class_prototypes(*to_device(data.train, torch.device("cpu")), 10)
    return found


# --- Supports -------------------------------------------------------------------------------


def _blob(side: int, at: int, size: int) -> Tensor:
    image = torch.zeros(side, side)
    image[at : at + size, at : at + size] = 200.0
    return image


def test_a_support_is_where_the_median_is_bright() -> None:
    images = _blob(16, 4, 8).expand(10, 16, 16)
    supports = class_supports(images, torch.zeros(10, dtype=torch.int64), 1)
    assert torch.equal(supports[0], _blob(16, 4, 8) > 0)


def test_a_patch_in_a_quarter_of_the_images_is_no_part_of_a_support() -> None:
    images = _blob(16, 5, 6).repeat(12, 1, 1)
    for number, (row, column) in enumerate([(0, 0), (0, 14), (14, 0), (14, 14)] * 3):
        images[number, row : row + 2, column : column + 2] = 255.0
    supports = class_supports(images, torch.zeros(12, dtype=torch.int64), 1)
    assert torch.equal(supports[0], _blob(16, 5, 6) > 0)


@pytest.mark.parametrize(("offset", "width"), [(1, 0), (2, 1), (3, 2), (5, 3)])
def test_a_support_is_widened_to_hold_what_varies_but_not_for_ever(offset: int, width: int) -> None:
    images = torch.stack([_blob(24, 8 + (offset if n % 5 < 2 else 0), 6) for n in range(10)])
    supports = class_supports(images, torch.zeros(10, dtype=torch.int64), 1)
    assert torch.equal(supports[0], _blob(24, 8 - width, 6 + 2 * width) > 0)
