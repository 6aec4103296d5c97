"""Tests of the metrics: exact values, agreement with pytorch-msssim, gradients, invariants."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pytorch_msssim import ssim as reference_ssim
from torch import Tensor

from batchcam.similarity import METRICS, Distance, l1, l2, ssim, ssim_distance

seeds = st.integers(0, 2**16)


def _pair(seed: int, side: int = 9, count: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, side, side, generator=generator, dtype=torch.float64)
    y = torch.rand(count, side, side, generator=generator, dtype=torch.float64)
    return x, y


def test_l1_is_the_mean_absolute_difference_of_each_map() -> None:
    x = torch.tensor([[[0.0, 1.0], [0.5, 0.25]], [[1.0, 1.0], [1.0, 1.0]]])
    y = torch.tensor([[[1.0, 1.0], [0.0, 0.75]], [[0.0, 0.0], [0.0, 0.0]]])
    # (1 + 0 + 0.5 + 0.5) / 4 and 4 / 4.
    torch.testing.assert_close(l1(x, y), torch.tensor([0.5, 1.0]))


def test_l2_is_the_mean_squared_difference_of_each_map() -> None:
    x = torch.tensor([[[0.0, 1.0], [0.5, 0.25]], [[1.0, 1.0], [1.0, 1.0]]])
    y = torch.tensor([[[1.0, 1.0], [0.0, 0.75]], [[0.0, 0.0], [0.0, 0.0]]])
    # (1 + 0 + 0.25 + 0.25) / 4 and 4 / 4.
    torch.testing.assert_close(l2(x, y), torch.tensor([0.375, 1.0]))


def test_ssim_of_two_flat_maps_is_their_luminance_alone() -> None:
    x, y = torch.full((1, 7, 7), 0.2).double(), torch.full((1, 7, 7), 0.6).double()
    # Variances are 0, so contrast and structure are 1: (2 * 0.12 + 1e-4) / (0.04 + 0.36 + 1e-4).
    torch.testing.assert_close(ssim(x, y), torch.tensor([0.2401 / 0.4001]).double())
    # The exponent 2 squares the luminance.
    expected = torch.tensor([(0.2401 / 0.4001) ** 2]).double()
    torch.testing.assert_close(ssim(x, y, alpha=2), expected)


def test_ssim_with_a_flat_window_of_one_pixel_has_no_variance() -> None:
    x, y = torch.tensor([[[0.2, 1.0]]]).double(), torch.tensor([[[0.6, 1.0]]]).double()
    expected = torch.tensor([(0.2401 / 0.4001 + 1) / 2]).double()
    torch.testing.assert_close(ssim(x, y, window=1), expected)


@pytest.mark.parametrize("side", [7, 14, 28])
def test_ssim_equals_pytorch_msssim(side: int) -> None:
    x, y = _pair(side, side=side, count=8)
    y = 0.7 * x + 0.3 * y
    expected = reference_ssim(x[:, None], y[:, None], data_range=1, win_size=7, size_average=False)
    torch.testing.assert_close(ssim(x, y), expected, atol=1e-6, rtol=1e-6)


def test_ssim_of_opposites_equals_pytorch_msssim_below_zero() -> None:
    x, _ = _pair(0, side=14)
    expected = reference_ssim(
        x[:, None], 1 - x[:, None], data_range=1, win_size=7, size_average=False
    )
    torch.testing.assert_close(ssim(x, 1 - x), expected, atol=1e-6, rtol=1e-6)
    assert (expected < 0).all()


def test_the_three_factors_apart_give_the_product_of_the_shortcut() -> None:
    x, y = _pair(0)
    # Any epsilon_3 other than epsilon_2 / 2 takes the branch with the square roots.
    apart = ssim(x, y, epsilon_3=4.5e-4 * (1 + 1e-9))
    torch.testing.assert_close(apart, ssim(x, y), atol=1e-7, rtol=0)


def test_exponents_select_the_factors() -> None:
    x, _ = _pair(1)
    paler = 0.5 + 0.5 * (x - 0.5)
    structure = ssim(x, paler, alpha=0, beta=0, gamma=1, epsilon_3=1e-12)
    torch.testing.assert_close(structure, torch.ones(2).double(), atol=1e-6, rtol=0)
    # Deviations s and s / 2: 2 * (s * s / 2) / (s^2 + s^2 / 4) = 0.8.
    contrast = ssim(x, paler, alpha=0, beta=1, gamma=0, epsilon_2=1e-12)
    torch.testing.assert_close(contrast, torch.full((2,), 0.8).double(), atol=1e-6, rtol=0)


def test_a_negative_structure_under_an_exponent_stays_finite() -> None:
    x, _ = _pair(2)
    x.requires_grad_()
    index = ssim(x, 1 - x.detach(), gamma=0.5)
    (gradient,) = torch.autograd.grad(index.sum(), x)
    assert index.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", sorted(METRICS))
def test_the_gradient_at_equal_and_at_flat_maps_is_finite(name: str) -> None:
    for x in (torch.rand(1, 9, 9), torch.zeros(1, 9, 9)):
        for y in (x.clone(), torch.zeros(1, 9, 9)):
            x = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(METRICS[name](x, y).sum(), x)
            assert gradient.isfinite().all()


@pytest.mark.parametrize(
    "metric",
    [
        pytest.param(l1, id="l1"),
        pytest.param(l2, id="l2"),
        pytest.param(ssim, id="ssim"),
        pytest.param(ssim_distance, id="ssim_distance"),
        pytest.param(partial(ssim, alpha=2.0, beta=0.5, gamma=1.0), id="ssim-2-0.5-1"),
        pytest.param(partial(ssim, alpha=0.5, beta=1.5, gamma=2.0), id="ssim-0.5-1.5-2"),
        pytest.param(partial(ssim, epsilon_3=1e-3), id="ssim-epsilon_3"),
    ],
)
def test_gradients_pass_gradcheck(metric: Callable[[Tensor, Tensor], Tensor]) -> None:
    x, noise = _pair(7, side=8)
    # Positive correlation keeps structure away from its clamp. The maps differ in every pixel,
    # away from the kink of L1.
    y = 0.8 * x + 0.15 * noise + 0.01
    assert torch.autograd.gradcheck(metric, (x.requires_grad_(), y.requires_grad_()))


@given(seeds)
def test_equal_maps_have_ssim_one_and_distance_zero(seed: int) -> None:
    x, _ = _pair(seed)
    torch.testing.assert_close(ssim(x, x), torch.ones(2).double())
    for metric in METRICS.values():
        torch.testing.assert_close(metric(x, x), torch.zeros(2).double(), atol=1e-12, rtol=0)


@given(seeds)
def test_metrics_are_symmetric(seed: int) -> None:
    x, y = _pair(seed)
    for metric in METRICS.values():
        torch.testing.assert_close(metric(x, y), metric(y, x))


@given(seeds, st.floats(0, 1))
def test_metrics_stay_in_their_range(seed: int, mix: float) -> None:
    x, y = _pair(seed)
    y = mix * y + (1 - mix) * (1 - x)
    assert (ssim(x, y).abs() <= 1 + 1e-9).all()
    for name, top in (("l1", 1.0), ("l2", 1.0), ("ssim", 2.0)):
        distance = METRICS[name](x, y)
        assert (distance >= -1e-9).all()
        assert (distance <= top + 1e-9).all()


@given(seeds)
def test_maps_are_compared_one_by_one(seed: int) -> None:
    x, y = _pair(seed, count=3)
    for metric in METRICS.values():
        alone = torch.cat([metric(x[i : i + 1], y[i : i + 1]) for i in range(3)])
        torch.testing.assert_close(metric(x, y), alone)


@given(seeds)
def test_many_compared_with_few_are_as_each_with_its_own(seed: int) -> None:
    x, y = _pair(seed, count=5)
    few, pairs = y[:2], torch.tensor([1, 0, 0, 1, 1])
    for metric in (*METRICS.values(), partial(ssim, gamma=2.0)):
        torch.testing.assert_close(metric(x, few, pairs_B=pairs), metric(x, few[pairs]))


@pytest.mark.parametrize("metric", [l1, l2, ssim, ssim_distance])
def test_maps_of_different_shape_are_refused(metric: Distance) -> None:
    with pytest.raises(ValueError, match=r"\(2, 9, 9\) and \(3, 9, 9\)"):
        metric(torch.rand(2, 9, 9), torch.rand(3, 9, 9))
    with pytest.raises(ValueError, match=r"one shape \(B, H, W\)"):
        metric(torch.rand(9, 9), torch.rand(9, 9))
    with pytest.raises(ValueError, match=r"\(2, 9, 9\) and \(3, 9, 9\), paired by \(4,\)"):
        metric(torch.rand(2, 9, 9), torch.rand(3, 9, 9), pairs_B=torch.zeros(4).long())


def test_maps_smaller_than_the_window_are_refused() -> None:
    with pytest.raises(ValueError, match=r"side of 6 pixels.*window of 7; use larger maps"):
        ssim(torch.rand(1, 6, 9), torch.rand(1, 6, 9))
    assert ssim(torch.rand(1, 6, 9), torch.rand(1, 6, 9), window=5).shape == (1,)
