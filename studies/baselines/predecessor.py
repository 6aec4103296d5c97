"""Baseline: the predecessor of Batch-CAM, which computes CAMs image by image with hooks.

Implemented from the paper's description (Sections 3 and 3.3, its references 7 and 8). Hooks store
features A and gradients G. The CAM of each image of a batch takes its own backward pass with
`retain_graph=True`. A contrastive loss of the Euclidean distance between CAM and image (Eq. 1) is
added to the cross-entropy. Docstrings state our choices where the paper gives no detail.

Shapes: N images, C classes, K channels, H and W cells of the feature grid, R pixels.
"""

from types import TracebackType
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from batchcam.cam import render
from studies.baselines.hookable_model import HookableModel

Reach = Literal["features", "model"]
"""Where the backward pass of a single image ends.

"model": at the model's input, as the paper describes its predecessor. G is then a constant in the
loss, and the loss's gradient reaches the weights only through A. "features": at the feature maps,
with `create_graph=True`, so that the loss is also differentiated through G. "features" is cheaper.
"""


def contrastive_loss(distance_N: Tensor, similar_N: Tensor, margin: float) -> Tensor:
    """Return Eq. 1 per pair: `(Y D² + (1 - Y) max(m - D, 0)²) / 2`.

    Args:
        distance_N: Euclidean distances D >= 0.
        similar_N: Y, 1 for a similar pair and 0 for a dissimilar one; bool or number.
        margin: m, the distance at and above which a dissimilar pair has a loss of 0.

    Raises:
        ValueError: shapes differ, or the margin is negative.
    """
    if distance_N.shape != similar_N.shape:
        raise ValueError(
            f"expected one label per distance, got {tuple(similar_N.shape)} labels and "
            f"{tuple(distance_N.shape)} distances."
        )
    if margin < 0:
        raise ValueError(f"margin={margin} must be 0 or more.")
    similar_N = similar_N.to(distance_N.dtype)
    shortfall_N = (margin - distance_N).clamp(min=0)
    return (similar_N * distance_N.square() + (1 - similar_N) * shortfall_N.square()) / 2


class Hooks:
    """Context manager that stores the features of the last forward pass and their last gradient."""

    def __init__(self, model: HookableModel) -> None:
        self.features_NKHW: Tensor
        self.gradients_NKHW: Tensor
        self._model = model
        self._handle: RemovableHandle

    def __enter__(self) -> Self:
        self._handle = self._model.hook_point.register_forward_hook(self._store_features)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._handle.remove()

    def _store_features(
        self, module: torch.nn.Module, inputs: tuple[Tensor], output: Tensor
    ) -> None:
        del module, inputs
        self.features_NKHW = output
        output.register_hook(self._store_gradient)  # type: ignore[no-untyped-call]

    def _store_gradient(self, gradient: Tensor) -> None:
        self.gradients_NKHW = gradient


def sequential_grad_cam(
    logits_NC: Tensor, targets_N: Tensor, hooks: Hooks, reach: Reach
) -> list[Tensor]:
    """Return one unnormalised Grad-CAM `(H, W)` per image, each from its own backward pass.

    With `reach="model"` the passes accumulate gradients in the weights' `.grad`, which the caller
    must clear.

    Args:
        logits_NC: class scores before softmax, from a forward pass inside the context of `hooks`.
        targets_N: int64, the class to explain for each image.
        hooks: holds the features, and receives the gradients.
        reach: see :data:`Reach`.
    """
    features_NKHW = hooks.features_NKHW
    maps = []
    for image, target in enumerate(targets_N.tolist()):
        score = logits_NC[image, target]
        if reach == "model":
            torch.autograd.backward(score, retain_graph=True)
            gradients_NKHW = hooks.gradients_NKHW
        else:
            (gradients_NKHW,) = torch.autograd.grad(
                score, features_NKHW, retain_graph=True, create_graph=True
            )
        weights_K11 = gradients_NKHW[image].mean(dim=(1, 2), keepdim=True)
        maps.append(F.relu((weights_K11 * features_NKHW[image]).sum(dim=0)))
    return maps


def training_step(
    model: HookableModel,
    optimizer: torch.optim.Optimizer,
    x_NCRR: Tensor,
    images_NRR: Tensor,
    labels_N: Tensor,
    *,
    weight: float = 0.1,
    margin: float = 1.0,
    reach: Reach = "features",
) -> Tensor:
    """Take an optimiser step on a batch and return the loss, detached.

    The paper does not state which pairs are similar. Here an image and the CAM of its true class
    are a similar pair, and there are no dissimilar ones. The paper does not state how a CAM is
    scaled either. Here it is scaled by :func:`batchcam.cam.render`.

    Args:
        model: in training mode.
        optimizer: updates the model's weights.
        x_NCRR: the model's input.
        images_NRR: the same images in grey, in [0, 1].
        labels_N: int64, the class of each image.
        weight: factor of the contrastive loss, which is added to the cross-entropy.
        margin: of the contrastive loss; see :func:`contrastive_loss`.
        reach: see :data:`Reach`.
    """
    with Hooks(model) as hooks:
        logits_NC = model(x_NCRR)
        maps = sequential_grad_cam(logits_NC, labels_N, hooks, reach)
    distances = [
        torch.linalg.vector_norm(render(map_HW[None], len(image_RR))[0] - image_RR)
        for map_HW, image_RR in zip(maps, images_NRR, strict=True)
    ]
    similar_N = torch.ones(len(labels_N), device=labels_N.device)
    explanation = contrastive_loss(torch.stack(distances), similar_N, margin).mean()
    loss = F.cross_entropy(logits_NC, labels_N) + weight * explanation
    optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    optimizer.step()
    return loss.detach()
