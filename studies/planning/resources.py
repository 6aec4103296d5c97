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
_UNITS = 10_000
"""Ray counts a GPU in units of 1/10,000, and rounds down to whole units."""


@dataclass(frozen=True)
class TrialResources:
    """CPUs and GPUs that one trial reserves; fractions share a device.

    Attributes:
        cpus: CPUs of a trial.
        gpus: GPUs of a trial.
        max_cpus: CPUs of the largest node that has these GPUs, the most that a trial can get.

    Raises:
        ConfigError: no trial can have this number of GPUs; see :func:`check_gpus`.
    """

    cpus: float
    gpus: float
    max_cpus: float

    def __post_init__(self) -> None:
        check_gpus(self.gpus)

    @property
    def threads(self) -> int:
        """Threads for PyTorch: the trial's CPUs, so that trials do not compete for cores."""
        return max(1, int(self.cpus))

    def enlarged(self, multiplier: int) -> "TrialResources":
        """Return `multiplier` times these resources, at most a whole GPU and a whole node's CPUs.

        A trial that requests several GPUs keeps their number. CPUs stand for host memory: a
        trial with more of them shares its node with fewer others.
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
    trials: int | None = None,
) -> TrialResources:
    """Complete the user's request from the cluster's nodes and the measured memory of a trial.

    With GPUs, a trial gets a whole GPU, or the part that :func:`shared_gpus` returns, and CPUs of
    the node in proportion. Without GPUs it gets one CPU, or the part of the smallest node's CPUs
    that corresponds to its memory: small models finish sooner as many trials of one thread than as
    few trials of many threads.

    All trials request the same, on all nodes. The memory fraction is measured on one device, and
    Ray chooses the device. So the fraction is valid for the whole cluster only if no other device
    has less memory than the measured one. On a smaller one, a trial may run out of memory; it then
    starts again with twice the resources. On a cluster with GPUs of several sizes, request the part
    of the smallest GPU that a trial needs.

    Args:
        nodes: the nodes of the cluster, at least one; see :func:`alive_nodes`.
        cpus: CPUs of a trial that the user requested, or None.
        gpus: GPUs of a trial that the user requested, or None.
        memory_fraction: peak memory of a trial by the total memory of the device that it was
            measured on, from 0 to 1; None if it was not measured.
        trials: how many trials are left to run; None: more than the nodes can run at a time.

    Raises:
        ConfigError: no node has the requested resources, or no trial can have them.
    """
    if gpus is None:
        gpus = shared_gpus(nodes, cpus, memory_fraction, trials)
    check_gpus(gpus)
    if cpus is None:
        cpus = 1.0
        if gpus:
            # A node with GPUs and no CPU, such as a head that runs no trials, has no part in this.
            shares = [n["CPU"] / n["GPU"] for n in nodes if n.get("GPU") and n.get("CPU", 0.0) >= 1]
            together = 1 / gpus if gpus >= 1 else _on_a_gpu(gpus)
            cpus = max(1.0, float(int(min(shares, default=0.0) / together)))
        elif memory_fraction:
            smallest = min((n["CPU"] for n in nodes if n.get("CPU", 0.0) >= 1), default=1.0)
            cpus = float(min(smallest, max(1, math.ceil(smallest * memory_fraction * _RESERVE))))
    if not any(n.get("CPU", 0.0) >= cpus and n.get("GPU", 0.0) >= gpus for n in nodes):
        largest = max(nodes, key=lambda n: (n.get("GPU", 0.0), n.get("CPU", 0.0)))
        raise ConfigError(
            f"a trial requests {cpus:g} CPUs and {gpus:g} GPUs, but the largest node has "
            f"{largest.get('CPU', 0.0):g} CPUs and {largest.get('GPU', 0.0):g} GPUs; lower "
            "--cpus-per-trial or --gpus-per-trial."
        )
    # The CPUs of a node without these GPUs cannot be given to the trial.
    usable = [node.get("CPU", 0.0) for node in nodes if node.get("GPU", 0.0) >= gpus]
    return TrialResources(cpus, gpus, max(usable))


def slots(nodes: Sequence[Node], resources: TrialResources) -> int:
    """Return how many trials the nodes can run at a time, at least 1.

    A trial with a fraction of a GPU is on one GPU: two of 0.4 fit on each, not five on two.
    """

    def fit(node: Node) -> int:
        by_cpu = _by_cpus(node, resources.cpus)
        return min(by_cpu, _by_gpus(node, resources.gpus)) if resources.gpus else by_cpu

    return max(1, sum(fit(node) for node in nodes))


def cluster_device(nodes: Sequence[Node]) -> str:
    """Return "cuda" if a node has a GPU, else "cpu"."""
    return "cuda" if any(node.get("GPU", 0.0) for node in nodes) else "cpu"


def _by_cpus(node: Node, cpus: float) -> int:
    """Return how many trials of this many CPUs fit on a node."""
    return int(node.get("CPU", 0.0) / cpus + 1e-9)


def _by_gpus(node: Node, gpus: float) -> int:
    """Return how many trials of this many GPUs, or this part of one, fit on a node."""
    whole = int(node.get("GPU", 0.0))
    if gpus >= 1:
        return whole // int(gpus)
    return whole * _on_a_gpu(gpus)


def _on_a_gpu(gpus: float) -> int:
    """Return how many trials of this part of a GPU Ray places on one."""
    return _UNITS // int(gpus * _UNITS)


def check_gpus(gpus: float) -> None:
    """Refuse a number of GPUs that no trial can have.

    Raises:
        ConfigError: it is negative, not finite, below Ray's unit of 1/10,000, or above 1 and not
            whole.
    """
    if not (math.isfinite(gpus) and gpus >= 0):
        raise ConfigError(f"gpus_per_trial={gpus} must be a finite number >= 0.")
    if gpus and int(gpus * _UNITS) == 0:
        raise ConfigError(
            f"gpus_per_trial={gpus} is less than Ray's smallest part of a GPU, {1 / _UNITS}; raise "
            "it, or set it to 0 to train on CPUs."
        )
    if gpus > 1 and gpus != int(gpus):
        raise ConfigError(
            f"gpus_per_trial={gpus} is more than one GPU and not a whole number; use a fraction "
            "up to 1, which shares a GPU, or a whole number."
        )


def shared_gpus(
    nodes: Sequence[Node], cpus: float | None, memory_fraction: float | None, trials: int | None
) -> float:
    """Return the part of a GPU for a trial; 0 on a cluster without GPUs.

    No GPU is shared while another is idle. Ray fills a GPU before it uses the next on that node, so
    k trials share a GPU only if there are k trials for every GPU, and CPUs for k trials beside it:
    then all places are taken, in whichever order Ray fills them. With 10 trials on 8 GPUs, 8 run
    alone and 2 follow; with two on each, Ray would leave 3 GPUs idle. Nothing is lost by that: one
    trial whose steps are recorded as CUDA graphs keeps a GPU busy (results/gpu).

    The part is 1/k, the largest with k trials on a GPU. A part in between, such as 0.4 or 0.8,
    would leave the rest of each GPU to nobody. GPUs beside which there are no CPUs for a trial do
    not count. At the end of a study, when fewer trials are left than places, GPUs do become idle:
    trials do not move.

    Args:
        nodes: the nodes of the cluster.
        cpus: CPUs of a trial that the user requested, or None.
        memory_fraction: see :func:`choose_resources`; None: a trial gets a whole GPU.
        trials: see :func:`choose_resources`.
    """
    if cluster_device(nodes) == "cpu":
        return 0.0
    by_cpus = [_by_cpus(node, cpus or 1.0) for node in nodes]
    used = [min(by_cpu, _by_gpus(node, 1.0)) for by_cpu, node in zip(by_cpus, nodes, strict=True)]
    if not memory_fraction or not any(used):
        return 1.0
    bounds = [_MAX_PER_GPU, int(1 / (memory_fraction * _RESERVE))]
    bounds += [by_cpu // gpus for by_cpu, gpus in zip(by_cpus, used, strict=True) if gpus]
    if trials is not None:
        bounds.append(trials // sum(used))
    # Rounded down to Ray's unit, so that so many trials fit.
    return _UNITS // max(1, min(bounds)) / _UNITS


def alive_nodes() -> list[Node]:
    """Return the resources of each node of the connected cluster that is alive."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [node["Resources"] for node in nodes if node["Alive"]]
