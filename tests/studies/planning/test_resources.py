import pytest
import ray

from batchcam.errors import ConfigError
from studies.planning.resources import (
    Node,
    TrialResources,
    alive_nodes,
    choose_resources,
    cluster_device,
    packed_gpus,
    slots,
)

NODE = {"CPU": 8.0, "memory": 1e9}


@pytest.fixture(params=[0, 2], ids=["no GPU", "2 GPUs"])
def gpus(request: pytest.FixtureRequest) -> int:
    """Return the number of GPUs of a cluster of one node with 8 CPUs."""
    number: int = request.param
    return number


@pytest.fixture
def nodes(gpus: int) -> list[Node]:
    """Return the only node of the cluster; as in Ray, it has the key "GPU" only if it has GPUs."""
    return [NODE | {"GPU": float(gpus)} if gpus else NODE]


@pytest.mark.faults
@pytest.mark.parametrize("number", [0, 2])
def test_nodes_of_the_connected_cluster_are_read(number: int) -> None:
    # Ray accepts any declared number of GPUs.
    ray.init(address="local", num_cpus=8, num_gpus=number, include_dashboard=False)
    try:
        (node,) = alive_nodes()
    finally:
        ray.shutdown()
    assert (node["CPU"], node.get("GPU")) == (8.0, number or None)


def test_trial_takes_one_gpu_and_its_share_of_cpus(nodes: list[Node], gpus: int) -> None:
    expected = TrialResources(4.0, 1.0, 8.0) if gpus else TrialResources(1.0, 0.0, 8.0)
    assert choose_resources(nodes, None, None) == expected


def test_given_cpus_are_kept(nodes: list[Node], gpus: int) -> None:
    assert choose_resources(nodes, 3.0, None) == TrialResources(3.0, 1.0 if gpus else 0.0, 8.0)


def test_trials_can_share_a_gpu(nodes: list[Node], gpus: int) -> None:
    if not gpus:
        pytest.skip("needs a GPU to share")
    assert choose_resources(nodes, None, 0.5) == TrialResources(2.0, 0.5, 8.0)
    assert choose_resources(nodes, None, 0.01) == TrialResources(1.0, 0.01, 8.0)


def test_gpus_can_be_declined(nodes: list[Node], gpus: int) -> None:
    assert choose_resources(nodes, None, 0.0) == TrialResources(1.0, 0.0, 8.0), gpus


@pytest.mark.parametrize(("cpus", "asked"), [(9.0, None), (None, 3.0)])
def test_more_than_any_node_has_is_refused(
    nodes: list[Node], gpus: int, cpus: float | None, asked: float | None
) -> None:
    message = rf"the largest node has 8 CPUs and {gpus} GPUs; lower --cpus-per-trial or --gpus"
    with pytest.raises(ConfigError, match=message):
        choose_resources(nodes, cpus, asked)


def test_memory_that_was_measured_decides_the_share(nodes: list[Node], gpus: int) -> None:
    # Each trial takes a fifth of the memory plus a reserve: four trials fit on a device.
    chosen = choose_resources(nodes, None, None, 0.2)
    assert chosen == (TrialResources(1.0, 0.25, 8.0) if gpus else TrialResources(2.0, 0.0, 8.0))
    # Requested resources take precedence over measured ones.
    assert choose_resources(nodes, 1.0, 0.0, 0.2) == TrialResources(1.0, 0.0, 8.0)


@pytest.mark.parametrize(
    ("share", "part"),
    [(None, 1.0), (0.9, 1.0), (0.5, 1.0), (0.4, 0.5), (0.25, 0.3333), (0.001, 0.125)],
)
def test_as_many_trials_share_a_gpu_as_its_memory_holds(share: float | None, part: float) -> None:
    assert packed_gpus(share) == part


def test_slots_are_counted_node_by_node(nodes: list[Node], gpus: int) -> None:
    assert slots(nodes, TrialResources(3.0, 0.0, 8.0)) == 2
    assert slots(nodes, TrialResources(1.0, 0.5, 8.0)) == (4 if gpus else 1)
    assert cluster_device(nodes) == ("cuda" if gpus else "cpu")


def test_threads_are_whole_and_at_least_one() -> None:
    assert [TrialResources(cpus, 0.0, 8.0).threads for cpus in (0.5, 1.0, 2.5)] == [1, 1, 2]


def test_request_is_in_the_terms_of_ray() -> None:
    resources = TrialResources(2.0, 0.5, 8.0)
    assert resources.request(1) == {"CPU": 2.0, "GPU": 0.5}
    assert resources.request(2) == {"CPU": 4.0, "GPU": 1.0}


@pytest.mark.parametrize(
    ("usual", "share", "enlarged"),
    [
        ((1.0, 0.0), 1, (1.0, 0.0)),
        ((1.0, 0.0), 4, (4.0, 0.0)),
        ((3.0, 0.0), 4, (8.0, 0.0)),
        ((1.0, 0.25), 2, (2.0, 0.5)),
        ((1.0, 0.25), 8, (8.0, 1.0)),
        # A trial that requests several GPUs never gets more of them.
        ((1.0, 2.0), 2, (2.0, 2.0)),
    ],
)
def test_enlarged_as_far_as_a_trial_can_use(
    usual: tuple[float, float], share: int, enlarged: tuple[float, float]
) -> None:
    assert TrialResources(*usual, 8.0).enlarged(share) == TrialResources(*enlarged, 8.0)
