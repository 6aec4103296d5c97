"""The training objective: cross-entropy and all that goes beside it, in one.

Shapes: N images, C classes, P prototypes (one or several per class), S slots for class maps, K
channels, H and W cells of the feature grid, R pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from batchcam.cam import (
    at_least_float32,
    attribution,
    class_means,
    class_sums,
    of_targets,
    pooled,
    score_gradients,
    weighted_sums,
)
from batchcam.losses.alignment import alignment_loss
from batchcam.losses.exchange import exchange_loss
from batchcam.similarity import METRICS, Distance


@dataclass(frozen=True)
class Objective:
    """The sum of Eqs. 11 and 12 with all weights free, and two losses of ours.

    `lambda_class` alone is the cross-entropy baseline, and costs what it costs: no CAM is computed.
    With `lambda_proto` it is Eq. 11, with `lambda_batch` Eq. 12, with both their sum.
    Ours are `lambda_energy`, see :func:`energy_loss`, and `lambda_exchange`, see
    :mod:`batchcam.losses.exchange`.

    `cam` is "grad_cam", or "hires_cam": then a map is what each cell adds to the score
    (:func:`batchcam.cam.attribution`), cut by a ReLU, and that of a class the mean of its images',
    cut after it. Eqs. 4 to 6 have no mean gradient to pool then, so this is ours.
    """

    metric: str
    lambda_class: float
    lambda_proto: float
    lambda_batch: float
    lambda_energy: float = 0.0
    lambda_exchange: float = 0.0
    cam: str = "grad_cam"

    def __call__(
        self,
        logits_NC: Tensor,
        features_NKHW: Tensor,
        labels_N: Tensor,
        prototypes_PRR: Tensor,
        sums_NHW: Tensor | None = None,
        prototype_index_N: Tensor | None = None,
        off_support_CHW: Tensor | None = None,
        gradients_CKHW: Tensor | None = None,
        exchanged_NC: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the total loss, and its terms before weighting, detached.

        Args:
            logits_NC: class scores before softmax, computed from `features_NKHW`.
            features_NKHW: the feature maps, part of the graph of `logits_NC`.
            labels_N: int64, the class of each image, whose score is explained.
            prototypes_PRR: square, scaled to [0, 1].
            sums_NHW: :func:`batchcam.cam.weighted_sums` by the channel weights of each image's
                class, where they are known without a backward pass; see
                :meth:`batchcam.models.ExplainableModel.class_weights`. Else, if wanted, weights
                are computed for each image.
            prototype_index_N: int64, the prototype of each image; None: that of its class.
            off_support_CHW: 1 where a class has no support, else 0; needed for the energy loss.
            gradients_CKHW: those of each class's score, where they are the same for all images;
                see :meth:`batchcam.models.ExplainableModel.class_gradients`. Else, if wanted, they
                are computed for each image.
            exchanged_NC: scores of what :func:`batchcam.losses.exchange.exchange` made of the
                images; needed for the exchange loss.

        Returns:
            The scalar total; and `class`, `proto`, `batch`, `energy`, `exchange`, where their
            weight is not 0.

        Raises:
            ValueError: `lambda_energy` is not 0, and `off_support_CHW` is not given; or
                `lambda_exchange`, and `exchanged_NC`.
        """
        terms: dict[str, Tensor] = {}
        precise_NC = logits_NC.to(at_least_float32(logits_NC))
        if self.lambda_class:
            terms["class"] = F.cross_entropy(precise_NC, labels_N)
        gradients_NKHW = evidence_NHW = None
        if self.wants_gradients and gradients_CKHW is not None:
            gradients_NKHW = of_targets(gradients_CKHW, labels_N, features_NKHW)
        elif self.wants_gradients or (self.wants_weights and sums_NHW is None):
            gradients_NKHW = score_gradients(logits_NC, features_NKHW, labels_N, create_graph=True)
        if self.wants_gradients:
            assert gradients_NKHW is not None
            evidence_NHW = attribution(gradients_NKHW, features_NKHW)
        if self._compares:
            distance = METRICS[self.metric]
            prototype_index_N = labels_N if prototype_index_N is None else prototype_index_N
            slots_N, wanted_SRR = _slots(prototype_index_N, prototypes_PRR)
            known_NHW = sums_NHW if self.wants_weights else evidence_NHW
            weights_NK = None
            if known_NHW is None:
                assert gradients_NKHW is not None
                weights_NK = pooled(gradients_NKHW)

            def sums_by(weigh: Callable[..., Tensor], *more: object) -> Tensor:
                if known_NHW is not None:
                    return known_NHW
                return weigh(weights_NK, features_NKHW, *more)

            if self.lambda_proto:
                own_NHW = sums_by(weighted_sums)
                terms["proto"] = prototype_loss(
                    own_NHW, prototype_index_N, prototypes_PRR, distance
                )
            if self.lambda_batch:
                shared_NHW = sums_by(class_sums, slots_N, len(wanted_SRR))
                terms["batch"] = batch_cam_loss(shared_NHW, slots_N, wanted_SRR, distance)
        if self.lambda_energy:
            if off_support_CHW is None:
                raise ValueError(
                    "the energy loss needs off_support_CHW, where classes have no support."
                )
            assert evidence_NHW is not None
            terms["energy"] = energy_loss(evidence_NHW, off_support_CHW[labels_N])
        if self.lambda_exchange:
            if exchanged_NC is None:
                raise ValueError("the exchange loss needs exchanged_NC, scores after an exchange.")
            terms["exchange"] = exchange_loss(
                precise_NC, exchanged_NC.to(precise_NC.dtype), labels_N
            )
        total = sum(
            (getattr(self, f"lambda_{name}") * term for name, term in terms.items()),
            logits_NC.new_zeros(()),
        )
        return total, {name: term.detach() for name, term in terms.items()}

    @property
    def wants_weights(self) -> bool:
        """Whether channel weights go into the loss."""
        return self._compares and self.cam == "grad_cam"

    @property
    def wants_gradients(self) -> bool:
        """Whether gradients of every cell go into the loss."""
        return self.lambda_energy > 0 or (self._compares and self.cam == "hires_cam")

    @property
    def _compares(self) -> bool:
        """Whether CAMs are compared with prototypes."""
        return self.lambda_proto > 0 or self.lambda_batch > 0


