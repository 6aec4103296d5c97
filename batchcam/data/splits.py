"""A part of a data set in memory, and how one is cut in two.

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

    `masks`, `(N, H, W)`, is where something was painted that no model should look at, if it was:
    for judging models, and for methods that are told.
    """

    images: Pixels
    labels: Labels
    masks: Masks | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Labels) -> Self:
        """Return the part of the split that `index` chooses, in its order."""
        masks = None if self.masks is None else self.masks[index]
        return replace(self, images=self.images[index], labels=self.labels[index], masks=masks)


def stratified_split(labels: Labels, fraction: float, seed: int) -> tuple[Labels, Labels]:
    """Return sorted indices of the part kept and the part held out, class by class.

    Of each class, `round(fraction * n)` items are held out, at least one and at most n - 1, so
    that both parts contain every class however small.

    Raises:
        DataError: a class has a single item.
    """
    generator = np.random.default_rng(seed)
    held_out = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) < 2:
            raise DataError(
                f"class {label} has a single training image; it needs at least 2, one to train on "
                "and one to validate on."
            )
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        held_out.append(generator.permutation(members)[:count])
    held = np.sort(np.concatenate(held_out))
    kept = np.setdiff1d(np.arange(len(labels)), held)
    return kept, held
