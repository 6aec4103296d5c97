"""The protocol between the engine and a trainable: parameters, reports, objectives, resources.

A trainable is a function of one dictionary: what the search space returned for the trial, and the
keys `NUMBER`, `TRIAL_ID`, `RESOURCE_MULTIPLIER` and `RESUMES_AT`. It calls :func:`report` after
each epoch, :func:`report_out_of_memory` where memory is short, and :func:`report_unusable_node`
where no trial can run. After an exception the trial starts again from its last checkpoint, a
limited number of times; :mod:`studies.engine.failures` tells an exception from a lack of memory. A
resumed search tries a trial that failed for good once more, unless its exception was
`DivergedError`. README.md in this folder shows a whole example.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from ray import tune
from ray.tune.result import AUTO_RESULT_KEYS

from batchcam.errors import ConfigError, DivergedError

Metrics = dict[str, float]
"""What a trial reports of an epoch; `epoch` is one of the keys."""

NUMBER = "number"
"""In a trial's parameters: its number in the study, from 0, in the order of the proposals."""
TRIAL_ID = "trial_id"
"""In a trial's parameters: an id that no other trial of any study has, for its checkpoints."""
RESOURCE_MULTIPLIER = "share"
"""In a trial's parameters: how many times the usual resources it has."""
RESUMES_AT = "resumes_at"
"""In a trial's parameters: the last epoch of which the ledger has a report; 0 before the first."""

EPOCH = "epoch"
"""In a report: the number of finished epochs, from 1."""
OUT_OF_MEMORY = "out_of_memory"
"""In a report: true where the trial asks to start again with twice the resources."""
UNUSABLE_NODE = "unusable_node"
"""In a report: why no trial can run on this node until the user has corrected it."""
REPORTED = "reported"
"""In Ray's result: the names of the trainable's metrics, to which Ray adds entries of its own."""

_TAKEN = frozenset(
    (
        *AUTO_RESULT_KEYS,
        "done",
        "should_checkpoint",
        TRIAL_ID,
        OUT_OF_MEMORY,
        UNUSABLE_NODE,
        REPORTED,
    )
)
"""Entries of a result that Ray or the engine sets: a metric of this name would be overwritten."""

Direction = Literal["maximize", "minimize"]
"""Of an objective, as Optuna spells it."""

ResourceRequest = Callable[[int], Mapping[str, float]]
"""Returns what a trial asks Ray for, such as `{"CPU": 2}`, by the multiple of the usual resources.

Where twice the multiple asks for no more, a trial that is out of memory fails.
"""


@dataclass(frozen=True)
class Objective:
    """A metric that a search maximises or minimises.

    Attributes:
        name: the metric's name in the reports.
        title: the metric's name for people.
        direction: "maximize" or "minimize", as Optuna spells them.
        format: the format specification by which values are printed, such as ".4f".
        short: the name of the bundle that is the best by this objective; by default `name`.

    Raises:
        ConfigError: the direction is neither of the two.

    Example:
        >>> loss = Objective("val_loss", "validation loss", direction="minimize", format=".2f")
        >>> loss.gain(0.25), loss.show(0.25)
        (-0.25, '0.25')
    """

    name: str
    title: str
    direction: Direction = "maximize"
    format: str = ".4f"
    short: str = ""

    def __post_init__(self) -> None:
        if self.direction not in ("maximize", "minimize"):
            raise ConfigError(
                f"objective {self.name!r} has the direction {self.direction!r}; choose "
                "'maximize' or 'minimize'."
            )
        if not self.short:
            object.__setattr__(self, "short", self.name)

    def gain(self, value: float) -> float:
        """Return the value as a quantity to maximise: negated where less is better."""
        return value if self.direction == "maximize" else -value

    def show(self, value: float) -> str:
        """Return the value as text."""
        return format(value, self.format)


