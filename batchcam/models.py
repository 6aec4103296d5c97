"""Classifiers that can be explained: a backbone cut where its feature maps are.

`features(x)` gives the maps A that a CAM weighs, `head(A)` the logits. A must have more than one
cell (:func:`resolve_output_stride`), and what comes after A must treat images independently
(:func:`check_explainable`).

Shapes: N images, K channels, H and W cells of the feature grid.
"""

import copy
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchcam.depthwise import use_matrix_products
from batchcam.errors import BackboneError, suggest_names

SIMPLE_CNN = "simple_cnn"
_AUTO_STRIDES = (None, 16, 8)
_AUTO_MIN_GRID = 3
"""Cells per side. The paper's smallest grid, below which None is not allowed to go by itself."""


class ExplainableModel(nn.Module):
    """An image classifier in two parts: features, and the head that turns them into logits."""

    def features(self, images: Tensor) -> Tensor:
        """Map images `(N, channels, R, R)` to feature maps `(N, K, H, W)`."""
        raise NotImplementedError

    def head(self, features_NKHW: Tensor) -> Tensor:
        """Map feature maps to logits `(N, C)`, each image by itself."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """Map images to logits."""
        return self.head(self.features(images))

    def class_weights(self, cells: int) -> Tensor | None:
        """Return the channel weights (Eq. 6) of each class, `(C, K)`, where the head is linear.

        The gradient of a class score with respect to the features then is the same for every image:
        it is read off the head's parameters, through which it stays differentiable, and no backward
        pass is needed. None where the head is not linear.

        Args:
            cells: H W of the feature grid.
        """
        del cells
        return None

    def class_gradients(self, rows: int, columns: int) -> Tensor | None:
        """Return the gradient of each class score with respect to the features, as above.

        Args:
            rows: H of the feature grid.
            columns: W of it.

        Returns:
            `(C, K, H, W)`, or `(C, K, 1, 1)` where it is the same in all cells, or None.
        """
        weights_CK = self.class_weights(rows * columns)
        return None if weights_CK is None else weights_CK[:, :, None, None]


class SimpleCNN(ExplainableModel):
    """The paper's baseline: convolutions, flattened features, one linear layer (Section 3.2).

    Four 3x3 convolutions, batch-normalised, with one pooling step among them, so that the CAM grid
    is half the input: 14x14 at 28x28. Features are pooled to 7x7 before they are flattened,
    whatever the resolution. The paper gives no layer sizes; these are ours.

    Its weights lie in memory channels last, and so do its features: a quarter faster on CPUs. What
    is pooled is made positive afterwards, which comes to the same, on a quarter of the cells.
    """

    def __init__(self, num_classes: int = 10, in_chans: int = 1) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            *_convolution(in_chans, 32),
            *_convolution(32, 32, nn.MaxPool2d(2)),
            *_convolution(32, 64),
            *_convolution(64, 64),
        )
        self.classifier = nn.Linear(64 * 7 * 7, num_classes)
        self.to(memory_format=torch.channels_last)

    def features(self, images: Tensor) -> Tensor:
        """See :class:`ExplainableModel`."""
        maps: Tensor = self.convolutions(images)
        return maps

    def head(self, features_NKHW: Tensor) -> Tensor:
        """See :class:`ExplainableModel`."""
        rows, columns = features_NKHW.shape[-2:]
        if rows % 7 or columns % 7:
            pooled = F.adaptive_avg_pool2d(features_NKHW, 7)
            return F.linear(pooled.flatten(1), self.classifier.weight, self.classifier.bias)
        # Pooling and classifier in one, on the features as they lie in memory: pooling would cost
        # more than the classifier, and its derivative as much as a convolution.
        weight_CHWK = self._cell_weights(rows, columns).permute(0, 2, 3, 1)
        features_NHWK = features_NKHW.permute(0, 2, 3, 1)
        return F.linear(features_NHWK.flatten(1), weight_CHWK.flatten(1), self.classifier.bias)

    def _cell_weights(self, rows: int, columns: int) -> Tensor:
        """Return the classifier's weight of each cell, `(C, K, H, W)`, channels last.

        A grid of multiples of 7: each cell has its part in one of the 7x7.
        """
        shared = self.classifier.weight.view(-1, 64, 7, 7) / (rows * columns // 49)
        return F.interpolate(
            shared.contiguous(memory_format=torch.channels_last), (rows, columns), mode="nearest"
        )

    def class_weights(self, cells: int) -> Tensor:
        """See :class:`ExplainableModel`; a pooled cell is an average, which shares out its gain."""
        weight = self.classifier.weight
        means = weight.view(-1, 7 * 7) @ weight.new_full((7 * 7,), 1 / cells)
        return means.view(-1, 64)

    def class_gradients(self, rows: int, columns: int) -> Tensor:
        """See :class:`ExplainableModel`: each cell has a part in the 7x7 that it is pooled into."""
        if rows % 7 == 0 and columns % 7 == 0:
            return self._cell_weights(rows, columns)
        weight_CKAB = self.classifier.weight.view(-1, 64, 7, 7)
        parts_HA = F.adaptive_avg_pool1d(torch.eye(rows).to(weight_CKAB), 7)
        parts_WB = F.adaptive_avg_pool1d(torch.eye(columns).to(weight_CKAB), 7)
        return torch.einsum("ckab,ha,wb->ckhw", weight_CKAB, parts_HA, parts_WB)


class TimmCNN(ExplainableModel):
    """Any convolutional timm model, cut between `forward_features` and `forward_head`.

    Depthwise convolutions compute the same in another way: see :mod:`batchcam.depthwise`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        use_matrix_products(model)
        self.model = model
        self._averages: bool | None = None

    def features(self, images: Tensor) -> Tensor:
        """See :class:`ExplainableModel`."""
        maps: Tensor = self.model.forward_features(images)  # type: ignore[operator]
        return maps

    def head(self, features_NKHW: Tensor) -> Tensor:
        """See :class:`ExplainableModel`."""
        logits: Tensor = self.model.forward_head(features_NKHW)  # type: ignore[operator]
        return logits

    def class_weights(self, cells: int) -> Tensor | None:
        """See :class:`ExplainableModel`; known where a linear layer sees the channels' averages."""
        if self._averages is None:
            self._averages = _averages_channels(self.model)
        if not self._averages:
            return None
        weight: Tensor = self.model.get_classifier().weight  # type: ignore[operator]
        return weight / cells


