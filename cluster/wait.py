"""Wait until a Ray cluster has a given number of nodes.

    python -m cluster.wait --nodes 4

A study reads the cluster's resources once, at its start, to choose the resources of a trial. Nodes
that join later are used. But if no node has a GPU at the start, trials request none, and GPUs that
join later are not used.
"""

import os
import sys
import time
from dataclasses import dataclass

from batchcam.errors import BatchCamError
from batchcam.extras import require_extra
from studies.commands import run_command


@dataclass(frozen=True, kw_only=True)
class Wait:
    """Wait until a Ray cluster has a given number of nodes; exit with 2 after a timeout."""

    nodes: int
    """Number of alive nodes to wait for, the head included."""
    address: str | None = None
    """Address of the cluster; the default is RAY_ADDRESS."""
    seconds: float = 300
    """Timeout."""


def main(settings: Wait) -> None:
    """Return when the cluster has the nodes, or exit with 2 after the timeout."""
    with require_extra("studies", "cluster.wait"):
        import ray

        from studies.planning.ray_cluster import connect
        from studies.planning.resources import alive_nodes
    end = time.monotonic() + settings.seconds
    address = settings.address or os.environ.get("RAY_ADDRESS")
    if address is None:
        print("error: no cluster is given; set --address or RAY_ADDRESS.", file=sys.stderr)
        sys.exit(2)
    alive: int | None = None
    reason = ""
    while alive is None or alive < settings.nodes:
        if time.monotonic() > end:
            print(
                f"error: {alive or 0} of {settings.nodes} nodes joined within "
                f"{settings.seconds:g} seconds; read the logs of the missing nodes, or raise "
                f"--seconds.{reason}",
                file=sys.stderr,
            )
            sys.exit(2)
        try:
            if alive is None:
                connect(address)
            alive = len(alive_nodes())
        except (BatchCamError, ConnectionError) as error:  # The head may not have started yet.
            reason = f" The last error: {error}"
        time.sleep(0.5)
    ray.shutdown()
    print(f"{alive} nodes", flush=True)


if __name__ == "__main__":
    run_command(main, Wait)
