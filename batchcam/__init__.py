"""Batch-CAM: image classifiers whose explanations are part of the loss (arXiv:2510.00664).

The public names are imported when they are first used (PEP 562): a program that needs only
`batchcam.errors`, such as the search engine, does not load PyTorch.
"""

import importlib
import importlib.metadata
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from batchcam.config import TrialConfig
    from batchcam.data.prepared import PreparedData, prepare
    from batchcam.errors import BatchCamError
    from batchcam.export.bundle import load, save_bundle
    from batchcam.export.loaded_model import LoadedModel
    from batchcam.training.fit import EpochReport, TrialResult, fit

__all__ = [
    "BatchCamError",
    "EpochReport",
    "LoadedModel",
    "PreparedData",
    "TrialConfig",
    "TrialResult",
    "fit",
    "load",
    "prepare",
    "save_bundle",
]

_MODULES = {
    "BatchCamError": "batchcam.errors",
    "EpochReport": "batchcam.training.fit",
    "LoadedModel": "batchcam.export.loaded_model",
    "PreparedData": "batchcam.data.prepared",
    "TrialConfig": "batchcam.config",
    "TrialResult": "batchcam.training.fit",
    "fit": "batchcam.training.fit",
    "load": "batchcam.export.bundle",
    "prepare": "batchcam.data.prepared",
    "save_bundle": "batchcam.export.bundle",
}
"""The module of each public name."""

if not TYPE_CHECKING:  # Else type checkers would believe in every name.

    def __getattr__(name: str) -> Any:
        """Return a public name, a submodule or `__version__`, and import it first.

        Raises:
            AttributeError: there is neither a public name nor a submodule of this name.
        """
        if name == "__version__":
            value = importlib.metadata.version("batchcam")
        elif name in _MODULES:
            value = getattr(importlib.import_module(_MODULES[name]), name)
        elif name.startswith("__") or importlib.util.find_spec(f"batchcam.{name}") is None:
            raise AttributeError(f"module 'batchcam' has no attribute {name!r}")
        else:
            value = importlib.import_module(f"batchcam.{name}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    """Return the public names, also those that are not imported yet."""
    return sorted({*globals(), *__all__})
