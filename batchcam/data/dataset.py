"""Data sets as uint8 arrays in memory, in three splits.

A data set is loaded once and shared: the arrays are NumPy, are never written, and may live in
another process's memory. Pictures stay uint8 at their stored size until a batch of them is on the
device, where :class:`batchcam.data.preprocessing.Preprocess` scales, resizes and normalises it.

Shapes: N images, C channels, H and W pixels.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from batchcam.config import TrialConfig
from batchcam.data.sources import LOADERS
from batchcam.data.splits import Pixels, Split, stratified_split
from batchcam.errors import DataError


@dataclass(frozen=True)
class ImageData:
    """A data set in memory: three splits, and the constants that normalise them.

    `mean` and `std` are per channel, of pixels scaled to [0, 1]. `sha256` is the digest of pixels
    and labels before the validation split is cut off, so it identifies the data set itself.

    Example:
        >>> data = load_data(TrialConfig(dataset="digits"))
        >>> data.num_classes, data.channels, data.class_names[:2]
        (10, 1, ('0', '1'))
        >>> data.split("test").images.shape, data.split("test").images.dtype
        ((359, 1, 8, 8), dtype('uint8'))
    """

    name: str
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train: Split
    validation: Split
    test: Split
    sha256: str

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    @property
    def channels(self) -> int:
        """1 for grey pictures, 3 for RGB."""
        return int(self.train.images.shape[1])

    def split(self, name: str) -> Split:
        """Return the split called train, validation or test."""
        if name not in ("train", "validation", "test"):
            raise DataError(f"split {name!r} is unknown; choose train, validation or test.")
        chosen: Split = getattr(self, name)
        return chosen


def load_data(config: TrialConfig) -> ImageData:
    """Load the data set that `config` names, check it, and cut off its validation split.

    Uses the fields `dataset`, `data_root`, `val_fraction` and `split_seed`.

    Raises:
        DataError: the files are missing, damaged or unusable; the message lists what was tried.

    Example:
        >>> data = load_data(TrialConfig(dataset="digits", val_fraction=0.1))
        >>> len(data.train), len(data.validation), len(data.test)
        (1295, 143, 359)
    """
    train, test, class_names = LOADERS[config.dataset](config.data_root)
    digest = _digest(train, test)
    fit_index, val_index = stratified_split(train.labels, config.val_fraction, config.split_seed)
    fit = train.take(fit_index)
    mean, std = _NORMALISATION.get(config.dataset) or _channel_statistics(fit.images)
    return ImageData(
        name=config.dataset,
        class_names=class_names,
        mean=mean,
        std=std,
        train=fit,
        validation=train.take(val_index),
        test=test,
        sha256=digest,
    )


_NORMALISATION: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    # The paper's constants (Section 3.1).
    "mnist": ((0.1307,), (0.3081,)),
    "fashion_mnist": ((0.2860,), (0.3530,)),
}


def _channel_statistics(images: Pixels) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation per channel of pixels scaled to [0, 1]."""
    mean, std = [], []
    for channel in range(images.shape[1]):
        counts = np.bincount(images[:, channel].ravel(), minlength=256)
        values = np.arange(256) / 255
        average = float(np.average(values, weights=counts))
        mean.append(average)
        deviation = float(np.sqrt(np.average((values - average) ** 2, weights=counts)))
        std.append(deviation or 1.0)  # A constant channel has nothing to scale.
    return tuple(mean), tuple(std)


def _digest(*splits: Split) -> str:
    sha = hashlib.sha256()
    for split in splits:
        sha.update(np.ascontiguousarray(split.images).data)
        sha.update(np.ascontiguousarray(split.labels).data)
    return sha.hexdigest()
