"""Settings of all tests: one thread, Hypothesis without deadlines, a clean environment."""

import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)  # For fixtures of a wider scope, which run before _one_thread.

settings.register_profile("batchcam", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("batchcam")

# BATCHCAM_DATA stays: tests find the real data files through it.
_PRIVATE = ("WANDB_", "RAY_", "BATCHCAM_OPTUNA_", "XDG_", "NETRC", "COLUMNS")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Reset PyTorch to one thread, whatever the previous test has set.

    Results are reproducible only for a fixed number of threads. One thread is also by far the
    fastest choice on a busy machine, which has no idle cores.
    """
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the environment of a user without W&B account, Ray cluster or database."""
    # All tests of a session share a home: Ray caches the token that it first read from there.
    home = tmp_path_factory.getbasetemp() / "home"
    home.mkdir(exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_PRIVATE)}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # By default Ray's workers have a lower priority, and wait for the machine's other processes.
    # A Ray that starts in this process would require a token from then on, also of the drivers of
    # clusters that started without one. Tests of tokens set the mode themselves.
    ray = {"RAY_worker_niceness": "0", "RAY_AUTH_MODE": "disabled"}
    return kept | {"HOME": str(home), "NETRC": str(home / "netrc"), "PATH": path} | ray


@pytest.fixture(scope="session", autouse=True)
def _clean_environment(environment: dict[str, str]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in os.environ.keys() - environment.keys():
            patch.delenv(name)
        for name, value in environment.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """Return a function that returns a free TCP port."""

    def choose() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return int(probe.getsockname()[1])

    return choose
