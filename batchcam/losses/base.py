"""What a loss term is: its description, what it is built from, and the batch that it sees.

A term is a file of this package: a public function, and a :class:`TermSpec` that adapts it to the
trainer. What else depends on the terms (metrics, search axes, model cards, charts) is derived from
the specs in :data:`batchcam.losses.TERMS`.

Shapes: N images, C classes, P prototypes, K channels, H and W cells of the feature grid, R pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from batchcam.cam import at_least_float32
from batchcam.config import TrialConfig
from batchcam.data.prepared import PreparedData
from batchcam.explainers import Explainer, TargetScores
from batchcam.models.base import ExplainableModel


@dataclass(frozen=True)
class TermContext:
    """The values from which a term is built, once per run.

    Attributes:
        config: the run.
        prepared: data, prototypes and supports.
        grid: rows and columns of the CAM grid.
        device: where training takes place.
        prototypes_PRR: the training prototypes at the run's resolution, on the device.
    """

    config: TrialConfig
    prepared: PreparedData
    grid: tuple[int, int]
    device: torch.device
    prototypes_PRR: Tensor

    def off_support_mask(self, size: tuple[int, int]) -> Tensor:
        """Return where each class has no support, `(C, *size)` float32, on the device.

        See :meth:`batchcam.data.prepared.PreparedData.off_support_mask`.
        """
        return self.prepared.off_support_mask(size).to(self.device)


class Batch(TargetScores):
    """A classified training batch, as loss terms see it; each value is computed at most once.

    Args:
        model: the model in training.
        forward: maps preprocessed images to logits, in the precision of the step.
        images_NCRR: preprocessed images.
        labels_N: int64, the class of each image.
        prototype_index_N: int64, the prototype of each image; None: that of its class.
        masks_NRR: 1 where an image shows what the model should ignore, else 0; None without masks.
        features_NKHW: the feature maps of the images.
        logits_NC: the logits of the images.
        explainer: makes the maps that are compared with prototypes.
        class_weights_CK: see :class:`batchcam.explainers.TargetScores`.
        fused_sums_NHW: see :class:`batchcam.explainers.TargetScores`.
    """

    def __init__(
        self,
        model: ExplainableModel,
        forward: Callable[[Tensor], Tensor],
        images_NCRR: Tensor,
        labels_N: Tensor,
        features_NKHW: Tensor,
        logits_NC: Tensor,
        explainer: Explainer,
        *,
        prototype_index_N: Tensor | None = None,
        masks_NRR: Tensor | None = None,
        class_weights_CK: Tensor | None = None,
        fused_sums_NHW: Tensor | None = None,
    ) -> None:
        super().__init__(
            model,
            logits_NC,
            features_NKHW,
            labels_N,
            create_graph=True,
            class_weights_CK=class_weights_CK,
            fused_sums_NHW=fused_sums_NHW,
        )
        self.forward = forward
        self.images_NCRR = images_NCRR
        self.labels_N = labels_N
        self.prototype_index_N = labels_N if prototype_index_N is None else prototype_index_N
        self.masks_NRR = masks_NRR
        self.scores_NC = logits_NC.to(at_least_float32(logits_NC))
        """The logits, at least float32."""
        self._explainer = explainer

    def image_sums(self) -> Tensor:
        """Return the saliency map of each image, before its ReLU, `(N, H, W)`."""
        return self._explainer.image_sums(self)

    def class_sums(self, prototype_index_N: Tensor, num_prototypes: int) -> Tensor:
        """Return maps whose means by prototype are the class-level maps, `(N, H, W)`."""
        return self._explainer.class_sums(self, prototype_index_N, num_prototypes)


Compute = Callable[[Batch], Tensor]
"""A built term: returns a scalar, differentiable, before weighting."""


@dataclass(frozen=True, kw_only=True)
class TermSpec:
    """A loss term, described once for everything that depends on it.

    Attributes:
        name: an identifier. `TrialConfig.lambda_<name>` is the term's weight, `loss_<name>` its
            metric.
        title: what people call it, in cards, tags, charts and reports.
        source: the equation or paper that it comes from, or "ours".
        search_range: lowest and highest weight that a study searches by default, both > 0.
        build: makes the function that computes the term; called once per run.
        compares_cams: whether it compares saliency maps with prototypes, by `TrialConfig.metric`
            and `TrialConfig.cam`.
        input_gradients: whether it takes gradients with respect to the images. Such a term
            differentiates twice through the whole model, which `torch.compile` cannot.
        uses_masks: whether it needs the masks of the data set.
        uses_supports: whether it needs the supports of the classes, which a study then computes
            once for all trials.
    """

    name: str
    title: str
    source: str
    search_range: tuple[float, float]
    build: Callable[[TermContext], Compute]
    compares_cams: bool = False
    input_gradients: bool = False
    uses_masks: bool = False
    uses_supports: bool = False


@dataclass(frozen=True)
class WeightedTerm:
    """A term of a run's loss: its description, its weight, and the function that computes it."""

    spec: TermSpec
    weight: float
    compute: Compute
