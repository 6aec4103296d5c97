"""The prototype energy loss: attribution off the support of an image's class is penalised.

Ours, not the paper's.

Shapes: N images, C classes, K channels, H and W cells of the feature grid.
"""

from torch import Tensor

from batchcam.cam import attribution, score_gradients
from batchcam.losses.base import Batch, Compute, TermContext, TermSpec


def prototype_energy_loss(
    logits_NC: Tensor, features_NKHW: Tensor, labels_N: Tensor, off_support_CHW: Tensor
) -> Tensor:
    """Return the mean over images of the attribution off the support of the image's class.

    The prototype of a class shows where the class is in the training images, and thereby where it
    is not. The score of the true class y is attributed to cells, `a = sum_k A_k dS_y/dA_k`
    (:func:`batchcam.cam.attribution`). Attribution off the support is summed in absolute value:

        E = 1/N sum_i sum_hw o_y(h, w) |a_i(h, w)|,   o_c = 1 off the support of class c, else 0.

    The loss has the unit of a score. Attribution on the support is free. A constant score, whose
    attribution is 0 everywhere, costs nothing.

    Args:
        logits_NC: class scores before softmax, computed from `features_NKHW`.
        features_NKHW: the feature maps, part of the graph of `logits_NC`.
        labels_N: int64 in [0, C), the class of each image.
        off_support_CHW: 1 off the support of a class, else 0, on the grid of the features; see
            :func:`batchcam.prototypes.off_support_mask`.

    Returns:
        A scalar, at least 0.

    Raises:
        ValueError: shapes do not fit each other.

    Example:
        >>> import torch
        >>> from batchcam.prototypes import class_supports, off_support_mask
        >>> _ = torch.manual_seed(0)
        >>> images, labels = torch.randint(0, 256, (6, 28, 28)), torch.tensor([0, 0, 1, 1, 2, 2])
        >>> supports = class_supports(images, labels, num_classes=3)
        >>> features = torch.rand(6, 8, 7, 7, requires_grad=True)
        >>> logits = torch.nn.Linear(8, 3)(features.mean(dim=(2, 3)))
        >>> mask = off_support_mask(supports, (7, 7))
        >>> loss = prototype_energy_loss(logits, features, labels, mask)
        >>> loss.backward()
    """
    if off_support_CHW.dim() != 3 or off_support_CHW.shape[1:] != features_NKHW.shape[2:]:
        raise ValueError(
            f"expected off_support_CHW (C, H, W) on the grid of features (N, K, H, W), got "
            f"{tuple(off_support_CHW.shape)} and {tuple(features_NKHW.shape)}."
        )
    gradients_NKHW = score_gradients(logits_NC, features_NKHW, labels_N, create_graph=True)
    return _energy(attribution(gradients_NKHW, features_NKHW), off_support_CHW[labels_N])


def _energy(attribution_NHW: Tensor, off_support_NHW: Tensor) -> Tensor:
    return (attribution_NHW.abs() * off_support_NHW).sum(dim=(1, 2)).mean()


def _build(context: TermContext) -> Compute:
    off_support_CHW = context.off_support_mask(context.grid)

    def compute(batch: Batch) -> Tensor:
        return _energy(batch.attribution_NHW, off_support_CHW[batch.labels_N])

    return compute


ENERGY = TermSpec(
    name="energy",
    title="prototype energy",
    source="ours",
    search_range=(0.3, 100.0),
    build=_build,
    uses_supports=True,
)
