"""Decides what follows the failure of a trial: a start with more memory, another try, or the end.

The process of a trial is out of memory in three ways, which need not raise an exception in it:

- The trainable raised `MemoryError` outside of what it protects.
- Ray's memory monitor killed the process, because the node was nearly full. Ray names this cause.
- The kernel's OOM killer killed the process. Ray sees only that a process has gone, as after any
  SIGKILL or crash. The kernel counts its kills (:func:`studies.engine.cgroups.oom_kills`): if the
  count of the node rose, the trial counts as out of memory. The count does not name the process.
  If another process of the node was killed in the same minute, a trial that died of another cause
  is enlarged too, which costs resources but no result. Without a rise, or where the kernel does
  not count or the node cannot be asked, the death is an ordinary failure.
"""

import pickle
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.exceptions import OutOfMemoryError, RayActorError, RayError, RayTaskError
from ray.tune.experiment import Trial
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from studies.engine.cgroups import oom_kills
from studies.engine.protocol import NUMBER

_ANSWER_SECONDS = 20.0
"""How long a node may take to tell its count; starting a process on a full node is slow."""
_SAME_EVENT_SECONDS = 60.0
"""Deaths on one node within this time of a kill may be of the same shortage."""


@dataclass(frozen=True)
class Verdict:
    """What follows a failure.

    Attributes:
        starts_again: whether the trial is proposed again.
        reason: why the trial's memory was short; None for other failures.
    """

    starts_again: bool
    reason: str | None = None


class Failures(tune.Callback):
    """Judges the failures of a search's trials.

    Must be a callback of the search, before those that ask for a verdict, and the scheduler must
    call :meth:`judge`: Ray tells it of a failure first.

    Args:
        max_failures: how often a trial that fails is tried again. A trial that is enlarged has not
            failed.
        enlarge: called with the number of a trial that is out of memory; returns None if there is
            no more memory for it. Its failure is then an ordinary one, because the trials beside
            it may have filled the node.
    """

    def __init__(self, max_failures: int, enlarge: Callable[[int], int | None]) -> None:
        self._max_failures = max_failures
        self._enlarge = enlarge
        self._kills = _NodeKills()
        self._started: set[str] = set()
        self._failed: dict[int, int] = {}
        self._verdicts: dict[str, Verdict] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing: Ray pickles its callbacks and its scheduler."""
        return {}

    def setup(
        self,
        stop: Any = None,
        num_samples: int | None = None,
        total_num_samples: int | None = None,
        **info: Any,
    ) -> None:
        """Begin to watch the nodes of the cluster."""
        del stop, num_samples, total_num_samples, info
        self._kills.watch()

    def on_trial_start(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Begin to watch nodes that have joined the cluster."""
        del iteration, trials, info
        self._started.add(trial.trial_id)
        self._kills.watch()

    def judge(self, trial: Trial) -> None:
        """Decide what follows the failure of a trial."""
        number = trial.config[NUMBER]
        reason = None
        if trial.trial_id in self._started:  # Else it has not used any memory.
            reason = self._shortage(_error_of(trial))
        if reason and self._enlarge(number) is not None:
            self._verdicts[trial.trial_id] = Verdict(True, reason)
            return
        self._failed[number] = self._failed.get(number, 0) + 1
        again = self._failed[number] <= self._max_failures
        self._verdicts[trial.trial_id] = Verdict(again, reason)

    def verdict(self, trial_id: str) -> Verdict:
        """Return what follows the failure of a trial, by Ray's id of it."""
        return self._verdicts.get(trial_id, Verdict(False))

    def _shortage(self, error: Exception | None) -> str | None:
        if isinstance(error, OutOfMemoryError):
            return "killed by Ray's memory monitor"
        if isinstance(error, RayTaskError) and isinstance(error.cause, MemoryError):
            return "MemoryError"
        if isinstance(error, RayActorError):
            address = re.search(r"^\tip: (\S+)$", str(error), re.MULTILINE)
            if address and self._kills.rose(address[1]):
                return "killed by the kernel's OOM killer"
        return None


class _NodeKills:
    """The OOM kills of each node since it was seen first."""

    def __init__(self) -> None:
        self._known: dict[str, ray.ObjectRef[int | None]] = {}
        self._rose_at: dict[str, float] = {}

    def watch(self) -> None:
        """Ask the nodes that are new for their counts; return without waiting for them."""
        for node in _alive_nodes():
            if node["NodeID"] not in self._known:
                self._known[node["NodeID"]] = self._ask(node["NodeID"])

    def rose(self, address: str) -> bool:
        """Return whether the count of a node at this IP address rose, now or a short time ago."""
        known = [node["NodeID"] for node in _alive_nodes() if node["NodeManagerAddress"] == address]
        for node in known:
            asked = self._ask(node)
            before, now = _answer(self._known.get(node)), _answer(asked)
            if now is not None:
                self._known[node] = asked
                if before is not None and now > before:
                    self._rose_at[node] = time.monotonic()
        due = time.monotonic() - _SAME_EVENT_SECONDS
        return any(self._rose_at.get(node, due) > due for node in known)

    def _ask(self, node: str) -> "ray.ObjectRef[int | None]":
        task = ray.remote(num_cpus=0)(oom_kills)
        found: ray.ObjectRef[int | None] = task.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
        ).remote()
        return found


def _alive_nodes() -> list[dict[str, Any]]:
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [node for node in nodes if node["Alive"]]


def _answer(asked: "ray.ObjectRef[int | None] | None") -> int | None:
    """Return the answer of a node, or None if it does not answer."""
    if asked is None:
        return None
    try:
        return ray.get(asked, timeout=_ANSWER_SECONDS)
    except RayError:  # The node has died, or the time is over.
        return None


def _error_of(trial: Trial) -> Exception | None:
    """Return the error that ended a trial; None if it is of another kind than Ray's own."""
    path = trial.pickled_error_file
    if path is None:
        return None
    try:
        with Path(path).open("rb") as file:
            error = pickle.load(file)
    except Exception:  # The class of an exception may exist in the trial's process only.
        return None
    return error if isinstance(error, Exception) else None


@contextmanager
def memory_kills_end_trials_only() -> Iterator[None]:
    """Make Ray Tune take a kill by Ray's memory monitor as the death of an actor.

    Ray Tune 2.60 expects a `RayActorError` where an actor dies. The memory monitor's error is none,
    so that one killed trial would end the whole search with "Caught unexpected exception". Within
    this context `OutOfMemoryError` is a `RayActorError`.
    """
    if issubclass(OutOfMemoryError, RayActorError):
        yield
        return
    error: Any = OutOfMemoryError
    bases = error.__bases__
    error.__bases__ = (RayActorError,)
    error.preempted = False
    try:
        yield
    finally:
        error.__bases__ = bases
        del error.preempted
