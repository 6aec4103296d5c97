"""Check the predecessor: its loss by hand, its CAMs against ours, and its gradients."""

import pytest
import torch
from torch import Tensor

from batchcam.cam import grad_cam
from batchcam.models import SimpleCNN
from studies.baselines.hookable_model import HookableModel
from studies.baselines.predecessor import (
    Hooks,
    Reach,
    contrastive_loss,
    sequential_grad_cam,
    training_step,
)

REACHES: tuple[Reach, ...] = ("features", "model")


@pytest.fixture
def model() -> HookableModel:
    torch.manual_seed(0)
    return HookableModel(SimpleCNN())


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(5, 1, 28, 28, generator=generator), torch.tensor([3, 1, 4, 1, 5])


def test_contrastive_loss_is_what_pencil_and_paper_give() -> None:
    distance = torch.tensor([3.0, 3.0, 0.5, 0.5, 0.0])
    similar = torch.tensor([1, 0, 1, 0, 0])
    # 3² / 2; 0 beyond the margin; 0.5² / 2; (2 - 0.5)² / 2; 2² / 2.
    expected = torch.tensor([4.5, 0.0, 0.125, 1.125, 2.0])
    torch.testing.assert_close(contrastive_loss(distance, similar, margin=2), expected)
    torch.testing.assert_close(contrastive_loss(distance, similar.bool(), margin=2), expected)


def test_contrastive_loss_has_the_right_gradients() -> None:
    distance = torch.tensor([0.3, 0.7, 2.5], dtype=torch.float64, requires_grad=True)
    similar = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda d: contrastive_loss(d, similar, 1.0), (distance,))


def test_contrastive_loss_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"got \(3,\) labels and \(2,\) distances"):
        contrastive_loss(torch.zeros(2), torch.zeros(3), 1.0)
    with pytest.raises(ValueError, match=r"margin=-1\.0 must be 0 or more"):
        contrastive_loss(torch.zeros(2), torch.zeros(2), -1.0)


@pytest.mark.parametrize("reach", REACHES)
def test_its_cams_are_ours(
    model: HookableModel, batch: tuple[Tensor, Tensor], reach: Reach
) -> None:
    x, labels = batch
    with Hooks(model) as hooks:
        logits = model(x)
        maps = sequential_grad_cam(logits, labels, hooks, reach)
    assert maps[0].requires_grad
    assert not model.hook_point._forward_hooks
    torch.testing.assert_close(torch.stack(maps), grad_cam(logits, hooks.features_NKHW, labels))


def test_its_loss_reaches_the_weights(model: HookableModel, batch: tuple[Tensor, Tensor]) -> None:
    x, labels = batch
    convolution = next(model.model.parameters())
    classifier = list(model.model.parameters())[-2]
    with Hooks(model) as hooks:
        logits = model(x)
        to_features = torch.stack(sequential_grad_cam(logits, labels, hooks, "features")).sum()
        ours = grad_cam(logits, hooks.features_NKHW, labels).sum()
        through_model = torch.stack(sequential_grad_cam(logits, labels, hooks, "model")).sum()
    weights = (convolution, classifier)
    for mine, theirs in zip(
        torch.autograd.grad(ours, weights, retain_graph=True),
        torch.autograd.grad(to_features, weights, retain_graph=True),
        strict=True,
    ):
        assert mine.abs().sum() > 0
        torch.testing.assert_close(theirs, mine, rtol=1e-4, atol=1e-5)
    # Gradients stored by a hook are constants: the loss does not reach the head's weights.
    found = torch.autograd.grad(through_model, weights, allow_unused=True)
    assert found[0] is not None
    assert found[1] is None


@pytest.mark.parametrize("reach", REACHES)
def test_a_step_lowers_the_loss(
    model: HookableModel, batch: tuple[Tensor, Tensor], reach: Reach
) -> None:
    x, labels = batch
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    losses = [
        training_step(model, optimizer, x, x[:, 0], labels, reach=reach).item() for _ in range(4)
    ]
    assert losses[-1] < losses[0]
    # Cross-entropy is about 2.3. The contrastive loss adds a tenth of D² / 2, and D² is several
    # hundred for 28 x 28 pixels.
    assert losses[0] > 5


def test_what_backward_passes_left_in_the_weights_is_not_trained_on(
    model: HookableModel, batch: tuple[Tensor, Tensor]
) -> None:
    x, labels = batch
    before = [parameter.clone() for parameter in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    training_step(model, optimizer, x, x[:, 0], labels, weight=0.0, reach="model")
    after = [parameter.clone() for parameter in model.parameters()]
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), before, strict=True):
            parameter.copy_(value)
    loss = torch.nn.functional.cross_entropy(model(x), labels)
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    optimizer.step()
    for plain, theirs in zip(model.parameters(), after, strict=True):
        torch.testing.assert_close(theirs, plain)
