import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from batchcam.config import TrialConfig
from batchcam.data.decoys import paint_decoys
from batchcam.data.prepared import PreparedData
from batchcam.training.fit import TrialResult, fit
from studies.planning.probe import context_bytes, probe
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


@pytest.mark.parametrize(
    "error",
    [MemoryError("no more"), RuntimeError("no more: CUDA error: CUBLAS_STATUS_ALLOC_FAILED")],
)
def test_probe_that_runs_out_of_memory_says_so(
    config: TrialConfig,
    prepared: PreparedData,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("studies.planning.probe.fit", fail)
    assert str(probe(config, prepared, 1).error).startswith("no more")


def test_probe_raises_other_errors(
    config: TrialConfig, prepared: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr("studies.planning.probe.fit", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        probe(config, prepared, 1)


@pytest.mark.parametrize(("images", "validated"), [(500, 128), (100, 100)])
def test_probe_validates_a_whole_batch_of_an_evaluation(
    config: TrialConfig,
    prepared: PreparedData,
    monkeypatch: pytest.MonkeyPatch,
    images: int,
    validated: int,
) -> None:
    whole = prepared.with_splits(
        validation=prepared.dataset.train.take(np.resize(np.arange(100), images))
    )
    sizes = []

    def record(config: TrialConfig, *, prepared: PreparedData) -> TrialResult:
        sizes.append(len(prepared.dataset.validation))
        return fit(config, prepared=prepared)

    monkeypatch.setattr("studies.planning.probe.fit", record)
    probe(replace(config, batch_size=16), whole, 1)
    assert sizes == [validated]


def test_probe_is_measured_against_the_memory_of_its_container(
    config: TrialConfig, prepared: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("studies.planning.probe.total_memory", lambda: 2**32)
    assert probe(config, prepared, 1).device_bytes == 2**32


GIB = 2**30


@pytest.mark.parametrize(
    ("used", "reserved", "expected"),
    [
        (5 * GIB, 4 * GIB, GIB),
        (GIB, GIB, 600 * 2**20),  # The driver does not tell.
        (40 * GIB, 4 * GIB, 600 * 2**20),  # Others use the GPU.
    ],
)
def test_memory_beside_the_tensors_is_measured_where_it_is_plausible(
    used: int, reserved: int, expected: int
) -> None:
    assert context_bytes(used, reserved) == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_probe_on_a_gpu_counts_all_that_its_process_takes(
    config: TrialConfig, prepared: PreparedData
) -> None:
    found = probe(replace(config, device="cuda"), prepared, 1)
    free, total = torch.cuda.mem_get_info()
    assert found.device_bytes == total
    assert total - free - 2**20 <= found.peak_bytes < total - free + GIB


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
