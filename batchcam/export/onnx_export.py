"""A trained model and its CAM as one ONNX file.

Shapes: N images, R pixels of the model's input.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchcam.cam import render
from batchcam.errors import BundleError
from batchcam.explainers import EXPLAINERS, TargetScores
from batchcam.export.loaded_model import LoadedModel
from batchcam.extras import require_extra


def write_onnx(loaded: LoadedModel, path: Path) -> None:
    """Write a model with a linear head as ONNX.

    The input is `images`, uint8 `(N, channels, R, R)`. The outputs are `probabilities`, `(N, C)`,
    and `cams`, `(N, R, R)` in [0, 1]: the map of each image's predicted class, by the explainer
    that the model was trained with.

    Raises:
        BundleError: the head is not linear.
        MissingPackageError: the extra `onnx` is not installed.
    """
    if not has_linear_head(loaded):
        raise BundleError(
            f"a CAM of {loaded.config.backbone} needs the gradient of its head, which ONNX lacks; "
            "use timm's format."
        )
    with require_extra("onnx", path.name):
        import onnxscript  # noqa: F401
    side = loaded.preprocess.resolution
    images = torch.zeros(2, loaded.channels, side, side, dtype=torch.uint8)
    program = torch.onnx.export(
        _WithCam(loaded).eval(),
        (images,),
        dynamo=True,
        dynamic_shapes={"images": {0: torch.export.Dim("N")}},
        input_names=["images"],
        output_names=["probabilities", "cams"],
        verbose=False,
    )
    assert program is not None
    program.save(path)


class _WithCam(nn.Module):
    """Preprocessing, model and CAM in one module, without gradients."""

    mean: Tensor
    std: Tensor

    def __init__(self, loaded: LoadedModel) -> None:
        super().__init__()
        self.model = loaded.model.cpu()
        self._resolution = loaded.preprocess.resolution
        self._explainer = EXPLAINERS[loaded.config.cam]
        for name in ("mean", "std"):
            values = torch.tensor(getattr(loaded.preprocess, name))
            self.register_buffer(name, values.view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = (images.float() / 255 - self.mean) / self.std
        features = self.model.features(x)
        logits = self.model.head(features)
        scores = TargetScores(
            self.model, logits, features, logits.argmax(dim=1), create_graph=False
        )
        sums = self._explainer.image_sums(scores)
        return logits.softmax(dim=1), render(F.relu(sums), self._resolution)


def has_linear_head(loaded: LoadedModel) -> bool:
    """Return whether the head is linear, so that a CAM needs no gradients."""
    return loaded.model.class_weights(1) is not None
