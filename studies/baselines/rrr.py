"""Right for the Right Reasons (Ross et al. 2017): a model that is told where not to look.

Its loss (their Eq. 1) penalises the gradient of the summed log probabilities with respect to the
input where an annotation says that the input is irrelevant. It differentiates twice through the
whole model, and needs a mask for every image: a ceiling for methods that have none.

Shapes: N images, R pixels.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from batchcam.devices import autocast
from batchcam.training.step import TrainingStep


def rrr_penalty(logits_NC: Tensor, x_NCRR: Tensor, masks_NRR: Tensor) -> Tensor:
    """Return the mean over images of `sum_d (A_d d/dx_d sum_c log p_c)^2`.

    The paper sums over images; a mean does not change with the size of a batch.

    Args:
        logits_NC: computed from `x_NCRR`, which requires gradients.
        x_NCRR: preprocessed images, of any number of channels.
        masks_NRR: A, 1 or true where the input is irrelevant.
    """
    scores = F.log_softmax(logits_NC.float(), dim=1).sum()
    (gradient_NCRR,) = torch.autograd.grad(scores, x_NCRR, create_graph=True)
    return (gradient_NCRR * masks_NRR.unsqueeze(1)).square().sum(dim=(1, 2, 3)).mean()


def train_epoch(
    step: TrainingStep,
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    weight: float,
    precision: str = "fp32",
) -> None:
    """Train for an epoch on cross-entropy and the penalty, times its weight.

    Args:
        step: the model, trained in place, its optimiser and schedule; its objective is not used.
        batches: preprocessed images `(N, C, R, R)`, labels `(N,)` and masks `(N, R, R)`.
        weight: of the penalty, λ₁ of the paper.
        precision: fp32, or autocast of the forward pass to bf16.
    """
    step.model.train()
    for x_NCRR, labels_N, masks_NRR in batches:
        x_NCRR.requires_grad_()
        with autocast(x_NCRR.device, precision):
            logits = step.model(x_NCRR)
        penalty = rrr_penalty(logits, x_NCRR, masks_NRR)
        step.update(F.cross_entropy(logits.float(), labels_N) + weight * penalty)
