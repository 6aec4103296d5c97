"""Connects a driver to a Ray cluster, or starts a local one."""

import logging
import os
import socket
from typing import Any

import ray
from ray.exceptions import AuthenticationError

from batchcam.errors import ConfigError, first_line

# Ray resets a reused actor only after the thread of its last trial has ended. The thread may still
# have to finish a W&B run.
WORKER_ENVIRONMENT = {"TUNE_FUNCTION_THREAD_TIMEOUT_S": "60"}
_REACH_SECONDS = 10
_TOKEN = (
    "Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to the cluster's token, or copy the cluster's "
    "file ~/.ray/auth_token."
)


def connect(address: str | None, cpus: int | None = None) -> None:
    """Connect to a cluster, or start a local one if no address is given.

    Unlike `ray.init()`, this does not connect to a cluster that happens to run on this machine.

    Args:
        address: address of the cluster; None: RAY_ADDRESS, or a local cluster.
        cpus: CPUs of a local cluster; None: all of this machine.

    Raises:
        ConfigError: no cluster answers at the address, or it refuses this process's token.
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
    except AuthenticationError as error:
        raise ConfigError(
            f"cannot join the Ray cluster at {address!r}: {error.message.rstrip('.')}. {_TOKEN}"
        ) from error
    except OSError as error:  # Ray also raises ConnectionError where the token is wrong.
        reason = first_line(error).rstrip(".")
        raise ConfigError(
            f"no Ray cluster answers at {address!r}: {reason}. Start one with "
            "`ray start --head`, or use a local one: leave out --address and unset RAY_ADDRESS. "
            f"If the cluster requires a token: {_TOKEN}"
        ) from error


def _check_reachable(address: str) -> None:
    """Raise OSError if nothing listens at the address. Ray would wait for about 20 minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=_REACH_SECONDS).close()
