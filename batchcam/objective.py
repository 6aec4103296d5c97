"""The training objective: cross-entropy, Prototype Loss and Batch-CAM Prototype Loss in one.

Shapes: N images, C classes, S slots for class maps, K channels, H and W cells of the feature grid,
R pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from batchcam.cam import (
    at_least_float32,
    channel_weights,
    class_maps,
    class_weighted_sums,
    mean_maps,
    render,
    weighted_maps,
)
from batchcam.similarity import METRICS


@dataclass(frozen=True)
class Objective:
    """The sum of Eqs. 11 and 12 with all three weights free.

    `lambda_proto = lambda_batch = 0` is the cross-entropy baseline, and costs what it costs: no CAM
    is computed. One of them above 0 is Eq. 11 or Eq. 12, both are their sum.
    """

    metric: str
    lambda_class: float
    lambda_proto: float
    lambda_batch: float

    def __call__(
        self,
        logits_NC: Tensor,
        features_NKHW: Tensor,
        labels_N: Tensor,
        prototypes_CRR: Tensor,
        weights_CK: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the total loss, and its terms before weighting, detached.

        Args:
            logits_NC: class scores before softmax, computed from `features_NKHW`.
            features_NKHW: the feature maps, part of the graph of `logits_NC`.
            labels_N: int64, the class of each image.
            prototypes_CRR: one prototype per class, square, scaled to [0, 1].
            weights_CK: the channel weights of each class, where they are the same for all images;
                see :meth:`batchcam.models.ExplainableModel.class_weights`. Else they are computed
                for each image.

        Returns:
            The scalar total, and `class`, `proto` and `batch` where their weight is not 0.
        """
        terms: dict[str, Tensor] = {}
        if self.lambda_class:
            precise_NC = logits_NC.to(at_least_float32(logits_NC))
            terms["class"] = F.cross_entropy(precise_NC, labels_N)
        if self.lambda_proto or self.lambda_batch:
            distance = METRICS[self.metric]
            slots_N, wanted_SRR = _class_slots(labels_N, prototypes_CRR)
            if weights_CK is None:
                weights_NK = channel_weights(logits_NC, features_NKHW, labels_N, create_graph=True)
                proto = partial(weighted_maps, weights_NK, features_NKHW)
                batch = partial(class_maps, weights_NK, features_NKHW, slots_N, len(wanted_SRR))
            else:
                sums_NHW = class_weighted_sums(weights_CK, features_NKHW, labels_N)
                proto = partial(F.relu, sums_NHW)
                batch = partial(mean_maps, sums_NHW, slots_N, len(wanted_SRR))
            if self.lambda_proto:
                terms["proto"] = prototype_loss(proto(), labels_N, prototypes_CRR, distance)
            if self.lambda_batch:
                terms["batch"] = batch_cam_loss(*batch(), wanted_SRR, distance)
        weights = {
            "class": self.lambda_class,
            "proto": self.lambda_proto,
            "batch": self.lambda_batch,
        }
        total = sum((weights[name] * term for name, term in terms.items()), logits_NC.new_zeros(()))
        return total, {name: term.detach() for name, term in terms.items()}


def _class_slots(labels_N: Tensor, prototypes_CRR: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the map of each image's class is kept, and the prototype of each such slot.

    A slot per class, or, where there are more classes than images, a slot per image, of which a
    class takes that of its first image: maps that no image has a part in are few at any number of
    classes, and no shape depends on the labels, for which a GPU would have to be waited for.
    """
    if len(prototypes_CRR) <= len(labels_N):
        return labels_N, prototypes_CRR
    first_N = (labels_N[:, None] == labels_N).int().argmax(dim=1)
    return first_N, prototypes_CRR[labels_N]


Distance = Callable[[Tensor, Tensor], Tensor]


def prototype_loss(
    maps_NHW: Tensor, labels_N: Tensor, prototypes_CRR: Tensor, distance: Distance
) -> Tensor:
    """Return the Prototype Loss: the mean over images of `φ(M_i, P_y)` (Eq. 11)."""
    rendered_NRR = render(maps_NHW, prototypes_CRR.shape[-1])
    return distance(rendered_NRR, prototypes_CRR[labels_N]).mean()


def batch_cam_loss(
    maps_CHW: Tensor, present_C: Tensor, prototypes_CRR: Tensor, distance: Distance
) -> Tensor:
    """Return the Batch-CAM Prototype Loss: the sum over classes present of `φ(M̄_c, P_c)` (Eq. 12).

    A class that is absent from the batch contributes neither value nor gradient.
    """
    rendered_CRR = render(maps_CHW, prototypes_CRR.shape[-1])
    per_class_C = distance(rendered_CRR, prototypes_CRR)
    return per_class_C.where(present_C, per_class_C.new_zeros(())).sum()
