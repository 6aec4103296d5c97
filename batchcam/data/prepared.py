"""What trials on one data set share: its splits, their prototypes, and which image goes with which.

Shapes: N images, C classes, P prototypes (one or several per class), H and W pixels as stored, R
pixels of the model's input.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from batchcam.config import TrialConfig
from batchcam.data.dataset import ImageData, load_data
from batchcam.data.preprocessing import to_device
from batchcam.prototypes import (
    class_prototypes,
    class_supports,
    cluster_centres,
    group_prototypes,
    nearest_groups,
    resize_prototypes,
    ssim_ceiling,
    supported_cells,
)

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Inputs:
    """Data and prototypes.

    Training and validation have prototypes of their own, as in the paper (Section 3.1); the test
    split is compared with the training prototypes, so that nothing is derived from it.

    With several prototypes per class, images are in groups: each goes with that prototype of its
    class whose cluster centre is nearest to it. Else the groups are the classes.
    """

    data: ImageData
    train_prototypes: Tensor
    """`(P, H, W)` at the stored image size; those of a class follow one another."""
    validation_prototypes: Tensor
    centres_PHW: Tensor | None = None
    """The centres by which images are grouped, in grey levels; None: one prototype per class."""
    _ceilings: dict[tuple[int, tuple[int, int]], Tensor] = field(default_factory=dict)
    _supports: list[Tensor] = field(default_factory=list, init=False)

    def prototypes(self, split: str, resolution: int) -> Tensor:
        """Return the prototypes that CAMs of `split` are compared with, `(P, R, R)`."""
        chosen = self.validation_prototypes if split == "validation" else self.train_prototypes
        return resize_prototypes(chosen, resolution)

    def groups(self, split: str) -> Tensor:
        """Return the number of the prototype that each image of `split` goes with, int64 `(N,)`."""
        images, labels = to_device(self.data.split(split), _CPU)
        if self.centres_PHW is None:
            return labels
        return nearest_groups(images, labels, self.centres_PHW, self.data.num_classes)

    @property
    def group_names(self) -> tuple[str, ...]:
        """What to call each prototype, `(P,)`: its class, with a number if that has several."""
        per_class = len(self.train_prototypes) // self.data.num_classes
        if per_class == 1:
            return self.data.class_names
        return tuple(
            f"{name} #{number}"
            for name in self.data.class_names
            for number in range(1, per_class + 1)
        )

    def ceiling(self, resolution: int, grid: tuple[int, int]) -> Tensor:
        """Return :func:`ssim_ceiling` of the validation prototypes, `(P,)`; computed once."""
        key = (resolution, grid)
        if key not in self._ceilings:
            self._ceilings[key] = ssim_ceiling(self.prototypes("validation", resolution), grid)
        return self._ceilings[key]

    def outside(self, grid: tuple[int, int]) -> Tensor:
        """Return where on a grid a class has no support in the training split, `(C, *grid)`.

        The grid is a CAM's, or the input's pixels.

        See :func:`batchcam.prototypes.class_supports`. 1 outside, 0 inside, float32.
        """
        if not self._supports:
            images, labels = to_device(self.data.train, _CPU)
            self._supports.append(class_supports(images, labels, self.data.num_classes))
        return 1 - supported_cells(self._supports[0], grid).float()


def prepare(config: TrialConfig) -> Inputs:
    """Load the data that `config` names and make the prototypes of its splits.

    Raises:
        DataError: see :func:`batchcam.data.dataset.load_data`; or a class has fewer images than
            clusters.
    """
    return with_prototypes(load_data(config), config)


def with_prototypes(data: ImageData, config: TrialConfig) -> Inputs:
    """Return data and the prototypes that `config` wants of it, by its `prototype` and `clusters`.

    Raises:
        DataError: a class has no image, or fewer images than clusters.
    """
    train, validation = to_device(data.train, _CPU), to_device(data.validation, _CPU)
    if config.prototype != "kmeans":
        kind = config.prototype
        return Inputs(
            data,
            class_prototypes(*train, data.num_classes, kind),
            class_prototypes(*validation, data.num_classes, kind),
        )
    centres = cluster_centres(*train, data.num_classes, config.clusters)
    own, seen = (
        group_prototypes(images, nearest_groups(images, labels, centres, data.num_classes), centres)
        for images, labels in (train, validation)
    )
    return Inputs(data, own, seen, centres)
