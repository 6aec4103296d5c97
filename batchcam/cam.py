"""Class activation maps as pure functions `M = Φ(L, A)` of logits and features (Eqs. 3-6).

No hooks, no `.grad`, no second pass through the backbone. The gradient of the class scores is taken
with respect to the features only, and stays differentiable, so that a map can be part of a loss.

Shapes: N images, C classes, K channels, H and W cells of the feature grid.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def grad_cam(
    logits_NC: Tensor, features_NKHW: Tensor, targets_N: Tensor, *, create_graph: bool = True
) -> Tensor:
    """Return one Grad-CAM per image: `ReLU(sum_k GAP(dS/dA)_k A_k)`, unnormalised.

    The gradients of all images are read off one gradient, that of the sum of their scores. This is
    exact if the head maps the features of each image to its logits independently of the others;
    `batchcam.models.check_explainable` refuses other models.

    Args:
        logits_NC: class scores before softmax, computed from `features_NKHW`.
        features_NKHW: the feature maps A, part of the graph of `logits_NC`.
        targets_N: int64, the class to explain for each image.
        create_graph: keep the result differentiable with respect to features and head weights.

    Returns:
        `maps_NHW`, >= 0; float32 under autocast, else of the features' type.

    Raises:
        ValueError: shapes do not fit each other.

    Example:
        >>> import torch
        >>> features = torch.rand(2, 8, 7, 7, requires_grad=True)
        >>> logits = torch.nn.Linear(8, 3)(features.mean(dim=(2, 3)))
        >>> grad_cam(logits, features, targets_N=torch.tensor([0, 2])).shape
        torch.Size([2, 7, 7])
    """
    weights_NK = channel_weights(logits_NC, features_NKHW, targets_N, create_graph=create_graph)
    return weighted_maps(weights_NK, features_NKHW)


def batch_cam(
    logits_NC: Tensor,
    features_NKHW: Tensor,
    labels_N: Tensor,
    num_classes: int,
    *,
    create_graph: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return one Grad-CAM per class of the batch, from class-averaged features and gradients.

    Eqs. 4-6: features and gradients are averaged over the images of a class, the averaged gradients
    are pooled to one weight per channel, and the weighted channels are summed. A ReLU follows, as
    in Grad-CAM; the paper's equations leave it implicit.

    Args:
        logits_NC: class scores before softmax, computed from `features_NKHW`.
        features_NKHW: the feature maps A, part of the graph of `logits_NC`.
        labels_N: int64, the class of each image, whose score is explained.
        num_classes: the number of classes C of the result.
        create_graph: keep the result differentiable.

    Returns:
        `maps_CHW`, unnormalised, >= 0, zero for a class that is absent from the batch; and
        `present_C`, bool, the classes that the batch contains.

    Raises:
        ValueError: shapes do not fit each other.

    Example:
        >>> import torch
        >>> features = torch.rand(4, 8, 7, 7, requires_grad=True)
        >>> logits = torch.nn.Linear(8, 3)(features.mean(dim=(2, 3)))
        >>> maps, present = batch_cam(logits, features, torch.tensor([0, 0, 2, 2]), num_classes=3)
        >>> maps.shape, present.tolist()
        (torch.Size([3, 7, 7]), [True, False, True])
    """
    weights_NK = channel_weights(logits_NC, features_NKHW, labels_N, create_graph=create_graph)
    return class_maps(weights_NK, features_NKHW, labels_N, num_classes)


def channel_weights(
    logits_NC: Tensor, features_NKHW: Tensor, targets_N: Tensor, *, create_graph: bool
) -> Tensor:
    """Return the weight of each channel, `(N, K)`: the gradient of the target score, pooled.

    Eqs. 3 and 6; arguments and errors as for :func:`grad_cam`.
    """
    return pooled(score_gradients(logits_NC, features_NKHW, targets_N, create_graph=create_graph))


def score_gradients(
    logits_NC: Tensor, features_NKHW: Tensor, targets_N: Tensor, *, create_graph: bool
) -> Tensor:
    """Return the gradient of each image's target score by its features, `(N, K, H, W)` (Eq. 3).

    Arguments and errors as for :func:`grad_cam`.
    """
    if features_NKHW.dim() != 4 or logits_NC.dim() != 2 or targets_N.dim() != 1:
        raise ValueError(
            "expected logits (N, C), features (N, K, H, W) and targets (N,), got "
            f"{tuple(logits_NC.shape)}, {tuple(features_NKHW.shape)}, {tuple(targets_N.shape)}."
        )
    if not len(logits_NC) == len(features_NKHW) == len(targets_N):
        raise ValueError(
            f"expected one N, got {len(logits_NC)} logits, {len(features_NKHW)} features and "
            f"{len(targets_N)} targets."
        )
    with torch.enable_grad():  # Evaluation asks for CAMs where gradients are off.
        scores = logits_NC.gather(1, targets_N.unsqueeze(1)).sum()
    (gradients_NKHW,) = torch.autograd.grad(scores, features_NKHW, create_graph=create_graph)
    return gradients_NKHW


