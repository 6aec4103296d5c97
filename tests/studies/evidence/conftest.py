"""Fixtures: 300 digits, clean and with decoys, under the names of the real data sets."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from batchcam.config import TrialConfig
from batchcam.data.dataset import ImageData, load_data
from batchcam.data.decoys import paint_decoys, paint_random_decoys
from batchcam.data.prepared import PreparedData
from batchcam.data.preprocessing import to_device
from batchcam.prototypes import class_prototypes
from studies.evidence import decoy_pictures, paper, pictures, right_reasons


@pytest.fixture(scope="session")
def small() -> dict[str, ImageData]:
    digits = load_data(TrialConfig(dataset="digits"))
    clean = replace(digits, train=digits.train.take(np.arange(300)))
    generator = np.random.default_rng(0)
    decoyed = replace(
        clean,
        train=paint_decoys(clean.train, clean.train.labels, generator),
        validation=paint_decoys(clean.validation, clean.validation.labels, generator),
        test=paint_random_decoys(clean.test, 10, generator),
    )
    return {"mnist": clean, "decoy_mnist": decoyed}


@pytest.fixture
def on_digits(small: dict[str, ImageData], monkeypatch: pytest.MonkeyPatch) -> None:
    def prepared(dataset: str, prototype: str = "mean") -> PreparedData:
        data = small[dataset]
        train, validation = (
            class_prototypes(*to_device(split, torch.device("cpu")), 10, prototype)
            for split in (data.train, data.validation)
        )
        return PreparedData(data, train, validation)

    for study in (paper, pictures, right_reasons, decoy_pictures):
        monkeypatch.setattr(study, "load_prepared", prepared)
    for study in (paper, right_reasons):
        monkeypatch.setattr(study, "_EXPLAINED", 40)
    monkeypatch.setattr(paper, "_IMPUTED", 4)