def _averages_channels(model: nn.Module) -> bool:
    """Whether a timm model's head is its classifier on the channels' averages, and nothing more.

    Found by asking it: no name or class says so for all of timm.
    """
    classifier = model.get_classifier()  # type: ignore[operator]
    if not isinstance(classifier, nn.Linear):
        return False
    weight = classifier.weight
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            generator = torch.Generator().manual_seed(0)
            drawn = torch.randn(2, classifier.in_features, 3, 2, generator=generator)
            features = drawn.to(weight.device, weight.dtype)
            logits = model.forward_head(features)  # type: ignore[operator]
            averaged = classifier(features.mean(dim=(2, 3)))
    except RuntimeError:  # Other channels than the classifier's: there is more in between.
        return False
    finally:
        model.train(was_training)
    return torch.allclose(logits, averaged, rtol=1e-4, atol=1e-5)


def create_model(
    backbone: str,
    num_classes: int = 10,
    in_chans: int = 1,
    output_stride: int | None = None,
    pretrained: bool = False,
) -> ExplainableModel:
    """Build a model by name.

    Args:
        backbone: "simple_cnn", or the name of a timm model.
        num_classes: the number of logits.
        in_chans: channels of the input; timm adapts pretrained weights to it.
        output_stride: input pixels per feature cell, by dilation; None keeps the backbone's own.
        pretrained: load timm's pretrained weights, from the network or a local cache.

    Raises:
        BackboneError: the name is unknown (with the nearest ones), the backbone has no such output
            stride, or its pretrained weights cannot be had.
    """
    if backbone == SIMPLE_CNN:
        if output_stride not in (None, 2):
            raise BackboneError(
                f"simple_cnn has a fixed output stride of 2, not {output_stride}; leave "
                "output_stride out."
            )
        if pretrained:
            raise BackboneError("simple_cnn has no pretrained weights; set pretrained to false.")
        return SimpleCNN(num_classes, in_chans)
    if not _timm_models().is_model(backbone.split(".")[0]):
        raise BackboneError(
            f"backbone {backbone!r} is unknown." + suggest_names(backbone, backbone_names())
        )
    return TimmCNN(_create_timm(backbone, num_classes, in_chans, output_stride, pretrained))


