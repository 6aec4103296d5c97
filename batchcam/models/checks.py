"""Checks of whether a CAM can explain a backbone, and the choice of its output stride.

Shapes: N images, K channels, H and W cells of the feature grid.
"""

import copy
from functools import lru_cache

import torch

from batchcam.errors import BackboneError, first_line
from batchcam.models.base import ExplainableModel
from batchcam.models.create import create_model

_AUTO_STRIDES = (None, 16, 8)


_AUTO_MIN_GRID = 3
"""Cells per side: the paper's smallest grid. An automatic output stride gives no smaller one if a
stride with this grid exists."""


_REMEDY = (
    "use a larger resolution (112 suits most), a smaller output_stride (8) if the backbone "
    "supports it, or a convolutional backbone"
)


def resolve_output_stride(
    backbone: str, resolution: int, in_chans: int = 1, output_stride: int | None = None
) -> int | None:
    """Return the output stride with which the CAM of `backbone` has a usable grid.

    A given output stride is kept. None becomes the backbone's own stride if its grid is at least
    3x3, else the largest dilated stride with such a grid.

    Raises:
        BackboneError: the grid is 1x1 or the backbone fails at this resolution, with the remedy.
    """
    strides = _AUTO_STRIDES if output_stride is None else (output_stride,)
    best: tuple[int, int | None] | None = None
    failure: BackboneError | None = None
    for stride in strides:
        try:
            cells = min(feature_grid(backbone, resolution, in_chans, stride))
        except BackboneError as error:
            failure = failure or error
            continue
        if cells >= _AUTO_MIN_GRID:
            return stride
        if best is None or cells > best[0]:
            best = (cells, stride)
    if best is not None and best[0] > 1:
        return best[1]
    if best is not None:
        raise BackboneError(
            f"backbone {backbone} reduces {resolution}x{resolution} pixels to a CAM grid of 1x1, "
            f"which explains nothing; {_REMEDY}."
        )
    assert failure is not None
    raise failure


@lru_cache(maxsize=256)
def feature_grid(
    backbone: str, resolution: int, in_chans: int = 1, output_stride: int | None = None
) -> tuple[int, int]:
    """Return rows and columns of the CAM grid, computed from shapes only, on the meta device.

    Raises:
        BackboneError: the backbone fails at this resolution, or its features are not maps.
    """
    with torch.device("meta"):
        model = create_model(backbone, in_chans=in_chans, output_stride=output_stride).eval()
        try:
            features = model.features(torch.empty(2, in_chans, resolution, resolution))
        except Exception as error:
            raise BackboneError(
                f"backbone {backbone} fails on {resolution}x{resolution} pixels "
                f"({type(error).__name__}: {first_line(error)}); {_REMEDY}."
            ) from error
    channels = getattr(getattr(model, "model", None), "num_features", None)
    channels_last = features.dim() == 4 and channels not in (None, features.shape[1])
    if features.dim() != 4 or (channels_last and features.shape[-1] == channels):
        raise BackboneError(
            f"backbone {backbone} gives features of shape {tuple(features.shape)}, not maps "
            "(N, K, H, W); a CAM needs a convolutional backbone, such as resnet18."
        )
    return int(features.shape[2]), int(features.shape[3])


def check_explainable(model: ExplainableModel, resolution: int, in_chans: int) -> None:
    """Refuse a model whose head lets the features of one image influence the logits of another.

    The gradients of all images are read off one backward pass (see :func:`batchcam.cam.grad_cam`);
    a batch normalisation after the features would mix them in training mode. The model is not
    modified.

    Raises:
        BackboneError: the head mixes images.
    """
    probe = copy.deepcopy(model).cpu().float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        with torch.no_grad():
            features = probe.eval().features(torch.rand(3, in_chans, resolution, resolution))
        features = torch.rand_like(features).requires_grad_()
        logits = probe.train().head(features)
        (gradient,) = torch.autograd.grad(logits[0].sum(), features)
    if gradient[1:].abs().max() > 0:
        raise BackboneError(
            f"the head of {type(getattr(model, 'model', model)).__name__} mixes the images of a "
            "batch (a batch normalisation after the last feature maps), so a CAM per image is "
            "undefined in training; choose another backbone, such as resnet18."
        )
