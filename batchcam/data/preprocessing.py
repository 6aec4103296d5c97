"""From stored pictures to a model's input: batches of uint8 that are scaled on the device.

Shapes: N images, C channels, H and W pixels.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from batchcam.data.splits import Split


@dataclass(frozen=True)
class Preprocess:
    """Maps stored pictures to a model's input: scales, resizes and normalises them.

    `mean` and `std` are per channel, of pixels scaled to [0, 1].

    Example:
        >>> preprocess = Preprocess(28, mean=(0.5,), std=(0.25,))
        >>> x = preprocess(torch.full((2, 1, 8, 8), 255, dtype=torch.uint8))
        >>> x.shape, x.unique().tolist()
        (torch.Size([2, 1, 28, 28]), [2.0])
    """

    resolution: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images_NCHW: Tensor) -> Tensor:
        """Return uint8 images as float32 `(N, C, resolution, resolution)`, on their device.

        Resizing is bilinear, with anti-aliasing when it shrinks.
        """
        x_NCHW = resize(images_NCHW.float().div_(255), self.resolution)
        return (x_NCHW - _per_channel(self.mean, x_NCHW.device)) / _per_channel(
            self.std, x_NCHW.device
        )


@lru_cache(maxsize=64)
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return constants as `(1, C, 1, 1)`, copied to the device once: a copy makes the host wait."""
    return torch.tensor(values, device=device).view(1, -1, 1, 1)


def resize(x_NCHW: Tensor, resolution: int) -> Tensor:
    """Resize float images to `resolution` pixels square; images of that size are not copied.

    Example:
        >>> resize(torch.rand(2, 3, 8, 8), 28).shape
        torch.Size([2, 3, 28, 28])
    """
    if x_NCHW.shape[-2:] == (resolution, resolution):
        return x_NCHW
    return F.interpolate(
        x_NCHW, size=(resolution, resolution), mode="bilinear", align_corners=False, antialias=True
    )


def to_device(split: Split, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the images and labels of a split on a device; on the CPU they share its memory.

    Example:
        >>> import numpy as np
        >>> split = Split(np.zeros((4, 1, 8, 8), dtype=np.uint8), np.arange(4))
        >>> images, labels = to_device(split, torch.device("cpu"))
        >>> images.dtype, labels.tolist()
        (torch.uint8, [0, 1, 2, 3])
    """
    with warnings.catch_warnings():
        # Arrays from a shared object store are read-only. No code writes to them.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        images, labels = torch.from_numpy(split.images), torch.from_numpy(split.labels)
    return images.to(device), labels.to(device)


def batches(
    tensors: tuple[Tensor, ...], batch_size: int, order: Tensor | None = None
) -> Iterator[tuple[Tensor, ...]]:
    """Yield batches of parallel tensors, in the given order; the last batch may be smaller.

    Example:
        >>> images, labels = torch.rand(5, 1, 8, 8), torch.arange(5)
        >>> order = torch.tensor([4, 3, 2, 1, 0])
        >>> [y.tolist() for _, y in batches((images, labels), batch_size=2, order=order)]
        [[4, 3], [2, 1], [0]]
    """
    for start in range(0, len(tensors[0]), batch_size):
        chosen = slice(start, start + batch_size) if order is None else order[start:][:batch_size]
        yield tuple(tensor[chosen] for tensor in tensors)
