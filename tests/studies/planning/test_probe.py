import subprocess
import sys

import numpy as np
import pytest

from batchcam.config import TrialConfig
from batchcam.data.decoys import paint_decoys
from batchcam.data.prepared import PreparedData
from studies.planning.probe import probe
from studies.space import SWITCHED


def test_probe_needs_neither_ray_nor_optuna() -> None:
    """A machine with a GPU and without the extra "studies" can measure."""
    script = """
import sys
for name in ("ray", "optuna", "wandb", "pandas", "moocore"):
    sys.modules[name] = None  # Its import raises ModuleNotFoundError.
from batchcam import TrialConfig
from batchcam.data.prepared import prepare
from studies.planning.probe import probe
config = TrialConfig(epochs=1, batch_size=16, device="cpu")
print(probe(config, prepare(config), threads=1).error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("None\n", 0), done.stderr


def test_probe_measures_speed_and_memory(config: TrialConfig, prepared: PreparedData) -> None:
    found = probe(config, prepared, 1)
    assert found.error is None
    assert found.train_images_per_second > 0
    assert found.validation_images_per_second > 0
    assert 2**26 < found.peak_bytes < found.device_bytes
    assert found.device == "cpu"


def test_probe_that_runs_out_of_memory_says_so(
    config: TrialConfig, prepared: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError("no more")

    monkeypatch.setattr("studies.planning.probe.fit", fail)
    assert probe(config, prepared, 1).error == "no more"


@pytest.mark.parametrize("name", SWITCHED)
def test_every_loss_can_be_probed_on_a_few_images(
    name: str, config: TrialConfig, prepared: PreparedData
) -> None:
    dataset = prepared.dataset
    generator = np.random.default_rng(0)
    marked = prepared.with_splits(
        train=paint_decoys(dataset.train, dataset.train.labels, generator)
    )
    marked.compute_ahead([], supports=True)
    # Fewer images than classes: the supports are those of the whole data set.
    few = {"batch_size": 2, "lambda_batch": 0.0, f"lambda_{name}": 1.0}
    found = probe(TrialConfig.from_dict(config.as_dict() | few), marked, threads=1)
    assert found.error is None
    assert found.train_images_per_second > 0
