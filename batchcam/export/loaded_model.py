"""A trained model out of its bundle, which predicts and explains images.

Shapes: N images, C classes, P prototypes, R pixels of the model's input, H and W of an image.
"""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from batchcam.config import TrialConfig
from batchcam.data.prepared import PreparedSplit
from batchcam.data.preprocessing import Preprocess
from batchcam.devices import resolve_device
from batchcam.errors import BundleError
from batchcam.models import ExplainableModel
from batchcam.similarity import ssim
from batchcam.training.evaluate import Evaluation, Evaluator


@dataclass(frozen=True)
class LoadedModel:
    """A classifier from a bundle, which predicts and explains images; on the CPU unless moved.

    Attributes:
        config: the configuration that it was trained with.
        metrics: the content of metrics.json.
        class_names: the name of each class, in the order of the logits.
        model: the network, in `eval` mode.
        preprocess: maps uint8 images to the network's input.
        channels: 1 for grey images, 3 for RGB.
        prototypes: names and images of the training prototypes, `(P, R, R)` in [0, 1]; None for a
            bundle without them.
    """

    config: TrialConfig
    metrics: dict[str, Any]
    class_names: tuple[str, ...]
    model: ExplainableModel
    preprocess: Preprocess
    channels: int
    prototypes: tuple[tuple[str, ...], Tensor] | None = None

    def predict(self, images: npt.ArrayLike | Tensor) -> npt.NDArray[np.int64]:
        """Return the index of the predicted class of each image, `(N,)`; see `class_names`.

        Args:
            images: uint8, `(N, H, W)` for grey or `(N, channels, H, W)`, of any size.

        Raises:
            BundleError: the images have a wrong type, shape or number of channels.
        """
        classes: npt.NDArray[np.int64] = self.probabilities(images).argmax(axis=1)
        return classes

    def probabilities(self, images: npt.ArrayLike | Tensor) -> npt.NDArray[np.float32]:
        """Return the softmax probabilities, `(N, C)`."""
        probabilities, _ = self._run(images, None)
        return probabilities

    def explain(
        self, images: npt.ArrayLike | Tensor, targets: npt.ArrayLike | None = None
    ) -> npt.NDArray[np.float32]:
        """Return one CAM per image at the model's resolution, `(N, R, R)` in [0, 1].

        The explainer is the one that the model was trained with: Grad-CAM or HiResCAM.

        Args:
            images: as for :meth:`predict`.
            targets: the class to explain for each image, `(N,)`; None: the predicted classes.
        """
        _, maps = self._run(images, targets)
        return maps

    def nearest_prototypes(
        self, maps: npt.NDArray[np.float32]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Return the index of the prototype most similar to each CAM, `(N,)`, and the SSIM, `(N,)`.

        Args:
            maps: `(N, R, R)` in [0, 1], from :meth:`explain`.

        Raises:
            BundleError: the bundle has no prototypes.
        """
        if self.prototypes is None:
            raise BundleError(
                "the bundle has no prototypes; train it again from its config.yaml to have them."
            )
        _, prototypes_PRR = self.prototypes
        cams_NRR = torch.from_numpy(maps)
        found = torch.stack(
            [ssim(cams_NRR, each_RR.expand_as(cams_NRR)) for each_RR in prototypes_PRR]
        )
        best, which = found.max(dim=0)
        return which.numpy(), best.numpy()

    def to(self, device: str) -> Self:
        """Move the network to a device, and return this model."""
        self.model.to(resolve_device(device))
        return self

    def evaluate(self, split: PreparedSplit) -> Evaluation:
        """Evaluate on a split that is on :attr:`device`, at the model's resolution.

        See :meth:`batchcam.training.evaluate.Evaluator.evaluate`.
        """
        return self._evaluator.evaluate(split)

    def error_maps(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`batchcam.training.evaluate.Evaluator.error_maps`."""
        device = self.device
        return self._evaluator.error_maps(
            images.to(device), labels.to(device), len(self.class_names)
        )

    def _run(
        self, images: npt.ArrayLike | Tensor, targets: npt.ArrayLike | None
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        # Tensors made in the caller's inference mode could not carry the gradients of the CAM.
        with torch.inference_mode(mode=False):
            return self._explain(self._checked(images).to(self.device), targets)

    def _explain(
        self, checked: Tensor, targets: npt.ArrayLike | None
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        if len(checked) == 0:
            side = self.preprocess.resolution
            empty = np.zeros((0, len(self.class_names)), np.float32)
            return empty, np.zeros((0, side, side), np.float32)
        chosen = None
        if targets is not None:
            chosen = torch.as_tensor(np.asarray(targets), dtype=torch.int64, device=self.device)
            valid = (chosen >= 0) & (chosen < len(self.class_names))
            if chosen.shape != (len(checked),) or not valid.all():
                raise BundleError(
                    f"targets must be {len(checked)} class numbers from 0 to "
                    f"{len(self.class_names) - 1}, one per image."
                )
        probabilities, maps = self._evaluator.explain(checked, chosen)
        return probabilities.numpy(), maps.numpy()

    def _checked(self, images: npt.ArrayLike | Tensor) -> Tensor:
        try:
            tensor = images if isinstance(images, Tensor) else torch.as_tensor(np.array(images))
        except (TypeError, ValueError) as error:
            raise BundleError(
                f"images are not an array of pixels: {error}; give uint8 (N, channels, H, W)."
            ) from error
        if tensor.dtype != torch.uint8:
            raise BundleError(f"images are {tensor.dtype}; give uint8 pixels from 0 to 255.")
        if tensor.dim() == 3:
            tensor = tensor.unsqueeze(1)
        if tensor.dim() != 4 or tensor.shape[1] != self.channels:
            raise BundleError(
                f"images have the shape {tuple(tensor.shape)}; expected (N, {self.channels}, H, W)"
                + (" or (N, H, W)." if self.channels == 1 else ".")
            )
        return tensor

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.model.parameters()).device

    @property
    def _evaluator(self) -> Evaluator:
        return Evaluator(self.model, self.preprocess, self.config.cam)