def pooled(gradients_NKHW: Tensor) -> Tensor:
    """Return the mean over the cells of a grid, `(N, K)`, at least float32 (Eq. 6)."""
    # A sum, divided afterwards: the backward pass of a mean writes H x W copies of its gradient.
    sums_NK = gradients_NKHW.sum(dim=(2, 3), dtype=at_least_float32(gradients_NKHW))
    return sums_NK / (gradients_NKHW.shape[2] * gradients_NKHW.shape[3])


def of_targets(gradients_CKHW: Tensor, targets_N: Tensor, features_NKHW: Tensor) -> Tensor:
    """Return the gradient of each image's target score, `(N, K, H, W)`, from those of all classes.

    Args:
        gradients_CKHW: the gradient of each class score, equal for all images; H and W may be 1 if
            it is equal in all cells.
        targets_N: int64, a class for each image.
        features_NKHW: the result takes their memory format.
    """
    # The backward pass of indexing by brackets accumulates its gradient number by number.
    if features_NKHW.is_contiguous(memory_format=torch.channels_last):
        gradients_CHWK = gradients_CKHW.permute(0, 2, 3, 1).contiguous()
        return gradients_CHWK.index_select(0, targets_N).permute(0, 3, 1, 2)
    return gradients_CKHW.contiguous().index_select(0, targets_N)


def attribution(gradients_NKHW: Tensor, features_NKHW: Tensor) -> Tensor:
    """Return the contribution of each cell to a score: `sum_k A_k dS/dA_k`, signed, `(N, H, W)`.

    HiResCAM before its ReLU (Draelos and Carin 2020). With a linear head the contributions sum to
    the score minus its bias, so the map is faithful. Grad-CAM is faithful only if the gradients are
    equal in all cells, as with a head that averages each channel; then the two are equal.

    Args:
        gradients_NKHW: gradients of the scores; H and W may be 1 if they are equal in all cells.
        features_NKHW: the feature maps.
    """
    if gradients_NKHW.shape[2:] == (1, 1):
        weights_NK = gradients_NKHW.flatten(1).to(at_least_float32(gradients_NKHW))
        return weighted_sums(weights_NK, features_NKHW)
    with _exact(features_NKHW.device):
        return (gradients_NKHW * features_NKHW).sum(dim=1, dtype=at_least_float32(features_NKHW))


def weighted_maps(weights_NK: Tensor, features_NKHW: Tensor) -> Tensor:
    """Return `ReLU(sum_k weights_k A_k)` per image, `(N, H, W)`."""
    return F.relu(weighted_sums(weights_NK, features_NKHW))


def class_maps(
    weights_NK: Tensor, features_NKHW: Tensor, labels_N: Tensor, num_classes: int
) -> tuple[Tensor, Tensor]:
    """Return the maps of :func:`batch_cam` from given channel weights.

    The averaged features are never formed. By linearity, the weights of a class applied to its mean
    features equal the mean of those weights applied to the features of each image. So H x W values
    are averaged instead of K x H x W, and absent classes cost nothing.
    """
    sums_NHW = class_sums(weights_NK, features_NKHW, labels_N, num_classes)
    means_CHW, counts_C = class_means(sums_NHW, labels_N, num_classes)
    return F.relu(means_CHW), counts_C > 0


def class_sums(
    weights_NK: Tensor, features_NKHW: Tensor, labels_N: Tensor, num_classes: int
) -> Tensor:
    """Return :func:`weighted_sums` by the mean of the weights of each image's class."""
    weights_CK, _ = class_means(weights_NK, labels_N, num_classes)
    return weighted_sums(weights_CK.index_select(0, labels_N), features_NKHW)


