"""Where runs are made: in this process, in several on this machine, or on a Ray cluster."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
import torch

from studies.planning.ray_cluster import connect

Task = TypeVar("Task")
Outcome = TypeVar("Outcome")


@dataclass(frozen=True, kw_only=True)
class Workers:
    """How runs are shared out."""

    threads: int = 2
    """Of PyTorch in each run, and the CPUs that it asks a cluster for."""
    at_once: int = 1
    """Runs at a time on this machine; more than one are processes of their own."""
    address: str | None = None
    """Of a Ray cluster, which makes as many runs at a time as it has room for."""
    gpus: float = 0.0
    """Of each run, on a cluster; runs with a fraction share one."""

    def map(
        self, function: Callable[[Task], Outcome], tasks: Sequence[Task]
    ) -> Iterator[tuple[int, Outcome]]:
        """Call a function for each task; yield the task's number and what came of it, as it ends.

        A task whose process or node is lost begins again elsewhere. An error in a task is raised
        here, when those that ended before it have been yielded.
        """
        if self.address is None and self.at_once == 1:
            torch.set_num_threads(self.threads)
            for number, task in enumerate(tasks):
                yield number, function(task)
            return
        connect(self.address, None if self.address else self.threads * self.at_once)
        try:
            remote: Any = ray.remote(num_cpus=self.threads, num_gpus=self.gpus)(_call)
            numbers = {
                remote.remote(function, task, self.threads): number
                for number, task in enumerate(tasks)
            }
            waiting = list(numbers)
            while waiting:
                (ended,), waiting = ray.wait(waiting, num_returns=1)
                yield numbers[ended], ray.get(ended)
        finally:
            ray.shutdown()


def _call(function: Callable[[Task], Outcome], task: Task, threads: int) -> Outcome:
    torch.set_num_threads(threads)
    return function(task)
