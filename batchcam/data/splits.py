"""A part of a data set in memory, and the stratified split.

Shapes: N images, C channels, H and W pixels.
"""

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import numpy.typing as npt

from batchcam.errors import DataError

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]
Masks = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Split:
    """Images `(N, C, H, W)` uint8 and their labels `(N,)` int64.

    `masks`, `(N, H, W)`, marks the pixels that a model should ignore, if they are known: for
    evaluation, and for losses that use annotations.

    Example:
        >>> split = Split(np.zeros((4, 1, 8, 8), dtype=np.uint8), np.array([0, 1, 0, 1]))
        >>> len(split), split.take(np.array([3, 0])).labels
        (4, array([1, 0]))
    """

    images: Pixels
    labels: Labels
    masks: Masks | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Labels) -> Self:
        """Return the items of the split that `index` selects, in that order."""
        masks = None if self.masks is None else self.masks[index]
        return replace(self, images=self.images[index], labels=self.labels[index], masks=masks)


Loaded = tuple[Split, Split, tuple[str, ...]]
"""What a loader returns: training set, test set, class names."""


def stratified_split(labels: Labels, fraction: float, seed: int) -> tuple[Labels, Labels]:
    """Return the sorted indices of the items kept and of those held out, stratified by class.

    Of the n items of a class, `round(fraction * n)` are held out, at least 1 and at most n - 1, so
    that both parts contain every class.

    Args:
        labels: int64 `(N,)`.
        fraction: to hold out, in (0, 1).
        seed: of the draw.

    Raises:
        DataError: a class has a single item.

    Example:
        >>> labels = np.repeat([0, 1], [10, 30])
        >>> kept, held = stratified_split(labels, fraction=0.1, seed=0)
        >>> np.bincount(labels[kept]), np.bincount(labels[held])
        (array([ 9, 27]), array([1, 3]))
    """
    generator = np.random.default_rng(seed)
    held_out = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) < 2:
            raise DataError(
                f"class {label} has a single training image; it needs at least 2, one for training "
                "and one for validation."
            )
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        held_out.append(generator.permutation(members)[:count])
    held = np.sort(np.concatenate(held_out))
    kept = np.setdiff1d(np.arange(len(labels)), held)
    return kept, held