def class_means(values: Tensor, labels_N: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Return the mean of each class, zero for a class without images, and the class sizes.

    Args:
        values: `(N, ...)`, floating point.
        labels_N: int64, the class of each value.
        num_classes: the number of classes C of the result.

    Returns:
        `(C, ...)`; and `counts_C`, of the values' type.
    """
    classes_C = torch.arange(num_classes, device=labels_N.device)
    members_CN = (classes_C[:, None] == labels_N).to(values.dtype)
    counts_C = members_CN.sum(dim=1)
    means_CF = (members_CN / counts_C.clamp(min=1)[:, None]) @ values.flatten(1)
    return means_CF.view(num_classes, *values.shape[1:]), counts_C


def render(maps_BHW: Tensor, resolution: int) -> Tensor:
    """Upsample maps to `resolution` pixels square, and scale the maximum of each map to 1.

    Bilinear upsampling, then division by the map's maximum plus 1e-6, so that an empty map stays
    empty. The paper compares maps with prototypes, and does not say how it scales them.

    Returns:
        `(B, resolution, resolution)`, in [0, 1].
    """
    rows_RH, columns_RW = (
        bilinear(cells, resolution, maps_BHW.dtype, maps_BHW.device) for cells in maps_BHW.shape[1:]
    )
    scaled = rows_RH @ (maps_BHW @ columns_RW.T)
    return scaled / (scaled.amax(dim=(1, 2), keepdim=True) + 1e-6)


def bilinear(cells: int, pixels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the matrix `(pixels, cells)` that upsamples one axis.

    Two matrix products take a fifth of the time of `F.interpolate` and its backward pass.
    """
    eye_11CC = torch.eye(cells, dtype=dtype, device=device)[None, None]
    return F.interpolate(eye_11CC, (pixels, cells), mode="bilinear", align_corners=False)[0, 0]


def weighted_sums(weights_NK: Tensor, features_NKHW: Tensor) -> Tensor:
    """Return `sum_k weights_k A_k` per image, negative values included, `(N, H, W)`.

    The result is at least float32. Sums of bfloat16 features are computed in bfloat16, like logits:
    accumulated in float32, then rounded to 8 bits.
    """
    return fused_weighted_sum(weights_NK, features_NKHW)[1]


def fused_weighted_sum(weights_NK: Tensor, features_NKHW: Tensor) -> tuple[Tensor, Tensor]:
    """Return the features, for use by the head, and their :func:`weighted_sums`.

    The backward pass adds the gradient of the sums in place to the gradient from the head. A
    separate operation would write its gradient to a tensor of the features' size and then add it:
    three passes over memory instead of one. The returned features must be used by one function
    only, the head, and the head must not need the gradient of its input for anything else. A
    linear head does not.
    """
    # bfloat16 has the range of float32: as exact as the logits, without a copy of the features.
    kept = features_NKHW.dtype == torch.bfloat16
    dtype = torch.bfloat16 if kept else torch.promote_types(features_NKHW.dtype, weights_NK.dtype)
    with _exact(features_NKHW.device):
        same_NKHW, sums_NHW = _FusedWeightedSum.apply(weights_NK.to(dtype), features_NKHW)
    return same_NKHW, sums_NHW.to(at_least_float32(sums_NHW))


def _exact(device: torch.device) -> AbstractContextManager[object]:
    """Return a context without autocast; without autocast, an empty one, which is faster."""
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


class _FusedWeightedSum(torch.autograd.Function):
    """Features and their weighted sums. The gradient has the memory format of the features.

    Another format would slow down the backward pass of every layer before.
    """

    @staticmethod
    def forward(ctx: Any, weights_NK: Tensor, features_NKHW: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(weights_NK, features_NKHW)
        ctx.set_materialize_grads(False)
        features_NKS = features_NKHW.flatten(2).to(weights_NK.dtype)
        # Vector times matrix: matrix times vector takes up to eight times as long.
        sums_N1S = torch.bmm(weights_NK.unsqueeze(1), features_NKS)
        return features_NKHW.view_as(features_NKHW), sums_N1S.view(-1, *features_NKHW.shape[2:])

    @staticmethod
    def backward(
        ctx: Any, onward_NKHW: Tensor | None, sums_NHW: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        weights_NK, features_NKHW = ctx.saved_tensors
        if sums_NHW is None:
            return None, onward_NKHW
        weights_grad_NK = features_grad_NKHW = None
        if ctx.needs_input_grad[0]:
            features_NSK = features_NKHW.flatten(2).transpose(1, 2).to(weights_NK.dtype)
            weights_grad_NK = torch.bmm(sums_NHW.flatten(1).unsqueeze(1), features_NSK).squeeze(1)
        if ctx.needs_input_grad[1]:
            features_grad_NKHW = _outer(weights_NK, sums_NHW, onward_NKHW, features_NKHW)
        return weights_grad_NK, features_grad_NKHW


def _outer(
    weights_NK: Tensor, maps_NHW: Tensor, plus_NKHW: Tensor | None, like_NKHW: Tensor
) -> Tensor:
    """Return `plus + weights_k maps_hw` per image, with type and memory format of `like`.

    `plus` is modified in place, unless it will be differentiated or has another memory format.
    """
    last = like_NKHW.is_contiguous(memory_format=torch.channels_last)
    order = torch.channels_last if last else torch.contiguous_format
    weights_NK11 = weights_NK.to(like_NKHW.dtype)[:, :, None, None]
    maps_N1HW = maps_NHW.to(like_NKHW.dtype).unsqueeze(1)
    if plus_NKHW is None:
        return (weights_NK11 * maps_N1HW).contiguous(memory_format=order)
    if torch.is_grad_enabled() or not plus_NKHW.is_contiguous(memory_format=order):
        plus_NKHW = plus_NKHW.clone(memory_format=order)
    if like_NKHW.dtype != torch.bfloat16:
        return plus_NKHW.addcmul_(weights_NK11, maps_N1HW)
    # CPUs multiply matrices of bfloat16 faster than elementwise.
    sums, weights, maps = (each.flatten(2) for each in (plus_NKHW, weights_NK11, maps_N1HW))
    if last:
        sums.transpose(1, 2).baddbmm_(maps.transpose(1, 2), weights.transpose(1, 2))
    else:
        sums.baddbmm_(weights, maps)
    return plus_NKHW


def at_least_float32(tensor: Tensor) -> torch.dtype:
    """Return the type to accumulate in: float32 for lower precision, else the tensor's own."""
    return torch.promote_types(tensor.dtype, torch.float32)
