"""What turns the gradient of class scores into saliency maps: Grad-CAM and HiResCAM.

Training, evaluation and export ask an :class:`Explainer` for maps; none of them knows which it is.
:class:`TargetScores` computes what explainers need, each quantity at most once, and without a
backward pass where the head is linear.

Shapes: N images, C classes, P prototypes, K channels, H and W cells of the feature grid.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Protocol

from torch import Tensor

from batchcam import cam
from batchcam.models.base import ExplainableModel


class TargetScores:
    """The score of a target class for each image of a batch, and the score's derivatives.

    Args:
        model: its head made `logits_NC` of `features_NKHW`.
        logits_NC: class scores before softmax.
        features_NKHW: the feature maps; part of the graph of `logits_NC`, unless the head is
            linear.
        targets_N: int64, the class whose score is explained.
        create_graph: keep the derivatives differentiable, as a loss needs them.
        class_weights_CK: the channel weights of each class, if the caller has computed
            :meth:`batchcam.models.ExplainableModel.class_weights` already.
        fused_sums_NHW: :attr:`weighted_sums_NHW`, if the caller has computed them with
            :func:`batchcam.cam.fused_weighted_sum`.

    Example:
        >>> import torch
        >>> from batchcam.models import create_model
        >>> model = create_model("simple_cnn", num_classes=3)
        >>> features = model.features(torch.rand(2, 1, 28, 28))
        >>> logits, targets = model.head(features), torch.tensor([0, 2])
        >>> scores = TargetScores(model, logits, features, targets, create_graph=False)
        >>> scores.channel_weights_NK.shape, EXPLAINERS["hires_cam"].image_sums(scores).shape
        (torch.Size([2, 64]), torch.Size([2, 14, 14]))
    """

    def __init__(
        self,
        model: ExplainableModel,
        logits_NC: Tensor,
        features_NKHW: Tensor,
        targets_N: Tensor,
        *,
        create_graph: bool,
        class_weights_CK: Tensor | None = None,
        fused_sums_NHW: Tensor | None = None,
    ) -> None:
        self.logits_NC = logits_NC
        self.features_NKHW = features_NKHW
        self.targets_N = targets_N
        self._model = model
        self._create_graph = create_graph
        self._fused_sums_NHW = fused_sums_NHW
        if class_weights_CK is not None:
            self.class_weights_CK = class_weights_CK

    @cached_property
    def class_weights_CK(self) -> Tensor | None:
        """The channel weights of each class where the head is linear, else None."""
        rows, columns = self.features_NKHW.shape[2:]
        return self._model.class_weights(rows * columns)

    @cached_property
    def gradients_NKHW(self) -> Tensor:
        """The gradient of the target scores with respect to the features (Eq. 3).

        `(N, K, 1, 1)` where a linear head makes it the same in all cells.
        """
        rows, columns = self.features_NKHW.shape[2:]
        gradients_CKHW = self._model.class_gradients(rows, columns)
        if gradients_CKHW is not None:
            return cam.of_targets(gradients_CKHW, self.targets_N, self.features_NKHW)
        return cam.score_gradients(
            self.logits_NC, self.features_NKHW, self.targets_N, create_graph=self._create_graph
        )

    @cached_property
    def channel_weights_NK(self) -> Tensor:
        """The gradient, averaged over the cells (Eq. 6)."""
        if self.class_weights_CK is not None:
            return self.class_weights_CK.index_select(0, self.targets_N)
        return cam.pooled(self.gradients_NKHW)

    @cached_property
    def weighted_sums_NHW(self) -> Tensor:
        """The Grad-CAM of each image before its ReLU: `sum_k weights_k A_k`."""
        if self._fused_sums_NHW is not None:
            return self._fused_sums_NHW
        return cam.weighted_sums(self.channel_weights_NK, self.features_NKHW)

    @cached_property
    def attribution_NHW(self) -> Tensor:
        """What each cell adds to the target score, signed; see :func:`batchcam.cam.attribution`."""
        return cam.attribution(self.gradients_NKHW, self.features_NKHW)


class Explainer(Protocol):
    """A way to saliency maps. Maps are returned before their ReLU, unnormalised."""

    name: str
    """The value of `TrialConfig.cam`."""
    title: str
    """The explainer's name for people."""
    uses_channel_weights: bool
    """Whether its maps are weighted sums of feature maps, which a training step of a linear head
    can compute together with the logits (:func:`batchcam.cam.fused_weighted_sum`)."""

    def image_sums(self, scores: TargetScores) -> Tensor:
        """Return the map of each image, `(N, H, W)`."""

    def class_sums(
        self, scores: TargetScores, prototype_index_N: Tensor, num_prototypes: int
    ) -> Tensor:
        """Return maps `(N, H, W)` whose means by prototype are the class-level maps.

        Args:
            scores: of the batch.
            prototype_index_N: int64, the prototype of each image.
            num_prototypes: P.
        """

    def averages_maps(self, scores: TargetScores) -> bool:
        """Return whether a class-level map is the mean of :meth:`image_sums`.

        Else it is made of mean weights and mean features (Eqs. 4-6), which differs.
        """


class GradCAM:
    """Grad-CAM per image (Selvaraju et al. 2017), Batch-CAM per class (Eqs. 3-6)."""

    name = "grad_cam"
    title = "Grad-CAM"
    uses_channel_weights = True

    def image_sums(self, scores: TargetScores) -> Tensor:
        """See :class:`Explainer`."""
        return scores.weighted_sums_NHW

    def class_sums(
        self, scores: TargetScores, prototype_index_N: Tensor, num_prototypes: int
    ) -> Tensor:
        """See :class:`Explainer`; weights are averaged over the images of a prototype."""
        if self.averages_maps(scores):
            return scores.weighted_sums_NHW
        return cam.class_sums(
            scores.channel_weights_NK, scores.features_NKHW, prototype_index_N, num_prototypes
        )

    def averages_maps(self, scores: TargetScores) -> bool:
        """See :class:`Explainer`; with a linear head all images of a class have its weights."""
        return scores.class_weights_CK is not None


class HiResCAM:
    """HiResCAM (Draelos and Carin 2020): gradients are not pooled.

    Faithful where the head tells cells apart, as SimpleCNN's does; elsewhere equal to Grad-CAM.
    Eqs. 4-6 have no mean gradient to pool then, so the class-level map is the mean of the images'
    maps: ours, not the paper's.
    """

    name = "hires_cam"
    title = "HiResCAM"
    uses_channel_weights = False

    def image_sums(self, scores: TargetScores) -> Tensor:
        """See :class:`Explainer`."""
        return scores.attribution_NHW

    def class_sums(
        self,
        scores: TargetScores,
        prototype_index_N: Tensor,  # noqa: ARG002
        num_prototypes: int,  # noqa: ARG002
    ) -> Tensor:
        """See :class:`Explainer`."""
        return scores.attribution_NHW

    def averages_maps(self, scores: TargetScores) -> bool:  # noqa: ARG002
        """See :class:`Explainer`."""
        return True


EXPLAINERS: Mapping[str, Explainer] = {each.name: each for each in (GradCAM(), HiResCAM())}
"""The explainers by name."""