def gains(
    rows: Sequence[Mapping[str, float]], objectives: Sequence[Objective]
) -> npt.NDArray[np.float64]:
    """Return the objectives of each row of metrics, all to be maximised, `(rows, objectives)`.

    Raises:
        KeyError: a row lacks an objective.

    Example:
        >>> objectives = [Objective("accuracy", "accuracy"), Objective("loss", "loss", "minimize")]
        >>> gains([{"accuracy": 0.5, "loss": 2.0}, {"accuracy": 0.75, "loss": 1.0}], objectives)
        array([[ 0.5 , -2.  ],
               [ 0.75, -1.  ]])
    """
    return np.array(
        [[each.gain(row[each.name]) for each in objectives] for row in rows], dtype=float
    ).reshape(len(rows), len(objectives))


def has_objectives(metrics: Mapping[str, Any], objectives: Sequence[Objective]) -> bool:
    """Return whether metrics hold a finite number for each objective.

    Example:
        >>> has_objectives({"accuracy": float("nan")}, [Objective("accuracy", "accuracy")])
        False
    """
    return all(math.isfinite(metrics.get(each.name, math.nan)) for each in objectives)


def report(metrics: Mapping[str, float]) -> None:
    """Report the metrics of an epoch, from inside a trainable.

    Where the engine stops the trial early, Ray raises SystemExit from this call.

    Args:
        metrics: `epoch`, every objective, and whatever other numbers the ledger is to record.
            Numbers need not be finite; a trial whose objective is not is stopped, and has failed.

    Raises:
        ValueError: there is no `epoch`, a metric is no number, or its name is taken.
    """
    if EPOCH not in metrics:
        raise ValueError(f"the report has no {EPOCH!r}; give the number of finished epochs.")
    given: Mapping[str, Any] = metrics  # Callers may be untyped.
    for name, value in given.items():
        if not isinstance(value, Real):
            raise ValueError(f"metric {name!r} is {value!r}; report numbers only.")
        if name in _TAKEN:
            raise ValueError(f"metric {name!r} has a name that Ray or the engine uses; rename it.")
    plain = {
        name: int(value) if isinstance(value, Integral) else float(value)
        for name, value in given.items()
    }
    tune.report({**plain, REPORTED: list(plain)})


def report_out_of_memory(epoch: int) -> None:
    """Report that memory was short after `epoch` finished epochs; the trainable then returns.

    The engine starts the trial again with twice the resources, or lets it fail where there are no
    more.
    """
    tune.report({EPOCH: epoch, OUT_OF_MEMORY: True})


def report_unusable_node(epoch: int, message: str) -> None:
    """Report that no trial can run on this node; the trainable then returns.

    The search stops with `ConfigError` and this message. The trial has not ended: a search that is
    resumed runs it again. Otherwise all trials would fail one after the other on such a node, which
    is always free.

    Args:
        epoch: the trial's finished epochs.
        message: what is wrong, and the remedy.
    """
    tune.report({EPOCH: epoch, UNUSABLE_NODE: message})


class SearchStoppedError(BaseException):
    """A trial reported that no trial can run on its node.

    Not an Exception, which Ray would take for a failure of the trial.
    """


def report_again(history: Sequence[Mapping[str, float]], last: int) -> int:
    """Report the epochs of a checkpoint that the ledger lacks; return the last epoch of all.

    Args:
        history: the metrics of each epoch of the checkpoint, in order.
        last: the trial's `RESUMES_AT`.
    """
    for metrics in history:
        if metrics[EPOCH] > last:
            report(metrics)
    return max([last, *(int(metrics[EPOCH]) for metrics in history)])


def reported_metrics(result: Mapping[str, Any]) -> Metrics:
    """Return what the trainable reported, out of a result to which Ray has added.

    Raises:
        ValueError: the result was not reported by :func:`report`.
    """
    if REPORTED not in result:
        raise ValueError(
            "a trial reported through ray.tune.report, which does not tell its metrics from those "
            "of Ray; report through studies.engine.protocol.report."
        )
    return {name: result[name] for name in result[REPORTED]}


def has_diverged(error: str | None) -> bool:
    """Return whether the last line of a trial's error names `DivergedError`.

    A trial that diverged would diverge again: it is not tried once more on resuming.
    """
    return DivergedError.__name__ in (error or "")
