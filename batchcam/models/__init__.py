"""Classifiers that can be explained: a backbone that is cut at its feature maps.

`features(x)` returns the feature maps A that a CAM weighs, `head(A)` returns the logits. A must
have more than one cell (:func:`resolve_output_stride`), and the head must treat the images of a
batch independently (:func:`check_explainable`).
"""

from batchcam.models.base import ExplainableModel
from batchcam.models.checks import check_explainable, feature_grid, resolve_output_stride
from batchcam.models.create import backbone_names, create_model
from batchcam.models.simple_cnn import SimpleCNN
from batchcam.models.timm_cnn import TimmCNN

__all__ = [
    "ExplainableModel",
    "SimpleCNN",
    "TimmCNN",
    "backbone_names",
    "check_explainable",
    "create_model",
    "feature_grid",
    "resolve_output_stride",
]
