"""Tests of the contract that every backbone passes."""

import copy
from dataclasses import dataclass

import pytest
import torch
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn

from batchcam.cam import batch_cam, fused_weighted_sum, grad_cam, pooled
from batchcam.models import ExplainableModel, check_explainable, create_model, feature_grid
from tests.batchcam.losses.problems import Head, total_loss

RESOLUTION = 28


@dataclass(frozen=True)
class Backbone:
    name: str
    output_stride: int | None
    grid: tuple[int, int]
    images: int = 4

    def create(self, seed: int = 0) -> ExplainableModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return create_model(self.name, in_chans=1, output_stride=self.output_stride)

    def batch(self, seed: int = 1) -> tuple[Tensor, Tensor]:
        """Return images and their labels, of two classes."""
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(self.images, 1, RESOLUTION, RESOLUTION, generator=generator)
        return images, torch.arange(self.images) % 2 * 7


BACKBONES = (
    Backbone("simple_cnn", None, (14, 14)),
    Backbone("resnet18", 8, (4, 4)),
    Backbone("convnextv2_tiny", 8, (3, 3), images=2),
    Backbone("convnextv2_atto", 8, (3, 3)),
    Backbone("resnet10t", 8, (4, 4)),
    Backbone("efficientnet_b0", 8, (4, 4)),
    Backbone("regnetx_002", 8, (4, 4)),
)


LARGE = {"resnet18", "convnextv2_tiny"}
"""Slow backbones. resnet10t and convnextv2_atto cover the same families."""


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(each, marks=pytest.mark.faults if each.name in LARGE else (), id=each.name)
        for each in BACKBONES
    ],
)
def backbone(request: pytest.FixtureRequest) -> Backbone:
    chosen: Backbone = request.param
    return chosen


@pytest.fixture(scope="module")
def pristine(backbone: Backbone) -> ExplainableModel:
    return backbone.create()


@pytest.fixture
def model(pristine: ExplainableModel) -> ExplainableModel:
    return copy.deepcopy(pristine)


def test_the_grid_told_is_the_grid_of_a_real_forward(
    backbone: Backbone, model: ExplainableModel
) -> None:
    images, _ = backbone.batch()
    with torch.no_grad():
        features = model.eval().features(images)
    assert tuple(features.shape[2:]) == backbone.grid
    assert feature_grid(backbone.name, RESOLUTION, 1, backbone.output_stride) == backbone.grid


def test_forward_is_the_head_of_the_features(backbone: Backbone, model: ExplainableModel) -> None:
    images, _ = backbone.batch()
    model.eval()
    with torch.no_grad():
        logits = model(images)
        assert torch.equal(logits, model.head(model.features(images)))
    assert logits.shape == (backbone.images, 10)


def test_gradients_of_a_batch_in_training_are_those_of_its_images_alone(
    backbone: Backbone, model: ExplainableModel
) -> None:
    images, labels = backbone.batch()
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    features = model.features(images).detach().requires_grad_()
    scores = model.head(features).gather(1, labels[:, None]).sum()
    (together,) = torch.autograd.grad(scores, features)
    for number, label in enumerate(labels):
        alone = features.detach()[number : number + 1].requires_grad_()
        (gradient,) = torch.autograd.grad(model.head(alone)[0, label], alone)
        torch.testing.assert_close(together[number], gradient[0])
    check_explainable(model, RESOLUTION, in_chans=1)


class _Tapped(nn.Module):
    """A model whose feature maps pass through a layer that pytorch-grad-cam can hook."""

    def __init__(self, model: ExplainableModel) -> None:
        super().__init__()
        self.model = model
        self.tap = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        return self.model.head(self.tap(self.model.features(images)))


def test_grad_cam_equals_pytorch_grad_cam_before_its_scaling(
    backbone: Backbone, model: ExplainableModel
) -> None:
    images, labels = backbone.batch()
    tapped = _Tapped(model)
    reference = GradCAM(tapped, [tapped.tap])
    targets = [ClassifierOutputTarget(int(label)) for label in labels]
    reference(images, targets)
    recorded = reference.activations_and_grads
    expected = reference.get_cam_image(
        images,
        tapped.tap,
        targets,
        recorded.activations[0].numpy(),
        recorded.gradients[0].numpy(),
    ).clip(min=0)
    recorded.release()

    features = model.eval().features(images)
    maps = grad_cam(model.head(features), features, labels).detach()
    scale = float(expected.max())
    assert scale > 0
    torch.testing.assert_close(maps, torch.from_numpy(expected), atol=1e-5 * scale, rtol=0)


