"""Check probes as a study runs them, in processes that may be killed."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import ray

from batchcam.config import TrialConfig
from batchcam.data.prepared import PreparedData
from studies.planning.probe import Probe
from studies.planning.probing import probe_all

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

    monkeypatch.setattr("studies.planning.probing.probe", greedy)
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

    monkeypatch.setattr("studies.planning.probing.probe", greedy)
    # This Ray treats a node as full when more than a thousandth of its memory is in use.
    with local_ray(memory_usage_threshold=0.001, memory_monitor_refresh_ms=50):
        (killed,) = probe_all([config], prepared, 1.0, 0.0)
    assert "memory" in str(killed.error)
