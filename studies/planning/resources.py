"""What a trial asks of the cluster, and how many threads it then uses."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray

from batchcam.errors import ConfigError

Node = dict[str, float]
"""The resources of one node by Ray's names, such as "CPU" and "GPU"."""

_RESERVE = 1.2
"""What a trial may take beyond what a few batches showed."""
_MOST_ON_A_GPU = 8
"""Trials that share a GPU at most: beyond, they wait for each other."""


@dataclass(frozen=True)
class TrialResources:
    """CPUs and GPUs that one trial holds; fractions share a device.

    Attributes:
        cpus: CPUs of a trial.
        gpus: GPUs of a trial.
        most_cpus: CPUs of the largest node, which is as much as a trial can ever get.
    """

    cpus: float
    gpus: float
    most_cpus: float

    @property
    def threads(self) -> int:
        """Threads for PyTorch: the trial's CPUs, so that trials do not fight for cores."""
        return max(1, int(self.cpus))

    def enlarged(self, share: int) -> "TrialResources":
        """Return `share` times these resources, or as much of it as a trial can use.

        A share of a GPU grows to the whole of it; memory of the host is asked for by CPUs.
        """
        gpus = max(self.gpus, min(1.0, self.gpus * share)) if self.gpus else 0.0
        cpus = max(self.cpus, min(self.most_cpus, self.cpus * share))
        return TrialResources(cpus, gpus, self.most_cpus)

    def request(self, multiplier: int) -> dict[str, float]:
        """Return what a trial asks Ray for that has `multiplier` times these resources."""
        enlarged = self.enlarged(multiplier)
        return {"CPU": enlarged.cpus, "GPU": enlarged.gpus}


def choose_resources(
    nodes: Sequence[Node],
    cpus: float | None,
    gpus: float | None,
    memory_share: float | None = None,
) -> TrialResources:
    """Complete the user's request from what the cluster has, and what a trial was measured to take.

    With GPUs, a trial gets as much of one as it needs memory of, the whole of it if that was not
    measured, and its share of the CPUs. Without, it gets one CPU, or as many as go with the memory
    it needs: for small models, many trials of one thread finish sooner than few of many.

    Args:
        nodes: the nodes of the cluster, one or more; see :func:`alive_nodes`.
        cpus: CPUs of a trial, if the user said so.
        gpus: GPUs of a trial, if the user said so.
        memory_share: of the memory of its device that a trial takes, from 0 to 1.

    Raises:
        ConfigError: no node has what is asked for.
    """
    if gpus is None:
        gpus = 0.0 if cluster_device(nodes) == "cpu" else packed_gpus(memory_share)
    if cpus is None:
        cpus = 1.0
        if gpus:
            shares = [n.get("CPU", 0.0) / n["GPU"] for n in nodes if n.get("GPU", 0.0)]
            cpus = max(1.0, float(int(min(shares, default=0.0) * gpus)))
        elif memory_share:
            smallest = min(n["CPU"] for n in nodes if n.get("CPU", 0.0) >= 1)
            cpus = float(min(smallest, max(1, math.ceil(smallest * memory_share * _RESERVE))))
    if not any(n.get("CPU", 0.0) >= cpus and n.get("GPU", 0.0) >= gpus for n in nodes):
        largest = max(nodes, key=lambda n: (n.get("GPU", 0.0), n.get("CPU", 0.0)))
        raise ConfigError(
            f"a trial asks for {cpus:g} CPUs and {gpus:g} GPUs, but the largest node has "
            f"{largest.get('CPU', 0.0):g} CPUs and {largest.get('GPU', 0.0):g} GPUs; lower "
            "--cpus-per-trial or --gpus-per-trial."
        )
    return TrialResources(cpus, gpus, max(node.get("CPU", 0.0) for node in nodes))


def slots(nodes: Sequence[Node], resources: TrialResources) -> int:
    """Return how many trials these nodes run at a time, at least 1."""

    def fit(node: Node) -> int:
        by_cpu = node.get("CPU", 0.0) / resources.cpus
        by_gpu = node.get("GPU", 0.0) / resources.gpus if resources.gpus else math.inf
        return int(min(by_cpu, by_gpu) + 1e-9)

    return max(1, sum(fit(node) for node in nodes))


def cluster_device(nodes: Sequence[Node]) -> str:
    """Return "cuda" where a node has a GPU, else "cpu"."""
    return "cuda" if any(node.get("GPU", 0.0) for node in nodes) else "cpu"


def packed_gpus(memory_share: float | None) -> float:
    """Return the part of a GPU that a trial asks for which takes this share of its memory."""
    if not memory_share:
        return 1.0
    together = min(_MOST_ON_A_GPU, int(1 / (memory_share * _RESERVE)))
    # Rounded down: Ray counts in ten-thousandths, and as many as fit are to fit.
    return math.floor(10_000 / together) / 10_000 if together > 1 else 1.0


def alive_nodes() -> list[Node]:
    """Return the resources of each node of the cluster that is connected and alive."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [node["Resources"] for node in nodes if node["Alive"]]
