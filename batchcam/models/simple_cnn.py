"""SimpleCNN, the paper's baseline model.

Shapes: N images, C classes, K channels, H and W cells of the feature grid.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchcam.models.base import ExplainableModel


class SimpleCNN(ExplainableModel):
    """The paper's baseline: convolutions, flattened features, one linear layer (Section 3.2).

    Four 3x3 convolutions with batch normalisation, and one pooling step, so that the CAM grid has
    half the side of the input: 14x14 at 28x28. Features are pooled to 7x7 before they are
    flattened, at any resolution. The paper gives no layer sizes; these are ours.

    Weights and features are in channels-last format, which is a quarter faster on CPUs. The ReLU
    follows the max pooling: the result is the same, computed on a quarter of the cells.
    """

    def __init__(self, num_classes: int = 10, in_chans: int = 1) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            *_convolution(in_chans, 32),
            *_convolution(32, 32, nn.MaxPool2d(2)),
            *_convolution(32, 64),
            *_convolution(64, 64),
        )
        self.classifier = nn.Linear(64 * 7 * 7, num_classes)
        self.to(memory_format=torch.channels_last)

    def features(self, images: Tensor) -> Tensor:
        """See :class:`ExplainableModel`."""
        maps: Tensor = self.convolutions(images)
        return maps

    def head(self, features_NKHW: Tensor) -> Tensor:
        """See :class:`ExplainableModel`."""
        rows, columns = features_NKHW.shape[-2:]
        if rows % 7 or columns % 7:
            pooled = F.adaptive_avg_pool2d(features_NKHW, 7)
            return F.linear(pooled.flatten(1), self.classifier.weight, self.classifier.bias)
        # Pooling and classifier in one product, on the features in their memory format. Pooling
        # alone would cost more than the classifier, and its derivative as much as a convolution.
        weight_CHWK = self._cell_weights(rows, columns).permute(0, 2, 3, 1)
        features_NHWK = features_NKHW.permute(0, 2, 3, 1)
        return F.linear(features_NHWK.flatten(1), weight_CHWK.flatten(1), self.classifier.bias)

    def _cell_weights(self, rows: int, columns: int) -> Tensor:
        """Return the classifier's weight of each cell, `(C, K, H, W)`, in channels-last format.

        Sides of the grid are multiples of 7, so that each cell belongs to one pooled cell.
        """
        shared = self.classifier.weight.view(-1, 64, 7, 7) / (rows * columns // 49)
        return F.interpolate(
            shared.contiguous(memory_format=torch.channels_last), (rows, columns), mode="nearest"
        )

    def class_weights(self, cells: int) -> Tensor:
        """See :class:`ExplainableModel`; pooled cells are averages, so their gains are divided."""
        weight = self.classifier.weight
        means = weight.view(-1, 7 * 7) @ weight.new_full((7 * 7,), 1 / cells)
        return means.view(-1, 64)

    def class_gradients(self, rows: int, columns: int) -> Tensor:
        """See :class:`ExplainableModel`; a cell contributes to the pooled cells that contain it."""
        if rows % 7 == 0 and columns % 7 == 0:
            return self._cell_weights(rows, columns)
        weight_CKAB = self.classifier.weight.view(-1, 64, 7, 7)
        # Made on the device: a copy from the host would make the host wait.
        parts_HA, parts_WB = (
            F.adaptive_avg_pool1d(
                torch.eye(cells, dtype=weight_CKAB.dtype, device=weight_CKAB.device), 7
            )
            for cells in (rows, columns)
        )
        return torch.einsum("ckab,ha,wb->ckhw", weight_CKAB, parts_HA, parts_WB)


def _convolution(
    in_channels: int, out_channels: int, *before_relu: nn.Module
) -> tuple[nn.Module, ...]:
    return (
        nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        *before_relu,
        nn.ReLU(),
    )
