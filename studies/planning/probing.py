"""Probes each kind of trial of a study on its Ray cluster, before the study starts."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, WorkerCrashedError

from batchcam.config import TrialConfig
from batchcam.data.prepared import PreparedData
from batchcam.errors import first_line
from studies.planning.devices import check_device
from studies.planning.probe import Probe, probe
from studies.space import SWITCHED, SearchSpace, Strides


def probe_configs(base: TrialConfig, space: SearchSpace, strides: Strides) -> Iterator[TrialConfig]:
    """Yield the most expensive configuration of each backbone, resolution and output stride."""
    metric = "ssim" if "ssim" in space.metrics else space.metrics[0]
    weights: dict[str, Any] = {f"lambda_{name}": float(name in space.switched) for name in SWITCHED}
    for (backbone, resolution), options in strides.items():
        for stride in options:
            yield replace(
                base,
                backbone=backbone,
                resolution=resolution,
                output_stride=stride,
                metric=metric,
                **weights,
            )


def probe_all(
    configs: Sequence[TrialConfig], prepared: PreparedData, cpus: float, gpus: float
) -> list[Probe]:
    """Probe configurations one after the other on the connected Ray cluster.

    A process that Ray or the kernel kills counts as out of memory.

    Args:
        configs: the configurations.
        prepared: the data.
        cpus: CPUs that a probe reserves, and its threads.
        gpus: whole GPUs that a probe reserves.

    Raises:
        ConfigError: a probe cannot use the GPU that Ray gave it.
    """

    def probe_here(config: TrialConfig, prepared: PreparedData, threads: int) -> Probe:
        check_device(config.device)
        return probe(config, prepared, threads)

    # max_calls=1 gives each probe a new process. A killed probe would be killed again.
    remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_calls=1, max_retries=0)(probe_here)
    shared = ray.put(prepared)
    threads = max(1, int(cpus))

    def run(config: TrialConfig) -> Probe:
        try:
            found: Probe = ray.get(remote.remote(config, shared, threads))
        except (OutOfMemoryError, WorkerCrashedError) as error:
            device = "cuda" if gpus else "cpu"
            return Probe(config, threads, device=device, error=first_line(error))
        return found

    return [run(config) for config in configs]
