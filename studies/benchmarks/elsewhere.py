"""What is timed in a process of its own, beside what is timed here."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

Runs = Mapping[str, Callable[[], Any]]

_runs: dict[str, Callable[[], Any]] = {}


@contextmanager
def elsewhere(start: Callable[..., Runs], *given: Any) -> Iterator[Callable[[str], Any]]:
    """Have a process that makes its runs ready once, and then runs what is asked for, and waits.

    Args:
        start: a function of a module, which is called there; returns runs by name.
        given: what it is called with.

    Yields:
        A function that takes the name of a run, and returns what the run returns.
    """
    with ProcessPoolExecutor(1, get_context("spawn"), _begin, (start, given)) as process:
        yield lambda name: process.submit(_run, name).result()


def _begin(start: Callable[..., Runs], given: tuple[Any, ...]) -> None:
    _runs.update(start(*given))


def _run(name: str) -> Any:
    return _runs[name]()
