"""Batch-CAM: image classifiers whose explanations are part of the loss (arXiv:2510.00664)."""

from batchcam.config import TrialConfig
from batchcam.data.prepared import PreparedData, prepare
from batchcam.errors import BatchCamError
from batchcam.export.bundle import LoadedModel, load
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
]
