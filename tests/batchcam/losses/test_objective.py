"""The objective: its terms by hand, its second derivatives, and what absent classes leave alone."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from batchcam.cam import batch_cam, grad_cam, render
from batchcam.losses.exchange import exchange_loss
from batchcam.losses.objective import Objective, batch_cam_loss, prototype_loss
from batchcam.similarity import METRICS, l1

seeds = st.integers(0, 2**16)
metrics = pytest.mark.parametrize("metric", sorted(METRICS))
CLASSES = 3


def _head(features: Tensor, weight: Tensor) -> Tensor:
    return features.flatten(1).tanh() @ weight.T


def _problem(seed: int, images: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return float64 features `(N, 2, 3, 3)`, head weights, labels and prototypes of 8x8."""
    generator = torch.Generator().manual_seed(seed)
    # Positive features with positive weights: maps well above the ReLU's kink.
    features = 0.2 + torch.rand(images, 2, 3, 3, generator=generator, dtype=torch.float64)
    weight = 0.2 + torch.rand(CLASSES, 18, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (images,), generator=generator)
    prototypes = torch.rand(CLASSES, 8, 8, generator=generator, dtype=torch.float64)
    return features.requires_grad_(), weight.requires_grad_(), labels, prototypes


def test_prototype_loss_is_the_mean_over_images() -> None:
    # Maps of ones render to 1 / (1 + 1e-6): distances to flat prototypes 0.25 and 0.75.
    prototypes = torch.stack([torch.full((8, 8), 0.75), torch.full((8, 8), 0.25)])
    loss = prototype_loss(torch.ones(3, 4, 4), torch.tensor([0, 0, 1]), prototypes, l1)
    torch.testing.assert_close(loss.item(), (0.25 + 0.25 + 0.75) / 3, atol=1e-5, rtol=0)


def test_batch_cam_loss_is_the_sum_over_the_classes_present() -> None:
    prototypes = torch.stack([torch.full((8, 8), value) for value in (0.75, 0.25, 0.5)])
    sums = torch.tensor([1.0, 3.0, -2.0, 1.0])[:, None, None].expand(4, 4, 4)
    # Of the second class one image is for it, one against it, and on the whole it is not shown.
    for groups, expected in (([0, 0, 1, 1], 0.25 + 0.25), ([0, 0, 0, 0], 0.25)):
        loss = batch_cam_loss(sums, torch.tensor(groups), prototypes, l1)
        torch.testing.assert_close(loss.item(), expected, atol=1e-5, rtol=0)


def test_terms_are_weighted_and_summed() -> None:
    features, weight, labels, prototypes = _problem(0)
    logits = _head(features, weight)
    total, terms = Objective("l2", 0.5, 2.0, 3.0)(logits, features, labels, prototypes)
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
        torch.testing.assert_close(terms[name], value.detach())
        assert not terms[name].requires_grad
    torch.testing.assert_close(
        total, 0.5 * expected["class"] + 2 * expected["proto"] + 3 * expected["batch"]
    )


def test_the_energy_is_the_evidence_outside_the_support_of_the_true_class() -> None:
    # Two cells; what they add to the true class's score is 3 * 1 - 1 * 2 and 2 * 2 - 1 * 5.
    features = torch.tensor([[[[3.0, 2.0]], [[1.0, 1.0]]]]).requires_grad_()
    weight = torch.tensor([[[[1.0, 2.0]], [[-2.0, -5.0]]], [[[7.0, 7.0]], [[7.0, 7.0]]]])
    logits = torch.einsum("nkhw,ckhw->nc", features, weight)
    labels, flat = torch.tensor([0]), torch.zeros(2, 8, 8)
    outside = torch.tensor([[[0.0, 1.0]], [[1.0, 1.0]]])
    objective = Objective("l1", 0.0, 0.0, 0.0, 2.0)
    total, terms = objective(logits, features, labels, flat, off_support_CHW=outside)
    assert terms["energy"].item() == 1
    assert total.item() == 2
    inside = objective(logits, features, labels, flat, off_support_CHW=torch.zeros(2, 1, 2))
    assert inside[0].item() == 0


