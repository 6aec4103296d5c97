"""Decoys: a patch in a corner whose grey gives the class away in training and misleads in the test.

After Decoy-MNIST (Ross et al. 2017, "Right for the Right Reasons", Section 4.2). A model that
classifies by the patch is accurate on the training images and fails on the test images.
"""

from dataclasses import replace

import numpy as np

from batchcam.data.splits import Labels, Split

PATCH = 4
"""Pixels. Side of a decoy."""
_STEP = 25
"""Difference in grey between the decoys of consecutive classes: class c has 255 - 25 c."""
MAX_CLASSES = 255 // _STEP + 1
"""The number of classes whose decoys have distinct greys."""


def paint_decoys(split: Split, shown: Labels, generator: np.random.Generator) -> Split:
    """Return the split with a decoy in a random corner of each image, marked in `masks`.

    Args:
        split: images `(N, C, H, W)`, at least 8 pixels a side; not modified.
        shown: int64 `(N,)`, from 0 to 10, the class that determines the grey of each decoy: the
            image's own class in training, a random class in a test.
        generator: draws the corners.

    Raises:
        ValueError: `shown` does not have one class for each image, or has a class above 10.

    Example:
        >>> split = Split(np.zeros((2, 1, 28, 28), dtype=np.uint8), np.array([0, 3]))
        >>> painted = paint_decoys(split, split.labels, np.random.default_rng(0))
        >>> painted.images.max(axis=(1, 2, 3)), painted.masks.sum(axis=(1, 2))
        (array([255, 180], dtype=uint8), array([16, 16]))
    """
    if shown.shape != split.labels.shape:
        raise ValueError(
            f"shown has the shape {shown.shape}; give a class for each of the {len(split)} images."
        )
    if len(shown) and not 0 <= shown.min() <= shown.max() < MAX_CLASSES:
        raise ValueError(
            f"shown has classes from {shown.min()} to {shown.max()}; decoys have grey values for "
            f"classes 0 to {MAX_CLASSES - 1} only."
        )
    height, width = split.images.shape[2:]
    corners = generator.integers(0, 4, len(split))
    top = np.where(corners < 2, 0, height - PATCH)
    left = np.where(corners % 2 == 0, 0, width - PATCH)
    rows, columns = np.arange(height), np.arange(width)
    in_rows = (rows >= top[:, None]) & (rows < top[:, None] + PATCH)
    in_columns = (columns >= left[:, None]) & (columns < left[:, None] + PATCH)
    masks = in_rows[:, :, None] & in_columns[:, None, :]
    greys = (255 - _STEP * shown).astype(np.uint8)
    painted = np.where(masks[:, None], greys[:, None, None, None], split.images)
    return replace(split, images=painted, masks=masks)


def paint_random_decoys(split: Split, num_classes: int, generator: np.random.Generator) -> Split:
    """Return the split with decoys of random classes, as in the test split."""
    return paint_decoys(split, generator.integers(0, num_classes, len(split)), generator)
