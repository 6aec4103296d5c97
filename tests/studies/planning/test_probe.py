"""Check probes as a study runs them, in processes that may be killed."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import ray

from batchcam.config import TrialConfig
from batchcam.data.decoys import paint_decoys
from batchcam.data.prepared import PreparedData
from studies.planning.probe import Probe, probe, probe_all
from studies.space import SWITCHED

pytestmark = pytest.mark.xdist_group("ray")


@contextmanager
def local_ray(**settings: float) -> Iterator[None]:
    """Run a Ray of one CPU, with internal settings that users do not change."""
    ray.init(
        address="local",
        num_cpus=1,
        include_dashboard=False,
        log_to_driver=False,
        _system_config=settings,
    )
    try:
        yield
    finally:
        ray.shutdown()


def test_probe_killed_by_the_kernel_is_out_of_memory_and_the_next_one_is_not(
    config: TrialConfig, prepared: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    def greedy(each: TrialConfig, _: PreparedData, threads: int) -> Probe:
        if each.batch_size == 128:
            os.kill(os.getpid(), signal.SIGKILL)
        return Probe(each, threads, 1.0, 1.0, 1, 2)

    monkeypatch.setattr("studies.planning.probe.probe", greedy)
    larger = TrialConfig(batch_size=128)
    with local_ray():
        killed, found = probe_all([larger, config], prepared, 1.0, 0.0)
    assert (killed.config, killed.threads, killed.device) == (larger, 1, "cpu")
    assert killed.error
    assert found == Probe(config, 1, 1.0, 1.0, 1, 2)


@pytest.mark.faults
def test_probe_killed_by_ray_is_out_of_memory(
    config: TrialConfig, prepared: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    def greedy(each: TrialConfig, _: PreparedData, threads: int) -> Probe:
        time.sleep(60)
        return Probe(each, threads)

    monkeypatch.setattr("studies.planning.probe.probe", greedy)
    # This Ray treats a node as full when more than a thousandth of its memory is in use.
    with local_ray(memory_usage_threshold=0.001, memory_monitor_refresh_ms=50):
        (killed,) = probe_all([config], prepared, 1.0, 0.0)
    assert "memory" in str(killed.error)


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
