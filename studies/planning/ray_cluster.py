"""How a driver gets a Ray cluster: the one that is named, or one of its own."""

import logging
import os
import socket
from typing import Any

import ray

from batchcam.errors import ConfigError

# A reused actor is reset only once its last trial's thread has ended, and that thread may have a
# W&B run to finish.
WORKER_ENVIRONMENT = {"TUNE_FUNCTION_THREAD_TIMEOUT_S": "60"}
_REACH_SECONDS = 10


def connect(address: str | None, cpus: int | None = None) -> None:
    """Join the cluster that is named; start a local one if none is.

    Ray on its own would join whatever cluster happens to run on this machine.

    Args:
        address: of a cluster; None: that of RAY_ADDRESS, or a local one.
        cpus: of a local cluster; None: as many as this machine has.

    Raises:
        ConfigError: no cluster answers there.
    """
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    options: dict[str, Any] = {
        "runtime_env": {"env_vars": WORKER_ENVIRONMENT},
        "log_to_driver": False,
        "logging_level": logging.WARNING,
    }
    if address == "local":
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, **options)
        return
    try:
        _check_reachable(address)
        ray.init(address=address, **options)
    except OSError as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ConfigError(
            f"no Ray cluster answers at {address!r}: {reason}. Start one with "
            "`ray start --head`, or leave out --address and RAY_ADDRESS for a local one."
        ) from error


def _check_reachable(address: str) -> None:
    """Raise OSError if nothing listens there, which Ray would find out in some twenty minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=_REACH_SECONDS).close()
