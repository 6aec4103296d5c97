"""Measures of explanations that no loss has trained.

All explain the predicted class. Images whose explanation is nil have nothing to be measured; they
are left out of means, and counted.

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
from captum.attr import IntegratedGradients
from pytorch_grad_cam.metrics.road import ROADCombined
from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget
from torch import Tensor, nn

from batchcam.cam import attribution, pooled, render, score_gradients, weighted_maps
from batchcam.data.preprocessing import Preprocess, batches
from batchcam.models import ExplainableModel
from batchcam.similarity import ssim

_INTEGRATION_STEPS = 16
_ROAD_PERCENTILES = [20, 40, 60, 80]


class Explanations(NamedTuple):
    """What a model's decisions on some images rest on, by three methods."""

    predicted: Tensor
    """int64 `(N,)`."""
    cams: Tensor
    """Grad-CAM, `(N, H, W)`, >= 0."""
    evidence: Tensor
    """What each cell adds to the score, in absolute value, `(N, H, W)`: HiResCAM without ReLU."""
    integrated: Tensor
    """Integrated gradients from the data's mean grey, in absolute value, `(N, R, R)`."""


def explain(
    model: ExplainableModel, images: Tensor, preprocess: Preprocess, *, batch_size: int = 250
) -> Explanations:
    """Explain a model's decisions.

    Integrated gradients (Sundararajan et al. 2017; captum's) begin at the data's mean grey, not at
    black, from where they could not but find every dark pixel without merit.

    Args:
        model: in `eval` mode.
        images: uint8 `(N, channels, H, W)`, on the model's device.
        preprocess: turns images into the model's input.
        batch_size: images at a time; it does not change the result.
    """
    integrate = IntegratedGradients(model)
    found = []
    for (chosen,) in batches((images,), batch_size):
        x = preprocess(chosen)
        with torch.no_grad():
            features = model.features(x)
        features = features.detach().requires_grad_()
        logits = model.head(features)
        predicted = logits.argmax(dim=1)
        gradients = score_gradients(logits, features, predicted, create_graph=False)
        with torch.no_grad():
            cams = weighted_maps(pooled(gradients), features)
            evidence = attribution(gradients, features).abs()
        along = integrate.attribute(
            x,
            torch.zeros_like(x),
            target=predicted,
            n_steps=_INTEGRATION_STEPS,
            internal_batch_size=batch_size,
        )
        parts = (predicted, cams, evidence, along.abs().sum(dim=1).to(cams.dtype))
        found.append([part.detach().cpu() for part in parts])
    return Explanations(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def mass_share(mass: Tensor, masks: Tensor) -> Tensor:
    """Return which share of each explanation lies on masked pixels, `(N,)`, NaN where it is nil.

    The energy-based pointing game (Wang et al. 2020). A cell counts by the share of it that is
    masked.

    Args:
        mass: `(N, H, W)`, >= 0.
        masks: bool `(N, pixels, pixels)`, of any size.
    """
    weights = _on_grid(masks, mass)
    return (mass * weights).sum(dim=(1, 2)) / mass.sum(dim=(1, 2))


def concentration(mass: Tensor, masks: Tensor) -> Tensor:
    """Return :func:`mass_share` divided by the share of the area that is masked, `(N,)`.

    1 is what an explanation has that is the same everywhere, or knows nothing of the mask.
    """
    return mass_share(mass, masks) / _on_grid(masks, mass).mean(dim=(1, 2))


def _on_grid(masks: Tensor, mass: Tensor) -> Tensor:
    grid = (mass.shape[1], mass.shape[2])
    return F.adaptive_avg_pool2d(masks.float().unsqueeze(1), grid).squeeze(1)


def prototype_gap(cams: Tensor, predicted: Tensor, prototypes_CRR: Tensor) -> Tensor:
    """Return SSIM to the prototype of the predicted class less the mean of that to all others'.

    An explanation that looks alike whatever the class has 0.

    Returns:
        `(N,)`, in [-2, 2], NaN where the explanation is nil.
    """
    rendered = render(cams, prototypes_CRR.shape[-1])
    each_CN = torch.stack(
        [ssim(rendered, prototype.expand_as(rendered)) for prototype in prototypes_CRR]
    )
    own_N = each_CN.gather(0, predicted.unsqueeze(0)).squeeze(0)
    others_N = (each_CN.sum(dim=0) - own_N) / (len(prototypes_CRR) - 1)
    return (own_N - others_N).where(_present(cams), torch.nan)


def diversity(cams: Tensor, predicted: Tensor, resolution: int, most: int = 20) -> float:
    """Return how much explanations of one class differ: the mean of 1 - SSIM over pairs of them.

    A template that is pasted on all images of its class has 0.

    Args:
        cams: `(N, H, W)`; those that are nil are left out.
        predicted: int64 `(N,)`.
        resolution: pixels at which maps are compared.
        most: explanations of a class that are paired with each other, the first ones.
    """
    kept = _present(cams)
    rendered, classes = render(cams[kept], resolution), predicted[kept]
    distances = []
    for label in range(int(classes.max()) + 1 if len(classes) else 0):
        members = rendered[classes == label][:most]
        one, other = torch.triu_indices(len(members), len(members), offset=1)
        if len(one):
            distances.append(1 - ssim(members[one], members[other]).mean())
    return torch.stack(distances).mean().item() if distances else float("nan")


def road(
    model: ExplainableModel, images: Tensor, preprocess: Preprocess, cams: Tensor, predicted: Tensor
) -> Tensor:
    """Return ROAD (Rong et al. 2022; pytorch-grad-cam's), how much the model needs what is shown.

    Half of what the probability of the predicted class is higher when the least relevant pixels are
    removed than when the most relevant ones are, the mean over 20, 40, 60 and 80 % of them; removed
    pixels are guessed from their neighbours. Equally relevant ones go in random order.

    Returns:
        `(n,)`, in [-0.5, 0.5], of the images whose explanation is not nil; 0 is that of a random
        map.
    """
    kept = _present(cams)
    x = preprocess(images[kept.to(images.device)])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        maps = render(cams[kept], preprocess.resolution)
        maps = maps + 1e-6 * torch.rand_like(maps)
        targets = [ClassifierOutputSoftmaxTarget(label) for label in predicted[kept].tolist()]
        with warnings.catch_warnings():
            # The library hands tensors to NumPy's functions, which is to change in NumPy.
            warnings.filterwarnings("ignore", message="__array_wrap__", category=DeprecationWarning)
            scores = ROADCombined(_ROAD_PERCENTILES)(x, maps.numpy(), targets, model)
    return torch.from_numpy(np.asarray(scores))


class Randomised(NamedTuple):
    """How alike CAMs stay when weights are random: SSIM, a mean over images."""

    head: float
    """The last linear layer's weights."""
    everything: float
    """All weights."""


def randomisation(
    model: ExplainableModel,
    fresh: ExplainableModel,
    images: Tensor,
    preprocess: Preprocess,
    cams: Tensor,
    predicted: Tensor,
) -> Randomised:
    """Return how alike CAMs stay when what was learnt is lost (Adebayo et al. 2018).

    What stays as it was does not explain what was learnt. Maps that are nil count as they are.

    Args:
        model: in `eval` mode.
        fresh: of the same architecture, as it was before training, or as another seed makes it.
        images: uint8 `(N, channels, H, W)`.
        preprocess: turns images into the model's input.
        cams: the model's Grad-CAMs of these images.
        predicted: the classes that they explain.
    """
    without_head = copy.deepcopy(model)
    last = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)][-1]
    without_head.get_submodule(last).load_state_dict(fresh.get_submodule(last).state_dict())
    wanted = render(cams, preprocess.resolution)
    alike = []
    for other in (without_head, fresh.eval()):
        features = other.features(preprocess(images)).detach().requires_grad_()
        gradients = score_gradients(
            other.head(features), features, predicted.to(images.device), create_graph=False
        )
        with torch.no_grad():
            maps = weighted_maps(pooled(gradients), features).cpu()
            alike.append(ssim(render(maps, preprocess.resolution), wanted).mean().item())
    return Randomised(*alike)


def _present(cams: Tensor) -> Tensor:
    return cams.amax(dim=(1, 2)) > 0
