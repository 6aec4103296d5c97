"""Parts of the suite: functions that yield rows, each run in a process of its own under a limit."""

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from batchcam.errors import ConfigError

Row = dict[str, Any]
"""One result. A check has `passed`; a measurement has numbers only."""


@dataclass(frozen=True)
class Setup:
    """What every part receives.

    Attributes:
        device: where to run, "cpu" or "cuda".
        quick: whether to run each part on as little as shows that it runs.
        seed: of weights, batches and orders.
    """

    device: torch.device
    quick: bool
    seed: int = 0

    @property
    def cuda(self) -> bool:
        """Whether the device is a GPU of CUDA."""
        return self.device.type == "cuda"


class Skipped(Exception):  # noqa: N818 - ends a part, and is not an error.
    """A part does not apply to this machine; the message says why."""


@dataclass(frozen=True)
class Part:
    """A named part of the suite.

    Attributes:
        name: unique.
        run: yields the rows, each of which is kept as soon as it is there.
        limit: seconds after which the part is killed.
    """

    name: str
    run: Callable[[Setup], Iterator[Row]]
    limit: float


@dataclass
class Outcome:
    """What a part has given so far.

    Attributes:
        state: "running", "finished", "skipped", "failed", "time limit" or "not started".
        rows: the results so far.
        seconds: wall time of the part.
        message: why it was skipped or failed.
    """

    state: str = "not started"
    rows: list[Row] = field(default_factory=list)
    seconds: float = 0.0
    message: str = ""

    @property
    def passed(self) -> bool:
        """Whether the part ended as it should, and every check in it passed."""
        checks = all(row.get("passed", True) for row in self.rows)
        return self.state in ("finished", "skipped") and checks


@dataclass
class _Running:
    part: Part
    outcome: Outcome
    process: Any
    connection: Connection
    started: float


def run_parts(
    parts: Sequence[Part],
    setup: Setup,
    *,
    together: int,
    deadline: float,
    on_change: Callable[[str, Outcome], None],
) -> None:
    """Run parts, each in a process of its own, and report every row when it is there.

    Processes are forked, so that PyTorch is imported once. The calling process must not have used
    CUDA, which does not survive a fork.

    Args:
        parts: started in this order.
        setup: their argument.
        together: number of parts that run at a time.
        deadline: on the clock of `time.monotonic`; parts that run then are killed, and no other
            starts.
        on_change: called with a part's name and outcome after each row, and at its end.

    Raises:
        ConfigError: this process has used CUDA.
    """
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        raise ConfigError("this process has used CUDA; run the suite in a process of its own.")
    waiting, running = list(parts), dict[str, _Running]()
    threads = 1 if setup.quick else max(1, (os.cpu_count() or 1) // together)
    while waiting or running:
        while waiting and len(running) < together and time.monotonic() < deadline:
            part = waiting.pop(0)
            running[part.name] = _start(part, setup, threads)
        if not running:
            for part in waiting:
                on_change(part.name, Outcome(message="the time of the suite was over"))
            return
        ready = wait([each.connection for each in running.values()], timeout=0.2)
        for each in list(running.values()):
            ended = each.connection in ready and _receive(each)
            late = time.monotonic() > min(deadline, each.started + each.part.limit)
            if late and not ended:
                _kill(each)
                each.outcome.state = "time limit"
                each.outcome.message = f"killed after {time.monotonic() - each.started:.0f} s"
            each.outcome.seconds = round(time.monotonic() - each.started, 1)
            if ended or late:
                each.process.join()
                each.connection.close()
                del running[each.part.name]
            if ended or late or each.connection in ready:
                on_change(each.part.name, each.outcome)


def _start(part: Part, setup: Setup, threads: int) -> _Running:
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_execute, args=(part, setup, threads, sending))
    process.start()
    sending.close()
    return _Running(part, Outcome("running"), process, receiving, time.monotonic())


def _execute(part: Part, setup: Setup, threads: int, sending: Connection) -> None:
    """Run a part in its process, whose group holds the processes that the part starts."""
    os.setsid()
    torch.set_num_threads(threads)
    try:
        for row in part.run(setup):
            sending.send(("row", row))
        sending.send(("finished", ""))
    except Skipped as reason:
        sending.send(("skipped", str(reason)))
    except BaseException:
        sending.send(("failed", traceback.format_exc()))


def _receive(each: _Running) -> bool:
    """Take what a part has sent, and return whether it has ended."""
    try:
        while each.connection.poll():
            kind, value = each.connection.recv()
            if kind == "row":
                each.outcome.rows.append(value)
            else:
                each.outcome.state, each.outcome.message = kind, value
                return True
    except EOFError:
        each.process.join()
        each.outcome.state = "failed"
        each.outcome.message = f"the process ended with exit code {each.process.exitcode}"
        return True
    return False


def _kill(each: _Running) -> None:
    try:
        os.killpg(each.process.pid, signal.SIGKILL)
    except ProcessLookupError:  # It has not made its group yet, or has ended.
        each.process.kill()
