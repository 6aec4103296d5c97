"""The predecessor of Batch-CAM: hooks, one image after the other, CAMs compared with the images.

After what the paper says of it (Sections 3 and 3.3, its references 7 and 8): hooks intercept the
passes and keep features A and gradients G; the CAMs of a batch are made image by image, each by a
backward pass with `retain_graph=True`; a contrastive loss of their Euclidean distance to the images
(Eq. 1) is added to the cross-entropy. What the paper leaves open is stated where it is decided.

Shapes: N images, C classes, K channels, H and W cells of the feature grid, R pixels.
"""

from types import TracebackType
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from batchcam.cam import render
from studies.baselines.tapped import Tapped

Reach = Literal["features", "model"]
"""How far the pass of an image goes back.

"model": through the whole model, as the paper says of its predecessor; G then is a constant of the
loss, whose gradient reaches the weights through A alone. "features": to the feature maps and no
further, with a graph of its own, so that G is part of the loss too. It is the cheaper of the two.
"""


def contrastive_loss(distance_N: Tensor, similar_N: Tensor, margin: float) -> Tensor:
    """Return Eq. 1 per pair: `(Y D² + (1 - Y) max(m - D, 0)²) / 2`.

    Args:
        distance_N: Euclidean distances D >= 0.
        similar_N: Y, 1 for a similar pair and 0 for a dissimilar one; bool or number.
        margin: m, the distance from which a dissimilar pair costs nothing.

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
    apart_N = (margin - distance_N).clamp(min=0)
    return (similar_N * distance_N.square() + (1 - similar_N) * apart_N.square()) / 2


class Hooks:
    """Features and their last gradient, kept as passes go by, while the context lasts."""

    def __init__(self, tapped: Tapped) -> None:
        self.features_NKHW: Tensor
        self.gradients_NKHW: Tensor
        self._tapped = tapped
        self._handle: RemovableHandle

    def __enter__(self) -> Self:
        self._handle = self._tapped.tap.register_forward_hook(self._keep)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._handle.remove()

    def _keep(self, module: torch.nn.Module, prepared: tuple[Tensor], output: Tensor) -> None:
        del module, prepared
        self.features_NKHW = output
        output.register_hook(self._keep_gradient)  # type: ignore[no-untyped-call]

    def _keep_gradient(self, gradient: Tensor) -> None:
        self.gradients_NKHW = gradient


def sequential_grad_cam(
    logits_NC: Tensor, targets_N: Tensor, hooks: Hooks, reach: Reach
) -> list[Tensor]:
    """Return one Grad-CAM per image, `(H, W)`, unnormalised, one pass backwards for each.

    A pass through the whole model leaves gradients in the weights' `.grad`; they are the caller's
    to clear.

    Args:
        logits_NC: class scores before softmax, from a pass forwards that `hooks` saw.
        targets_N: int64, the class to explain for each image.
        hooks: where the features are, and the gradients will be.
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
    tapped: Tapped,
    optimizer: torch.optim.Optimizer,
    x_NCRR: Tensor,
    pictures_NRR: Tensor,
    labels_N: Tensor,
    *,
    weight: float = 0.1,
    margin: float = 1.0,
    reach: Reach = "features",
) -> Tensor:
    """Train on a batch; return the loss, detached.

    The paper does not say which pairs are similar: here each image's CAM of its true class and the
    image are. Nor does it say how a CAM is scaled: here as everywhere in this project.

    Args:
        tapped: the model, in training mode.
        optimizer: of its weights.
        x_NCRR: the model's input.
        pictures_NRR: the same images in grey, in [0, 1].
        labels_N: int64, the class of each image.
        weight: of the contrastive loss beside the cross-entropy.
        margin: of the contrastive loss.
        reach: see :data:`Reach`.
    """
    with Hooks(tapped) as hooks:
        logits_NC = tapped(x_NCRR)
        maps = sequential_grad_cam(logits_NC, labels_N, hooks, reach)
    distances = [
        torch.linalg.vector_norm(render(map_HW[None], len(picture_RR))[0] - picture_RR)
        for map_HW, picture_RR in zip(maps, pictures_NRR, strict=True)
    ]
    similar_N = torch.ones(len(labels_N), device=labels_N.device)
    explanation = contrastive_loss(torch.stack(distances), similar_N, margin).mean()
    loss = F.cross_entropy(logits_NC, labels_N) + weight * explanation
    optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    optimizer.step()
    return loss.detach()
