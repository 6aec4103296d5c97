"""Fixtures: a small part of the digits data set, and a model trained on it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from batchcam.config import TrialConfig
from batchcam.data.dataset import ImageData, load_data
from batchcam.data.prepared import PreparedData
from batchcam.data.preprocessing import to_device
from batchcam.data.splits import Split
from batchcam.export.bundle import save_bundle
from batchcam.prototypes import class_prototypes
from batchcam.training.fit import TrialResult, fit

TINY_CONFIG = TrialConfig(resolution=14, epochs=3, batch_size=32, device="cpu", lambda_batch=0.2)


def _first_of_each_class(split: Split, count: int) -> Split:
    chosen = np.concatenate([np.flatnonzero(split.labels == label)[:count] for label in range(10)])
    chosen.sort()
    return Split(split.images[chosen], split.labels[chosen])


@pytest.fixture(scope="session")
def tiny_data() -> ImageData:
    """Return 200 training, 50 validation and 50 test images of the digits data set."""
    data = load_data(TrialConfig(dataset="digits"))
    return replace(
        data,
        train=_first_of_each_class(data.train, 20),
        validation=_first_of_each_class(data.validation, 5),
        test=_first_of_each_class(data.test, 5),
    )


@pytest.fixture(scope="session")
def tiny_prepared(tiny_data: ImageData) -> PreparedData:
    cpu = torch.device("cpu")
    train, validation = (
        class_prototypes(*to_device(split, cpu), tiny_data.num_classes)
        for split in (tiny_data.train, tiny_data.validation)
    )
    return PreparedData(tiny_data, train, validation)


@pytest.fixture(scope="session")
def tiny_config() -> TrialConfig:
    return TINY_CONFIG


@pytest.fixture(scope="session")
def trained(tiny_prepared: PreparedData, tiny_config: TrialConfig) -> TrialResult:
    """Return a finished run. It is shared: tests must not modify its model."""
    return fit(tiny_config, prepared=tiny_prepared)


@pytest.fixture(scope="session")
def bundle_dir(trained: TrialResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the bundle of `trained`. It is shared: a test that damages it works on a copy."""
    directory = tmp_path_factory.mktemp("bundles") / "tiny"
    save_bundle(directory, trained, command="batchcam train --out tiny")
    return directory


@pytest.fixture
def make_pictures(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes `<root>/<part>/<class>/<n>.png`; brightness gives the class."""

    def make(
        classes: tuple[str, ...] = ("bright", "dark"),
        *,
        parts: tuple[str, ...] = ("train",),
        count: int = 5,
        mode: str = "L",
        root: str = "pictures",
    ) -> Path:
        generator = np.random.default_rng(0)
        for part in parts:
            for number, name in enumerate(classes):
                folder = tmp_path / root / part / name
                folder.mkdir(parents=True)
                for index in range(count):
                    shape = (12 + index, 20) if mode == "L" else (12 + index, 20, 3)
                    pixels = generator.integers(100 * number, 100 * number + 100, shape)
                    Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
        return tmp_path / root

    return make