def _slots(prototype_index_N: Tensor, prototypes_PRR: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the map of each image's group is kept, and the prototype of each such slot.

    A slot per prototype, or, where there are more of them than images, a slot per image, of which
    a group takes that of its first image: maps that no image has a part in are few at any number
    of classes, and no shape depends on the labels, for which a GPU would have to be waited for.
    """
    if len(prototypes_PRR) <= len(prototype_index_N):
        return prototype_index_N, prototypes_PRR
    first_N = (prototype_index_N[:, None] == prototype_index_N).int().argmax(dim=1)
    return first_N, prototypes_PRR[prototype_index_N]


def prototype_loss(
    sums_NHW: Tensor, prototype_index_N: Tensor, prototypes_PRR: Tensor, distance: Distance
) -> Tensor:
    """Return the Prototype Loss: the mean over images of `φ(M_i, P_y)` (Eq. 11).

    Args:
        sums_NHW: of each image; :func:`batchcam.losses.alignment.alignment_loss` makes maps of
            them.
        prototype_index_N: int64, the prototype of each image.
        prototypes_PRR: square, scaled to [0, 1].
        distance: φ.
    """
    shares_N = sums_NHW.new_full((len(sums_NHW),), 1 / len(sums_NHW))
    return alignment_loss(sums_NHW, prototypes_PRR, distance, shares_N, prototype_index_N)


def batch_cam_loss(
    sums_NHW: Tensor, prototype_index_N: Tensor, prototypes_PRR: Tensor, distance: Distance
) -> Tensor:
    """Return the Batch-CAM Prototype Loss: the sum over groups present of `φ(M̄_c, P_c)` (Eq. 12).

    A group that is absent from the batch contributes neither value nor gradient.

    Args:
        sums_NHW: of each image, by its group's mean weights; averaged by group, maps are made of
            them as above.
        prototype_index_N: int64, the prototype of each image.
        prototypes_PRR: square, scaled to [0, 1].
        distance: φ.
    """
    means_PHW, counts_P = class_means(sums_NHW, prototype_index_N, len(prototypes_PRR))
    return alignment_loss(means_PHW, prototypes_PRR, distance, counts_P.clamp(max=1))


def energy_loss(evidence_NHW: Tensor, off_support_NHW: Tensor) -> Tensor:
    """Return the prototype energy loss: the mean over images of the evidence outside the support.

    A prototype says where a class is, and so where it is not. The score of the true class is made
    of what each cell adds to it, `a = sum_k A_k dS_y/dA_k`; what cells add, or take, where the
    class has no support in the training images is summed in absolute value:

        E = 1/N sum_i sum_hw o_y(h, w) |a_i(h, w)|,   o_c = 1 outside the support of class c, or 0.

    It is in the units of a score. Nothing is asked of what lies inside: a constant score, all of
    whose evidence is nil, costs nothing.

    Args:
        evidence_NHW: :func:`batchcam.cam.attribution` of the true class.
        off_support_NHW: 1 outside the support of the image's class, 0 inside.
    """
    return (evidence_NHW.abs() * off_support_NHW).sum(dim=(1, 2)).mean()
