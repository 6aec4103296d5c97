"""Baseline: a cross-entropy training step that computes the batch's CAMs by pytorch-grad-cam.

pytorch-grad-cam's CAMs cannot be part of the loss. The library switches the model to evaluation
mode, runs a forward and a backward pass of its own through the whole model, detaches the result and
returns NumPy arrays. (Its base class accepts `detach=False`, but `GradCAM` does not pass it on.)
This step therefore only monitors CAMs during training.

Needs the extra `evidence` or `benchmarks`.
"""

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from batchcam.extras import require_extra
from studies.baselines.hookable_model import HookableModel

with require_extra("benchmarks", "the step with pytorch-grad-cam"):
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget


def training_step(
    model: HookableModel, optimizer: torch.optim.Optimizer, x_NCRR: Tensor, labels_N: Tensor
) -> tuple[Tensor, npt.NDArray[np.float32]]:
    """Take an optimiser step on the cross-entropy of a batch, then compute the batch's CAMs.

    Args:
        model: in training mode, which is restored after the CAMs.
        optimizer: updates the model's weights.
        x_NCRR: the model's input.
        labels_N: int64, the class of each image, whose score is explained.

    Returns:
        The loss, detached; and a Grad-CAM of each image, computed with the updated weights,
        `(N, R, R)`, in [0, 1].
    """
    loss = F.cross_entropy(model(x_NCRR), labels_N)
    optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    optimizer.step()
    targets = [ClassifierOutputTarget(label) for label in labels_N.tolist()]
    with GradCAM(model=model, target_layers=[model.hook_point]) as cam:  # Calls `eval()`.
        maps_NRR = cam(input_tensor=x_NCRR, targets=targets)
    model.train()
    return loss.detach(), maps_NRR
