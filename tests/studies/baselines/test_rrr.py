"""Right for the Right Reasons: its penalty, by hand and by finite differences."""

import math

import pytest
import torch
from torch import Tensor

from batchcam.config import TrialConfig
from batchcam.models import create_model
from batchcam.training.step import TrainingStep
from studies.baselines.rrr import rrr_penalty, train_epoch


def test_rrr_penalises_the_gradient_of_the_log_probabilities_under_the_mask() -> None:
    # d/dx sum_c log p_c of logits (x1, 0) is 1 - 2 p_1, which is 1 - 2 * 0.5 = 0 at 0.
    x = torch.tensor([[[[math.log(3.0), 5.0]]]], dtype=torch.float32).requires_grad_()
    logits = torch.stack([x[:, 0, 0, 0], torch.zeros(1)], dim=1)
    everywhere = rrr_penalty(logits, x, torch.ones(1, 1, 2))
    assert everywhere.item() == pytest.approx((1 - 2 * 0.75) ** 2)
    assert rrr_penalty(logits, x, torch.tensor([[[0.0, 1.0]]])).item() == 0


def test_the_penalty_passes_gradcheck() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 1, 3, 3, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.rand(3, 9, generator=generator, dtype=torch.float64).requires_grad_()
    masks = torch.rand(2, 3, 3, generator=generator) > 0.5

    def penalty(w: Tensor) -> Tensor:
        return rrr_penalty((x.flatten(1) @ w.T).tanh(), x, masks)

    # The penalty's logits are rounded to float32, as they are in training.
    assert torch.autograd.gradcheck(penalty, (weight,), eps=1e-3, atol=1e-3)


def test_training_on_the_penalty_moves_the_gradient_from_under_the_mask() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(64) % 2
    images = 0.3 * torch.randn(64, 1, 14, 14, generator=generator)
    images[:, 0, :4, :4] += labels[:, None, None]  # The decoy.
    images[:, 0, 8:, 8:] += labels[:, None, None]  # As good a reason.
    masks = torch.zeros(64, 14, 14)
    masks[:, :6, :6] = 1

    def trained(weight: float) -> float:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = create_model("simple_cnn", num_classes=2)
        config = TrialConfig(schedule="constant", resolution=14)
        step = TrainingStep(model, torch.zeros(2, 14, 14), config, 20, torch.device("cpu"))
        for _ in range(20):
            train_epoch(step, [(images.clone(), labels, masks)], weight)
        x = images.clone().requires_grad_()
        model.eval()
        everything = rrr_penalty(model(x), x, torch.ones_like(masks))
        return float(rrr_penalty(model(x), x, masks).detach() / everything.detach())

    assert trained(100.0) < 0.5 * trained(0.0)
