"""The prototype exchange loss: what neither of two classes owns may not decide between them.

The prototype energy loss (:func:`batchcam.losses.objective.energy_loss`) judges where evidence
is by gradients on the CAM grid, whose cells see further than they lie, and forbids each class all
but its own support: also evidence that another class is *not* there, as a missing sleeve. This one
intervenes instead. Two images of a batch exchange the pixels where neither's class has support in
the training images; what decides between the two classes must stay as it was. Nothing comes in
unseen by it, whatever the receptive fields, and where either class may be, anything may count. It
needs no annotation, no gradient of a gradient, and two looks at each image.

Ours, not the paper's. Patches of other images as an intervention are of CutMix (Yun et al. 2019)
and of counterfactual augmentation (Chang et al. 2021), there with labels to be right for and with
annotated masks.

Shapes: N images, C classes, R pixels.
"""

import torch
from torch import Tensor


def exchange(x_NCRR: Tensor, labels_N: Tensor, off_support_CRR: Tensor) -> Tensor:
    """Return each image with its partner's pixels where neither's class has support.

    Partners are neighbours: the batches of training are in random order. Of a batch of one the
    image comes back as it is.

    Args:
        x_NCRR: images, of any number of channels.
        labels_N: int64, the class of each image.
        off_support_CRR: 1 where a class has no support, else 0; see
            :meth:`batchcam.data.prepared.PreparedData.outside`.
    """
    off_support_NRR = off_support_CRR.index_select(0, labels_N).bool()
    free_NRR = off_support_NRR & _partners(off_support_NRR)
    return torch.where(free_NRR.unsqueeze(1), _partners(x_NCRR), x_NCRR)


def exchange_loss(logits_NC: Tensor, exchanged_NC: Tensor, labels_N: Tensor) -> Tensor:
    """Return what an exchange changes in the decision between two classes, a mean square.

        X = 1/N sum_i (Δ_i(x_i) - Δ_i(x'_i))^2,   Δ_i = S_y - S_c,

    where y is the class of image i, c that of its partner, S are scores before softmax, and x' is
    what :func:`exchange` makes of x. It is in units of a squared score. Partners of one class cost
    nothing; nor does a constant score.

    Args:
        logits_NC: of the images, float32.
        exchanged_NC: of what :func:`exchange` made of them, float32.
        labels_N: int64, the class of each image.
    """
    moved_NC = logits_NC - exchanged_NC
    own_N1, others_N1 = labels_N.unsqueeze(1), _partners(labels_N).unsqueeze(1)
    shift_N1 = moved_NC.gather(1, own_N1) - moved_NC.gather(1, others_N1)
    return shift_N1.square().mean()


def _partners(of_N: Tensor) -> Tensor:
    return of_N.roll(1, dims=0)
