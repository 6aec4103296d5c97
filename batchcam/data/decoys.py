"""Decoys: a patch in a corner that tells the class in training and lies in the test.

After Decoy-MNIST (Ross et al. 2017, "Right for the Right Reasons", Section 4.2). A model that
classifies by the patch is right on the training images and wrong on the test images.
"""

from dataclasses import replace

import numpy as np

from batchcam.data.splits import Labels, Split

PATCH = 4
"""Pixels. Side of a decoy."""
_STEP = 25
"""Grey levels between the decoys of neighbouring classes: class c shows 255 - 25 c."""
MAX_CLASSES = 255 // _STEP + 1
"""Classes that can be told apart by the grey of a decoy."""


def paint_decoys(split: Split, shown: Labels, generator: np.random.Generator) -> Split:
    """Return the split with a decoy in a random corner of each image, and where it is in `masks`.

    Args:
        split: images `(N, C, H, W)`, at least 8 pixels a side; left as it is.
        shown: int64 `(N,)`, the class whose grey each decoy has, from 0 to 10: the image's own in
            training, a random one in a test.
        generator: draws the corners.

    Raises:
        ValueError: there is not one class for each image, or a class has no grey.
    """
    if shown.shape != split.labels.shape:
        raise ValueError(
            f"expected a class to show for each of {len(split)} images, got {shown.shape}."
        )
    if len(shown) and not 0 <= shown.min() <= shown.max() < MAX_CLASSES:
        raise ValueError(f"decoys show classes from 0 to {MAX_CLASSES - 1}; got {shown.max()}.")
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
    """Return the split with decoys that show a random class each, as a test of them does."""
    return paint_decoys(split, generator.integers(0, num_classes, len(split)), generator)
