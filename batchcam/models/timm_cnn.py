"""Convolutional timm models, cut at their last feature maps.

Shapes: N images, C classes, K channels, H and W cells of the feature grid.
"""

import torch
from torch import Tensor, nn

from batchcam.models.base import ExplainableModel
from batchcam.models.depthwise import use_matrix_products


class TimmCNN(ExplainableModel):
    """Any convolutional timm model, cut between `forward_features` and `forward_head`.

    Depthwise convolutions are computed as matrix products where that is faster; see
    :mod:`batchcam.models.depthwise`.
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
        """See :class:`ExplainableModel`; known if the head is linear on channel averages."""
        if self._averages is None:
            self._averages = _averages_channels(self.model)
        if not self._averages:
            return None
        weight: Tensor = self.model.get_classifier().weight  # type: ignore[operator]
        return weight / cells


def _averages_channels(model: nn.Module) -> bool:
    """Return whether the head of a timm model is its classifier on channel averages, and no more.

    Determined by evaluating the head: no attribute tells it for all of timm.
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
    except RuntimeError:  # The channels are not those of the classifier: a layer is in between.
        return False
    finally:
        model.train(was_training)
    return torch.allclose(logits, averaged, rtol=1e-4, atol=1e-5)
