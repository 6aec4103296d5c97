"""Tests of the loss terms and their weighted sum: exact values, gradcheck, invariances."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from batchcam.cam import batch_cam, grad_cam, render
from batchcam.config import LAMBDAS, TrialConfig
from batchcam.losses import (
    TERMS,
    batch_cam_loss,
    compares_cams,
    exchange_loss,
    prototype_energy_loss,
    prototype_loss,
)
from batchcam.similarity import METRICS
from tests.batchcam.losses.problems import total_loss

seeds = st.integers(0, 2**16)
metrics = pytest.mark.parametrize("metric", sorted(METRICS))
CLASSES = 3


def _head(features: Tensor, weight: Tensor) -> Tensor:
    return features.flatten(1).tanh() @ weight.T


def _problem(seed: int, images: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return float64 features `(N, 2, 3, 3)`, head weights, labels and prototypes of 8x8."""
    generator = torch.Generator().manual_seed(seed)
    # Positive features and weights keep the maps above the kink of the ReLU.
    features = 0.2 + torch.rand(images, 2, 3, 3, generator=generator, dtype=torch.float64)
    weight = 0.2 + torch.rand(CLASSES, 18, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (images,), generator=generator)
    prototypes = torch.rand(CLASSES, 8, 8, generator=generator, dtype=torch.float64)
    return features.requires_grad_(), weight.requires_grad_(), labels, prototypes


def _constant(values: Sequence[float], classes: int) -> tuple[Tensor, Tensor]:
    """Return logits and features whose maps are constant, with the sign of each image's value."""
    features = torch.tensor(values)[:, None, None, None].expand(-1, 1, 4, 4).clone()
    features.requires_grad_()
    return features.mean(dim=(1, 2, 3))[:, None].expand(-1, classes), features


def test_prototype_loss_is_the_mean_over_images() -> None:
    # The maps render to 1 / (1 + 1e-6), at distances of 0.25 and 0.75 to the flat prototypes.
    prototypes = torch.stack([torch.full((8, 8), 0.75), torch.full((8, 8), 0.25)])
    loss = prototype_loss(*_constant([1.0, 2.0, 3.0], 2), torch.tensor([0, 0, 1]), prototypes)
    torch.testing.assert_close(loss.item(), (0.25 + 0.25 + 0.75) / 3, atol=1e-4, rtol=0)


def test_batch_cam_loss_is_the_sum_over_the_classes_present() -> None:
    prototypes = torch.stack([torch.full((8, 8), value) for value in (0.75, 0.25, 0.5)])
    # The mean map of the second class is negative, so the ReLU makes it empty.
    for labels, expected in (([0, 0, 1, 1], 0.25 + 0.25), ([0, 0, 0, 0], 0.25)):
        logits, features = _constant([1.0, 3.0, -2.0, 1.0], 3)
        loss = batch_cam_loss(logits, features, torch.tensor(labels), prototypes)
        torch.testing.assert_close(loss.item(), expected, atol=1e-4, rtol=0)


def test_terms_are_weighted_and_summed() -> None:
    features, weight, labels, prototypes = _problem(0)
    logits = _head(features, weight)
    total, terms = total_loss(
        {"lambda_class": 0.5, "lambda_proto": 2.0, "lambda_batch": 3.0, "metric": "l2"},
        logits,
        features,
        labels,
        prototypes,
    )
    l2 = METRICS["l2"]
    per_image = render(grad_cam(logits, features, labels), 8)
    maps, present = batch_cam(logits, features, labels, CLASSES)
    expected = {
        "class": F.cross_entropy(logits, labels),
        "proto": l2(per_image, prototypes, pairs_B=labels).mean(),
        "batch": l2(render(maps, 8), prototypes)[present].sum(),
    }
    assert set(terms) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value)
    torch.testing.assert_close(
        total, 0.5 * expected["class"] + 2 * expected["proto"] + 3 * expected["batch"]
    )


def test_the_energy_is_the_evidence_outside_the_support_of_the_true_class() -> None:
    # The two cells add 3 * 1 - 1 * 2 = 1 and 2 * 2 - 1 * 5 = -1 to the score of the true class.
    features = torch.tensor([[[[3.0, 2.0]], [[1.0, 1.0]]]]).requires_grad_()
    weight = torch.tensor([[[[1.0, 2.0]], [[-2.0, -5.0]]], [[[7.0, 7.0]], [[7.0, 7.0]]]])
    logits = torch.einsum("nkhw,ckhw->nc", features, weight)
    labels, flat = torch.tensor([0]), torch.zeros(2, 8, 8)
    outside = torch.tensor([[[0.0, 1.0]], [[1.0, 1.0]]])
    fields: dict[str, Any] = {"lambda_energy": 2.0}
    total, terms = total_loss(fields, logits, features, labels, flat, off_support=outside)
    assert terms["energy"].item() == 1
    assert total.item() == 2
    inside = total_loss(fields, logits, features, labels, flat, off_support=torch.zeros(2, 1, 2))
    assert inside[0].item() == 0


