"""Measures of explanations that no training loss optimises.

All measures refer to the predicted class. A map that is zero everywhere cannot be measured: unless
a function states otherwise, it gives NaN or is left out. Callers exclude such maps from means and
report their share.

Needs the extra `evidence`.

Shapes: N images, C classes, H and W cells of the feature grid or pixels, R pixels of the model's
input.
"""

import copy
import warnings
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchcam.cam import attribution, pooled, render, score_gradients, weighted_maps
from batchcam.data.preprocessing import Preprocess, batches
from batchcam.extras import require_extra
from batchcam.models import ExplainableModel
from batchcam.similarity import ssim

with require_extra("evidence", "a measure of explanations"):
    from captum.attr import IntegratedGradients
    from pytorch_grad_cam.metrics.road import ROADCombined
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget

_INTEGRATION_STEPS = 16
_ROAD_PERCENTILES = [20, 40, 60, 80]


class Explanations(NamedTuple):
    """Attribution maps of the predicted class by three methods, on the CPU."""

    predicted: Tensor
    """Predicted classes, int64 `(N,)`."""
    cams: Tensor
    """Grad-CAM, `(N, H, W)`, >= 0."""
    evidence: Tensor
    """Absolute contribution of each cell to the score, `(N, H, W)`: |HiResCAM without ReLU|."""
    integrated: Tensor
    """Absolute integrated gradients, summed over channels, `(N, R, R)`."""


def explain(
    model: ExplainableModel, images: Tensor, preprocess: Preprocess, *, batch_size: int = 250
) -> Explanations:
    """Return attribution maps of the predicted class of each image.

    The baseline of integrated gradients (Sundararajan et al. 2017; captum's implementation) is the
    data's mean grey, which is 0 after normalisation. With a black baseline every black pixel would
    get an attribution of 0.

    Args:
        model: in `eval` mode.
        images: uint8 `(N, channels, H, W)`, on the model's device.
        preprocess: turns images into the model's input.
        batch_size: images per pass; it does not change the result.
    """
    integrate = IntegratedGradients(model)
    explained = []
    for (batch,) in batches((images,), batch_size):
        x = preprocess(batch)
        with torch.no_grad():
            features = model.features(x)
        features = features.detach().requires_grad_()
        logits = model.head(features)
        predicted = logits.argmax(dim=1)
        gradients = score_gradients(logits, features, predicted, create_graph=False)
        with torch.no_grad():
            cams = weighted_maps(pooled(gradients), features)
            evidence = attribution(gradients, features).abs()
        integrated = integrate.attribute(
            x,
            torch.zeros_like(x),
            target=predicted,
            n_steps=_INTEGRATION_STEPS,
            internal_batch_size=batch_size,
        )
        parts = (predicted, cams, evidence, integrated.abs().sum(dim=1).to(cams.dtype))
        explained.append([part.detach().cpu() for part in parts])
    return Explanations(*(torch.cat(parts) for parts in zip(*explained, strict=True)))


def mass_share(mass: Tensor, masks: Tensor) -> Tensor:
    """Return the share of each map's sum that lies on masked pixels.

    This is the energy-based pointing game (Wang et al. 2020). Each cell is weighted by the fraction
    of its area that is masked.

    Args:
        mass: attribution maps, `(N, H, W)`, >= 0.
        masks: bool `(N, pixels, pixels)`, at any resolution.

    Returns:
        `(N,)`, in [0, 1]; NaN for a map that is zero everywhere.
    """
    weights = _on_grid(masks, mass)
    return (mass * weights).sum(dim=(1, 2)) / mass.sum(dim=(1, 2))


def concentration(mass: Tensor, masks: Tensor) -> Tensor:
    """Return :func:`mass_share` divided by the masked share of the area.

    1 for a uniform map, and on average for a map that is independent of the mask.

    Args:
        mass: attribution maps, `(N, H, W)`, >= 0.
        masks: bool `(N, pixels, pixels)`, at any resolution.

    Returns:
        `(N,)`, >= 0; NaN for a map that is zero everywhere and for an empty mask.
    """
    return mass_share(mass, masks) / _on_grid(masks, mass).mean(dim=(1, 2))


def _on_grid(masks: Tensor, mass: Tensor) -> Tensor:
    """Return the masked fraction of each cell of the grid of `mass`, `(N, H, W)`."""
    grid = (mass.shape[1], mass.shape[2])
    return F.adaptive_avg_pool2d(masks.float().unsqueeze(1), grid).squeeze(1)


def prototype_gap(cams: Tensor, predicted: Tensor, prototypes_CRR: Tensor) -> Tensor:
    """Return SSIM to the predicted class's prototype minus the mean SSIM to all other prototypes.

    0 for a map that resembles all prototypes equally.

    Args:
        cams: `(N, H, W)`, >= 0.
        predicted: int64 `(N,)`.
        prototypes_CRR: one prototype per class, in [0, 1].

    Returns:
        `(N,)`, in [-2, 2]; NaN for a map that is zero everywhere.
    """
    rendered = render(cams, prototypes_CRR.shape[-1])
    each_CN = torch.stack(
        [ssim(rendered, prototype.expand_as(rendered)) for prototype in prototypes_CRR]
    )
    own_N = each_CN.gather(0, predicted.unsqueeze(0)).squeeze(0)
    others_N = (each_CN.sum(dim=0) - own_N) / (len(prototypes_CRR) - 1)
    return (own_N - others_N).where(_is_nonzero(cams), torch.nan)