def test_a_training_step_moves_every_parameter_by_a_finite_gradient(
    backbone: Backbone, model: ExplainableModel
) -> None:
    images, labels = backbone.batch()
    prototypes = torch.rand(10, RESOLUTION, RESOLUTION, generator=torch.Generator().manual_seed(0))
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1)
    features = model.features(images)
    loss, terms = total_loss(
        {"lambda_class": 1.0, "lambda_proto": 1.0, "lambda_batch": 1.0, "metric": "ssim"},
        model.head(features),
        features,
        labels,
        prototypes,
    )
    torch.autograd.backward(loss)
    optimizer.step()
    assert set(terms) == {"class", "proto", "batch"}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert any(not torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_batch_cam_differentiates_twice_as_numbers_say(
    backbone: Backbone, model: ExplainableModel
) -> None:
    images, labels = backbone.batch()
    model.double().eval()
    parameters = list(model.parameters())
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in parameters:
            if parameter.dim() == 1:
                # Some gains are initialised to 0, which puts whole blocks on the kink of a ReLU.
                parameter.add_(torch.rand(parameter.shape, generator=generator), alpha=0.1)

    def loss() -> Tensor:
        features = model.features(images.double())
        maps, _ = batch_cam(model.head(features), features, labels, 10)
        return maps.square().sum()

    gradients = torch.autograd.grad(loss(), parameters, materialize_grads=True)
    # Step along the gradient, by the same length in every tensor. The directional derivative is
    # the sum of the gradient norms.
    direction = [gradient / (gradient.norm() + 1e-30) for gradient in gradients]
    exact = torch.stack([gradient.norm() for gradient in gradients]).sum()
    step, sides = 1e-7, []
    for factor in (step, -2 * step):
        with torch.no_grad():
            for parameter, d in zip(parameters, direction, strict=True):
                parameter.add_(d, alpha=factor)
        sides.append(loss().item())
    numeric = torch.tensor((sides[0] - sides[1]) / (2 * step), dtype=torch.float64)
    assert numeric.abs() > 0
    torch.testing.assert_close(exact, numeric, rtol=1e-3, atol=0)


LINEAR_HEADS = {"simple_cnn", "resnet18", "resnet10t", "efficientnet_b0", "regnetx_002"}


@pytest.mark.parametrize("resolution", [28, 40])
def test_weights_of_a_linear_head_are_the_pooled_gradients(
    backbone: Backbone, model: ExplainableModel, resolution: int
) -> None:
    """Compare losses and gradients with and without a backward pass through the head."""
    model = copy.deepcopy(model).double()
    # SimpleCNN pools the grid in equal parts at 28 pixels, and in unequal parts at 40.
    images = torch.randn(backbone.images, 1, resolution, resolution, dtype=torch.float64)
    labels = torch.arange(backbone.images) % 2 * 7
    with torch.no_grad():
        fixed = model.eval().features(images)
    weights = model.class_weights(fixed.shape[2] * fixed.shape[3])
    if backbone.name not in LINEAR_HEADS:
        assert weights is None
        return
    assert weights is not None
    losses = []
    for known in (False, True):
        given = fixed.clone().requires_grad_()
        features, sums = fused_weighted_sum(weights[labels], given) if known else (given, None)
        prototypes = torch.rand(10, 14, 14, generator=torch.Generator().manual_seed(0)).double()
        loss, _ = total_loss(
            {"lambda_class": 0.5, "lambda_proto": 0.7, "lambda_batch": 0.3, "metric": "l2"},
            model.head(features),
            features,
            labels,
            prototypes,
            model=model if known else Head(),
            fused_sums_NHW=sums,
        )
        wanted = [given, *model.parameters()]
        losses.append((loss, torch.autograd.grad(loss, wanted, materialize_grads=True)))
    (slow, slow_gradients), (fast, fast_gradients) = losses
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(fast_gradients, slow_gradients)


@pytest.mark.parametrize("resolution", [28, 40, 56])
@pytest.mark.parametrize("lambda_energy", [0.0, 0.4])
def test_known_gradients_are_those_of_the_scores(
    backbone: Backbone, model: ExplainableModel, resolution: int, lambda_energy: float
) -> None:
    """Compare HiResCAM and energy losses with and without a backward pass through the head."""
    model = copy.deepcopy(model).double()
    images = torch.randn(backbone.images, 1, resolution, resolution, dtype=torch.float64)
    labels = torch.arange(backbone.images) % 2 * 7
    with torch.no_grad():
        fixed = model.eval().features(images)
    known = model.class_gradients(*fixed.shape[2:])
    if backbone.name not in LINEAR_HEADS:
        assert known is None
        return
    assert known is not None
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.rand(10, 14, 14, generator=generator).double()
    outside = (torch.rand(10, *fixed.shape[2:], generator=generator) < 0.5).double()
    fields = {"lambda_proto": 0.7, "lambda_batch": 0.3, "lambda_energy": lambda_energy}
    losses = []
    for explained in (Head(), model):
        features = fixed.clone().requires_grad_()
        loss, _ = total_loss(
            {**fields, "metric": "l2", "cam": "hires_cam"},
            model.head(features),
            features,
            labels,
            prototypes,
            model=explained,
            off_support=outside,
        )
        wanted = [features, *model.parameters()]
        losses.append((loss, torch.autograd.grad(loss, wanted, materialize_grads=True)))
    (slow, slow_gradients), (fast, fast_gradients) = losses
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(fast_gradients, slow_gradients)
    weights = model.class_weights(fixed.shape[2] * fixed.shape[3])
    torch.testing.assert_close(pooled(known), weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_maps_are_float32_in_either_precision(
    backbone: Backbone, model: ExplainableModel, dtype: torch.dtype
) -> None:
    images, labels = backbone.batch()
    model.eval()
    features = model.features(images)
    expected = grad_cam(model.head(features), features, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        low_features = model.features(images)
        low_logits = model.head(low_features)
    maps = grad_cam(low_logits, low_features, labels)
    assert low_logits.dtype == dtype
    assert maps.dtype == torch.float32
    assert torch.cosine_similarity(maps.flatten(), expected.flatten(), dim=0) > 0.95


def test_a_state_dict_carries_the_model_over(backbone: Backbone, model: ExplainableModel) -> None:
    images, _ = backbone.batch()
    other = backbone.create(seed=99)
    model.eval()
    other.eval()
    with torch.no_grad():
        assert not torch.equal(other(images), model(images))
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(images), model(images))
