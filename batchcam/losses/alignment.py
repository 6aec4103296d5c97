"""The sum of the distances between maps and prototypes, and its gradient in the same pass.

In a training step these tensors are small, and the number of operators determines the cost. For the
three metrics of the paper, derivatives written by hand need fewer than half the operators that
autograd needs. They are the derivatives of :func:`batchcam.cam.render` and of the distances in
`batchcam.similarity`. Other distances are differentiated by autograd, through those functions.

Shapes: B maps of H and W cells, P prototypes of R pixels square.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from batchcam.cam import bilinear, render
from batchcam.similarity import (
    EPSILON_1,
    EPSILON_2,
    SIGMA,
    WINDOW,
    Distance,
    l1,
    l2,
    smoothing,
    ssim_distance,
)

Differentiated = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""A distance's value for each map, `(B,)`, and its gradient to the maps, `(B, R, R)`."""


def alignment_loss(
    sums_BHW: Tensor,
    prototypes_PRR: Tensor,
    distance: Distance,
    shares_B: Tensor,
    pairs_B: Tensor | None = None,
) -> Tensor:
    """Return `sum_b shares_b φ(M_b, P_b)` of the maps `M = render(ReLU(sums))`.

    The result is differentiable once, with respect to the sums. If the prototypes require a
    gradient, or the distance is not one of the paper's, it is differentiable with respect to both,
    any number of times.

    Args:
        sums_BHW: weighted sums of feature maps, negative values included.
        prototypes_PRR: square, in [0, 1].
        distance: φ.
        shares_B: the weight of each map; a map of weight 0 adds neither value nor gradient.
        pairs_B: int64, the index of each map's prototype; None: map b goes with prototype b.

    Raises:
        ValueError: shapes do not fit each other.
        RuntimeError: in the backward pass, if a second derivative is requested and not available.
    """
    count = len(prototypes_PRR if pairs_B is None else pairs_B)
    square = prototypes_PRR.dim() == 3 and prototypes_PRR.shape[1] == prototypes_PRR.shape[2]
    if sums_BHW.dim() != 3 or not square or not len(sums_BHW) == len(shares_B) == count:
        raise ValueError(
            "expected sums (B, H, W), shares (B,), prototypes (P, R, R) and a prototype for each "
            f"map, got {tuple(sums_BHW.shape)}, {tuple(shares_B.shape)}, "
            f"{tuple(prototypes_PRR.shape)} and {count}."
        )
    differentiated = _DIFFERENTIATED.get(distance)
    if differentiated is None or prototypes_PRR.requires_grad:
        maps_BRR = render(F.relu(sums_BHW), prototypes_PRR.shape[-1])
        distances_B = distance(maps_BRR, prototypes_PRR, pairs_B=pairs_B)
        return distances_B.where(shares_B > 0, distances_B.new_zeros(())) @ shares_B
    loss: Tensor = _Alignment.apply(sums_BHW, prototypes_PRR, differentiated, shares_B, pairs_B)
    return loss


class _Alignment(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        sums_BHW: Tensor,
        prototypes_PRR: Tensor,
        differentiated: Differentiated,
        shares_B: Tensor,
        pairs_B: Tensor | None,
    ) -> Tensor:
        height, width = sums_BHW.shape[1:]
        pixels = prototypes_PRR.shape[-1]
        rows_RH = _upsampling(height, pixels, sums_BHW.dtype, sums_BHW.device)
        columns_RW = _upsampling(width, pixels, sums_BHW.dtype, sums_BHW.device)
        scaled_BRR = rows_RH @ (sums_BHW.clamp(min=0) @ columns_RW.T)
        tops_B11 = scaled_BRR.amax(dim=(1, 2), keepdim=True).add_(1e-6)
        maps_BRR = scaled_BRR.div_(tops_B11)
        distances_B, slopes_BRR = differentiated(maps_BRR, prototypes_PRR, pairs_B)
        if ctx.needs_input_grad[0]:
            slopes_BRR *= shares_B[:, None, None] / tops_B11
            # A map is divided by its maximum: raising the maximum lowers the whole map.
            flat_BS, slopes_BS = maps_BRR.flatten(1), slopes_BRR.flatten(1)
            top_B1 = flat_BS.argmax(dim=1, keepdim=True)
            lowered_B1 = torch.linalg.vecdot(slopes_BS, flat_BS).unsqueeze(1)
            slopes_BS.scatter_add_(1, top_B1, lowered_B1.neg_())
            gradient_BHW = rows_RH.T @ (slopes_BRR @ columns_RW)
            ctx.save_for_backward(gradient_BHW.mul_(sums_BHW > 0))
        return distances_B @ shares_B

    @staticmethod
    def backward(ctx: Any, loss: Tensor) -> tuple[Tensor, None, None, None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the alignment of maps can be differentiated once, not with create_graph=True; "
                "for a second derivative, compare the maps of batchcam.cam.render by a distance of "
                "batchcam.similarity."
            )
        (gradient_BHW,) = ctx.saved_tensors
        return gradient_BHW * loss, None, None, None, None


