"""Models by name: SimpleCNN, and every convolutional timm model."""

from typing import Any

from torch import nn

from batchcam.errors import BackboneError, first_line, suggest_names
from batchcam.models.base import ExplainableModel
from batchcam.models.simple_cnn import SimpleCNN
from batchcam.models.timm_cnn import TimmCNN

SIMPLE_CNN = "simple_cnn"


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
        BackboneError: the name is unknown, the backbone does not support the output stride, or its
            pretrained weights are not available.

    Example:
        >>> import torch
        >>> model = create_model("simple_cnn", num_classes=3)
        >>> features = model.features(torch.rand(2, 1, 28, 28))
        >>> features.shape, model.head(features).shape
        (torch.Size([2, 64, 14, 14]), torch.Size([2, 3]))
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
    """Return every name that :func:`create_model` accepts, including models without CAMs."""
    return [SIMPLE_CNN, *_timm_models().list_models()]


def _timm_models() -> Any:
    """Import timm only when it is needed; the import takes as long as that of PyTorch."""
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
    except Exception as error:  # timm passes on whatever its models and the hub client raise.
        if pretrained:
            raise BackboneError(
                f"pretrained weights of {backbone} cannot be loaded ({type(error).__name__}: "
                f"{first_line(error)}). They come from the network or the local Hugging Face "
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
            f"num_classes={num_classes} ({type(error).__name__}: {first_line(error)}); choose "
            "another."
        ) from error
    return model
