"""The paper's losses: saliency maps compared with class prototypes.

The Prototype Loss compares the map of each image (Eq. 11), the Batch-CAM Prototype Loss (BCPL) the
map of each class in the batch (Eq. 12). Both are plain functions of tensors, for any training loop.

Shapes: N images, C classes, P prototypes (one or several per class), S slots for class maps, K
channels, H and W cells of the feature grid, R pixels.
"""

from typing import Any

import torch
import torch.distributed
from torch import Tensor

from batchcam.cam import channel_weights, class_means, class_sums, weighted_sums
from batchcam.losses.alignment import alignment_loss
from batchcam.losses.base import Batch, Compute, TermContext, TermSpec
from batchcam.similarity import METRICS, Distance


def prototype_loss(
    logits_NC: Tensor,
    features_NKHW: Tensor,
    labels_N: Tensor,
    prototypes_PRR: Tensor,
    metric: str = "l1",
    *,
    prototype_index_N: Tensor | None = None,
) -> Tensor:
    """Return the Prototype Loss: the mean over images of `φ(M_i, P_y)` (second term of Eq. 11).

    `M_i` is the Grad-CAM of image i for its class, cut by a ReLU, upsampled bilinearly to the
    prototype's size and divided by its maximum; the paper does not say how it scales maps.
    Gradients are read off one backward pass from the sum of the scores, so the head must treat the
    images of a batch independently (:func:`batchcam.models.check_explainable`).

    Args:
        logits_NC: class scores before softmax, computed from `features_NKHW`.
        features_NKHW: the feature maps, part of the graph of `logits_NC`.
        labels_N: int64 in [0, C), the class of each image.
        prototypes_PRR: square, in [0, 1]; see :func:`batchcam.prototypes.class_prototypes`.
        metric: φ, one of "l1", "l2" and "ssim" (as 1 - SSIM).
        prototype_index_N: int64 in [0, P), the prototype of each image; None: that of its class.

    Returns:
        A scalar, at least 0: at most 1 for "l1" and "l2", at most 2 for "ssim". Differentiable
        once with respect to the parameters that made logits and features.

    Raises:
        ValueError: the metric is unknown, or shapes do not fit each other.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> features = torch.rand(4, 8, 7, 7, requires_grad=True)
        >>> logits = torch.nn.Linear(8, 3)(features.mean(dim=(2, 3)))
        >>> labels = torch.tensor([0, 1, 1, 2])
        >>> loss = prototype_loss(logits, features, labels, prototypes_PRR=torch.rand(3, 28, 28))
        >>> loss.backward()
        >>> features.grad.shape
        torch.Size([4, 8, 7, 7])
    """
    distance = _distance(metric)
    weights_NK = channel_weights(logits_NC, features_NKHW, labels_N, create_graph=True)
    return _image_loss(
        weighted_sums(weights_NK, features_NKHW),
        labels_N if prototype_index_N is None else prototype_index_N,
        prototypes_PRR,
        distance,
    )


def batch_cam_loss(
    logits_NC: Tensor,
    features_NKHW: Tensor,
    labels_N: Tensor,
    prototypes_PRR: Tensor,
    metric: str = "l1",
    *,
    prototype_index_N: Tensor | None = None,
    process_group: "torch.distributed.ProcessGroup | None" = None,
) -> Tensor:
    """Return the Batch-CAM Prototype Loss: the sum over classes of `φ(M̄_c, P_c)` (Eq. 12).

    `M̄_c` is made of features and gradients averaged over the images of class c in the batch
    (Eqs. 4-6), and scaled like the maps of :func:`prototype_loss`. A class that is absent from the
    batch adds neither value nor gradient.

    Args:
        logits_NC: class scores before softmax, computed from `features_NKHW`.
        features_NKHW: the feature maps, part of the graph of `logits_NC`.
        labels_N: int64 in [0, C), the class of each image.
        prototypes_PRR: square, in [0, 1]; see :func:`batchcam.prototypes.class_prototypes`.
        metric: φ, one of "l1", "l2" and "ssim" (as 1 - SSIM).
        prototype_index_N: int64 in [0, P), the prototype of each image; None: that of its class.
            Images are averaged by prototype.
        process_group: average over the images of all processes of this group, of which each holds
            a part of the batch. Under `DistributedDataParallel`, which averages gradients, the
            update then is that of one process with the whole batch. None: each process averages
            over its own images.

    Returns:
        A scalar, at least 0; the same on all processes of the group. Differentiable once with
        respect to the parameters that made logits and features.

    Raises:
        ValueError: the metric is unknown, or shapes do not fit each other.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> features = torch.rand(4, 8, 7, 7, requires_grad=True)
        >>> logits = torch.nn.Linear(8, 3)(features.mean(dim=(2, 3)))
        >>> labels = torch.tensor([0, 1, 1, 2])
        >>> prototypes = torch.rand(3, 28, 28)
        >>> loss = torch.nn.functional.cross_entropy(logits, labels)
        >>> loss = loss + 0.1 * batch_cam_loss(logits, features, labels, prototypes, metric="ssim")
        >>> loss.backward()
    """
    distance = _distance(metric)
    index_N = labels_N if prototype_index_N is None else prototype_index_N
    weights_NK = channel_weights(logits_NC, features_NKHW, labels_N, create_graph=True)
    if process_group is None:
        slots_N, wanted_SRR = _slots(index_N, prototypes_PRR)
        sums_NHW = class_sums(weights_NK, features_NKHW, slots_N, len(wanted_SRR))
        return _class_loss(sums_NHW, slots_N, wanted_SRR, distance)
    weights_PK, _ = _means_over_processes(weights_NK, index_N, len(prototypes_PRR), process_group)
    sums_NHW = weighted_sums(weights_PK.index_select(0, index_N), features_NKHW)
    means_PHW, counts_P = _means_over_processes(
        sums_NHW, index_N, len(prototypes_PRR), process_group
    )
    return alignment_loss(means_PHW, prototypes_PRR, distance, counts_P.clamp(max=1))


