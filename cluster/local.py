"""Run a Ray cluster of several nodes on one machine.

    python -m cluster.local --workers 2 --cpus-per-worker 1

Head and workers run in separate processes. The command prints how to use the cluster and runs until
Ctrl-C. It allows testing a study on several nodes, including nodes that join and fail, without
several machines.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from batchcam.errors import ConfigError, exit_on_error, first_line
from batchcam.extras import require_extra


@dataclass(frozen=True, kw_only=True)
class LocalClusterSettings:
    """Run a Ray cluster of a head and worker nodes on this machine until Ctrl-C."""

    workers: int = 2
    """Number of worker nodes in addition to the head."""
    cpus_per_worker: int = 1
    """CPUs that each worker advertises to Ray; they are not reserved."""
    head_cpus: int = 0
    """CPUs that the head advertises to Ray; with 0, trials run on workers only."""
    dashboard_port: int = 8265
    """Port of the dashboard and of job submission, on 127.0.0.1."""

    def __post_init__(self) -> None:
        for name in ("workers", "cpus_per_worker", "head_cpus"):
            if getattr(self, name) < 0:
                raise SystemExit(f"error: {name}={getattr(self, name)} must be 0 or more.")
        if self.workers * self.cpus_per_worker + self.head_cpus == 0:
            raise SystemExit("error: the cluster has no CPU; raise --workers or --head-cpus.")


class LocalCluster:
    """A running local cluster with its address and worker nodes.

    Raises:
        ConfigError: Ray requires a token, and there is none.
    """

    def __init__(self, settings: LocalClusterSettings, *, dashboard: bool) -> None:
        with require_extra("studies", "a Ray cluster"):
            from ray.cluster_utils import Cluster
        _check_token()
        self._settings = settings
        head: dict[str, Any] = {"num_cpus": settings.head_cpus, "include_dashboard": dashboard}
        if dashboard:
            head |= {"dashboard_host": "127.0.0.1", "dashboard_port": settings.dashboard_port}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self.workers = [self.add_worker() for _ in range(settings.workers)]

    @property
    def address(self) -> str:
        """The address for `ray.init(address=...)` and `--address`."""
        return str(self._cluster.address)

    def add_worker(self) -> Any:
        """Start one more worker node, wait until it is alive, and return it."""
        return self._cluster.add_node(num_cpus=self._settings.cpus_per_worker)

    def remove_worker(self, node: Any) -> None:
        """Kill a worker node and all its processes, which simulates the loss of a machine."""
        self._cluster.remove_node(node, allow_graceful=False)

    def shutdown(self) -> None:
        """Stop all nodes."""
        self._cluster.shutdown()  # type: ignore[no-untyped-call]


def _check_token() -> None:
    """Check that there is a token if Ray requires one. Ray's head would only time out.

    Raises:
        ConfigError: there is none.
    """
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        return
    if os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    file = Path(named or "~/.ray/auth_token").expanduser()
    try:
        reason = "" if file.read_bytes().strip() else "it is empty"
    except OSError as error:
        reason = error.strerror or first_line(error)
    if reason:
        remedy = "Correct RAY_AUTH_TOKEN_PATH" if named else "Run `ray get-auth-token --generate`"
        raise ConfigError(
            f"RAY_AUTH_MODE=token requires a token, but {file} has none: {reason}. {remedy}, set "
            "RAY_AUTH_TOKEN to a token, or unset RAY_AUTH_MODE."
        )


@contextmanager
def local_cluster(
    settings: LocalClusterSettings | None = None, *, dashboard: bool = False
) -> Iterator[LocalCluster]:
    """Start a cluster and stop it when the context exits."""
    cluster = LocalCluster(settings or LocalClusterSettings(), dashboard=dashboard)
    try:
        yield cluster
    finally:
        cluster.shutdown()


def main(argv: Sequence[str] | None = None) -> None:
    """Run a cluster with the settings of the command line until SIGINT or SIGTERM."""
    settings = tyro.cli(LocalClusterSettings, args=argv, prog="python -m cluster.local")
    stop = threading.Event()
    with exit_on_error(), local_cluster(settings, dashboard=True) as cluster:
        # After Ray has started, because Ray installs its own handlers.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        token = " RAY_AUTH_MODE=token" if os.environ.get("RAY_AUTH_MODE") == "token" else ""
        print(
            f"{1 + settings.workers} nodes are running. To run a study on them:\n\n"
            f"  RAY_ADDRESS={cluster.address}{token} python studies/bcpl_sweep.py\n"
            f"  RAY_API_SERVER_ADDRESS=http://127.0.0.1:{settings.dashboard_port}{token} "
            "ray job submit studies/bcpl_sweep.py\n\n"
            "Press Ctrl-C to stop them.",
            flush=True,
        )
        stop.wait()
    sys.exit(0)


if __name__ == "__main__":
    main()
