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
    cluster_prototypes,
    nearest_prototype_index,
    resize_prototypes,
    ssim_ceiling,
    supported_cells,
)

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class PreparedData:
    """Data and prototypes.

    Training and validation have prototypes of their own, as in the paper (Section 3.1); the test
    split is compared with the training prototypes, so that nothing is derived from it.

    With several prototypes per class, images are in groups: each goes with that prototype of its
    class whose cluster centre is nearest to it. Else the groups are the classes.
    """

    dataset: ImageData
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

    def prototype_index(self, split: str) -> Tensor:
        """Return the number of the prototype that each image of `split` goes with, int64 `(N,)`."""
        images, labels = to_device(self.dataset.split(split), _CPU)
        if self.centres_PHW is None:
            return labels
        return nearest_prototype_index(images, labels, self.centres_PHW, self.dataset.num_classes)

    @property
    def prototype_names(self) -> tuple[str, ...]:
        """What to call each prototype, `(P,)`: its class, with a number if that has several."""
        per_class = len(self.train_prototypes) // self.dataset.num_classes
        if per_class == 1:
            return self.dataset.class_names
        return tuple(
            f"{name} #{number}"
            for name in self.dataset.class_names
            for number in range(1, per_class + 1)
        )

    def ceiling(self, resolution: int, grid: tuple[int, int]) -> Tensor:
        """Return :func:`ssim_ceiling` of the validation prototypes, `(P,)`; computed once."""
        key = (resolution, grid)
        if key not in self._ceilings:
            self._ceilings[key] = ssim_ceiling(self.prototypes("validation", resolution), grid)
        return self._ceilings[key]

    def off_support_mask(self, grid: tuple[int, int]) -> Tensor:
        """Return where on a grid a class has no support in the training split, `(C, *grid)`.

        The grid is a CAM's, or the input's pixels.

        See :func:`batchcam.prototypes.class_supports`. 1 outside, 0 inside, float32.
        """
        if not self._supports:
            images, labels = to_device(self.dataset.train, _CPU)
            self._supports.append(class_supports(images, labels, self.dataset.num_classes))
        return 1 - supported_cells(self._supports[0], grid).float()


def prepare(config: TrialConfig) -> PreparedData:
    """Load the data that `config` names and make the prototypes of its splits.

    Raises:
        DataError: see :func:`batchcam.data.dataset.load_data`; or a class has fewer images than
            clusters.
    """
    return with_prototypes(load_data(config), config)


def with_prototypes(data: ImageData, config: TrialConfig) -> PreparedData:
    """Return data and the prototypes that `config` wants of it, by its `prototype` and `clusters`.

    Raises:
        DataError: a class has no image, or fewer images than clusters.
    """
    train, validation = to_device(data.train, _CPU), to_device(data.validation, _CPU)
    if config.prototype != "kmeans":
        kind = config.prototype
        return PreparedData(
            data,
            class_prototypes(*train, data.num_classes, kind),
            class_prototypes(*validation, data.num_classes, kind),
        )
    centres = cluster_centres(*train, data.num_classes, config.clusters)
    own, seen = (
        cluster_prototypes(
            images, nearest_prototype_index(images, labels, centres, data.num_classes), centres
        )
        for images, labels in (train, validation)
    )
    return PreparedData(data, own, seen, centres)
