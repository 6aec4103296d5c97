"""timm's own format of a model: config.json, and weights under timm's names."""

import shutil
import tempfile
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from batchcam.data.preprocessing import Preprocess
from batchcam.export.loaded_model import LoadedModel
from batchcam.models import ExplainableModel, TimmCNN

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
_PREFIX = "model."
"""Prefix of the timm model's weights in the state dict of our model."""


def write_timm(loaded: LoadedModel, folder: Path) -> None:
    """Write a timm backbone in timm's format, with class names and preprocessing."""
    model = loaded.model
    assert isinstance(model, TimmCNN)
    path = folder / CONFIG_FILE
    write_config(model, loaded.class_names, loaded.channels, loaded.preprocess, path)
    save_file(own_weights(model), folder / WEIGHTS_FILE, metadata={"format": "pt"})


def write_config(
    model: TimmCNN, class_names: tuple[str, ...], channels: int, preprocess: Preprocess, path: Path
) -> None:
    """Write timm's config.json: architecture, arguments, class names and preprocessing.

    With the weights of :func:`own_weights` beside it as `model.safetensors`, the folder is one that
    `timm.create_model("local-dir:FOLDER", pretrained=True)` reads.
    """
    from timm.models import save_for_hf

    side = preprocess.resolution
    # timm has no public function that writes the configuration without the weights.
    with tempfile.TemporaryDirectory() as folder:
        save_for_hf(
            model.get_submodule("model"),
            folder,
            model_config={"label_names": list(class_names)},
            data_config={
                "input_size": (channels, side, side),
                "mean": preprocess.mean,
                "std": preprocess.std,
                "interpolation": "bilinear",
                "crop_pct": 1.0,
            },
        )
        shutil.copyfile(Path(folder) / CONFIG_FILE, path)


def own_weights(model: ExplainableModel) -> dict[str, Tensor]:
    """Return a model's weights on the CPU; those of a timm model have the names that timm uses."""
    prefix = _PREFIX if isinstance(model, TimmCNN) else ""
    return {
        name.removeprefix(prefix): value.contiguous().cpu()
        for name, value in model.state_dict().items()
    }


def load_weights(model: ExplainableModel, weights: dict[str, Tensor]) -> None:
    """Load weights that :func:`own_weights` returned.

    Raises:
        RuntimeError: the names or shapes differ from those of the model.
    """
    if isinstance(model, TimmCNN) and weights.keys() != model.state_dict().keys():
        # Older bundles have the names of our state dict.
        weights = {_PREFIX + name: value for name, value in weights.items()}
    model.load_state_dict(weights)
