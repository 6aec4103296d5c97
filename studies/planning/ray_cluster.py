"""Connects a driver to a Ray cluster, or starts a local one; passes on errors of its tasks."""

import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import AuthenticationError, RayTaskError

from batchcam.errors import BatchCamError, ConfigError, first_line

# Ray resets a reused actor only after the thread of its last trial has ended. The thread may still
# have to finish a W&B run.
WORKER_ENVIRONMENT = {"TUNE_FUNCTION_THREAD_TIMEOUT_S": "60"}
_REACH_SECONDS = 10
_START = (
    "start one with `ray start --head`, or use a local one: leave out --address and unset "
    "RAY_ADDRESS."
)


def connect(address: str | None, cpus: int | None = None) -> None:
    """Connect to a cluster, or start a local one if no address is given.

    Unlike `ray.init()`, this does not connect to a cluster that happens to run on this machine.

    Args:
        address: address of the cluster; None: RAY_ADDRESS, or a local cluster.
        cpus: CPUs of a local cluster; None: all of this machine.

    Raises:
        ConfigError: no cluster answers at the address, or none accepts the connection.
    """
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    options: dict[str, Any] = {
        "runtime_env": {"env_vars": WORKER_ENVIRONMENT},
        "log_to_driver": False,
        "logging_level": logging.WARNING,
    }
    if address == "local":
        # Ray counts the GPU of a Mac, on which trials do not train: "auto" is the CPU there.
        gpus = 0 if sys.platform == "darwin" else None
        ray.init(address="local", num_cpus=cpus, num_gpus=gpus, include_dashboard=False, **options)
        return
    try:
        _check_reachable(address)
    except OSError as error:
        raise ConfigError(
            f"no Ray cluster answers at {address!r}: {_reason(error)}; {_START}"
        ) from error
    try:
        ray.init(address=address, **options)
    except (OSError, AuthenticationError) as error:
        # ConnectionError does not tell a refused token from a server that is not Ray's.
        raise ConfigError(
            f"no Ray cluster accepts a connection at {address!r}: {_reason(error)}. If the cluster "
            "requires a token, set RAY_AUTH_MODE=token, and set RAY_AUTH_TOKEN to its token or "
            f"copy its head node's ~/.ray/auth_token. If there is no cluster, {_START}"
        ) from error


@contextmanager
def errors_of_tasks() -> Iterator[None]:
    """Raise an error of the user from a Ray task as it was, without Ray's traceback in its text."""
    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, BatchCamError):
            raise error.cause from None
        raise


def _reason(error: Exception) -> str:
    """Return the first sentence of an error; Ray's remedies, which may follow, are left out."""
    return first_line(error).split(". ")[0].rstrip(".")


def _check_reachable(address: str) -> None:
    """Raise OSError if nothing listens at the address. Ray would wait for about 20 minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=_REACH_SECONDS).close()
