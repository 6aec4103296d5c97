"""Settings of all tests: one thread, hypothesis without deadlines, a clean environment."""

import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)  # For fixtures that live longer than a test; see _one_thread.

settings.register_profile("batchcam", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("batchcam")

# Not BATCHCAM_DATA, by which tests find real files.
_PRIVATE = ("WANDB_", "RAY_", "BATCHCAM_OPTUNA_", "XDG_", "NETRC", "COLUMNS")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Compute with one thread, whatever the previous test set.

    Results are promised per number of threads, and idle cores are not: one thread is both the
    reproducible and, on a busy machine, by far the fast choice.
    """
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a user who has no W&B account, no Ray cluster and no database."""
    # One home for all tests of a session: Ray keeps the token it once read from there.
    home = tmp_path_factory.getbasetemp() / "home"
    home.mkdir(exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_PRIVATE)}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # Ray's workers would else wait for whatever else the machine does.
    ray = {"RAY_worker_niceness": "0"}
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
    """Return a function that returns a free port."""

    def choose() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return int(probe.getsockname()[1])

    return choose
