"""Evaluation: how well a model classifies, and how similar its saliency maps are to the prototypes.

A CAM needs gradients of the head, so gradients are computed here too; no weight is ever updated.

Shapes: N images, C classes, P prototypes (as many as classes where each has one), K channels, H and
W cells of the feature grid, R pixels.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from batchcam.cam import render, weighted_maps
from batchcam.data.prepared import PreparedSplit
from batchcam.data.preprocessing import Preprocess, batches
from batchcam.devices import autocast, evaluation_batch
from batchcam.explainers import EXPLAINERS, Explainer, TargetScores
from batchcam.models.base import ExplainableModel
from batchcam.similarity import reported_ssim


@dataclass(frozen=True)
class Evaluation:
    """The result of one pass over a split, on the CPU.

    SSIM is computed by pytorch-msssim, so that the reported number does not come from the code that
    the training optimises.

    Attributes:
        accuracy: fraction of images classified correctly, in [0, 1].
        cam_ssim: class level; the mean over prototypes of `cam_ssim_P`.
        cam_ssim_sample: the mean over images of the SSIM between an image's CAM and its prototype.
        cam_ssim_P: SSIM between each prototype and the class-level CAM of its images (Eqs. 4-6 over
            the whole split); NaN for a prototype without images.
        maps_PRR: those CAMs, rendered: the reconstructed prototypes of the paper's Figs. 2-5.
        confusion_CC: int64, images by true class (row) and predicted class (column).
    """

    accuracy: float
    cam_ssim: float
    cam_ssim_sample: float
    cam_ssim_P: Tensor
    maps_PRR: Tensor
    confusion_CC: Tensor


class ClassCam:
    """Class-level CAMs over any number of batches: running sums of Eqs. 4 and 5.

    Batches are added by :meth:`add`, or by :meth:`add_maps` where the weighted sum of mean features
    is the mean of weighted sums (:meth:`batchcam.explainers.Explainer.averages_maps`).
    """

    def __init__(self, num_classes: int) -> None:
        self._num_classes = num_classes
        self._maps_CHW: Tensor | None = None
        self._features_CKHW: Tensor | None = None
        self._weights_CK = torch.zeros(0)
        self._counts_C = torch.zeros(0)

    def add(self, weights_NK: Tensor, features_NKHW: Tensor, index_N: Tensor) -> None:
        """Add a batch: channel weights, features, and the row each image is averaged into."""
        features_NKHW = features_NKHW.detach().to(weights_NK.dtype)
        if self._features_CKHW is None:
            shape = (self._num_classes, *features_NKHW.shape[1:])
            self._features_CKHW = features_NKHW.new_zeros(shape)
            self._weights_CK = features_NKHW.new_zeros(shape[:2])
            self._counts_C = features_NKHW.new_zeros(self._num_classes)
        self._features_CKHW.index_add_(0, index_N, features_NKHW)
        self._weights_CK.index_add_(0, index_N, weights_NK)
        self._counts_C.index_add_(0, index_N, torch.ones_like(weights_NK[:, 0]))

    def add_maps(self, sums_NHW: Tensor, index_N: Tensor) -> None:
        """Add a batch: maps before their ReLU, and the row each image is averaged into."""
        if self._maps_CHW is None:
            self._maps_CHW = sums_NHW.new_zeros(self._num_classes, *sums_NHW.shape[1:])
            self._counts_C = sums_NHW.new_zeros(self._num_classes)
        self._maps_CHW.index_add_(0, index_N, sums_NHW)
        self._counts_C.index_add_(0, index_N, torch.ones_like(sums_NHW[:, 0, 0]))

    def maps(self) -> tuple[Tensor, Tensor]:
        """Return `maps_CHW`, zero for classes without images, and `present_C`."""
        if self._maps_CHW is not None:
            counts_C = self._counts_C.clamp(min=1)
            return F.relu(self._maps_CHW / counts_C[:, None, None]), self._counts_C > 0
        if self._features_CKHW is None:
            return torch.zeros(self._num_classes, 1, 1), torch.zeros(self._num_classes).bool()
        counts_C = self._counts_C.clamp(min=1)
        mean_weights_CK = self._weights_CK / counts_C[:, None]
        mean_features_CKHW = self._features_CKHW / counts_C[:, None, None, None]
        return weighted_maps(mean_weights_CK, mean_features_CKHW), self._counts_C > 0


@dataclass(frozen=True)
class Evaluator:
    """A model with all that is needed to classify and explain images with it.

    Attributes:
        model: evaluated in `eval` mode, and left in the mode it was in.
        preprocess: maps uint8 images to the model's input.
        cam: the explainer's name, `TrialConfig.cam`.
        precision: fp32, bf16 or fp16, of the forward pass.
        batch_size: images at a time; None: what suits the device. It does not change the results.
    """

    model: ExplainableModel
    preprocess: Preprocess
    cam: str = "grad_cam"
    precision: str = "fp32"
    batch_size: int | None = None

    def evaluate(self, split: PreparedSplit) -> Evaluation:
        """Classify and explain every image of a split; each CAM explains the image's true class.

        Args:
            split: on the model's device.
        """
        prototypes_PRR = split.prototypes_PRR
        resolution = prototypes_PRR.shape[-1]
        class_cam = ClassCam(len(prototypes_PRR))
        sample_ssim, predictions, num_classes = [], [], 0
        together = (split.images_NCHW, split.labels_N, split.prototype_index_N)
        with self._evaluating():
            for images, labels_N, index_N in batches(together, self._batch_size(split.images_NCHW)):
                scores = self._scores(images, labels_N)
                sums_NHW = self._add(class_cam, scores, index_N)
                maps_NRR = render(F.relu(sums_NHW), resolution)
                sample_ssim.append(reported_ssim(maps_NRR, prototypes_PRR[index_N]))
                predictions.append(scores.logits_NC.argmax(dim=1))
                num_classes = scores.logits_NC.shape[1]
            predicted_N = torch.cat(predictions)
            confusion = (split.labels_N * num_classes + predicted_N).bincount(
                minlength=num_classes**2
            )
            maps_PHW, present_P = class_cam.maps()
            maps_PRR = render(maps_PHW, resolution)
            ssim_P = reported_ssim(maps_PRR, prototypes_PRR).where(present_P, torch.nan)
            return Evaluation(
                accuracy=int((predicted_N == split.labels_N).sum()) / len(split),
                cam_ssim=ssim_P.nanmean().item(),
                cam_ssim_sample=torch.cat(sample_ssim).mean().item(),
                cam_ssim_P=ssim_P.cpu(),
                maps_PRR=maps_PRR.cpu(),
                confusion_CC=confusion.view(num_classes, num_classes).cpu(),
            )

    def error_maps(self, images: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
        """Return class-level CAMs of the wrong answers (the paper's Fig. 6).

        The misclassified images of each true class are averaged into one CAM, which explains the
        classes that were predicted for them.

        Args:
            images: uint8 `(N, channels, H, W)`, on the model's device.
            labels: int64 `(N,)`, the true classes.
            num_classes: C.

        Returns:
            `maps_CRR`, rendered, zero for a class without errors, and `present_C`; on the CPU.
        """
        class_cam = ClassCam(num_classes)
        with self._evaluating():
            for batch, labels_N in batches((images, labels), self._batch_size(images)):
                scores = self._scores(batch)
                wrong = scores.targets_N != labels_N
                self._add(class_cam, scores, labels_N, wrong)
            maps_CHW, present_C = class_cam.maps()
            return render(maps_CHW, self.preprocess.resolution).cpu(), present_C.cpu()

    def explain(self, images: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return class probabilities `(N, C)` and rendered CAMs `(N, R, R)`, on the CPU.

        Args:
            images: uint8 `(N, channels, H, W)`, on the model's device.
            targets: int64 `(N,)`, the classes to explain; None: the predicted classes.
        """
        probabilities, maps = [], []
        together = (images,) if targets is None else (images, targets)
        with self._evaluating():
            for batch in batches(together, self._batch_size(images)):
                scores = self._scores(*batch)
                sums_NHW = self._explainer.image_sums(scores)
                maps.append(render(F.relu(sums_NHW), self.preprocess.resolution).cpu())
                probabilities.append(F.softmax(scores.logits_NC.float(), dim=1).cpu())
        return torch.cat(probabilities), torch.cat(maps)

    @property
    def _explainer(self) -> Explainer:
        return EXPLAINERS[self.cam]

    def _batch_size(self, images: Tensor) -> int:
        return self.batch_size or evaluation_batch(images.device)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Put the model into `eval` mode for a while, and build no graph."""
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.train(was_training)

    def _add(
        self,
        class_cam: ClassCam,
        scores: TargetScores,
        index_N: Tensor,
        chosen_N: Tensor | None = None,
    ) -> Tensor:
        """Add a batch, or the chosen images of it, to class-level CAMs; return the image maps."""
        chosen: Tensor | slice = slice(None) if chosen_N is None else chosen_N
        sums_NHW = self._explainer.image_sums(scores)
        if self._explainer.averages_maps(scores):
            class_cam.add_maps(sums_NHW[chosen], index_N[chosen])
        else:
            class_cam.add(
                scores.channel_weights_NK[chosen], scores.features_NKHW[chosen], index_N[chosen]
            )
        return sums_NHW

    def _scores(self, images_NCHW: Tensor, targets_N: Tensor | None = None) -> TargetScores:
        """Classify a batch, and return the scores of the targets, or of the predicted classes.

        The backbone runs without a graph. The head has one only if its gradients are not known in
        closed form.
        """
        x_NCRR = self.preprocess(images_NCHW)
        with autocast(x_NCRR.device, self.precision):
            features = self.model.features(x_NCRR)
            rows, columns = features.shape[2:]
            weights_CK = self.model.class_weights(rows * columns)
            with torch.set_grad_enabled(weights_CK is None):
                features = features.detach().requires_grad_(weights_CK is None)
                logits = self.model.head(features)
        return TargetScores(
            self.model,
            logits,
            features,
            logits.argmax(dim=1) if targets_N is None else targets_N,
            create_graph=False,
            class_weights_CK=weights_CK,
        )
