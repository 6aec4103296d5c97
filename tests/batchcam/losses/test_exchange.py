"""Tests of the exchange: the pixels exchanged, the loss, and its effect on training."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from batchcam.config import TrialConfig
from batchcam.data.dataset import ImageData
from batchcam.data.prepared import with_prototypes
from batchcam.data.preprocessing import to_device
from batchcam.data.splits import Split
from batchcam.losses.exchange import exchange_images, exchange_loss
from batchcam.training.fit import fit

OUTSIDE = torch.tensor([[[0.0, 1.0, 1.0]], [[1.0, 0.0, 1.0]]]).expand(2, 3, 3)
"""The support of class 0 is the left column, that of class 1 the middle one."""


@pytest.mark.parametrize("channels", [1, 3])
def test_partners_exchange_what_is_neithers(channels: int) -> None:
    x = torch.arange(3.0)[:, None, None, None].expand(3, channels, 3, 3)
    found = exchange_images(x, torch.tensor([0, 1, 1]), OUTSIDE)
    # Each image has the one before it as partner. Partners of class 1 keep the middle column.
    expected = torch.tensor([[0.0, 0.0, 2.0], [1.0, 1.0, 0.0], [1.0, 2.0, 1.0]])
    assert torch.equal(found, expected[:, None, None, :].expand(3, channels, 3, 3))


def test_one_image_alone_stays_as_it_is() -> None:
    x = torch.rand(1, 1, 3, 3)
    assert torch.equal(exchange_images(x, torch.tensor([1]), OUTSIDE), x)


def test_the_loss_is_of_the_margin_between_the_two_classes() -> None:
    logits = torch.tensor([[2.0, 1.0, 9.0], [0.0, 3.0, 0.0]])
    exchanged = torch.tensor([[1.0, 3.0, 0.0], [0.0, 3.0, 7.0]])
    # Image 0: the margin of class 0 over class 1 changes from 1 to -2. Image 1: the margin of
    # class 1 over class 0 stays 3.
    assert exchange_loss(logits, exchanged, torch.tensor([0, 1])).item() == 9 / 2
    assert exchange_loss(logits, exchanged, torch.tensor([1, 1])).item() == 0


def test_a_score_that_all_classes_gain_costs_nothing() -> None:
    logits = torch.rand(4, 3)
    shifted = logits + torch.rand(4, 1)
    assert exchange_loss(logits, shifted, torch.tensor([0, 1, 2, 0])).item() < 1e-12


def test_a_model_that_looks_at_either_class_alone_pays_nothing() -> None:
    x, labels = torch.rand(6, 1, 3, 3), torch.tensor([0, 1, 0, 1, 1, 0])

    def scores(x: Tensor, columns: slice) -> Tensor:
        seen = x[..., columns].flatten(1)
        return torch.stack([seen.sum(1), -seen.sum(1)], dim=1)

    exchanged = exchange_images(x, labels, OUTSIDE)
    # Partners of different classes exchange neither column. The loss of partners of one class is 0.
    own = exchange_loss(scores(x, slice(2)), scores(exchanged, slice(2)), labels)
    other = exchange_loss(scores(x, slice(2, 3)), scores(exchanged, slice(2, 3)), labels)
    assert own.item() == 0
    assert other.item() > 0.01


def test_the_loss_passes_gradcheck() -> None:
    labels = torch.tensor([0, 1, 2, 2])
    logits, exchanged = (
        torch.rand(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)
    )
    assert torch.autograd.gradcheck(lambda a, b: exchange_loss(a, b, labels), (logits, exchanged))


# --- In training -----------------------------------------------------------------------------


def _marked(split: Split) -> Split:
    """Return images in which one random corner pixel has a grey that encodes the class."""
    images = split.images.copy()
    corners = np.random.default_rng(0).integers(0, 2, (2, len(images))) * -1
    images[np.arange(len(images)), :, *corners] = 28 * split.labels[:, None]
    return Split(images, split.labels)


def test_training_makes_corners_count_less_that_give_the_class_away(tiny_data: ImageData) -> None:
    marked = replace(
        tiny_data,
        train=_marked(tiny_data.train),
        validation=_marked(tiny_data.validation),
        test=_marked(tiny_data.test),
    )
    config = TrialConfig(resolution=14, epochs=3, batch_size=32, device="cpu", lambda_batch=0.0)
    prepared = with_prototypes(marked, config)
    outside = prepared.off_support_mask((14, 14))
    assert outside[:, [0, 0, -1, -1], [0, -1, 0, -1]].all()
    images, labels = to_device(marked.test, torch.device("cpu"))

    def cost(lambda_exchange: float) -> float:
        """Return the loss on the test split, divided by the mean squared margin."""
        result = fit(replace(config, lambda_exchange=lambda_exchange), prepared=prepared)
        assert ("loss_exchange" in result.metrics) == (lambda_exchange > 0)
        x = result.preprocess(images)
        with torch.no_grad():
            logits, moved = result.model(x), result.model(exchange_images(x, labels, outside))
            margins = exchange_loss(logits, torch.zeros_like(logits), labels)
            return float(exchange_loss(logits, moved, labels) / margins)

    assert cost(1.0) < 0.5 * cost(0.0)
