"""Check on real Ray nodes which GPUs the trials of a study get. Ray only counts these GPUs."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import ray
from ray import tune
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from studies.engine.protocol import NUMBER, Objective, report
from studies.engine.run import Search, run_search
from studies.planning.resources import TrialResources, alive_nodes, choose_resources, slots

pytestmark = [pytest.mark.timeout(600), pytest.mark.xdist_group("ray")]

SMALL = 0.01
"""Memory fraction of a trial that could share its GPU with seven others."""

Gpu = tuple[str, str]
"""Id of a node, and id of a GPU on it."""


Nodes = tuple[tuple[int, int], ...]
"""CPUs and GPUs of each node that runs trials."""

ONE_NODE: Nodes = ((32, 4),)
TWO_NODES: Nodes = ((4, 2), (4, 2))
UNEQUAL_NODES: Nodes = ((8, 2), (4, 1))
EIGHT_NODES: Nodes = ((32, 8),) * 8


@pytest.fixture(scope="module")
def _cluster(request: pytest.FixtureRequest, _clean_environment: None) -> Iterator[None]:
    """Join a cluster of the nodes in the fixture's parameter, and a head, which runs no trials."""
    # The head has GPUs, which no trial can use without a CPU.
    head = {"num_cpus": 0, "num_gpus": 2, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for cpus, gpus in request.param:
            cluster.add_node(num_cpus=cpus, num_gpus=gpus)
        ray.init(address=cluster.address, log_to_driver=False)
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()  # type: ignore[no-untyped-call]


def on(nodes: Nodes) -> pytest.MarkDecorator:
    """Run a test on a cluster of these nodes."""
    return pytest.mark.parametrize("_cluster", [nodes], indirect=True, ids=[f"{len(nodes)} nodes"])


def place(resources: TrialResources, trials: int) -> Counter[Gpu]:
    """Reserve resources for trials, and return how many of them at a time are on each GPU.

    The reservations are those of Ray Tune, a placement group per trial. A task in each tells its
    GPUs, one task after the other, in one process for each node.
    """

    def where() -> list[Gpu]:  # Not of this module, which every process would have to import.
        context = ray.get_runtime_context()
        return [(context.get_node_id(), gpu) for gpu in context.get_accelerator_ids()["GPU"]]

    task = ray.remote(where)
    request = resources.request(1)
    factory: Any = tune.PlacementGroupFactory([request])
    groups = [factory.to_placement_group() for _ in range(trials)]

    def placed() -> list[Any]:
        states: Any = ray.util.placement_group_table()
        return [group for group in groups if states[group.id.hex()]["state"] == "CREATED"]

    try:
        fitting = min(trials, slots(alive_nodes(), resources))
        wait_until(lambda: len(placed()) >= fitting)
        time.sleep(0.5)
        assert len(placed()) == fitting
        options = [
            {
                "num_cpus": request["CPU"],
                "num_gpus": request["GPU"],
                "scheduling_strategy": PlacementGroupSchedulingStrategy(group),
            }
            for group in placed()
        ]
        return Counter(
            gpu for each in options for gpu in ray.get(task.options(**each).remote(), timeout=60)
        )
    finally:
        for group in groups:
            ray.util.remove_placement_group(group)
        total = sum(node.get("GPU", 0.0) for node in alive_nodes())
        available: Callable[[], dict[str, float]] = ray.available_resources
        wait_until(lambda: available().get("GPU") == total)


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds; fail after a minute."""
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("the condition did not hold within a minute")


@on(ONE_NODE)
@pytest.mark.usefixtures("_cluster")
def test_ray_fills_a_gpu_before_the_next() -> None:
    """The reason not to share a GPU by memory alone: three of four GPUs would be idle."""
    used = place(TrialResources(1.0, 0.125, 32.0), 8)
    assert list(used.values()) == [8]


@on(ONE_NODE)
@pytest.mark.usefixtures("_cluster")
@pytest.mark.parametrize(
    ("trials", "on_each"),
    [
        (3, [1, 1, 1]),
        (4, [1, 1, 1, 1]),
        (7, [1, 1, 1, 1]),
        (8, [2, 2, 2, 2]),
        (13, [3, 3, 3, 3]),
        (40, [8, 8, 8, 8]),
    ],
)
def test_all_gpus_of_a_node_are_used_before_any_is_shared(trials: int, on_each: list[int]) -> None:
    used = place(choose_resources(alive_nodes(), None, None, SMALL, trials), trials)
    assert list(used.values()) == on_each


@on(ONE_NODE)
@pytest.mark.usefixtures("_cluster")
def test_a_gpu_is_not_shared_where_the_cpus_are_too_few() -> None:
    """Only five trials of six CPUs fit; with two on each GPU, the fourth GPU would be idle."""
    resources = choose_resources(alive_nodes(), 6.0, None, SMALL, 8)
    assert list(place(resources, 8).values()) == [1, 1, 1, 1]


@on(ONE_NODE)
@pytest.mark.usefixtures("_cluster")
@pytest.mark.parametrize(
    ("gpus", "on_each"),
    [
        (0.4, [2, 2, 2, 2]),
        (0.6, [1, 1, 1, 1]),
        # Ray drops what is below a ten-thousandth.
        (0.33336, [3, 3, 3, 3]),
        # Two trials of two GPUs.
        (2.0, [1, 1, 1, 1]),
    ],
)
def test_slots_are_as_many_trials_as_ray_places(gpus: float, on_each: list[int]) -> None:
    # place() fails if Ray places fewer or more.
    assert list(place(choose_resources(alive_nodes(), 1.0, gpus), 20).values()) == on_each


@on(UNEQUAL_NODES)
@pytest.mark.usefixtures("_cluster")
@pytest.mark.parametrize(("trials", "on_each"), [(3, 1), (5, 1), (6, 2), (11, 3)])
def test_all_gpus_of_unequal_nodes_are_used_before_any_is_shared(trials: int, on_each: int) -> None:
    used = place(choose_resources(alive_nodes(), None, None, SMALL, trials), trials)
    assert list(used.values()) == [on_each] * 3


@pytest.mark.faults
@on(EIGHT_NODES)
@pytest.mark.usefixtures("_cluster")
@pytest.mark.parametrize(("trials", "on_each"), [(64, 1), (128, 2)])
def test_all_gpus_of_eight_nodes_are_used_before_any_is_shared(trials: int, on_each: int) -> None:
    used = place(choose_resources(alive_nodes(), None, None, SMALL, trials), trials)
    assert list(used.values()) == [on_each] * 64


def space(trial: optuna.Trial) -> dict[str, Any]:
    return {"x": trial.suggest_float("x", 0.0, 1.0)}


@pytest.mark.faults
@on(TWO_NODES)
@pytest.mark.usefixtures("_cluster")
def test_eight_trials_of_a_search_use_all_four_gpus(tmp_path: Path) -> None:
    """They run at the same time, two on each GPU."""
    places = tmp_path / "places"
    places.mkdir()

    def meet(params: dict[str, Any]) -> None:
        """Write this trial's node and GPU to a file, and end when all trials have come."""
        context = ray.get_runtime_context()
        (gpu,) = context.get_accelerator_ids()["GPU"]
        (places / str(params[NUMBER])).write_text(f"{context.get_node_id()} {gpu}")
        while len(list(places.iterdir())) < 8:
            time.sleep(0.1)
        report({"epoch": 1, "gain": params["x"]})

    search = Search(
        name="s",
        key="k",
        space=space,
        objectives=(Objective("gain", "gain"),),
        min_epochs=1,
        max_epochs=1,
        num_trials=8,
    )
    resources = choose_resources(alive_nodes(), None, None, SMALL, 8)
    ledger = run_search(
        search,
        tmp_path,
        meet,
        resources.request,
        lambda: slots(alive_nodes(), resources),
    )
    assert [trial.state for trial in ledger.trials] == ["completed"] * 8
    used = Counter(file.read_text() for file in places.iterdir())
    assert list(used.values()) == [2, 2, 2, 2]
