"""The prototype exchange loss: background pixels must not change the margin between two classes.

The prototype energy loss (:mod:`batchcam.losses.energy`) locates evidence by gradients on the CAM
grid. The receptive field of a cell is larger than the cell, and the loss also forbids evidence off
the support of a class that another class is absent. This loss intervenes instead: it swaps the
pixels of two images where neither of their classes has support in the training images, and
penalises the change of the margin between the two classes. Receptive fields do not matter to it.
It needs no annotation and no second derivative, but a second forward and backward pass.

Ours, not the paper's. Patches of other images as an intervention are known from CutMix (Yun et al.
2019), and from counterfactual augmentation (Chang et al. 2021), where labels change or masks are
annotated.

Shapes: N images, C classes, R pixels.
"""

import torch
from torch import Tensor

from batchcam.cam import at_least_float32
from batchcam.losses.base import Batch, Compute, TermContext, TermSpec


def exchange_images(images_NCRR: Tensor, labels_N: Tensor, off_support_CRR: Tensor) -> Tensor:
    """Return each image with the pixels of its partner where neither class has support.

    The partner of an image is the one before it in the batch; the batch must be in random order. A
    batch of one image is returned unchanged.

    Args:
        images_NCRR: images, with any number of channels.
        labels_N: int64 in [0, C), the class of each image.
        off_support_CRR: 1 off the support of a class, else 0, at the resolution of the images; see
            :func:`batchcam.prototypes.off_support_mask`.

    Raises:
        ValueError: shapes do not fit each other.
    """
    fits = images_NCRR.dim() == 4 and off_support_CRR.dim() == 3
    if not fits or images_NCRR.shape[2:] != off_support_CRR.shape[1:]:
        raise ValueError(
            "expected images (N, channels, R, R) and off_support_CRR (C, R, R) of one resolution, "
            f"got {tuple(images_NCRR.shape)} and {tuple(off_support_CRR.shape)}."
        )
    off_support_NRR = off_support_CRR.index_select(0, labels_N).bool()
    background_NRR = off_support_NRR & _partners(off_support_NRR)
    return torch.where(background_NRR.unsqueeze(1), _partners(images_NCRR), images_NCRR)


def exchange_loss(logits_NC: Tensor, exchanged_logits_NC: Tensor, labels_N: Tensor) -> Tensor:
    """Return the mean square of what an exchange changes in the margin between two classes.

        X = 1/N sum_i (Δ_i(x_i) - Δ_i(x'_i))^2,   Δ_i = S_y - S_c,

    where y is the class of image i, c the class of its partner, S the scores before softmax, and x'
    the result of :func:`exchange_images`. The loss has the unit of a squared score. It is 0 for
    partners of one class.

    Args:
        logits_NC: class scores of the images.
        exchanged_logits_NC: class scores of the exchanged images.
        labels_N: int64 in [0, C), the class of each image.

    Returns:
        A scalar, at least 0, at least float32.

    Raises:
        ValueError: shapes do not fit each other.

    Example:
        >>> import torch
        >>> from batchcam.prototypes import class_supports, off_support_mask
        >>> _ = torch.manual_seed(0)
        >>> images, labels = torch.rand(6, 1, 28, 28), torch.tensor([0, 1, 2, 0, 1, 2])
        >>> supports = class_supports(images, labels, num_classes=3)
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(28 * 28, 3))
        >>> exchanged = exchange_images(images, labels, off_support_mask(supports, (28, 28)))
        >>> loss = exchange_loss(model(images), model(exchanged), labels)
        >>> loss.backward()
    """
    if logits_NC.dim() != 2 or logits_NC.shape != exchanged_logits_NC.shape:
        raise ValueError(
            "expected two sets of logits (N, C) of one shape, got "
            f"{tuple(logits_NC.shape)} and {tuple(exchanged_logits_NC.shape)}."
        )
    dtype = at_least_float32(logits_NC)
    moved_NC = logits_NC.to(dtype) - exchanged_logits_NC.to(dtype)
    own_N1, others_N1 = labels_N.unsqueeze(1), _partners(labels_N).unsqueeze(1)
    shift_N1 = moved_NC.gather(1, own_N1) - moved_NC.gather(1, others_N1)
    return shift_N1.square().mean()


def _partners(values_N: Tensor) -> Tensor:
    return values_N.roll(1, dims=0)


def _build(context: TermContext) -> Compute:
    resolution = context.config.resolution
    off_support_CRR = context.off_support_mask((resolution, resolution))

    def compute(batch: Batch) -> Tensor:
        exchanged_NCRR = exchange_images(batch.images_NCRR, batch.labels_N, off_support_CRR)
        return exchange_loss(batch.scores_NC, batch.forward(exchanged_NCRR), batch.labels_N)

    return compute


EXCHANGE = TermSpec(
    name="exchange",
    title="prototype exchange",
    source="ours",
    search_range=(0.03, 10.0),
    build=_build,
    uses_supports=True,
)