def test_the_energy_passes_gradcheck_through_the_head() -> None:
    features, weight, labels, prototypes = _problem(3)
    outside = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0], [1.0, 1.0, 1.0]]).double()
    fields: dict[str, Any] = {"lambda_class": 0.5, "lambda_batch": 0.3, "lambda_energy": 0.7}

    def loss(a: Tensor, w: Tensor) -> Tensor:
        total: Tensor = total_loss(
            fields, _head(a, w), a, labels, prototypes, off_support=outside.expand(CLASSES, 3, 3)
        )[0]
        return total

    assert torch.autograd.gradcheck(loss, (features, weight))


@metrics
def test_several_prototypes_per_class_average_by_class_and_group(metric: str) -> None:
    """Check that two prototypes of one class act like two classes with the same scores."""
    features, weight, _, prototypes = _problem(4, images=6)
    groups = torch.tensor([0, 1, 1, 0, 2, 2])
    labels = torch.tensor([0, 0, 0, 0, 1, 1])
    fields: dict[str, Any] = {"lambda_proto": 0.7, "lambda_batch": 0.3, "metric": metric}
    grouped, _ = total_loss(
        fields, _head(features, weight), features, labels, prototypes, prototype_index_N=groups
    )
    twice = weight[[0, 0, 1]]
    apart, _ = total_loss(fields, _head(features, twice), features, groups, prototypes)
    torch.testing.assert_close(grouped, apart)


def test_the_baseline_computes_no_cam() -> None:
    # Logits that do not depend on the features have no CAM. Cross-entropy alone computes none.
    features, weight, labels, prototypes = _problem(2)
    logits = _head(features.detach(), weight)
    total, _ = total_loss({"lambda_class": 1.0}, logits, features, labels, prototypes)
    torch.testing.assert_close(total, F.cross_entropy(logits, labels))
    with pytest.raises(RuntimeError, match="not have been used"):
        total_loss({"lambda_class": 1.0, "lambda_batch": 0.1}, logits, features, labels, prototypes)


@metrics
def test_the_whole_objective_passes_gradcheck_through_its_cams(metric: str) -> None:
    features, weight, labels, prototypes = _problem(6)
    fields: dict[str, Any] = {
        "lambda_class": 0.5,
        "lambda_proto": 0.7,
        "lambda_batch": 0.3,
        "metric": metric,
    }

    def loss(a: Tensor, w: Tensor) -> Tensor:
        total: Tensor = total_loss(fields, _head(a, w), a, labels, prototypes)[0]
        return total

    assert torch.autograd.gradcheck(loss, (features, weight))


@metrics
def test_hires_cam_compares_what_each_cell_adds(metric: str) -> None:
    features, weight, labels, prototypes = _problem(6)
    logits = _head(features, weight)
    total, terms = total_loss(
        {"lambda_proto": 0.7, "lambda_batch": 0.3, "cam": "hires_cam", "metric": metric},
        logits,
        features,
        labels,
        prototypes,
    )
    scores = logits.gather(1, labels[:, None]).sum()
    (gradients,) = torch.autograd.grad(scores, features, create_graph=True)
    maps = (gradients * features).sum(dim=1)
    present = torch.unique(labels)
    own = torch.stack([maps[labels == each].mean(dim=0) for each in present]).relu()
    distance = METRICS[metric]
    wanted = {
        "proto": distance(render(maps.relu(), 8), prototypes[labels]).mean(),
        "batch": distance(render(own, 8), prototypes[present]).sum(),
    }
    for name, value in wanted.items():
        torch.testing.assert_close(terms[name], value.detach())
    torch.testing.assert_close(total, 0.7 * wanted["proto"] + 0.3 * wanted["batch"])
    pooled, _ = total_loss(
        {"lambda_proto": 0.7, "lambda_batch": 0.3, "metric": metric},
        logits,
        features,
        labels,
        prototypes,
    )
    assert not torch.allclose(total, pooled)


