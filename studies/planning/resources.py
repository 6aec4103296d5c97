"""The resources that a trial requests from the cluster, and its threads."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray

from batchcam.errors import ConfigError

Node = dict[str, float]
"""The resources of one node by Ray's names, such as "CPU" and "GPU"."""

_RESERVE = 1.2
"""Factor from the peak memory of a probe to the memory that is reserved for a trial."""
_MAX_PER_GPU = 8
"""Maximum number of trials that share a GPU."""


@dataclass(frozen=True)
class TrialResources:
    """CPUs and GPUs that one trial reserves; fractions share a device.

    Attributes:
        cpus: CPUs of a trial.
        gpus: GPUs of a trial.
        max_cpus: CPUs of the largest node, the most that a trial can get.
    """

    cpus: float
    gpus: float
    max_cpus: float

    @property
    def threads(self) -> int:
        """Threads for PyTorch: the trial's CPUs, so that trials do not compete for cores."""
        return max(1, int(self.cpus))

    def enlarged(self, multiplier: int) -> "TrialResources":
        """Return `multiplier` times these resources, at most a whole GPU and a whole node's CPUs.

        CPUs stand for host memory: a trial with more of them shares its node with fewer others.
        """
        gpus = max(self.gpus, min(1.0, self.gpus * multiplier)) if self.gpus else 0.0
        cpus = max(self.cpus, min(self.max_cpus, self.cpus * multiplier))
        return TrialResources(cpus, gpus, self.max_cpus)

    def request(self, multiplier: int) -> dict[str, float]:
        """Return Ray's resource request of `multiplier` times these resources."""
        enlarged = self.enlarged(multiplier)
        return {"CPU": enlarged.cpus, "GPU": enlarged.gpus}


def choose_resources(
    nodes: Sequence[Node],
    cpus: float | None,
    gpus: float | None,
    memory_fraction: float | None = None,
) -> TrialResources:
    """Complete the user's request from the cluster's nodes and the measured memory of a trial.

    With GPUs, a trial gets the part of a GPU whose memory it needs, or a whole GPU if its memory
    was not measured, and the node's CPUs in proportion. Without GPUs it gets one CPU, or the part
    of the smallest node's CPUs that corresponds to its memory: small models finish sooner as many
    trials of one thread than as few trials of many threads.

    Args:
        nodes: the nodes of the cluster, at least one; see :func:`alive_nodes`.
        cpus: CPUs of a trial that the user requested, or None.
        gpus: GPUs of a trial that the user requested, or None.
        memory_fraction: peak memory of a trial by the memory of its device, from 0 to 1.

    Raises:
        ConfigError: no node has the requested resources.
    """
    if gpus is None:
        gpus = 0.0 if cluster_device(nodes) == "cpu" else packed_gpus(memory_fraction)
    if cpus is None:
        cpus = 1.0
        if gpus:
            shares = [n.get("CPU", 0.0) / n["GPU"] for n in nodes if n.get("GPU", 0.0)]
            cpus = max(1.0, float(int(min(shares, default=0.0) * gpus)))
        elif memory_fraction:
            smallest = min(n["CPU"] for n in nodes if n.get("CPU", 0.0) >= 1)
            cpus = float(min(smallest, max(1, math.ceil(smallest * memory_fraction * _RESERVE))))
    if not any(n.get("CPU", 0.0) >= cpus and n.get("GPU", 0.0) >= gpus for n in nodes):
        largest = max(nodes, key=lambda n: (n.get("GPU", 0.0), n.get("CPU", 0.0)))
        raise ConfigError(
            f"a trial requests {cpus:g} CPUs and {gpus:g} GPUs, but the largest node has "
            f"{largest.get('CPU', 0.0):g} CPUs and {largest.get('GPU', 0.0):g} GPUs; lower "
            "--cpus-per-trial or --gpus-per-trial."
        )
    return TrialResources(cpus, gpus, max(node.get("CPU", 0.0) for node in nodes))


def slots(nodes: Sequence[Node], resources: TrialResources) -> int:
    """Return how many trials the nodes can run at a time, at least 1."""

    def fit(node: Node) -> int:
        by_cpu = node.get("CPU", 0.0) / resources.cpus
        by_gpu = node.get("GPU", 0.0) / resources.gpus if resources.gpus else math.inf
        return int(min(by_cpu, by_gpu) + 1e-9)

    return max(1, sum(fit(node) for node in nodes))


def cluster_device(nodes: Sequence[Node]) -> str:
    """Return "cuda" if a node has a GPU, else "cpu"."""
    return "cuda" if any(node.get("GPU", 0.0) for node in nodes) else "cpu"


def packed_gpus(memory_fraction: float | None) -> float:
    """Return the part of a GPU for a trial that takes this fraction of the GPU's memory."""
    if not memory_fraction:
        return 1.0
    together = min(_MAX_PER_GPU, int(1 / (memory_fraction * _RESERVE)))
    # Rounded down to Ray's unit of 1/10,000, so that `together` trials fit.
    return math.floor(10_000 / together) / 10_000 if together > 1 else 1.0


def alive_nodes() -> list[Node]:
    """Return the resources of each node of the connected cluster that is alive."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [node["Resources"] for node in nodes if node["Alive"]]
