"""Early stopping on recorded curves: what it costs in quality, and what it saves in epochs.

python -m studies.benchmarks.early_stopping --curves results/early_stopping/curves.csv.gz

Needs the extra `benchmarks`.

A study is simulated as it would run: workers take trials in a seeded order, each epoch lasts as
long as it was recorded to, and every report is judged as it comes. What is measured after each
epoch is the hypervolume of the last reports of all trials, which is what the study could export.
"""

import csv
import gzip
import heapq
import importlib
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import moocore
import numpy as np
import numpy.typing as npt
import pandas as pd
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from ray.tune.schedulers import AsyncHyperBandScheduler

from batchcam.provenance import git_commit, package_versions
from studies.engine.halving import ParetoHalving, Vector

OBJECTIVES = ("val_accuracy", "cam_ssim")
"""Both maximised; the first one leads."""

CHANCE = 0.1
"""Accuracy of guessing among ten classes."""

Array = npt.NDArray[np.float64]
Judge = Callable[[int, int, Vector], bool]
"""Whether trial `number` goes on after `epoch` with these objectives."""

Method = Callable[["Rules"], Judge]
"""Starts a study under these rules."""


@dataclass(frozen=True)
class Curve:
    """A trial trained to its end: objectives `(epochs, 2)` and seconds `(epochs,)`."""

    values: Array
    seconds: Array


@dataclass(frozen=True)
class Report:
    """A trial's epoch in a simulated study, and whether the trial went on."""

    number: int
    epoch: int
    values: Vector
    going_on: bool


@dataclass(frozen=True)
class Rules:
    """Settings that all methods share."""

    max_epochs: int
    min_epochs: int = 1
    reduction_factor: int = 2


