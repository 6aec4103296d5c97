"""Depthwise convolutions on small grids, computed as products with small dense matrices.

ConvNeXt's kernels of 7x7 taps, dilated to keep a useful CAM grid, are larger than the grid: most
taps only meet padding. CPUs have no fast kernel for dilated depthwise convolutions either. As one
matrix per channel, from input cells to output cells, the convolution needs no more multiplications,
and a fast matrix product computes them.

Shapes: N images, K channels, H and W cells, S = H W cells, T taps.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution that uses a matrix product if its input has no more cells than taps.

    Equal to :class:`torch.nn.Conv2d` up to rounding, with the same parameters and names.
    """

    def forward(self, x_NKHW: Tensor) -> Tensor:
        """Convolve `(N, K, H, W)` without changing its size."""
        height, width = x_NKHW.shape[-2:]
        taps_KT = self.weight.flatten(1)
        if height * width > taps_KT.shape[1]:
            return super().forward(x_NKHW)
        # torch.compile traces through the cache, and would warn of it.
        place = _placement if torch.compiler.is_compiling() else _remembered_placement
        placed = place((height, width), self.kernel_size, self.dilation, x_NKHW.device)
        # Rows of ones and zeros select the taps: exact in any precision.
        matrix_KSS = (taps_KT @ placed.to(taps_KT.dtype)).view(-1, height * width, height * width)
        x_KNS = x_NKHW.flatten(2).transpose(0, 1).contiguous()
        out_KNS: Tensor = _ContiguousGradient.apply(torch.bmm(x_KNS, matrix_KSS.mT))
        if self.bias is not None:
            out_KNS = out_KNS + self.bias[:, None, None]
        return out_KNS.transpose(0, 1).reshape(-1, len(out_KNS), height, width)


class _ContiguousGradient(torch.autograd.Function):
    """The identity, with a contiguous gradient: the batched product of another layout is a loop."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        """Return the value."""
        del ctx
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Return the gradient."""
        del ctx
        return gradient.contiguous()


def use_matrix_products(model: nn.Module) -> None:
    """Compute the depthwise convolutions that keep the size as matrix products on small grids.

    Changes the classes of these modules. Parameters and their names stay the same.
    """
    for module in model.modules():
        if type(module) is nn.Conv2d and _keeps_each_channel_and_size(module):
            module.__class__ = DepthwiseConv2d


def _keeps_each_channel_and_size(conv: nn.Conv2d) -> bool:
    padded = tuple(2 * pad for pad in conv.padding if isinstance(pad, int))
    reach = tuple(d * (size - 1) for d, size in zip(conv.dilation, conv.kernel_size, strict=True))
    return (
        conv.groups == conv.in_channels == conv.out_channels
        and conv.stride == (1, 1)
        and conv.padding_mode == "zeros"
        and padded == reach
    )


def _placement(
    grid: tuple[int, int], kernel: tuple[int, ...], dilation: tuple[int, ...], device: torch.device
) -> Tensor:
    """Return the position of each tap in the matrix from input to output cells, `(T, S S)`, 0 or 1.

    Rows of the matrix are output cells, columns input cells. A tap that meets padding is 0.
    """
    rows_T, columns_T = (
        _along(size, taps, step) for size, taps, step in zip(grid, kernel, dilation, strict=True)
    )
    both = rows_T[:, None, :, None, :, None] * columns_T[None, :, None, :, None, :]
    return both.reshape(kernel[0] * kernel[1], -1).to(device)


_remembered_placement = lru_cache(maxsize=32)(_placement)


def _along(size: int, taps: int, step: int) -> Tensor:
    """Return, for one axis, whether a tap connects an input to an output cell: `(T, out, in)`."""
    offset = torch.arange(size) - torch.arange(size)[:, None]
    reach = (torch.arange(taps) - taps // 2) * step
    return (offset == reach[:, None, None]).float()
