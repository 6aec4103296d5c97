"""A worker process, for measurements that need settings of their own (threads, allocator)."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

Functions = Mapping[str, Callable[[], Any]]

_functions: dict[str, Callable[[], Any]] = {}


@contextmanager
def subprocess_worker(
    create: Callable[..., Functions], *arguments: Any
) -> Iterator[Callable[[str], Any]]:
    """Start a process that creates functions once and executes them on request.

    The process is idle between requests, and ends with the context.

    Args:
        create: a module-level function, called once in the process; returns functions by name.
        arguments: of `create`; must be picklable.

    Yields:
        A function that takes a name, executes that function in the process, waits for it, and
        returns its result.
    """
    with ProcessPoolExecutor(1, get_context("spawn"), _initialise, (create, arguments)) as process:
        yield lambda name: process.submit(_execute, name).result()


def _initialise(create: Callable[..., Functions], arguments: tuple[Any, ...]) -> None:
    _functions.update(create(*arguments))


def _execute(name: str) -> Any:
    return _functions[name]()
