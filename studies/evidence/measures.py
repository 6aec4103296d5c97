"""Measures of explanations that no loss has trained.

Shapes: N images, H and W cells of the feature grid or pixels.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from batchcam.cam import attribution, pooled, score_gradients, weighted_maps
from batchcam.data import Preprocess, batches
from batchcam.models import ExplainableModel


class MassShare(NamedTuple):
    """Which share of an explanation lies on a part of an image: a mean over images, in [0, 1]."""

    attribution: float
    """Of what the cells add to the score, in absolute value (HiResCAM without its ReLU)."""
    cam: float
    """Of the Grad-CAM."""


def mass_share(
    model: ExplainableModel,
    images: Tensor,
    masks: Tensor,
    preprocess: Preprocess,
    *,
    batch_size: int = 500,
) -> MassShare:
    """Return which share of the explanations of the predicted classes lies on masked pixels.

    A cell counts by the share of it that is masked. Images whose explanation is nil are left out.

    Args:
        model: in `eval` mode.
        images: uint8 `(N, channels, H, W)`.
        masks: bool `(N, H, W)`.
        preprocess: turns images into the model's input.
        batch_size: images at a time; it does not change the result.
    """
    shares: list[list[Tensor]] = [[], []]
    for chosen, masked in batches((images, masks), batch_size):
        with torch.no_grad():
            features = model.features(preprocess(chosen))
        features = features.detach().requires_grad_()
        logits = model.head(features)
        gradients = score_gradients(logits, features, logits.argmax(dim=1), create_graph=False)
        with torch.no_grad():
            grid = (features.shape[2], features.shape[3])
            weights = F.adaptive_avg_pool2d(masked.float().unsqueeze(1), grid).squeeze(1)
            evidence = attribution(gradients, features).abs()
            maps = weighted_maps(pooled(gradients), features)
            for kept, mass in zip(shares, (evidence, maps), strict=True):
                total = mass.sum(dim=(1, 2))
                kept.append(((mass * weights).sum(dim=(1, 2)) / total)[total > 0])
    return MassShare(*(torch.cat(kept).mean().item() for kept in shares))