def _distance(metric: str) -> Distance:
    if metric not in METRICS:
        raise ValueError(f"metric={metric!r} is unknown; choose one of {', '.join(METRICS)}.")
    return METRICS[metric]


def _image_loss(
    sums_NHW: Tensor, index_N: Tensor, prototypes_PRR: Tensor, distance: Distance
) -> Tensor:
    """Return the mean over images of `φ(M_i, P_index)`, of maps before their ReLU."""
    shares_N = sums_NHW.new_full((len(sums_NHW),), 1 / len(sums_NHW))
    return alignment_loss(sums_NHW, prototypes_PRR, distance, shares_N, index_N)


def _class_loss(
    sums_NHW: Tensor, index_N: Tensor, prototypes_PRR: Tensor, distance: Distance
) -> Tensor:
    """Return the sum over prototypes present of `φ(M̄_p, P_p)`, M̄ the mean of maps by prototype."""
    means_PHW, counts_P = class_means(sums_NHW, index_N, len(prototypes_PRR))
    return alignment_loss(means_PHW, prototypes_PRR, distance, counts_P.clamp(max=1))


def _slots(index_N: Tensor, prototypes_PRR: Tensor) -> tuple[Tensor, Tensor]:
    """Return the slot of each image's class map, and the prototype of each slot.

    Uses one row per prototype, or per image if that is fewer, so shapes stay static: no shape
    depends on the labels, for which the host would have to wait for a GPU. With a row per image,
    the images of a prototype share the row of its first image.
    """
    if len(prototypes_PRR) <= len(index_N):
        return index_N, prototypes_PRR
    first_N = (index_N[:, None] == index_N).int().argmax(dim=1)
    return first_N, prototypes_PRR[index_N]


class _SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over a process group; its gradient is summed alike."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: "torch.distributed.ProcessGroup") -> Tensor:
        ctx.group = group
        total = value.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=ctx.group)
        return total, None


def _means_over_processes(
    values: Tensor, index_N: Tensor, count: int, group: "torch.distributed.ProcessGroup"
) -> tuple[Tensor, Tensor]:
    """Return :func:`batchcam.cam.class_means` over the images of all processes of a group."""
    members_PN = (torch.arange(count, device=index_N.device)[:, None] == index_N).to(values.dtype)
    sums_PF = members_PN @ values.flatten(1)
    together = torch.cat((sums_PF, members_PN.sum(dim=1, keepdim=True)), dim=1)
    total: Tensor = _SumOverProcesses.apply(together, group)
    counts_P = total[:, -1].detach()
    means_PF = total[:, :-1] / counts_P.clamp(min=1)[:, None]
    return means_PF.view(count, *values.shape[1:]), counts_P


def _build_prototype(context: TermContext) -> Compute:
    distance = METRICS[context.config.metric]

    def compute(batch: Batch) -> Tensor:
        return _image_loss(
            batch.image_sums(), batch.prototype_index_N, context.prototypes_PRR, distance
        )

    return compute


def _build_batch(context: TermContext) -> Compute:
    distance = METRICS[context.config.metric]

    def compute(batch: Batch) -> Tensor:
        slots_N, wanted_SRR = _slots(batch.prototype_index_N, context.prototypes_PRR)
        sums_NHW = batch.class_sums(slots_N, len(wanted_SRR))
        return _class_loss(sums_NHW, slots_N, wanted_SRR, distance)

    return compute


PROTOTYPE = TermSpec(
    name="proto",
    title="Prototype Loss",
    source="Eq. 11",
    search_range=(0.01, 10.0),
    build=_build_prototype,
    compares_cams=True,
)
BATCH = TermSpec(
    name="batch",
    title="BCPL",
    source="Eq. 12",
    search_range=(0.01, 10.0),
    build=_build_batch,
    compares_cams=True,
)
