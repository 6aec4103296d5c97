"""The distance φ between a saliency map and a prototype: L1, L2 and SSIM (Eqs. 7-10).

Each function compares maps pairwise and returns one value per map; nothing is averaged over the
batch. Maps are float tensors of shape `(B, H, W)` in [0, 1]. To compare many maps with few
prototypes, `pairs_B` gives the index of each map's prototype; statistics of a prototype are then
computed once.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

WINDOW, SIGMA = 7, 1.5
"""Pixels. Side and standard deviation of the Gaussian window of SSIM. Maps must be as large."""
EPSILON_1, EPSILON_2 = 1e-4, 9e-4
"""Stabilisers of luminance and contrast: `K = (0.01, 0.03)` squared, for a data range of 1."""


class Distance(Protocol):
    """The φ of Eqs. 11 and 12: 0 for equal maps."""

    def __call__(self, x_BHW: Tensor, y_PHW: Tensor, *, pairs_B: Tensor | None = None) -> Tensor:
        """Return the distance of each map, shape `(B,)`.

        Args:
            x_BHW: maps.
            y_PHW: maps to compare with.
            pairs_B: int64, the index of the map that each is compared with; None: map b is
                compared with map b.
        """


def l1(x_BHW: Tensor, y_PHW: Tensor, *, pairs_B: Tensor | None = None) -> Tensor:
    """Return the mean absolute difference per map, shape `(B,)`, in [0, 1] for maps in [0, 1].

    Example:
        >>> import torch
        >>> l1(torch.zeros(1, 8, 8), torch.full((1, 8, 8), 0.25))
        tensor([0.2500])
    """
    return (x_BHW - _paired(x_BHW, y_PHW, pairs_B)).abs().mean(dim=(1, 2))


def l2(x_BHW: Tensor, y_PHW: Tensor, *, pairs_B: Tensor | None = None) -> Tensor:
    """Return the mean squared difference per map, shape `(B,)`, in [0, 1] for maps in [0, 1].

    The paper names the "L2 norm" without a formula. The mean of squares is used instead of the
    norm: it is smooth at 0, and its scale does not depend on the resolution.

    Example:
        >>> import torch
        >>> l2(torch.zeros(1, 8, 8), torch.full((1, 8, 8), 0.5))
        tensor([0.2500])
    """
    return (x_BHW - _paired(x_BHW, y_PHW, pairs_B)).square().mean(dim=(1, 2))


def ssim(
    x_BHW: Tensor,
    y_PHW: Tensor,
    alpha: float = 1.0,
    beta: float = 1.0,
    gamma: float = 1.0,
    epsilon_1: float = EPSILON_1,
    epsilon_2: float = EPSILON_2,
    epsilon_3: float = EPSILON_2 / 2,
    window: int = WINDOW,
    sigma: float = SIGMA,
    *,
    pairs_B: Tensor | None = None,
) -> Tensor:
    """Return the structural similarity index per map: `L^alpha * C^beta * S^gamma` of Eqs. 7-10.

    The paper's loss is `1 - ssim(x, y)`. Eqs. 8-10 use the mean and deviation of "the images". Here
    they are computed in a Gaussian window around each pixel around which the whole window fits, and
    the index is averaged over those pixels, as is customary for SSIM.

    With `alpha = beta = gamma = 1` and `epsilon_3 = epsilon_2 / 2` the result equals
    `pytorch_msssim.ssim(x, y, data_range=1, win_size=window, size_average=False)` on
    `(B, 1, H, W)`: contrast times structure is then
    `(2 sigma_xy + epsilon_2) / (sigma_x^2 + sigma_y^2 + epsilon_2)`. The other defaults are that
    library's `K = (0.01, 0.03)` squared, for a data range of 1.

    A negative structure term has no real power for `gamma` other than 1. It is clamped to 1e-6
    then, as are the other terms, which are never negative, for exponents other than 1.

    Args:
        x_BHW: maps, float, `(B, H, W)`, in [0, 1].
        y_PHW: maps to compare with, of the same height and width.
        alpha: exponent of luminance.
        beta: exponent of contrast.
        gamma: exponent of structure.
        epsilon_1: stabiliser of luminance, > 0.
        epsilon_2: stabiliser of contrast, > 0.
        epsilon_3: stabiliser of structure, > 0.
        window: side of the Gaussian window in pixels, odd.
        sigma: standard deviation of the window in pixels.
        pairs_B: int64, the index of the map that each is compared with; None: map b is compared
            with map b.

    Returns:
        One value per map, shape `(B,)`, at most 1; 1 for equal maps.

    Raises:
        ValueError: shapes differ, or a side is smaller than the window.

    Example:
        >>> import torch
        >>> ssim(torch.ones(1, 8, 8), torch.ones(1, 8, 8))
        tensor([1.0000])
    """
    y_BHW = _paired(x_BHW, y_PHW, pairs_B)
    mu_x, mean_xx, mean_xy = _window_means((x_BHW, x_BHW * x_BHW, x_BHW * y_BHW), window, sigma)
    mu_yP, mean_yyP = _window_means((y_PHW, y_PHW * y_PHW), window, sigma)
    of_y = torch.stack([mu_yP, mu_yP.square(), mean_yyP - mu_yP.square()])
    mu_y, square_y, var_y = of_y if pairs_B is None else of_y[:, pairs_B]
    both, square_x = mu_x * mu_y, mu_x * mu_x
    var_x, covariance = mean_xx - square_x, mean_xy - both

    luminance = (2 * both + epsilon_1) / (square_x + (square_y + epsilon_1))
    if beta == gamma == 1 and 2 * epsilon_3 == epsilon_2:
        # The product of the two terms without square roots, whose slope at 0 is infinite.
        contrast_structure = (2 * covariance + epsilon_2) / (var_x + (var_y + epsilon_2))
    else:
        product = (_root(var_x) * _root(var_y)).clamp(min=0)
        contrast = (2 * product + epsilon_2) / (var_x + var_y + epsilon_2)
        structure = (covariance + epsilon_3) / (product + epsilon_3)
        contrast_structure = _power(contrast, beta) * _power(structure, gamma)
    index: Tensor = (_power(luminance, alpha) * contrast_structure).mean(dim=(1, 2))
    return index


def ssim_distance(x_BHW: Tensor, y_PHW: Tensor, *, pairs_B: Tensor | None = None) -> Tensor:
    """Return `1 - ssim` per map, shape `(B,)`, in [0, 2] (Eq. 7 with α = β = γ = 1)."""
    return 1 - ssim(x_BHW, y_PHW, pairs_B=pairs_B)


METRICS: dict[str, Distance] = {"l1": l1, "l2": l2, "ssim": ssim_distance}
"""The distances by name."""


def _paired(x_BHW: Tensor, y_PHW: Tensor, pairs_B: Tensor | None) -> Tensor:
    """Return the map that each map is compared with, `(B, H, W)`."""
    fits = x_BHW.dim() == y_PHW.dim() == 3 and x_BHW.shape[1:] == y_PHW.shape[1:]
    if not fits or len(x_BHW) != len(y_PHW if pairs_B is None else pairs_B):
        also = "" if pairs_B is None else f", paired by {tuple(pairs_B.shape)}"
        raise ValueError(
            "expected two stacks of maps of one shape (B, H, W), got "
            f"{tuple(x_BHW.shape)} and {tuple(y_PHW.shape)}{also}."
        )
    return y_PHW if pairs_B is None else y_PHW[pairs_B]


def _window_means(maps: Sequence[Tensor], window: int, sigma: float) -> Tensor:
    """Return Gaussian-weighted means around each pixel around which the whole window fits.

    Computed by matrix products along rows and columns: a convolution of one channel takes several
    times as long, mostly in its backward pass.
    """
    stack_SBHW = torch.stack(list(maps))
    height, width = stack_SBHW.shape[-2:]
    columns, rows = (
        smoothing(side, window, sigma, stack_SBHW.dtype, stack_SBHW.device)
        for side in (width, height)
    )
    return rows.T @ (stack_SBHW @ columns)


def smoothing(
    side: int, window: int, sigma: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return the banded matrix `(side, side - window + 1)` that smooths along one axis.

    Raises:
        ValueError: the side is smaller than the window.
    """
    if side < window:
        raise ValueError(
            f"maps with a side of {side} pixels are smaller than the SSIM window of {window}; use "
            "larger maps or a smaller window."
        )
    offsets = torch.arange(window, dtype=dtype, device=device)
    weights = torch.exp(-((offsets - window // 2) ** 2) / (2 * sigma**2))
    windows = torch.eye(side, dtype=dtype, device=device).unfold(1, window, 1)
    return windows @ (weights / weights.sum())


def _root(variance: Tensor) -> Tensor:
    # Rounding can make a variance slightly negative, and the slope of the root at 0 is infinite.
    return variance.clamp(min=1e-12).sqrt()


def _power(term: Tensor, exponent: float) -> Tensor:
    return term if exponent == 1 else term.clamp(min=1e-6) ** exponent


def reported_ssim(x_BHW: Tensor, y_BHW: Tensor) -> Tensor:
    """Return the SSIM per map by pytorch-msssim, `(B,)`, for numbers that people read.

    The constants are those of :func:`ssim`, which training optimises; this is another program.

    Args:
        x_BHW: maps in [0, 1], each side at least 7 pixels.
        y_BHW: maps to compare with, of the same shape.

    Raises:
        ValueError: shapes differ, or a side is smaller than the window, which pytorch-msssim would
            skip with a warning.
    """
    from pytorch_msssim import ssim as library_ssim

    if x_BHW.dim() != 3 or x_BHW.shape != y_BHW.shape or min(x_BHW.shape[1:]) < WINDOW:
        raise ValueError(
            f"expected two stacks of maps of one shape (B, H, W), sides at least {WINDOW}, got "
            f"{tuple(x_BHW.shape)} and {tuple(y_BHW.shape)}."
        )
    index: Tensor = library_ssim(
        x_BHW.unsqueeze(1),
        y_BHW.unsqueeze(1),
        data_range=1.0,
        size_average=False,
        win_size=WINDOW,
        win_sigma=SIGMA,
    )
    return index
