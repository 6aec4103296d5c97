"""timm's description of a model, from which timm builds it again around its weights."""

from pathlib import Path

from torch import Tensor

from batchcam.data.preprocessing import Preprocess
from batchcam.models import ExplainableModel, TimmCNN

CONFIG_FILE = "config.json"
_PREFIX = "model."
"""What the names of a timm model's weights begin with inside of ours."""


def write_config(
    model: TimmCNN, class_names: tuple[str, ...], channels: int, preprocess: Preprocess, path: Path
) -> None:
    """Write what timm says of its own models: architecture, its arguments, classes, preprocessing.

    With `model.safetensors` beside it, of :func:`own_weights`, its folder is one that
    `timm.create_model("local-dir:FOLDER", pretrained=True)` reads.
    """
    from timm.models._hub import save_config_for_hf

    side = preprocess.resolution
    save_config_for_hf(
        model.get_submodule("model"),
        str(path),
        model_config={"label_names": list(class_names)},
        data_config={
            "input_size": (channels, side, side),
            "mean": preprocess.mean,
            "std": preprocess.std,
            "interpolation": "bilinear",
            "crop_pct": 1.0,
        },
    )


def own_weights(model: ExplainableModel) -> dict[str, Tensor]:
    """Return a model's weights on the CPU, of a timm model by the names that timm gives them."""
    prefix = _PREFIX if isinstance(model, TimmCNN) else ""
    return {
        name.removeprefix(prefix): value.contiguous().cpu()
        for name, value in model.state_dict().items()
    }


def load_weights(model: ExplainableModel, weights: dict[str, Tensor]) -> None:
    """Load what :func:`own_weights` returned.

    Raises:
        RuntimeError: names or shapes are not the model's.
    """
    if isinstance(model, TimmCNN) and weights.keys() != model.state_dict().keys():
        # Bundles were once written by our names.
        weights = {_PREFIX + name: value for name, value in weights.items()}
    model.load_state_dict(weights)
