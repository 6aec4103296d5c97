"""Write a trained model in the formats that do not need this project: timm's own, and ONNX."""

from pathlib import Path

from batchcam.export.loaded_model import LoadedModel
from batchcam.export.onnx_export import has_linear_head, write_onnx
from batchcam.export.timm_format import CONFIG_FILE, WEIGHTS_FILE, write_timm
from batchcam.models import TimmCNN

ONNX_FILE = "model.onnx"


def export(loaded: LoadedModel, folder: Path) -> list[str]:
    """Write a model in every format that it supports, into an existing folder.

    - `config.json`, `model.safetensors`: for timm backbones;
      `timm.create_model("local-dir:FOLDER", pretrained=True)` reads them.
    - `model.onnx`: if the head is linear; see :func:`batchcam.export.onnx_export.write_onnx`.

    Returns:
        The names of the files.

    Raises:
        BundleError: the extra `onnx` is missing.
    """
    written = []
    if isinstance(loaded.model, TimmCNN):
        write_timm(loaded, folder)
        written += [CONFIG_FILE, WEIGHTS_FILE]
    if has_linear_head(loaded):
        write_onnx(loaded, folder / ONNX_FILE)
        written.append(ONNX_FILE)
    return written
