"""Wait until a Ray cluster has all its nodes.

    python -m cluster.wait --nodes 4

A study looks at the cluster once, when it begins, to decide what a trial asks for; nodes that come
later are used, but a GPU that nobody knew of is not.
"""

import os
import sys
import time
from dataclasses import dataclass

import ray
import tyro

from batchcam.errors import BatchCamError
from studies.planning.ray_cluster import connect
from studies.planning.resources import alive_nodes


@dataclass(frozen=True, kw_only=True)
class Wait:
    """Wait until a Ray cluster has all its nodes."""

    nodes: int
    """That are to be alive."""
    address: str | None = None
    """Of the cluster; RAY_ADDRESS if not given."""
    seconds: float = 300
    """To wait at most."""


def main(settings: Wait) -> None:
    """Return when the nodes are there, or exit with 2."""
    end = time.monotonic() + settings.seconds
    address = settings.address or os.environ.get("RAY_ADDRESS")
    if address is None:
        print("error: name a cluster by --address or RAY_ADDRESS.", file=sys.stderr)
        sys.exit(2)
    seen: int | None = None
    while seen is None or seen < settings.nodes:
        if time.monotonic() > end:
            print(
                f"error: {seen or 0} of {settings.nodes} nodes came within "
                f"{settings.seconds:g} seconds; see the logs of the others, or raise --seconds.",
                file=sys.stderr,
            )
            sys.exit(2)
        try:
            if seen is None:
                connect(address)
            seen = len(alive_nodes())
        except (BatchCamError, ConnectionError):  # The head is not there yet.
            pass
        time.sleep(0.5)
    ray.shutdown()
    print(f"{seen} nodes", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Wait))