def test_hires_cam_passes_gradcheck_through_the_head() -> None:
    features, weight, labels, prototypes = _problem(6)
    fields: dict[str, Any] = {
        "lambda_class": 0.5,
        "lambda_proto": 0.7,
        "lambda_batch": 0.3,
        "cam": "hires_cam",
        "metric": "l2",
    }

    def loss(a: Tensor, w: Tensor) -> Tensor:
        total: Tensor = total_loss(fields, _head(a, w), a, labels, prototypes)[0]
        return total

    assert torch.autograd.gradcheck(loss, (features, weight))


@metrics
@given(seed=seeds)
def test_permuting_a_batch_leaves_the_loss(metric: str, seed: int) -> None:
    features, weight, labels, prototypes = _problem(seed)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    shuffled = features.detach()[order].requires_grad_()
    fields: dict[str, Any] = {
        "lambda_class": 1.0,
        "lambda_proto": 1.0,
        "lambda_batch": 1.0,
        "metric": metric,
    }
    total, _ = total_loss(fields, _head(features, weight), features, labels, prototypes)
    other, _ = total_loss(fields, _head(shuffled, weight), shuffled, labels[order], prototypes)
    torch.testing.assert_close(other, total, atol=1e-6, rtol=1e-6)


@metrics
@given(seed=seeds)
def test_an_absent_class_contributes_neither_value_nor_gradient(metric: str, seed: int) -> None:
    features, weight, labels, prototypes = _problem(seed)
    labels = labels.clamp(max=CLASSES - 2)
    fields: dict[str, Any] = {"lambda_batch": 1.0, "metric": metric}
    total, _ = total_loss(fields, _head(features, weight), features, labels, prototypes)
    total.backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    assert weight.grad[-1].count_nonzero() == 0
    # The prototype of the absent class has no influence.
    changed = prototypes.detach().clone()
    changed[-1] = 0.123
    other, _ = total_loss(fields, _head(features, weight), features, labels, changed)
    assert other.item() == total.item()


@metrics
@given(seed=seeds)
def test_a_batch_of_one_image_has_equal_losses_per_image_and_per_class(
    metric: str, seed: int
) -> None:
    features, weight, labels, prototypes = _problem(seed, images=1)
    _, terms = total_loss(
        {"lambda_class": 1.0, "lambda_proto": 1.0, "lambda_batch": 1.0, "metric": metric},
        _head(features, weight),
        features,
        labels,
        prototypes,
    )
    torch.testing.assert_close(terms["proto"], terms["batch"])


@metrics
def test_a_dead_map_gives_a_finite_gradient(metric: str) -> None:
    features, weight, labels, prototypes = _problem(9)
    negative = (-weight.detach()).requires_grad_()
    total, _ = total_loss(
        {"lambda_class": 1.0, "lambda_proto": 1.0, "lambda_batch": 1.0, "metric": metric},
        _head(features, negative),
        features,
        labels,
        prototypes,
    )
    gradients = torch.autograd.grad(total, (features, negative))
    assert total.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)


@metrics
@given(seed=seeds)
def test_more_classes_than_images_change_nothing(metric: str, seed: int) -> None:
    features, weight, labels, prototypes = _problem(seed)
    generator = torch.Generator().manual_seed(seed)
    others = torch.rand(9, 18, generator=generator, dtype=torch.float64)
    fields: dict[str, Any] = {"lambda_batch": 1.0, "metric": metric}

    few, _ = total_loss(fields, _head(features, weight), features, labels, prototypes)
    many, _ = total_loss(
        fields,
        _head(features, torch.cat([others, weight])),
        features,
        labels + len(others),
        torch.cat([torch.zeros(len(others), 8, 8, dtype=torch.float64), prototypes]),
    )
    torch.testing.assert_close(many, few)
    for theirs, ours in zip(
        torch.autograd.grad(many, (features, weight)),
        torch.autograd.grad(few, (features, weight)),
        strict=True,
    ):
        torch.testing.assert_close(theirs, ours)


