"""Tests of RRR: exact values and gradcheck of its penalty, and its effect on training."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from batchcam.config import TrialConfig
from batchcam.data.dataset import ImageData
from batchcam.data.prepared import PreparedData, with_prototypes
from batchcam.data.splits import Split
from batchcam.errors import ConfigError, DataError
from batchcam.losses import mask_gradient_loss
from batchcam.training.fit import fit


def test_the_gradient_of_the_log_probabilities_is_penalised_under_the_mask() -> None:
    # For logits (x1, 0), d/dx1 sum_c log p_c = 1 - 2 p_1. At x1 = log 3, p_1 = 0.75.
    x = torch.tensor([[[[math.log(3.0), 5.0]]]], dtype=torch.float32).requires_grad_()
    logits = torch.stack([x[:, 0, 0, 0], torch.zeros(1)], dim=1)
    everywhere = mask_gradient_loss(logits, x, torch.ones(1, 1, 2))
    assert everywhere.item() == pytest.approx((1 - 2 * 0.75) ** 2)
    assert mask_gradient_loss(logits, x, torch.tensor([[[0.0, 1.0]]])).item() == 0


def test_the_penalty_passes_gradcheck() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 1, 3, 3, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.rand(3, 9, generator=generator, dtype=torch.float64).requires_grad_()
    masks = torch.rand(2, 3, 3, generator=generator) > 0.5

    def penalty(w: Tensor) -> Tensor:
        return mask_gradient_loss((x.flatten(1) @ w.T).tanh(), x, masks)

    assert torch.autograd.gradcheck(penalty, (weight,))


def test_bad_arguments_are_refused() -> None:
    x = torch.rand(2, 1, 3, 3)
    with pytest.raises(ValueError, match=r"call images.requires_grad_\(\) before"):
        mask_gradient_loss(torch.rand(2, 3), x, torch.ones(2, 3, 3))
    with pytest.raises(ValueError, match=r"got \(2, 4, 4\) and \(2, 1, 3, 3\)"):
        mask_gradient_loss(torch.rand(2, 3), x.requires_grad_(), torch.ones(2, 4, 4))


# --- In training -----------------------------------------------------------------------------

CONFIG = TrialConfig(
    resolution=14, epochs=4, batch_size=32, device="cpu", lambda_batch=0.0, schedule="constant"
)


def _marked(split: Split) -> Split:
    """Return images whose upper left corner has a grey that encodes the class, and its mask."""
    images = split.images.copy()
    images[:, :, :2, :2] = (28 * split.labels)[:, None, None, None]
    masks = torch.zeros(len(split), *images.shape[2:], dtype=torch.bool)
    masks[:, :2, :2] = True
    return Split(images, split.labels, masks.numpy())


@pytest.fixture
def marked(tiny_data: ImageData) -> PreparedData:
    data = replace(
        tiny_data,
        train=_marked(tiny_data.train),
        validation=_marked(tiny_data.validation),
        test=_marked(tiny_data.test),
    )
    return with_prototypes(data, CONFIG)


def test_training_moves_the_gradient_from_under_the_mask(marked: PreparedData) -> None:
    split = marked.split("test", 14, with_masks=True)
    assert split.masks_NRR is not None
    masks_NRR = split.masks_NRR

    def share(weight: float) -> float:
        result = fit(replace(CONFIG, lambda_mask_gradient=weight), prepared=marked)
        assert ("loss_mask_gradient" in result.metrics) == (weight > 0)
        x = result.preprocess(split.images_NCHW).requires_grad_()
        logits = result.model(x)
        everywhere = mask_gradient_loss(logits, x, torch.ones(len(x), 14, 14))
        return float((mask_gradient_loss(logits, x, masks_NRR) / everywhere).detach())

    assert share(100.0) < 0.5 * share(0.0)


def test_a_data_set_without_masks_is_refused(tiny_prepared: PreparedData) -> None:
    with pytest.raises(
        DataError, match=r"RRR \(lambda_mask_gradient\) needs a mask for every.*digits has none"
    ):
        fit(replace(CONFIG, lambda_mask_gradient=1.0), prepared=tiny_prepared)


def test_compilation_is_refused(marked: PreparedData) -> None:
    config = replace(CONFIG, lambda_mask_gradient=1.0, compile=True)
    with pytest.raises(ConfigError, match=r"RRR \(weight 1\) differentiates the features twice"):
        fit(config, prepared=marked)