def diversity(cams: Tensor, predicted: Tensor, resolution: int, most: int = 20) -> float:
    """Return the mean of 1 - SSIM over pairs of maps of the same class, averaged over classes.

    0 if all maps of a class are identical.

    Args:
        cams: `(N, H, W)`; maps that are zero everywhere are excluded.
        predicted: int64 `(N,)`.
        resolution: side of the maps when they are compared, in pixels.
        most: the largest number of maps of a class to pair with each other; the first ones count.

    Returns:
        A value in [0, 2]; NaN if no class has two maps.
    """
    kept = _is_nonzero(cams)
    rendered, classes = render(cams[kept], resolution), predicted[kept]
    distances = []
    for label in range(int(classes.max()) + 1 if len(classes) else 0):
        members = rendered[classes == label][:most]
        first, second = torch.triu_indices(len(members), len(members), offset=1)
        if len(first):
            distances.append(1 - ssim(members[first], members[second]).mean())
    return torch.stack(distances).mean().item() if distances else float("nan")


def road(
    model: ExplainableModel, images: Tensor, preprocess: Preprocess, cams: Tensor, predicted: Tensor
) -> Tensor:
    """Return the ROAD score of each map (Rong et al. 2022; pytorch-grad-cam's implementation).

    The score is (p_least - p_most) / 2, averaged over removing 20, 40, 60 and 80 % of the pixels.
    p_least and p_most are the probabilities of the predicted class after removing the least and
    the most relevant pixels. Removed pixels are imputed from their neighbours. Noise of 1e-6 puts
    equally relevant pixels into random order.

    Args:
        model: in `eval` mode.
        images: uint8 `(N, channels, H, W)`, on the model's device.
        preprocess: turns images into the model's input.
        cams: `(N, H, W)`, >= 0.
        predicted: int64 `(N,)`, the classes that the maps explain.

    Returns:
        `(n,)`, in [-0.5, 0.5], for the n maps that are not zero everywhere; 0 is expected of a
        random map.
    """
    kept = _is_nonzero(cams)
    x = preprocess(images[kept.to(images.device)])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        maps = render(cams[kept], preprocess.resolution)
        maps = maps + 1e-6 * torch.rand_like(maps)
        targets = [ClassifierOutputSoftmaxTarget(label) for label in predicted[kept].tolist()]
        with warnings.catch_warnings():
            # pytorch-grad-cam passes tensors to NumPy functions, which NumPy deprecates.
            warnings.filterwarnings("ignore", message="__array_wrap__", category=DeprecationWarning)
            scores = ROADCombined(_ROAD_PERCENTILES)(x, maps.numpy(), targets, model)
    return torch.from_numpy(np.asarray(scores))


class Randomised(NamedTuple):
    """Mean SSIM between CAMs of a trained model and CAMs after replacing weights by random ones."""

    head: float
    """Only the last linear layer is randomised."""
    everything: float
    """All weights are randomised."""


def randomisation(
    model: ExplainableModel,
    fresh: ExplainableModel,
    images: Tensor,
    preprocess: Preprocess,
    cams: Tensor,
    predicted: Tensor,
) -> Randomised:
    """Return the SSIM of CAMs before and after weight randomisation (Adebayo et al. 2018).

    A high value means that the CAMs depend little on the learnt weights. Maps that are zero
    everywhere are included.

    Args:
        model: in `eval` mode.
        fresh: a model of the same architecture with random weights.
        images: uint8 `(N, channels, H, W)`.
        preprocess: turns images into the model's input.
        cams: the model's Grad-CAMs of these images, `(N, H, W)`.
        predicted: int64 `(N,)`, the classes that the CAMs explain.
    """
    random_head = copy.deepcopy(model)
    last = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)][-1]
    random_head.get_submodule(last).load_state_dict(fresh.get_submodule(last).state_dict())
    trained = render(cams, preprocess.resolution)
    similarities = []
    for randomised in (random_head, fresh.eval()):
        features = randomised.features(preprocess(images)).detach().requires_grad_()
        gradients = score_gradients(
            randomised.head(features), features, predicted.to(images.device), create_graph=False
        )
        with torch.no_grad():
            maps = weighted_maps(pooled(gradients), features).cpu()
            similarity = ssim(render(maps, preprocess.resolution), trained)
            similarities.append(similarity.mean().item())
    return Randomised(*similarities)


def _is_nonzero(cams: Tensor) -> Tensor:
    """Return which maps have a positive cell, bool `(N,)`."""
    return cams.amax(dim=(1, 2)) > 0