def test_the_exchange_adds_to_the_other_terms() -> None:
    features, weight, labels, prototypes = _problem(3)
    logits, images = _head(features, weight), torch.rand(5, 1, 8, 8)
    seen: list[Tensor] = []

    def forward(exchanged: Tensor) -> Tensor:
        seen.append(exchanged)
        return _head(features.flip(3), weight)

    def loss(fields: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        return total_loss(
            fields,
            logits,
            features,
            labels,
            prototypes,
            images_NCRR=images,
            forward=forward,
            off_support=torch.ones(CLASSES, 8, 8),
        )

    others = {"lambda_class": 0.5, "lambda_batch": 0.3}
    total, terms = loss(others | {"lambda_exchange": 2.0})
    expected = exchange_loss(logits, _head(features.flip(3), weight), labels)
    assert terms["exchange"].item() > 0
    torch.testing.assert_close(total, loss(others)[0] + 2 * expected)
    assert len(seen) == 1
    assert torch.equal(seen[0], images.roll(1, dims=0))


@pytest.mark.parametrize("names", [{"class"}, {"class", "proto"}, {"class", "batch"}, {"batch"}])
def test_only_terms_with_a_weight_are_computed(names: set[str]) -> None:
    features, weight, labels, prototypes = _problem(1)
    fields = {f"lambda_{name}": 0.5 for name in names}
    _, terms = total_loss(fields, _head(features, weight), features, labels, prototypes)
    assert set(terms) == names


@metrics
@pytest.mark.parametrize("term", [prototype_loss, batch_cam_loss])
def test_the_losses_of_the_paper_pass_gradcheck(term: Callable[..., Tensor], metric: str) -> None:
    features, weight, labels, prototypes = _problem(5)

    def loss(a: Tensor, w: Tensor) -> Tensor:
        value: Tensor = term(_head(a, w), a, labels, prototypes, metric)
        return value

    assert torch.autograd.gradcheck(loss, (features, weight))


@metrics
def test_the_loss_is_zero_where_every_map_is_its_prototype(metric: str) -> None:
    features, weight, _, _ = _problem(8)
    labels = torch.arange(5) % CLASSES
    logits = _head(features, weight)
    maps, _ = batch_cam(logits, features, labels, CLASSES)
    loss = batch_cam_loss(logits, features, labels, render(maps, 8).detach(), metric)
    torch.testing.assert_close(loss.item(), 0.0, atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("term", "name"),
    [(prototype_loss, "proto"), (batch_cam_loss, "batch")],
)
@metrics
def test_the_functions_are_the_terms_of_the_trainer(
    term: Callable[..., Tensor], name: str, metric: str
) -> None:
    features, weight, labels, prototypes = _problem(7)
    logits = _head(features, weight)
    fields = {f"lambda_{name}": 1.0, "metric": metric}
    expected, _ = total_loss(fields, logits, features, labels, prototypes)
    torch.testing.assert_close(term(logits, features, labels, prototypes, metric), expected)


def test_the_energy_function_is_the_term_of_the_trainer() -> None:
    features, weight, labels, prototypes = _problem(7)
    logits = _head(features, weight)
    mask = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0], [1.0, 1.0, 1.0]]).double()
    mask = mask.expand(CLASSES, 3, 3)
    expected, _ = total_loss(
        {"lambda_energy": 1.0}, logits, features, labels, prototypes, off_support=mask
    )
    torch.testing.assert_close(prototype_energy_loss(logits, features, labels, mask), expected)


@pytest.mark.parametrize("term", [prototype_loss, batch_cam_loss])
def test_bad_arguments_are_refused(term: Callable[..., Tensor]) -> None:
    features, weight, labels, prototypes = _problem(7)
    logits = _head(features, weight)
    with pytest.raises(ValueError, match="metric='cosine' is unknown; choose one of l1, l2, ssim"):
        term(logits, features, labels, prototypes, "cosine")
    with pytest.raises(ValueError, match=r"expected logits \(N, C\), features"):
        term(logits, features[0], labels, prototypes)
    with pytest.raises(ValueError, match="expected sums"):
        term(logits, features, labels, prototypes[0])
    with pytest.raises(ValueError, match=r"on the grid of features .*got \(3, 8, 8\)"):
        prototype_energy_loss(logits, features, labels, prototypes)


# --- The registry ----------------------------------------------------------------------------


def test_every_term_has_its_weight_in_the_configuration() -> None:
    assert tuple(f"lambda_{name}" for name in TERMS) == LAMBDAS
    assert all(spec.name == name for name, spec in TERMS.items())
    for spec in TERMS.values():
        low, high = spec.search_range
        assert 0 < low < high


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"lambda_batch": 0.0}, False),
        ({"lambda_batch": 0.1}, True),
        ({"lambda_batch": 0.0, "lambda_proto": 0.1}, True),
        ({"lambda_batch": 0.0, "lambda_energy": 1.0}, False),
    ],
)
def test_a_metric_matters_where_maps_are_compared(config: dict[str, Any], expected: bool) -> None:
    assert compares_cams(TrialConfig(**config)) is expected