def test_the_energy_passes_gradcheck_through_the_head() -> None:
    features, weight, labels, prototypes = _problem(3)
    outside = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0], [1.0, 1.0, 1.0]]).double()
    objective = Objective("l1", 0.5, 0.0, 0.3, 0.7)

    def loss(a: Tensor, w: Tensor) -> Tensor:
        total: Tensor = objective(
            _head(a, w), a, labels, prototypes, off_support_CHW=outside.expand(CLASSES, 3, 3)
        )[0]
        return total

    assert torch.autograd.gradcheck(loss, (features, weight))


def test_the_energy_asks_for_the_supports() -> None:
    features, weight, labels, prototypes = _problem(3)
    with pytest.raises(ValueError, match="needs off_support_CHW"):
        Objective("l1", 1.0, 0.0, 0.0, 1.0)(_head(features, weight), features, labels, prototypes)


def test_the_exchange_adds_to_the_other_terms() -> None:
    features, weight, labels, prototypes = _problem(3)
    logits, exchanged = _head(features, weight), _head(features.flip(3), weight)
    objective = Objective("l1", 0.5, 0.0, 0.3, lambda_exchange=2.0)
    total, terms = objective(logits, features, labels, prototypes, exchanged_NC=exchanged)
    without, _ = Objective("l1", 0.5, 0.0, 0.3)(logits, features, labels, prototypes)
    expected = exchange_loss(logits, exchanged, labels)
    assert terms["exchange"].item() > 0
    torch.testing.assert_close(total, without + 2 * expected)
    assert not terms["exchange"].requires_grad


def test_the_exchange_asks_for_what_was_exchanged() -> None:
    features, weight, labels, prototypes = _problem(3)
    objective = Objective("l1", 1.0, 0.0, 0.0, lambda_exchange=1.0)
    with pytest.raises(ValueError, match="needs exchanged_NC"):
        objective(_head(features, weight), features, labels, prototypes)


@metrics
def test_several_prototypes_per_class_average_by_class_and_group(metric: str) -> None:
    """Two groups of one class give what two classes with that class's scores would give."""
    features, weight, _, prototypes = _problem(4, images=6)
    groups = torch.tensor([0, 1, 1, 0, 2, 2])
    labels = torch.tensor([0, 0, 0, 0, 1, 1])
    objective = Objective(metric, 0.0, 0.7, 0.3)
    grouped, _ = objective(
        _head(features, weight), features, labels, prototypes, prototype_index_N=groups
    )
    twice = weight[[0, 0, 1]]
    apart, _ = objective(_head(features, twice), features, groups, prototypes)
    torch.testing.assert_close(grouped, apart)


@pytest.mark.parametrize(
    ("weights", "names"),
    [
        ((1.0, 0.0, 0.0), {"class"}),
        ((1.0, 0.5, 0.0), {"class", "proto"}),
        ((1.0, 0.0, 0.5), {"class", "batch"}),
        ((0.0, 0.5, 0.5), {"proto", "batch"}),
    ],
)
def test_only_terms_with_a_weight_are_computed(
    weights: tuple[float, float, float], names: set[str]
) -> None:
    features, weight, labels, prototypes = _problem(1)
    _, terms = Objective("l1", *weights)(_head(features, weight), features, labels, prototypes)
    assert set(terms) == names


def test_the_baseline_computes_no_cam() -> None:
    # Logits that do not depend on the features have no CAM; cross-entropy alone does not care.
    features, weight, labels, prototypes = _problem(2)
    logits = _head(features.detach(), weight)
    total, _ = Objective("l1", 1.0, 0.0, 0.0)(logits, features, labels, prototypes)
    torch.testing.assert_close(total, F.cross_entropy(logits, labels))
    with pytest.raises(RuntimeError, match="not have been used"):
        Objective("l1", 1.0, 0.0, 0.1)(logits, features, labels, prototypes)


@metrics
@pytest.mark.parametrize("term", [prototype_loss, batch_cam_loss])
def test_the_terms_of_the_paper_pass_gradcheck(term: Callable[..., Tensor], metric: str) -> None:
    maps = 0.1 + torch.rand(3, 3, 3, generator=torch.Generator().manual_seed(0)).double()
    _, _, _, prototypes = _problem(3)
    labels = torch.tensor([0, 2, 2])

    def loss(maps: Tensor) -> Tensor:
        value: Tensor = term(maps, labels, prototypes, METRICS[metric])
        return value

    assert torch.autograd.gradcheck(loss, (maps.requires_grad_(),))


