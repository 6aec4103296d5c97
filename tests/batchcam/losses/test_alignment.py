"""Tests that the hand-written derivative of the alignment loss equals that of autograd."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from batchcam.cam import render
from batchcam.losses.alignment import alignment_loss
from batchcam.similarity import METRICS, Distance, l1

metrics = pytest.mark.parametrize("metric", sorted(METRICS))


def _problem(seed: int, maps: int = 6, height: int = 4, width: int = 3) -> tuple[Tensor, ...]:
    """Return sums of either sign, 9x9 prototypes, shares of which one is 0, and pairs."""
    generator = torch.Generator().manual_seed(seed)
    sums = torch.randn(maps, height, width, generator=generator, dtype=torch.float64)
    prototypes = torch.rand(3, 9, 9, generator=generator, dtype=torch.float64)
    shares = torch.rand(maps, generator=generator, dtype=torch.float64)
    shares[1] = 0
    return sums.requires_grad_(), prototypes, shares, torch.arange(maps) % 3


def _defined(
    sums: Tensor, prototypes: Tensor, distance: Distance, shares: Tensor, pairs: Tensor
) -> Tensor:
    return distance(render(sums.relu(), 9), prototypes[pairs]) @ shares


@metrics
@given(seed=st.integers(0, 2**16))
def test_value_and_gradient_are_those_of_the_definition(metric: str, seed: int) -> None:
    sums, prototypes, shares, pairs = _problem(seed)
    distance = METRICS[metric]
    loss = alignment_loss(sums, prototypes, distance, shares, pairs)
    expected = _defined(sums, prototypes, distance, shares, pairs)
    torch.testing.assert_close(loss, expected)
    # The upstream gradient is 3, as if the weight of the term were 3.
    (gradient,) = torch.autograd.grad(3 * loss, sums)
    (wanted,) = torch.autograd.grad(3 * expected, sums)
    torch.testing.assert_close(gradient, wanted)
    assert gradient[1].count_nonzero() == 0


@metrics
def test_without_pairs_each_map_has_its_own_prototype(metric: str) -> None:
    sums, prototypes, shares, pairs = _problem(0, maps=3)
    own = alignment_loss(sums, prototypes, METRICS[metric], shares)
    torch.testing.assert_close(
        own, alignment_loss(sums, prototypes, METRICS[metric], shares, pairs)
    )


@metrics
def test_a_map_without_evidence_has_no_gradient(metric: str) -> None:
    sums, prototypes, shares, pairs = _problem(1)
    none = (-sums.detach().abs()).requires_grad_()
    (gradient,) = torch.autograd.grad(
        alignment_loss(none, prototypes, METRICS[metric], shares, pairs), none
    )
    assert gradient.count_nonzero() == 0


@metrics
def test_prototypes_that_are_learned_get_their_gradient(metric: str) -> None:
    sums, prototypes, shares, pairs = _problem(2)
    prototypes.requires_grad_()
    losses = [
        function(sums, prototypes, METRICS[metric], shares, pairs)
        for function in (alignment_loss, _defined)
    ]
    torch.testing.assert_close(*(torch.autograd.grad(loss, (sums, prototypes)) for loss in losses))


def test_another_distance_is_differentiated_by_autograd() -> None:
    def doubled(x_BHW: Tensor, y_PHW: Tensor, *, pairs_B: Tensor | None = None) -> Tensor:
        return 2 * l1(x_BHW, y_PHW, pairs_B=pairs_B)

    sums, prototypes, shares, pairs = _problem(3)
    loss = alignment_loss(sums, prototypes, doubled, shares, pairs)
    twice = 2 * alignment_loss(sums, prototypes, l1, shares, pairs)
    torch.testing.assert_close(loss, twice)
    torch.testing.assert_close(torch.autograd.grad(loss, sums), torch.autograd.grad(twice, sums))


@metrics
def test_without_gradients_only_the_value_is_computed(metric: str) -> None:
    sums, prototypes, shares, pairs = _problem(4)
    with torch.no_grad():
        loss = alignment_loss(sums, prototypes, METRICS[metric], shares, pairs)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, _defined(sums, prototypes, METRICS[metric], shares, pairs))


@metrics
def test_a_second_derivative_is_refused(metric: str) -> None:
    sums, prototypes, shares, pairs = _problem(5)
    loss = alignment_loss(sums, prototypes, METRICS[metric], shares, pairs)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        torch.autograd.grad(loss, sums, create_graph=True)


@metrics
def test_shapes_that_do_not_fit_are_refused(metric: str) -> None:
    sums, prototypes, shares, pairs = _problem(6)
    distance = METRICS[metric]
    with pytest.raises(ValueError, match=r"a prototype for each map, got \(6, 4, 3\).* and 3"):
        alignment_loss(sums, prototypes, distance, shares)
    for other in (prototypes[0], prototypes[:, :7]):
        with pytest.raises(ValueError, match=r"expected .* prototypes \(P, R, R\)"):
            alignment_loss(sums, other, distance, shares, pairs)


def test_prototypes_smaller_than_the_window_of_ssim_are_refused() -> None:
    sums, prototypes, shares, pairs = _problem(7)
    with pytest.raises(ValueError, match="side of 6 pixels"):
        alignment_loss(sums, prototypes[:, :6, :6], METRICS["ssim"], shares, pairs)
