"""Ablations of the losses that use supports: their support masks are told the decoy positions."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from math import ceil

import torch
from torch import Tensor

from batchcam.config import TrialConfig
from batchcam.data.decoys import PATCH
from batchcam.data.prepared import PreparedData
from batchcam.models import create_model, resolve_output_stride

CORNERS_OUTSIDE = "corners_outside"
"""Key in a run's `beyond`: no class has support where decoys are painted, in pixels or cells."""
SIGHT_OUTSIDE = "sight_outside"
"""Key in a run's `beyond`: nor in any cell of the CAM grid whose features depend on a decoy."""
CONTROLS = (CORNERS_OUTSIDE, SIGHT_OUTSIDE)


@dataclass(frozen=True)
class CellsOutside(PreparedData):
    """Prepared data in which no class has support in some cells."""

    cells: Callable[[tuple[int, int]], Tensor] = field(kw_only=True)
    """Returns these cells of a grid, bool."""

    def off_support_mask(self, grid: tuple[int, int]) -> Tensor:
        """Return :meth:`PreparedData.off_support_mask` with 1 in those cells."""
        off_support_CHW = super().off_support_mask(grid)
        off_support_CHW[:, self.cells(grid)] = 1
        return off_support_CHW


def controlled(prepared: PreparedData, config: TrialConfig, control: str) -> PreparedData:
    """Return the data with the supports of a control, one of :data:`CONTROLS`."""
    if control == SIGHT_OUTSIDE:
        channels = prepared.dataset.channels
        stride = resolve_output_stride(
            config.backbone, config.resolution, channels, config.output_stride
        )
        seeing_HW = seeing_cells(config.backbone, config.resolution, channels, stride)

        def cells(grid: tuple[int, int]) -> Tensor:
            assert seeing_HW.shape == grid
            return seeing_HW

    else:
        cells = partial(touched_cells, size=prepared.dataset.train.images.shape[2:])
    return CellsOutside(
        prepared.dataset,
        prepared.train_prototypes,
        prepared.validation_prototypes,
        prepared.centres_PHW,
        cells=cells,
    )


def touched_cells(grid: tuple[int, int], size: tuple[int, ...]) -> Tensor:
    """Return the cells of a grid that overlap a place where decoys are painted, bool."""
    touched_HW = torch.zeros(grid, dtype=torch.bool)
    rows, columns = (ceil(PATCH * cells / side) for cells, side in zip(grid, size, strict=True))
    for vertical in (slice(rows), slice(-rows, None)):
        for horizontal in (slice(columns), slice(-columns, None)):
            touched_HW[vertical, horizontal] = True
    return touched_HW


def seeing_cells(backbone: str, resolution: int, channels: int, stride: int | None) -> Tensor:
    """Return the cells whose receptive field contains a decoy, bool.

    Determined with an untrained model: the cells whose features change with the decoys. Decoys are
    4x4 pixels of the model's input.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = create_model(backbone, in_chans=channels, output_stride=stride).eval()
        one, other = torch.rand(2, 16, channels, resolution, resolution)
        corners = touched_cells((resolution, resolution), (resolution, resolution))
        changed = model.features(torch.where(corners, other, one)) - model.features(one)
    return changed.abs().amax(dim=(0, 1)) > 1e-6
