"""What a trial asks of the cluster, and how many threads it then uses."""

from dataclasses import dataclass
from typing import Any

import ray
from ray import tune

from batchcam.errors import ConfigError


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

    def as_ray(self) -> tune.PlacementGroupFactory:
        """Return the request in Ray's terms."""
        return tune.PlacementGroupFactory([{"CPU": self.cpus, "GPU": self.gpus}])


def choose_resources(cpus: float | None, gpus: float | None) -> TrialResources:
    """Complete the user's request from what the cluster has.

    With GPUs, a trial gets one, and its share of the CPUs; without, one CPU: for small models, many
    trials of one thread finish sooner than few of many.

    Raises:
        ConfigError: no node has what is asked for.
    """
    nodes = [node["Resources"] for node in _nodes() if node["Alive"]]
    total_gpus = sum(node.get("GPU", 0.0) for node in nodes)
    if gpus is None:
        gpus = 1.0 if total_gpus else 0.0
    if cpus is None:
        cpus = 1.0
        if gpus:
            shares = [n.get("CPU", 0.0) / n["GPU"] for n in nodes if n.get("GPU", 0.0)]
            cpus = max(1.0, float(int(min(shares, default=0.0) * gpus)))
    if not any(n.get("CPU", 0.0) >= cpus and n.get("GPU", 0.0) >= gpus for n in nodes):
        largest = max(nodes, key=lambda n: (n.get("GPU", 0.0), n.get("CPU", 0.0)))
        raise ConfigError(
            f"a trial asks for {cpus:g} CPUs and {gpus:g} GPUs, but the largest node has "
            f"{largest.get('CPU', 0.0):g} CPUs and {largest.get('GPU', 0.0):g} GPUs; lower "
            "--cpus-per-trial or --gpus-per-trial."
        )
    return TrialResources(cpus, gpus, max(node.get("CPU", 0.0) for node in nodes))


def _nodes() -> list[dict[str, Any]]:
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return nodes
