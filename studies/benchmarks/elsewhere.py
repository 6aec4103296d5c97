"""What is timed in a process of its own, beside what is timed here."""

from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from types import TracebackType
from typing import Any

_runs: dict[str, Callable[[], Any]] = {}


class Elsewhere:
    """A process that makes its runs ready once, and then runs what is asked for, and waits."""

    def __init__(self, start: Callable[..., Mapping[str, Callable[[], Any]]], *given: Any) -> None:
        """Start the process.

        Args:
            start: a function of a module, which is called there; returns runs by name.
            given: what it is called with.
        """
        context = get_context("spawn")
        self._process = ProcessPoolExecutor(1, context, _begin, (start, given))

    def __call__(self, name: str) -> Any:
        """Return what a run returns."""
        return self._process.submit(_run, name).result()

    def __enter__(self) -> "Elsewhere":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.shutdown()


def _begin(start: Callable[..., Mapping[str, Callable[[], Any]]], given: tuple[Any, ...]) -> None:
    _runs.update(start(*given))


def _run(name: str) -> Any:
    return _runs[name]()
