"""Executes runs in this process, in several processes on this machine, or on a Ray cluster."""

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
    """Where runs are executed, and with which resources."""

    threads: int = 2
    """PyTorch threads per run, and the CPUs that each run reserves on a cluster."""
    at_once: int = 1
    """Concurrent runs on this machine; each is a separate process if there is more than one."""
    address: str | None = None
    """Address of a Ray cluster, which executes as many runs at a time as its resources allow."""
    gpus: float = 0.0
    """GPUs per run on a cluster; a fraction lets several runs share one GPU."""

    def map(
        self, function: Callable[[Task], Outcome], tasks: Sequence[Task]
    ) -> Iterator[tuple[int, Outcome]]:
        """Call `function` on each task; yield `(index of the task, result)` in order of completion.

        Ray retries a task whose process or node is lost. An exception of a task is raised here,
        after the results of tasks that ended before it are yielded.
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
    """Call `function` on `task` with the given number of PyTorch threads."""
    torch.set_num_threads(threads)
    return function(task)
