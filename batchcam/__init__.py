"""Batch-CAM: image classifiers whose explanations are part of the loss (arXiv:2510.00664)."""

from batchcam.bundle import LoadedModel, load
from batchcam.config import TrialConfig
from batchcam.errors import BatchCamError
from batchcam.inputs import Inputs, prepare
from batchcam.train import EpochReport, TrialResult, fit

__all__ = [
    "BatchCamError",
    "EpochReport",
    "Inputs",
    "LoadedModel",
    "TrialConfig",
    "TrialResult",
    "fit",
    "load",
    "prepare",
]