def _l1(x_BRR: Tensor, y_PRR: Tensor, pairs_B: Tensor | None) -> tuple[Tensor, Tensor]:
    difference = x_BRR - (y_PRR if pairs_B is None else y_PRR[pairs_B])
    distances_B = difference.abs().mean(dim=(1, 2))
    return distances_B, difference.sign_().div_(x_BRR[0].numel())


def _l2(x_BRR: Tensor, y_PRR: Tensor, pairs_B: Tensor | None) -> tuple[Tensor, Tensor]:
    difference = x_BRR - (y_PRR if pairs_B is None else y_PRR[pairs_B])
    distances_B = difference.square().mean(dim=(1, 2))
    return distances_B, difference.mul_(2 / x_BRR[0].numel())


def _ssim(x_BRR: Tensor, y_PRR: Tensor, pairs_B: Tensor | None) -> tuple[Tensor, Tensor]:
    """Differentiate `1 - mean(l s)`: luminance l = a / b, contrast times structure s = c / d.

    With μ a mean over the window, a = 2 μx μy + e1, b = μx² + μy² + e1, c = 2 (μxy - μx μy) + e2
    and d = μxx - μx² + μyy - μy² + e2. The derivatives with respect to the means are `p` for μxy,
    `-q / 2` for μxx and `r` for μx. The chain rule back to x applies the transposed window to each.
    """
    window_RQ = _window(x_BRR.shape[-1], x_BRR.dtype, x_BRR.device)
    mu_y, mean_yy = window_RQ.T @ (torch.stack((y_PRR, y_PRR * y_PRR)) @ window_RQ)
    square_y = mu_y * mu_y
    of_y = torch.stack((mu_y, square_y + EPSILON_1, mean_yy - square_y + EPSILON_2))
    y_BRR = y_PRR
    if pairs_B is not None:
        of_y, y_BRR = of_y[:, pairs_B], y_PRR[pairs_B]
    mu_y, rest_b, rest_d = of_y
    stack_3BRR = torch.stack((x_BRR, x_BRR * x_BRR, x_BRR * y_BRR))
    mu_x, mean_xx, mean_xy = window_RQ.T @ (stack_3BRR @ window_RQ)
    both, square_x = mu_x * mu_y, mu_x * mu_x
    b, d = square_x + rest_b, mean_xx.sub_(square_x).add_(rest_d)
    luminance = (2 * both).add_(EPSILON_1).div_(b)
    structure = mean_xy.sub_(both).mul_(2).add_(EPSILON_2).div_(d)
    distances_B = 1 - (luminance * structure).mean(dim=(1, 2))

    scale = -2 / mu_x[0].numel()
    p = (luminance / d).mul_(scale)
    q = p * structure
    r = torch.addcmul(mu_y, luminance, mu_x, value=-1).mul_(structure.mul_(scale).div_(b))
    r.addcmul_(q, mu_x).addcmul_(p, mu_y, value=-1)
    by_r, by_q, by_p = window_RQ @ (torch.stack((r, q, p)) @ window_RQ.T)
    return distances_B, by_r.addcmul_(by_q, x_BRR, value=-1).addcmul_(by_p, y_BRR)


_DIFFERENTIATED: dict[Distance, Differentiated] = {l1: _l1, l2: _l2, ssim_distance: _ssim}


@lru_cache(maxsize=32)
def _upsampling(cells: int, pixels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return bilinear(cells, pixels, dtype, device)


@lru_cache(maxsize=32)
def _window(side: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return smoothing(side, WINDOW, SIGMA, dtype, device)
