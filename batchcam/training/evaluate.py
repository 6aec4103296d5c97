"""How well a model classifies, and how much its CAMs resemble the prototypes.

A CAM needs gradients of the head, so gradients are taken here too; nothing is ever updated.

Shapes: N images, C classes, P prototypes (as many as classes where each has one), K channels, H and
W cells of the feature grid, R pixels.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from batchcam.cam import (
    attribution,
    of_targets,
    pooled,
    render,
    score_gradients,
    weighted_maps,
    weighted_sums,
)
from batchcam.data.preprocessing import Preprocess, batches
from batchcam.devices import autocast, evaluation_batch
from batchcam.models import ExplainableModel
from batchcam.similarity import ssim


@dataclass(frozen=True)
class Evaluation:
    """What one pass over a split gives, on the CPU.

    Attributes:
        accuracy: share of images classified correctly, in [0, 1].
        cam_ssim: class level; the mean over prototypes of `cam_ssim_P`.
        cam_ssim_sample: the mean over images of the SSIM between an image's CAM and its prototype.
        cam_ssim_P: SSIM between each prototype and the CAM of the images that go with it (Eqs. 4-6
            over the whole split), which are those of a class; NaN where there are none.
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

    Batches are added either by :meth:`add` or, where all images of a class have the same channel
    weights, by :meth:`add_maps`: the weighted sum of averages is the average of weighted sums.
    """

    def __init__(self, num_classes: int) -> None:
        self._num_classes = num_classes
        self._maps_CHW: Tensor | None = None
        self._features_CKHW: Tensor | None = None
        self._weights_CK = torch.zeros(0)
        self._counts_C = torch.zeros(0)

    def add(self, weights_NK: Tensor, features_NKHW: Tensor, prototype_index_N: Tensor) -> None:
        """Add a batch: channel weights, features, and the class each image is averaged into."""
        features_NKHW = features_NKHW.detach().to(weights_NK.dtype)
        if self._features_CKHW is None:
            shape = (self._num_classes, *features_NKHW.shape[1:])
            self._features_CKHW = features_NKHW.new_zeros(shape)
            self._weights_CK = features_NKHW.new_zeros(shape[:2])
            self._counts_C = features_NKHW.new_zeros(self._num_classes)
        self._features_CKHW.index_add_(0, prototype_index_N, features_NKHW)
        self._weights_CK.index_add_(0, prototype_index_N, weights_NK)
        self._counts_C.index_add_(0, prototype_index_N, torch.ones_like(weights_NK[:, 0]))

    def add_maps(self, sums_NHW: Tensor, prototype_index_N: Tensor) -> None:
        """Add a batch: :func:`batchcam.cam.weighted_sums`, and the class of each image."""
        if self._maps_CHW is None:
            self._maps_CHW = sums_NHW.new_zeros(self._num_classes, *sums_NHW.shape[1:])
            self._counts_C = sums_NHW.new_zeros(self._num_classes)
        self._maps_CHW.index_add_(0, prototype_index_N, sums_NHW)
        self._counts_C.index_add_(0, prototype_index_N, torch.ones_like(sums_NHW[:, 0, 0]))

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


def evaluate(
    model: ExplainableModel,
    images: Tensor,
    labels: Tensor,
    prototypes_PRR: Tensor,
    preprocess: Preprocess,
    *,
    prototype_index: Tensor | None = None,
    cam: str = "grad_cam",
    batch_size: int | None = None,
    precision: str = "fp32",
) -> Evaluation:
    """Classify and explain every image of a split; each CAM explains the image's true class.

    Args:
        model: evaluated in `eval` mode, and left in the mode it was in.
        images: uint8 `(N, channels, H, W)` on the model's device.
        labels: int64 `(N,)` on the same device.
        prototypes_PRR: scaled to [0, 1], R the input's resolution, on the same device.
        preprocess: turns images into the model's input.
        prototype_index: int64 `(N,)`, the prototype of each image; None: that of its class.
        cam: grad_cam or hires_cam; see :class:`batchcam.losses.objective.Objective`.
        batch_size: images at a time, None: what suits the device; it does not change the result.
        precision: fp32, bf16 or fp16, of the forward pass.
    """
    resolution = prototypes_PRR.shape[-1]
    class_cam = ClassCam(len(prototypes_PRR))
    by_maps = cam == "hires_cam" or model.class_weights(1) is not None
    sample_ssim, predictions, num_classes = [], [], 0
    was_training = model.training
    model.eval()
    together = (images, labels, labels if prototype_index is None else prototype_index)
    size = batch_size or evaluation_batch(images.device)
    for batch, batch_labels, batch_groups in batches(together, size):
        seen = _explained(model, preprocess(batch), cam, precision, batch_labels)
        with torch.no_grad():
            if by_maps:
                class_cam.add_maps(seen.sums_NHW, batch_groups)
            else:
                class_cam.add(seen.weights_NK, seen.features_NKHW, batch_groups)
            maps_NRR = render(F.relu(seen.sums_NHW), resolution)
            sample_ssim.append(ssim(maps_NRR, prototypes_PRR, pairs_B=batch_groups))
            predictions.append(seen.logits_NC.argmax(dim=1))
            num_classes = seen.logits_NC.shape[1]
    model.train(was_training)

    with torch.no_grad():
        predicted = torch.cat(predictions)
        confusion = (labels * num_classes + predicted).bincount(minlength=num_classes**2)
        maps_PHW, present_P = class_cam.maps()
        maps_PRR = render(maps_PHW, resolution)
        ssim_P = ssim(maps_PRR, prototypes_PRR).where(present_P, torch.nan)
        return Evaluation(
            accuracy=int((predicted == labels).sum()) / len(labels),
            cam_ssim=ssim_P.nanmean().item(),
            cam_ssim_sample=torch.cat(sample_ssim).mean().item(),
            cam_ssim_P=ssim_P.cpu(),
            maps_PRR=maps_PRR.cpu(),
            confusion_CC=confusion.view(num_classes, num_classes).cpu(),
        )


def error_maps(
    model: ExplainableModel,
    images: Tensor,
    labels: Tensor,
    num_classes: int,
    preprocess: Preprocess,
    *,
    cam: str = "grad_cam",
    batch_size: int | None = None,
    precision: str = "fp32",
) -> tuple[Tensor, Tensor]:
    """Return what misled the model: class-level CAMs of the wrong answers (the paper's Fig. 6).

    The misclassified images of each true class are averaged into one CAM that explains the classes
    they were taken for.

    Returns:
        `maps_CRR`, rendered, zero for a class without errors, and `present_C`; on the CPU.
    """
    class_cam = ClassCam(num_classes)
    was_training = model.training
    model.eval()
    size = batch_size or evaluation_batch(images.device)
    for batch, batch_labels in batches((images, labels), size):
        seen = _explained(model, preprocess(batch), cam, precision)
        predicted = seen.logits_NC.argmax(dim=1)
        wrong = predicted != batch_labels
        if cam == "hires_cam":
            class_cam.add_maps(seen.sums_NHW[wrong], batch_labels[wrong])
        else:
            class_cam.add(seen.weights_NK[wrong], seen.features_NKHW[wrong], batch_labels[wrong])
    model.train(was_training)
    maps_CHW, present_C = class_cam.maps()
    return render(maps_CHW, preprocess.resolution).cpu(), present_C.cpu()


def explain(
    model: ExplainableModel,
    images: Tensor,
    preprocess: Preprocess,
    targets: Tensor | None = None,
    *,
    cam: str = "grad_cam",
    batch_size: int | None = None,
    precision: str = "fp32",
) -> tuple[Tensor, Tensor]:
    """Return class probabilities `(N, C)` and rendered CAMs `(N, R, R)`, on the CPU.

    The CAMs explain `targets`, or the predicted classes where that is None.
    """
    probabilities, maps = [], []
    was_training = model.training
    model.eval()
    size = batch_size or evaluation_batch(images.device)
    for start in range(0, len(images), size):
        chosen = slice(start, start + size)
        seen = _explained(
            model,
            preprocess(images[chosen]),
            cam,
            precision,
            None if targets is None else targets[chosen],
        )
        with torch.no_grad():
            maps.append(render(F.relu(seen.sums_NHW), preprocess.resolution).cpu())
            probabilities.append(F.softmax(seen.logits_NC.float(), dim=1).cpu())
    model.train(was_training)
    return torch.cat(probabilities), torch.cat(maps)


class _Explained(NamedTuple):
    """A batch, classified and explained."""

    logits_NC: Tensor
    features_NKHW: Tensor
    weights_NK: Tensor
    """The channel weights of each image's target."""
    sums_NHW: Tensor
    """The CAM of each image before its ReLU."""


def _explained(
    model: ExplainableModel,
    x_NCHW: Tensor,
    cam: str,
    precision: str,
    targets_N: Tensor | None = None,
) -> _Explained:
    """Classify a batch, and explain the targets, or the predicted classes.

    The backbone runs without a graph; the head with one, unless its gradients are known without.
    """
    with autocast(x_NCHW.device, precision):
        with torch.no_grad():
            features = model.features(x_NCHW)
            rows, columns = features.shape[2:]
            known_CK = model.class_weights(rows * columns)
        with torch.set_grad_enabled(known_CK is None):
            features = features.detach().requires_grad_(known_CK is None)
            logits = model.head(features)
    chosen_N = logits.argmax(dim=1) if targets_N is None else targets_N
    if known_CK is not None and cam == "grad_cam":
        weights_NK = known_CK[chosen_N]
        return _Explained(logits, features, weights_NK, weighted_sums(weights_NK, features))
    with torch.no_grad():
        known_CKHW = model.class_gradients(rows, columns)
        gradients_NKHW = (
            score_gradients(logits, features, chosen_N, create_graph=False)
            if known_CKHW is None
            else of_targets(known_CKHW, chosen_N, features)
        )
        weights_NK = pooled(gradients_NKHW)
        sums_NHW = (
            attribution(gradients_NKHW, features)
            if cam == "hires_cam"
            else weighted_sums(weights_NK, features)
        )
        return _Explained(logits, features, weights_NK, sums_NHW)
