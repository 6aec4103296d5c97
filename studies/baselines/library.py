"""pytorch-grad-cam in the training loop: cross-entropy, and the library's CAMs of each batch.

Its CAMs cannot be part of the loss. It makes them in evaluation mode, by a pass forwards and one
backwards through the whole model of its own, detached, and returns NumPy arrays. (Its base class
has a switch against detaching, `detach=False`, which `GradCAM` does not hand on.) So what stands
here is the most that a user of the library gets in training: CAMs beside the loss, to look at.

Needs the extra `benchmarks`.
"""

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor

from studies.baselines.tapped import Tapped


def training_step(
    tapped: Tapped, optimizer: torch.optim.Optimizer, x_NCRR: Tensor, labels_N: Tensor
) -> tuple[Tensor, npt.NDArray[np.float32]]:
    """Train on a batch by cross-entropy, then make its CAMs.

    Args:
        tapped: the model, in training mode; left in it.
        optimizer: of its weights.
        x_NCRR: the model's input.
        labels_N: int64, the class of each image, whose score is explained.

    Returns:
        The loss, detached; and a Grad-CAM of each image by the weights after the step,
        `(N, R, R)`, in [0, 1].
    """
    loss = F.cross_entropy(tapped(x_NCRR), labels_N)
    optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    optimizer.step()
    targets = [ClassifierOutputTarget(label) for label in labels_N.tolist()]
    with GradCAM(model=tapped, target_layers=[tapped.tap]) as cam:  # Calls `eval()`.
        maps_NRR = cam(input_tensor=x_NCRR, targets=targets)
    tapped.train()
    return loss.detach(), maps_NRR
