"""A Ray cluster of several nodes on one machine: a head and workers, each its own processes.

    python -m cluster.local --workers 2 --cpus-per-worker 1

starts one, prints how to use it, and keeps it until Ctrl-C. It shows what a study does on several
nodes, nodes that come and go included, without several machines.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import tyro
from ray.cluster_utils import Cluster


@dataclass(frozen=True, kw_only=True)
class LocalClusterSettings:
    """Start a head and worker nodes on this machine, until Ctrl-C."""

    workers: int = 2
    """Worker nodes beside the head."""
    cpus_per_worker: int = 1
    """CPUs that each worker offers; they are counted, not reserved."""
    head_cpus: int = 0
    """CPUs that the head offers; with 0, trials run on workers only."""
    dashboard_port: int = 8265
    """Port of the dashboard and of job submission, on this machine only."""

    def __post_init__(self) -> None:
        for name in ("workers", "cpus_per_worker", "head_cpus"):
            if getattr(self, name) < 0:
                raise SystemExit(f"error: {name}={getattr(self, name)} must be 0 or more.")
        if self.workers * self.cpus_per_worker + self.head_cpus == 0:
            raise SystemExit("error: no node would have a CPU; raise --workers or --head-cpus.")


class LocalCluster:
    """A running cluster: its address, and its worker nodes."""

    def __init__(self, settings: LocalClusterSettings, *, dashboard: bool) -> None:
        self._settings = settings
        head: dict[str, Any] = {"num_cpus": settings.head_cpus, "include_dashboard": dashboard}
        if dashboard:
            head |= {"dashboard_host": "127.0.0.1", "dashboard_port": settings.dashboard_port}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self.workers = [self.add_worker() for _ in range(settings.workers)]

    @property
    def address(self) -> str:
        """What `ray.init(address=...)` and `--address` take."""
        return str(self._cluster.address)

    def add_worker(self) -> Any:
        """Start one more worker node, wait until it is alive, and return it."""
        return self._cluster.add_node(num_cpus=self._settings.cpus_per_worker)

    def remove_worker(self, node: Any) -> None:
        """Kill a worker node with all its processes, as a machine that is lost would go."""
        self._cluster.remove_node(node, allow_graceful=False)

    def shutdown(self) -> None:
        """Stop every node."""
        self._cluster.shutdown()  # type: ignore[no-untyped-call]


@contextmanager
def local_cluster(
    settings: LocalClusterSettings | None = None, *, dashboard: bool = False
) -> Iterator[LocalCluster]:
    """Start a cluster, and stop it at the end of the block."""
    cluster = LocalCluster(settings or LocalClusterSettings(), dashboard=dashboard)
    try:
        yield cluster
    finally:
        cluster.shutdown()


def main(argv: Sequence[str] | None = None) -> None:
    """Start a cluster from the command line and keep it until it is interrupted."""
    settings = tyro.cli(LocalClusterSettings, args=argv, prog="python -m cluster.local")
    ended = threading.Event()
    with local_cluster(settings, dashboard=True) as cluster:
        for number in (signal.SIGINT, signal.SIGTERM):  # Only now: Ray sets handlers of its own.
            signal.signal(number, lambda *_: ended.set())
        token = " RAY_AUTH_MODE=token" if os.environ.get("RAY_AUTH_MODE") == "token" else ""
        print(
            f"{1 + settings.workers} nodes are up. To run a study on them:\n\n"
            f"  RAY_ADDRESS={cluster.address}{token} python studies/bcpl_sweep.py\n"
            f"  RAY_API_SERVER_ADDRESS=http://127.0.0.1:{settings.dashboard_port}{token} "
            "ray job submit studies/bcpl_sweep.py\n\n"
            "Ctrl-C ends them.",
            flush=True,
        )
        ended.wait()
    sys.exit(0)


if __name__ == "__main__":
    main()