def read_curves(path: Path) -> dict[int, Curve]:
    """Return what `studies.benchmarks.record_curves` wrote, by the trial's number.

    Trials that ended before the last epoch, because training diverged, are left out.
    """
    by_number: dict[int, list[dict[str, str]]] = {}
    with gzip.open(path, "rt", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            by_number.setdefault(int(row["number"]), []).append(row)
    longest = max(len(rows) for rows in by_number.values())
    return {
        number: Curve(
            np.array([[float(row[name]) for name in OBJECTIVES] for row in rows]),
            np.array([float(row["seconds"]) for row in rows]),
        )
        for number, rows in by_number.items()
        if len(rows) == longest
    }


def simulate(
    curves: Mapping[int, Curve], order: Sequence[int], judge: Judge, workers: int = 4
) -> list[Report]:
    """Run a study of the trials in `order`, and return its reports as they came."""
    waiting = iter(order)
    running: list[tuple[float, int, int]] = []

    def start(now: float) -> None:
        if (number := next(waiting, None)) is not None:
            heapq.heappush(running, (now + curves[number].seconds[0], number, 1))

    for _ in range(workers):
        start(0.0)
    reports = []
    while running:
        now, number, epoch = heapq.heappop(running)
        curve = curves[number]
        values = tuple(curve.values[epoch - 1].tolist())
        going_on = judge(number, epoch, values)
        reports.append(Report(number, epoch, values, going_on))
        if going_on and epoch < len(curve.values):
            heapq.heappush(running, (now + curve.seconds[epoch], number, epoch + 1))
        else:
            start(now)
    return reports


def hypervolumes(reports: Sequence[Report], reference: Sequence[float]) -> Array:
    """Return the hypervolume of all trials' last reports, after each report, `(reports,)`."""
    last: dict[int, Vector] = {}
    found = []
    for report in reports:
        last[report.number] = report.values
        found.append(moocore.hypervolume(list(last.values()), ref=reference, maximise=True))
    return np.array(found)


def epochs_to_reach(trace: Array, level: float) -> float:
    """Return the epochs after which a trace is at `level` or above for good; inf if it never is."""
    below = np.flatnonzero(trace < level)
    if len(below) == 0:
        return 1.0
    return float(below[-1] + 2) if below[-1] + 1 < len(trace) else float("inf")


def random_search(rules: Rules) -> Judge:
    """Return a judge that stops nothing."""
    del rules
    return lambda number, epoch, values: True  # noqa: ARG005


def asha(rules: Rules) -> Judge:
    """Return ordinary ASHA on the first objective."""
    halving = _halving(rules)
    return lambda number, epoch, values: halving.judge(number, epoch, values[:1])


def pareto_asha(rules: Rules) -> Judge:
    """Return the studies' own early stopping, on all objectives."""
    return _halving(rules).judge


def _halving(rules: Rules) -> ParetoHalving:
    return ParetoHalving(
        min_epochs=rules.min_epochs,
        max_epochs=rules.max_epochs,
        reduction_factor=rules.reduction_factor,
    )


def ray_asha(rules: Rules) -> Judge:
    """Return Ray's AsyncHyperBandScheduler on the first objective."""
    scheduler = AsyncHyperBandScheduler(
        time_attr="epoch",
        metric=OBJECTIVES[0],
        mode="max",
        max_t=rules.max_epochs,
        grace_period=rules.min_epochs,
        reduction_factor=rules.reduction_factor,
    )
    return _driven(scheduler, lambda trial, result: (None, trial, result))


def syne_tune_moasha(rules: Rules) -> Judge:
    """Return Syne Tune's MOASHA as it is; needs the extra `benchmarks`."""
    return _syne_tune(rules, None)


def syne_tune_mended(rules: Rules) -> Judge:
    """Return Syne Tune's MOASHA with the place of each trial as its priority.

    Fronts and the order inside each are Syne Tune's own. What it makes of them is an order where
    MOASHA reads places; see results/early_stopping.
    """
    module = importlib.import_module(
        "syne_tune.optimizer.schedulers.multiobjective.non_dominated_priority"
    )

    def places(objectives: Array) -> npt.NDArray[np.int64]:
        found = np.empty(len(objectives), dtype=np.int64)
        left = np.arange(len(objectives))
        while len(left):
            front = module.pareto_efficient(objectives[left])
            start = len(objectives) - len(left)
            found[left[front]] = start + module.compute_epsilon_net(objectives[left[front]], dim=0)
            left = left[~front]
        return found

    return _syne_tune(rules, places)


def _syne_tune(rules: Rules, priority: Callable[[Array], Any] | None) -> Judge:
    module = importlib.import_module("syne_tune.optimizer.schedulers.multiobjective.moasha")
    scheduler = module.MOASHA(
        {},
        list(OBJECTIVES),
        do_minimize=False,
        time_attr="epoch",
        multiobjective_priority=priority,
        max_t=rules.max_epochs,
        grace_period=rules.min_epochs,
        reduction_factor=rules.reduction_factor,
        random_seed=0,
    )
    return _driven(scheduler, lambda trial, result: (trial, result))


def _driven(scheduler: Any, arguments: Callable[[Any, dict[str, float]], tuple[Any, ...]]) -> Judge:
    """Return a scheduler of another library as a judge; it sees trials as they first report."""
    trials: dict[int, Any] = {}

    def judge(number: int, epoch: int, values: Vector) -> bool:
        result = {"epoch": epoch, **dict(zip(OBJECTIVES, values, strict=True))}
        if number not in trials:
            trials[number] = SimpleNamespace(trial_id=number)
            scheduler.on_trial_add(*arguments(trials[number], result)[:-1])
        return bool(scheduler.on_trial_result(*arguments(trials[number], result)) == "CONTINUE")

    return judge


METHODS: Mapping[str, Method] = {
    "random search": random_search,
    "ASHA on accuracy": asha,
    "Ray's ASHA on accuracy": ray_asha,
    "ParetoASHA": pareto_asha,
    "Syne Tune's MOASHA": syne_tune_moasha,
    "Syne Tune's MOASHA, mended": syne_tune_mended,
}
"""What is compared."""


def orders(numbers: Sequence[int], count: int) -> Iterator[list[int]]:
    """Yield `count` orders of the trials; the seed of each is its index."""
    for seed in range(count):
        yield np.random.default_rng(seed).permutation(numbers).tolist()


def references(curves: Mapping[int, Curve]) -> dict[str, tuple[float, ...]]:
    """Return the points above which hypervolume is measured: of a lenient and of a strict kind.

    From a model that knows nothing, any good trial has most of what there is. From the median of
    the trials at their ends, objective by objective, only what is better than middling in both
    objectives counts.
    """
    ends = np.array([curve.values[-1] for curve in curves.values()])
    return {
        "a model that knows nothing": (CHANCE, 0.0),
        "the median trial": tuple(np.median(ends, axis=0).tolist()),
    }


@dataclass(frozen=True)
class Race:
    """A method against random search, in one order of the trials.

    Attributes:
        trace: hypervolume after each epoch of the method, as a share of random search's last one.
        budget: the epochs that random search needs.
    """

    trace: Array
    budget: int

    @property
    def at_a_third(self) -> float:
        """The share of the hypervolume that a third of the budget, or less, has brought."""
        return float(self.trace[min(self.budget // 3, len(self.trace)) - 1])

    def share_to_reach(self, level: float) -> float:
        """Return the epochs needed to reach `level` for good, as a share of the budget."""
        # The last digits of a hypervolume depend on the order of the points.
        return epochs_to_reach(self.trace, level - 1e-9) / self.budget


def race(
    curves: Mapping[int, Curve],
    order: Sequence[int],
    reports: Sequence[Report],
    reference: Sequence[float],
    rivals: int,
) -> Race:
    """Measure a simulated study against random search on the first `rivals` of the order."""
    ends = np.array([curves[number].values[-1] for number in order[:rivals]])
    goal = moocore.hypervolume(ends, ref=reference, maximise=True)
    budget = rivals * len(curves[order[0]].values)
    return Race(hypervolumes(reports, reference) / goal, budget)


def foresight(curves: Mapping[int, Curve]) -> dict[str, list[float]]:
    """Return, by objective, Spearman's correlation of each epoch's values with the last one's."""
    values = np.array([curve.values for curve in curves.values()])
    return {
        name: pd.DataFrame(values[:, :, index]).rank().corr().iloc[-1].round(3).tolist()
        for index, name in enumerate(OBJECTIVES)
    }


def agreement(
    curves: Mapping[int, Curve],
    order: Sequence[int],
    rules: Rules,
    leader: Method,
    other: Method,
) -> list[tuple[bool, bool]]:
    """Return both methods' decisions at the rungs, where `leader` alone runs the study."""
    rungs = set()
    rung = rules.min_epochs
    while rung < rules.max_epochs:
        rungs.add(rung)
        rung *= rules.reduction_factor
    following = other(rules)
    return [
        (report.going_on, following(report.number, report.epoch, report.values))
        for report in simulate(curves, order, leader(rules))
        if report.epoch in rungs
    ]


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What to replay."""

    curves: Path = Path("results/early_stopping/curves.csv.gz")
    """What `studies.benchmarks.record_curves` wrote."""
    out: Path = Path("results/early_stopping")
    """Folder for summary.json and hypervolume.png."""
    orders: int = 20
    """Orders of the trials, by seeds from 0."""
    workers: int = 4
    """Trials that run at a time."""
    min_epochs: int = 2
    """The first rung of the comparison; others are tried beside it."""
    reduction_factor: int = 2
    """Likewise."""


def main() -> None:
    """Replay what the command line names, and write what came of it."""
    benchmark = tyro.cli(Benchmark)
    curves = read_curves(benchmark.curves)
    rules = Rules(
        max_epochs=len(next(iter(curves.values())).values),
        min_epochs=benchmark.min_epochs,
        reduction_factor=benchmark.reduction_factor,
    )
    drawn = list(orders(list(curves), benchmark.orders))
    points = references(curves)

    def studies(method: Method, rules: Rules) -> list[list[Report]]:
        return [simulate(curves, order, method(rules), benchmark.workers) for order in drawn]

    same_rules = {name: studies(method, rules) for name, method in METHODS.items()}
    other_rules = {
        f"{name}, reduction factor {factor}, first rung {least}": studies(
            METHODS[name], Rules(rules.max_epochs, least, factor)
        )
        for factor in (2, 3, 4)
        for least in (1, 2, 4)
        for name in ("ParetoASHA", "ASHA on accuracy")
    }
    summary: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "studies.benchmarks.early_stopping", *sys.argv[1:]]),
        "commit": git_commit(),
        "versions": package_versions("ray", "moocore", "syne-tune"),
        "trials": len(curves),
        "epochs": rules.max_epochs,
        "references": points,
        "correlation with the last epoch": foresight(curves),
    }
    compared: dict[str, dict[str, list[Race]]] = {}
    for point, reference in points.items():
        measured = {}
        for title, found, rivals in (
            ("same trials", same_rules, len(curves)),
            ("random search on a third of the trials", same_rules, len(curves) // 3),
            ("other rungs", other_rules, len(curves)),
        ):
            measured[title] = {
                name: [
                    race(curves, order, reports, reference, rivals)
                    for order, reports in zip(drawn, each, strict=True)
                ]
                for name, each in found.items()
            }
        compared[point] = measured["same trials"]
        summary[f"above {point}"] = {
            title: {name: outcome(races) for name, races in found.items()}
            for title, found in measured.items()
        }
    summary["decisions at rungs"] = {
        f"{first} and {second}": agreements(
            [agreement(curves, order, rules, METHODS[first], METHODS[second]) for order in drawn]
        )
        for first, second in (
            ("ASHA on accuracy", "Ray's ASHA on accuracy"),
            ("ParetoASHA", "Syne Tune's MOASHA"),
            ("ParetoASHA", "Syne Tune's MOASHA, mended"),
        )
    }
    benchmark.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(summary, indent=2) + "\n"
    (benchmark.out / "summary.json").write_text(text, encoding="utf-8")
    draw(compared, benchmark.out / "hypervolume.png")


def outcome(races: Sequence[Race]) -> dict[str, list[float | None]]:
    """Return least, median and most over the orders, as shares of random search's; None is never.

    Of an even number of orders, the median is the worse of the two in the middle.

    `spent` is epochs. `reached` is the hypervolume at the end, `at_a_third` that after a third of
    random search's epochs. `to_98` and so on are the epochs to that percentage of its hypervolume.
    """
    found = {
        "spent": [len(each.trace) / each.budget for each in races],
        "reached": [float(each.trace[-1]) for each in races],
        "at_a_third": [each.at_a_third for each in races],
    }
    for percent in (98, 99, 100):
        found[f"to_{percent}"] = [each.share_to_reach(percent / 100) for each in races]
    gains = ("reached", "at_a_third")
    return {
        name: [
            round(float(value), 4) if np.isfinite(value) else None
            for value in np.quantile(
                values, (0, 0.5, 1), method="lower" if name in gains else "higher"
            )
        ]
        for name, values in found.items()
    }


def agreements(decisions: Sequence[Sequence[tuple[bool, bool]]]) -> dict[str, int]:
    """Return how many decisions there were, and how many of each kind, over all orders."""
    pairs = [pair for each in decisions for pair in each]
    return {
        "decisions": len(pairs),
        "same": sum(first == second for first, second in pairs),
        "only the first goes on": sum(first and not second for first, second in pairs),
        "only the second goes on": sum(second and not first for first, second in pairs),
    }


def draw(compared: Mapping[str, Mapping[str, Sequence[Race]]], path: Path) -> None:
    """Draw the median hypervolume over epochs spent, a panel for each reference point."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    for axes, (point, methods) in zip(
        figure.subplots(1, len(compared), squeeze=False)[0], compared.items(), strict=True
    ):
        ends = []
        for index, (name, races) in enumerate(methods.items()):
            longest = max(len(each.trace) for each in races)
            padded = [np.pad(it.trace, (0, longest - len(it.trace)), mode="edge") for it in races]
            middle = np.median(padded, axis=0)[: int(np.median([len(it.trace) for it in races]))]
            spent = np.arange(1, len(middle) + 1) / races[0].budget
            color, width = f"C{index}", 2.5 if name == "ParetoASHA" else 1.3
            axes.plot(spent, middle, color=color, linewidth=width, label=name)
            axes.plot(spent[-1], middle[-1], marker="o", color=color)
            ends.append(middle[-1])
        # A trial's first epochs say nothing; the panel shows where methods differ.
        bottom = 1 - 3 * (1 - min(ends))
        axes.axvline(1 / 3, color="0.6", linewidth=0.8, linestyle=":")
        axes.set(
            title=f"above {point}",
            xlabel="epochs spent, of random search's",
            xlim=(0, 1.02),
            ylim=(max(0.0, bottom), 1 + 0.03 * (1 - max(0.0, bottom))),
        )
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(1.0))
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("hypervolume, of random search's last")
    figure.axes[-1].legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=120, metadata={"Software": None})


if __name__ == "__main__":
    main()