def backbone_names() -> list[str]:
    """Return every name that :func:`create_model` knows, whether it can be explained or not."""
    return [SIMPLE_CNN, *_timm_models().list_models()]


def _timm_models() -> Any:
    """Import timm where it is needed: it takes as long as PyTorch itself."""
    import timm.models

    return timm.models


def _create_timm(
    backbone: str, num_classes: int, in_chans: int, output_stride: int | None, pretrained: bool
) -> nn.Module:
    options: dict[str, Any] = {} if output_stride is None else {"output_stride": output_stride}
    try:
        model: nn.Module = _timm_models().create_model(
            backbone, pretrained=pretrained, num_classes=num_classes, in_chans=in_chans, **options
        )
    except Exception as error:  # timm lets through what its models and the hub client raise.
        if pretrained:
            raise BackboneError(
                f"pretrained weights of {backbone} cannot be loaded ({type(error).__name__}: "
                f"{_first_line(error)}). They come from the network or the local Hugging Face "
                "cache (HF_HOME): connect once to fill the cache, or set pretrained to false."
            ) from error
        if output_stride is not None:
            raise BackboneError(
                f"backbone {backbone} cannot have output_stride={output_stride} "
                f"({type(error).__name__}); leave output_stride out, or choose a backbone that "
                "can be dilated, such as resnet18 or convnextv2_tiny."
            ) from error
        raise BackboneError(
            f"backbone {backbone} cannot be built with in_chans={in_chans} and "
            f"num_classes={num_classes} ({type(error).__name__}: {_first_line(error)}); choose "
            "another."
        ) from error
    return model


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]


def resolve_output_stride(
    backbone: str, resolution: int, in_chans: int = 1, output_stride: int | None = None
) -> int | None:
    """Return the output stride to build `backbone` with, so that its CAM has a usable grid.

    One that is given is kept. None becomes the backbone's own if the grid then is 3x3 or larger,
    else the largest dilated one for which it is.

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


_REMEDY = (
    "use a larger resolution (112 suits most), a smaller output_stride (8) if the backbone has "
    "one, or a convolutional backbone if it is none"
)


@lru_cache(maxsize=256)
def feature_grid(
    backbone: str, resolution: int, in_chans: int = 1, output_stride: int | None = None
) -> tuple[int, int]:
    """Return rows and columns of the CAM grid, from shapes alone: no memory, no arithmetic.

    Raises:
        BackboneError: the backbone fails at this resolution, or its features are no maps.
    """
    with torch.device("meta"):
        model = create_model(backbone, in_chans=in_chans, output_stride=output_stride).eval()
        try:
            features = model.features(torch.empty(2, in_chans, resolution, resolution))
        except Exception as error:
            raise BackboneError(
                f"backbone {backbone} fails on {resolution}x{resolution} pixels "
                f"({type(error).__name__}: {_first_line(error)}); {_REMEDY}."
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
    """Refuse a model whose head lets one image's features influence another's logits.

    Gradients of all images are read off one backward pass (see :func:`batchcam.cam.grad_cam`); a
    batch normalisation after the features, in training mode, would mix them. The model itself is
    left as it was.

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


def _convolution(
    in_channels: int, out_channels: int, *before_relu: nn.Module
) -> tuple[nn.Module, ...]:
    return (
        nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        *before_relu,
        nn.ReLU(),
    )
