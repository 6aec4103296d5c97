"""The input gradient loss of Right for the Right Reasons (RRR, Ross et al. 2017).

It penalises the input gradient where an annotation says that the input is irrelevant. It
differentiates twice through the whole model, and needs a mask for every image: a reference for
losses that have no masks. Not part of the paper.

Shapes: N images, C classes, R pixels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from batchcam.cam import at_least_float32
from batchcam.losses.base import Batch, Compute, TermContext, TermSpec


def mask_gradient_loss(logits_NC: Tensor, images_NCRR: Tensor, masks_NRR: Tensor) -> Tensor:
    """Return the mean over images of `sum_d (A_d d/dx_d sum_c log p_c)^2`.

    The second term of Eq. 1 of Ross et al. 2017. They sum over images; a mean does not change with
    the size of the batch.

    Args:
        logits_NC: class scores before softmax, computed from `images_NCRR`.
        images_NCRR: preprocessed images that require gradients, with any number of channels.
        masks_NRR: A, 1 or true where the input is irrelevant.

    Returns:
        A scalar, at least 0.

    Raises:
        ValueError: shapes do not fit each other, or the images require no gradients.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> images = torch.rand(4, 1, 8, 8, requires_grad=True)
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
        >>> masks = torch.zeros(4, 8, 8)
        >>> masks[:, :2, :2] = 1
        >>> mask_gradient_loss(model(images), images, masks).backward()
    """
    if masks_NRR.shape != (len(images_NCRR), *images_NCRR.shape[2:]):
        raise ValueError(
            f"expected masks (N, R, R) of images (N, channels, R, R), got {tuple(masks_NRR.shape)} "
            f"and {tuple(images_NCRR.shape)}."
        )
    if not images_NCRR.requires_grad:
        raise ValueError(
            "the images require no gradients; call images.requires_grad_() before the forward pass."
        )
    scores = F.log_softmax(logits_NC.to(at_least_float32(logits_NC)), dim=1).sum()
    (gradient_NCRR,) = torch.autograd.grad(scores, images_NCRR, create_graph=True)
    return (gradient_NCRR * masks_NRR.unsqueeze(1)).square().sum(dim=(1, 2, 3)).mean()


def _build(context: TermContext) -> Compute:
    del context

    def compute(batch: Batch) -> Tensor:
        assert batch.masks_NRR is not None
        return mask_gradient_loss(batch.logits_NC, batch.images_NCRR, batch.masks_NRR)

    return compute


MASK_GRADIENT = TermSpec(
    name="mask_gradient",
    title="RRR",
    source="Ross et al. 2017",
    search_range=(0.1, 100.0),
    build=_build,
    input_gradients=True,
    uses_masks=True,
)
