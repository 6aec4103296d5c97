"""Tests of preprocessing, from stored uint8 images to batches of a model's input."""

import numpy as np
import pytest
import torch

from batchcam.data.preprocessing import Preprocess, batches, resize, to_device
from batchcam.data.splits import Split


def test_preprocess_scales_shifts_and_divides() -> None:
    images = torch.tensor([[[[0, 255]] * 2], [[[51, 102]] * 2]], dtype=torch.uint8)
    x = Preprocess(2, (0.5,), (0.25,))(images)
    expected = torch.tensor([[[[-2.0, 2.0]] * 2], [[[-1.2, -0.4]] * 2]])
    torch.testing.assert_close(x, expected)
    assert images[0, 0, 0, 1] == 255  # Not modified.


def test_preprocess_treats_each_channel_by_its_own() -> None:
    images = torch.full((1, 3, 4, 4), 255, dtype=torch.uint8)
    x = Preprocess(4, (0.0, 0.5, 1.0), (1.0, 0.5, 2.0))(images)
    assert x.amax(dim=(0, 2, 3)).tolist() == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("resolution", [8, 16, 28])
def test_pictures_of_any_size_become_the_resolution(resolution: int) -> None:
    images = torch.zeros(2, 1, 20, 12, dtype=torch.uint8)
    assert Preprocess(resolution, (0.0,), (1.0,))(images).shape == (2, 1, resolution, resolution)


def test_resizing_to_the_same_size_copies_nothing() -> None:
    x = torch.rand(1, 1, 9, 9)
    assert resize(x, 9) is x


def test_shrinking_is_anti_aliased() -> None:
    # One white column in four. Sampling without anti-aliasing would miss it.
    stripes = (torch.arange(32) % 4 == 0).float().expand(1, 1, 32, 32)
    shrunk = resize(stripes, 8)[..., 1:-1]
    torch.testing.assert_close(shrunk, torch.full_like(shrunk, 0.25), atol=0.05, rtol=0)


def test_read_only_arrays_reach_the_device_without_a_warning() -> None:
    images = np.frombuffer(bytes(64), np.uint8).reshape(1, 1, 8, 8)
    assert not images.flags.writeable
    tensors = to_device(Split(images, np.zeros(1, np.int64)), torch.device("cpu"))
    assert tensors[0].data_ptr() == images.ctypes.data


@pytest.mark.parametrize("ordered", [False, True])
def test_batches_hold_every_image_once_with_its_label(ordered: bool) -> None:
    images, labels = torch.arange(10) * 10, torch.arange(10)
    order = torch.tensor([3, 1, 4, 0, 5, 9, 2, 6, 8, 7]) if ordered else None
    found = list(batches((images, labels), 4, order))
    assert [len(chosen) for _, chosen in found] == [4, 4, 2]
    together = torch.cat([chosen for _, chosen in found])
    assert together.tolist() == (list(range(10)) if order is None else order.tolist())
    for batch, chosen in found:
        assert torch.equal(batch, chosen * 10)


def test_a_batch_size_beyond_the_data_gives_one_batch() -> None:
    assert len(list(batches((torch.zeros(3), torch.zeros(3)), 100))) == 1
