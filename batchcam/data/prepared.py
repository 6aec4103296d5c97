"""A data set made ready for training: splits, prototypes, supports and prototype indices.

One record is prepared once and shared by all trials on a data set; it lives on the CPU, at the
stored image size. :meth:`PreparedData.split` hands out a split at the resolution and on the device
of a run.

Shapes: N images, C classes, P prototypes (one or several per class), H and W pixels as stored, R
pixels of the model's input.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from batchcam.config import TrialConfig
from batchcam.data.dataset import ImageData, load_data
from batchcam.data.preprocessing import to_device
from batchcam.data.splits import Split
from batchcam.prototypes import (
    class_prototypes,
    class_supports,
    cluster_centres,
    cluster_prototypes,
    nearest_prototype_index,
    off_support_mask,
    resize_prototypes,
    ssim_ceiling,
)

_CPU = torch.device("cpu")
Grid = tuple[int, int]


@dataclass(frozen=True)
class PreparedSplit:
    """A split at a model's resolution, on one device.

    Attributes:
        images_NCHW: uint8, at the stored size.
        labels_N: int64, the class of each image.
        prototype_index_N: int64, the prototype of each image.
        prototypes_PRR: the prototypes that saliency maps of the split are compared with, in [0, 1].
        masks_NRR: float32, 1 where an image shows what a model should ignore, else 0; None without.
    """

    images_NCHW: Tensor
    labels_N: Tensor
    prototype_index_N: Tensor
    prototypes_PRR: Tensor
    masks_NRR: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels_N)


@dataclass(frozen=True)
class PreparedData:
    """Data set and prototypes.

    Training and validation have prototypes of their own (Section 3.1). The test split is compared
    with the training prototypes, so that nothing is derived from the test split.

    With several prototypes per class, each image belongs to the prototype of its class whose
    cluster centre is nearest. Otherwise it belongs to the prototype of its class.

    Supports and ceilings are computed when they are first asked for, and kept;
    :meth:`compute_ahead` computes them before the record is shared with other processes. A copy
    made by `dataclasses.replace` starts without them, a copy by :meth:`with_splits` has them.

    Example:
        >>> prepared = prepare(TrialConfig(dataset="digits", prototype="kmeans", clusters=2))
        >>> prepared.train_prototypes.shape, prepared.prototype_names[:3]
        (torch.Size([20, 8, 8]), ('0 #1', '0 #2', '1 #1'))
    """

    dataset: ImageData
    train_prototypes: Tensor
    """`(P, H, W)` at the stored image size; the prototypes of a class follow one another."""
    validation_prototypes: Tensor
    """`(P, H, W)`, in the same order."""
    centres_PHW: Tensor | None = None
    """The centres that images are assigned by, in grey levels; None: one prototype per class."""
    _ceilings: dict[tuple[int, Grid], Tensor] = field(default_factory=dict, init=False)
    _supports: list[Tensor] = field(default_factory=list, init=False)

    def split(
        self, name: str, resolution: int, device: torch.device = _CPU, *, with_masks: bool = False
    ) -> PreparedSplit:
        """Return the split `name` ("train", "validation" or "test") for a run.

        Args:
            name: the split.
            resolution: R, the side of the model's input.
            device: where the tensors are to be. On the CPU the images are shared, not copied.
            with_masks: include the masks of the split, if it has any, at the resolution (nearest
                pixel).

        Raises:
            DataError: there is no such split.

        Example:
            >>> prepared = prepare(TrialConfig(dataset="digits"))
            >>> split = prepared.split("validation", resolution=28)
            >>> split.images_NCHW.shape, split.prototypes_PRR.shape
            (torch.Size([143, 1, 8, 8]), torch.Size([10, 28, 28]))
        """
        stored = self.dataset.split(name)
        images_NCHW, labels_N = to_device(stored, device)
        masks_NRR = None
        if with_masks and stored.masks is not None:
            masks_N1HW = torch.from_numpy(stored.masks[:, None]).float()
            masks_NRR = F.interpolate(masks_N1HW, (resolution, resolution)).squeeze(1).to(device)
        return PreparedSplit(
            images_NCHW,
            labels_N,
            self.prototype_index(name).to(device),
            self.prototypes(name, resolution).to(device),
            masks_NRR,
        )

    def prototypes(self, split: str, resolution: int) -> Tensor:
        """Return the prototypes that saliency maps of `split` are compared with, `(P, R, R)`.

        Example:
            >>> prepare(TrialConfig(dataset="digits")).prototypes("test", 14).shape
            torch.Size([10, 14, 14])
        """
        chosen = self.validation_prototypes if split == "validation" else self.train_prototypes
        return resize_prototypes(chosen, resolution)

    def prototype_index(self, split: str) -> Tensor:
        """Return the index of the prototype of each image of `split`, int64 `(N,)`.

        Example:
            >>> config = TrialConfig(dataset="digits", prototype="kmeans", clusters=2)
            >>> prepared = prepare(config)
            >>> labels = torch.from_numpy(prepared.dataset.train.labels)
            >>> torch.equal(prepared.prototype_index("train") // 2, labels)
            True
        """
        images, labels = to_device(self.dataset.split(split), _CPU)
        if self.centres_PHW is None:
            return labels
        return nearest_prototype_index(images, labels, self.centres_PHW, self.dataset.num_classes)

    @property
    def prototype_names(self) -> tuple[str, ...]:
        """The name of each prototype, `(P,)`: its class, with a number if the class has several."""
        per_class = len(self.train_prototypes) // self.dataset.num_classes
        if per_class == 1:
            return self.dataset.class_names
        return tuple(
            f"{name} #{number}"
            for name in self.dataset.class_names
            for number in range(1, per_class + 1)
        )

    def ceiling(self, resolution: int, grid: Grid) -> Tensor:
        """Return the SSIM that a CAM of this grid can reach at best, for each prototype, `(P,)`.

        See :func:`batchcam.prototypes.ssim_ceiling`; of the validation prototypes.

        Example:
            >>> ceiling = prepare(TrialConfig(dataset="digits")).ceiling(resolution=28, grid=(7, 7))
            >>> ceiling.shape, bool((ceiling <= 1).all())
            (torch.Size([10]), True)
        """
        key = (resolution, grid)
        if key not in self._ceilings:
            self._ceilings[key] = ssim_ceiling(self.prototypes("validation", resolution), grid)
        return self._ceilings[key]

    def off_support_mask(self, size: Grid) -> Tensor:
        """Return where each class has no support in the training split, `(C, *size)` float32.

        1 off the support, 0 on it; see :func:`batchcam.prototypes.class_supports`.

        Args:
            size: rows and columns, of a CAM grid or of the model's input.

        Example:
            >>> mask = prepare(TrialConfig(dataset="digits")).off_support_mask((28, 28))
            >>> mask.shape, mask.unique().tolist()
            (torch.Size([10, 28, 28]), [0.0, 1.0])
        """
        return off_support_mask(self._class_supports(), size)

    def _class_supports(self) -> Tensor:
        if not self._supports:
            images, labels = to_device(self.dataset.train, _CPU)
            self._supports.append(class_supports(images, labels, self.dataset.num_classes))
        return self._supports[0]

    def with_splits(self, **splits: Split) -> Self:
        """Return the record with other images, and the same prototypes, supports and ceilings.

        Args:
            splits: the splits to exchange, by name: parts of a split, or images with other masks.

        Example:
            >>> prepared = prepare(TrialConfig(dataset="digits"))
            >>> validation = prepared.dataset.validation
            >>> part = validation.take(validation.labels.argsort()[:20])
            >>> len(prepared.with_splits(validation=part).split("validation", resolution=28))
            20
        """
        other = replace(self, dataset=replace(self.dataset, **splits))  # type: ignore[arg-type]
        other._ceilings.update(self._ceilings)
        other._supports.extend(self._supports)
        return other

    def compute_ahead(self, ceilings: Iterable[tuple[int, Grid]], *, supports: bool) -> None:
        """Compute what would otherwise be computed by every process that this record is sent to.

        Args:
            ceilings: resolutions with the grids that occur at them.
            supports: whether supports will be asked for.
        """
        for resolution, grid in ceilings:
            self.ceiling(resolution, grid)
        if supports:
            self._class_supports()


def prepare(config: TrialConfig) -> PreparedData:
    """Load the data set that `config` names, and make the prototypes of its splits.

    Raises:
        DataError: see :func:`batchcam.data.dataset.load_data`; or a class has fewer images than
            clusters.

    Example:
        >>> from batchcam import TrialConfig, prepare
        >>> prepared = prepare(TrialConfig(dataset="digits"))  # For any number of calls of fit.
        >>> prepared.dataset.train.images.shape[1:], prepared.dataset.num_classes
        ((1, 8, 8), 10)
    """
    return with_prototypes(load_data(config), config)


def with_prototypes(dataset: ImageData, config: TrialConfig) -> PreparedData:
    """Return a data set with the prototypes that `config` wants, by `prototype` and `clusters`.

    Raises:
        DataError: a class has no image, or fewer images than clusters.

    Example:
        >>> data = load_data(TrialConfig(dataset="digits"))
        >>> with_prototypes(data, TrialConfig(prototype="median")).train_prototypes.shape
        torch.Size([10, 8, 8])
    """
    classes = dataset.num_classes
    train, validation = to_device(dataset.train, _CPU), to_device(dataset.validation, _CPU)
    if config.prototype != "kmeans":
        own, seen = (
            class_prototypes(*split, classes, config.prototype) for split in (train, validation)
        )
        return PreparedData(dataset, own, seen)
    centres_PHW = cluster_centres(*train, classes, config.clusters)
    own, seen = (
        cluster_prototypes(
            images, nearest_prototype_index(images, labels, centres_PHW, classes), centres_PHW
        )
        for images, labels in (train, validation)
    )
    return PreparedData(dataset, own, seen, centres_PHW)
