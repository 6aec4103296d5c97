"""The registry of data sets: a loader for each name.

A loader takes the user's data root, or None, and returns the training set, the test set and the
class names. To add a data set, write its loader, name it in `LOADERS`, and add its name to
:data:`batchcam.config.Dataset`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from batchcam.data.decoys import paint_decoys, paint_random_decoys
from batchcam.data.idx_files import load_fashion_mnist, load_mnist
from batchcam.data.image_folder import load_image_folder
from batchcam.data.splits import Loaded, Split, stratified_split


def _load_digits(data_root: str | None) -> Loaded:
    """Return scikit-learn's handwritten digits: 1,797 images of 8x8, a fixed fifth of them test."""
    del data_root  # The images ship with scikit-learn.
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)[:, None]
    labels = bunch.target.astype(np.int64)
    kept, held = stratified_split(labels, fraction=0.2, seed=0)
    names = tuple(str(digit) for digit in range(10))
    digits = Split(images, labels)
    return digits.take(kept), digits.take(held), names


def _load_decoy_mnist(data_root: str | None) -> Loaded:
    return _with_decoys(load_mnist(data_root))


def _load_decoy_fashion_mnist(data_root: str | None) -> Loaded:
    return _with_decoys(load_fashion_mnist(data_root))


def _with_decoys(loaded: Loaded) -> Loaded:
    """Paint decoys that show the class in training and a random class in the test.

    They are the same at every call.
    """
    train, test, class_names = loaded
    generator = np.random.default_rng(0)
    painted = paint_decoys(train, train.labels, generator)
    return painted, paint_random_decoys(test, len(class_names), generator), class_names


LOADERS: Mapping[str, Callable[[str | None], Loaded]] = {
    "digits": _load_digits,
    "mnist": load_mnist,
    "fashion_mnist": load_fashion_mnist,
    "decoy_mnist": _load_decoy_mnist,
    "decoy_fashion_mnist": _load_decoy_fashion_mnist,
    "imagefolder": load_image_folder,
}
