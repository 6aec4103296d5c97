"""Check the controls: supports exclude cells that touch decoys, or whose features see them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from batchcam.config import TrialConfig
from batchcam.data.dataset import ImageData
from batchcam.data.decoys import paint_decoys
from batchcam.data.prepared import PreparedData
from batchcam.data.preprocessing import to_device
from batchcam.prototypes import class_prototypes
from studies.evidence.controls import (
    CORNERS_OUTSIDE,
    SIGHT_OUTSIDE,
    controlled,
    seeing_cells,
    touched_cells,
)


def test_cells_are_touched_where_decoys_are_painted(small: dict[str, ImageData]) -> None:
    clean = small["mnist"].train
    large = replace(clean, images=clean.images.repeat(2, axis=2).repeat(2, axis=3))
    decoyed = paint_decoys(large, large.labels, np.random.default_rng(0))
    assert decoyed.masks is not None
    touched = torch.from_numpy(decoyed.masks).any(dim=0).view(8, 2, 8, 2).any(dim=3).any(dim=1)
    assert touched.sum() == 4 * 2 * 2
    assert torch.equal(touched_cells((8, 8), (16, 16)), touched)


def test_cells_see_decoys_as_far_as_their_receptive_field_reaches() -> None:
    # With two convolutions on each side of a pooling, cell i sees the pixels 2i - 6 to 2i + 7.
    near = torch.tensor([2 * cell - 6 < 4 for cell in range(14)])
    ends = near | near.flip(0)
    assert torch.equal(seeing_cells("simple_cnn", 28, 1, None), ends[:, None] & ends)


@pytest.mark.parametrize(
    ("control", "side"), [(CORNERS_OUTSIDE, 14), (CORNERS_OUTSIDE, 28), (SIGHT_OUTSIDE, 14)]
)
def test_with_a_control_no_class_has_support_there(
    control: str, side: int, small: dict[str, ImageData]
) -> None:
    """Check the CAM grid, which the energy loss uses, and pixels, which the exchange loss uses."""
    data = small["decoy_mnist"]
    prototypes = class_prototypes(*to_device(data.train, torch.device("cpu")), 10)
    prepared = PreparedData(data, prototypes, prototypes)
    config = TrialConfig(dataset="decoy_mnist", resolution=28)
    grid = (side, side)
    told, usual = (
        controlled(prepared, config, control).off_support_mask(grid),
        prepared.off_support_mask(grid),
    )
    marked = (
        touched_cells(grid, data.train.images.shape[2:])
        if control == CORNERS_OUTSIDE
        else seeing_cells("simple_cnn", 28, 1, None)
    )
    assert (told[:, marked] == 1).all()
    assert (usual[:, marked] == 0).any()
    torch.testing.assert_close(told[:, ~marked], usual[:, ~marked])