@metrics
def test_the_whole_objective_passes_gradcheck_through_its_cams(metric: str) -> None:
    features, weight, labels, prototypes = _problem(6)
    objective = Objective(metric, 0.5, 0.7, 0.3)

    def loss(a: Tensor, w: Tensor) -> Tensor:
        total: Tensor = objective(_head(a, w), a, labels, prototypes)[0]
        return total

    assert torch.autograd.gradcheck(loss, (features, weight))


@metrics
def test_hires_cam_compares_what_each_cell_adds(metric: str) -> None:
    features, weight, labels, prototypes = _problem(6)
    logits = _head(features, weight)
    total, terms = Objective(metric, 0.0, 0.7, 0.3, cam="hires_cam")(
        logits, features, labels, prototypes
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
    pooled, _ = Objective(metric, 0.0, 0.7, 0.3)(logits, features, labels, prototypes)
    assert not torch.allclose(total, pooled)


def test_hires_cam_passes_gradcheck_through_the_head() -> None:
    features, weight, labels, prototypes = _problem(6)
    objective = Objective("l2", 0.5, 0.7, 0.3, cam="hires_cam")

    def loss(a: Tensor, w: Tensor) -> Tensor:
        total: Tensor = objective(_head(a, w), a, labels, prototypes)[0]
        return total

    assert torch.autograd.gradcheck(loss, (features, weight))


@metrics
@given(seed=seeds)
def test_permuting_a_batch_leaves_the_loss(metric: str, seed: int) -> None:
    features, weight, labels, prototypes = _problem(seed)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    shuffled = features.detach()[order].requires_grad_()
    objective = Objective(metric, 1.0, 1.0, 1.0)
    total, _ = objective(_head(features, weight), features, labels, prototypes)
    other, _ = objective(_head(shuffled, weight), shuffled, labels[order], prototypes)
    torch.testing.assert_close(other, total, atol=1e-6, rtol=1e-6)


@metrics
@given(seed=seeds)
def test_an_absent_class_contributes_neither_value_nor_gradient(metric: str, seed: int) -> None:
    features, weight, labels, prototypes = _problem(seed)
    labels = labels.clamp(max=CLASSES - 2)
    objective = Objective(metric, 0.0, 0.0, 1.0)
    total, _ = objective(_head(features, weight), features, labels, prototypes)
    total.backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    assert weight.grad[-1].count_nonzero() == 0
    # Whatever its prototype is.
    changed = prototypes.detach().clone()
    changed[-1] = 0.123
    other, _ = objective(_head(features, weight), features, labels, changed)
    assert other.item() == total.item()


@metrics
@given(seed=seeds)
def test_a_batch_of_one_image_has_equal_losses_per_image_and_per_class(
    metric: str, seed: int
) -> None:
    features, weight, labels, prototypes = _problem(seed, images=1)
    _, terms = Objective(metric, 1.0, 1.0, 1.0)(
        _head(features, weight), features, labels, prototypes
    )
    torch.testing.assert_close(terms["proto"], terms["batch"])


@metrics
def test_the_loss_is_zero_where_every_map_is_its_prototype(metric: str) -> None:
    features, weight, labels, _ = _problem(8)
    labels = torch.arange(5) % CLASSES
    maps, _ = batch_cam(_head(features, weight), features, labels, CLASSES)
    prototypes = render(maps, 8).detach()
    loss = batch_cam_loss(maps, torch.arange(CLASSES), prototypes, METRICS[metric])
    torch.testing.assert_close(loss.item(), 0.0, atol=1e-9, rtol=0)


@metrics
def test_a_dead_map_gives_a_finite_gradient(metric: str) -> None:
    features, weight, labels, prototypes = _problem(9)
    negative = (-weight.detach()).requires_grad_()
    total, _ = Objective(metric, 1.0, 1.0, 1.0)(
        _head(features, negative), features, labels, prototypes
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
    objective = Objective(metric, 0.0, 0.0, 1.0)

    few, _ = objective(_head(features, weight), features, labels, prototypes)
    many, _ = objective(
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
