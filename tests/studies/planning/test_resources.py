import math

import pytest
import ray
from hypothesis import assume, given
from hypothesis import strategies as st

from batchcam.errors import ConfigError
from studies.planning.resources import (
    Node,
    TrialResources,
    alive_nodes,
    choose_resources,
    cluster_device,
    shared_gpus,
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
    nodes = [NODE | {"CPU": 64.0, "GPU": 2.0}]
    assert shared_gpus(nodes, None, share, None) == part


@pytest.mark.parametrize(
    ("trials", "part"),
    [(1, 1.0), (8, 1.0), (64, 1.0), (100, 1.0), (128, 0.5), (200, 0.3333), (10_000, 0.125)],
)
def test_no_gpu_is_shared_while_another_is_idle(trials: int, part: float) -> None:
    """64 small trials on 8 nodes of 8 GPUs have a GPU each."""
    nodes = [{"CPU": 96.0, "GPU": 8.0}] * 8
    chosen = choose_resources(nodes, None, None, 0.01, trials)
    assert chosen.gpus == part
    # All slots are taken, or each trial is alone on its GPU.
    assert chosen.gpus == 1 or slots(nodes, chosen) <= trials


def test_a_gpu_is_shared_by_no_more_trials_than_it_has_cpus() -> None:
    nodes = [{"CPU": 8.0, "GPU": 4.0}]
    assert shared_gpus(nodes, None, 0.01, None) == 0.5
    assert shared_gpus(nodes, 2.0, 0.01, None) == 1.0
    # One node has no CPUs to share with.
    assert shared_gpus([*nodes, {"CPU": 4.0, "GPU": 4.0}], None, 0.01, None) == 1.0


def test_nodes_without_cpus_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"requests 1 CPUs and 0 GPUs, but .* has 0 CPUs"):
        choose_resources([{"CPU": 0.0}], None, None, 0.2)


def test_gpus_that_no_trial_can_use_do_not_count() -> None:
    """A head with GPUs and without CPUs runs no trials, so it sets neither GPUs nor CPUs of one."""
    nodes = [{"GPU": 8.0}, {"CPU": 0.0, "GPU": 8.0}, {"CPU": 32.0, "GPU": 4.0}]
    assert choose_resources(nodes, None, None, 0.01, 8) == TrialResources(4.0, 0.5, 32.0)
    # Two of the four GPUs have CPUs for a trial.
    assert shared_gpus([{"CPU": 32.0, "GPU": 4.0}], 16.0, 0.01, 8) == 1.0
    with pytest.raises(ConfigError, match="the largest node has 0 CPUs and 8 GPUs"):
        choose_resources([{"CPU": 0.0, "GPU": 8.0}, {"CPU": 8.0}], None, None, 0.01, 8)


def test_a_third_of_a_gpu_has_a_third_of_the_cpus() -> None:
    """Ray's third is 0.3333, of which twelve CPUs would be less than four."""
    nodes = [{"CPU": 12.0, "GPU": 1.0}]
    assert choose_resources(nodes, None, None, 0.25) == TrialResources(4.0, 0.3333, 12.0)
    assert choose_resources([{"CPU": 12.0, "GPU": 4.0}], None, 2.0).cpus == 6.0


def test_an_enlarged_trial_fits_on_a_node_that_has_its_gpu() -> None:
    nodes = [{"CPU": 64.0}, {"CPU": 8.0, "GPU": 1.0}]
    assert choose_resources(nodes, None, None).request(8) == {"CPU": 8.0, "GPU": 1.0}


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 8)), min_size=1, max_size=4),
    st.none() | st.sampled_from([0.5, 1.0, 1.5, 3.0, 8.0]),
    st.floats(0.001, 1.0),
    st.integers(1, 80),
)
def test_a_shared_gpu_leaves_no_gpu_idle_wherever_trials_are_placed(
    cpus_and_gpus: list[tuple[int, int]], cpus: float | None, fraction: float, trials: int
) -> None:
    nodes = [{"CPU": float(cpus), "GPU": float(gpus)} for cpus, gpus in cpus_and_gpus]
    try:
        chosen = choose_resources(nodes, cpus, None, fraction, trials)
    except ConfigError:
        assume(False)
    assume(0 < chosen.gpus < 1)
    together = int(1 / chosen.gpus)
    assert together * fraction <= 1
    running = min(trials, slots(nodes, chosen))
    # All trials fit without the last GPU that a trial can use on any node, if that may be idle.
    for index, node in enumerate(nodes):
        usable = min(node["GPU"], node["CPU"] // chosen.cpus)
        if usable:
            others = slots(
                [*nodes[:index], node | {"GPU": usable - 1}, *nodes[index + 1 :]], chosen
            )
            assert running > others or others == slots(nodes, chosen) == 1


@pytest.mark.parametrize(
    ("gpus", "each"),
    # Ray rounds 0.33336 down to 0.3333.
    [(0.4, 2), (0.5, 2), (0.6, 1), (0.3333, 3), (0.33336, 3), (0.125, 8), (1.0, 1)],
)
def test_a_part_of_a_gpu_is_on_one_gpu(gpus: float, each: int) -> None:
    """Five trials of 0.4 would fit on two GPUs by their sum."""
    nodes = [{"CPU": 64.0, "GPU": 4.0}, {"CPU": 64.0}]
    assert slots(nodes, TrialResources(1.0, gpus, 64.0)) == 4 * each


def test_several_gpus_are_on_one_node() -> None:
    nodes = [{"CPU": 64.0, "GPU": 3.0}, {"CPU": 64.0, "GPU": 1.0}]
    assert slots(nodes, TrialResources(1.0, 2.0, 64.0)) == 1


@pytest.mark.parametrize(
    ("gpus", "message"),
    [
        (1.5, "gpus_per_trial=1.5 is more than one GPU and not a whole number; use a fraction"),
        (-1.0, "gpus_per_trial=-1.0 must be a finite number >= 0"),
        (math.nan, "gpus_per_trial=nan must be a finite number >= 0"),
        (0.00009, "gpus_per_trial=9e-05 is less than Ray's smallest part of a GPU, 0.0001; raise"),
    ],
)
def test_gpus_that_no_trial_can_have_are_refused(gpus: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_resources([{"CPU": 8.0, "GPU": 4.0}], None, gpus)
    with pytest.raises(ConfigError, match=message):
        TrialResources(1.0, gpus, 8.0)


@given(st.floats(0.0001, 1.0) | st.integers(0, 8).map(float), st.integers(0, 12))
def test_enlarged_gpus_are_valid_and_at_most_one_if_they_were(gpus: float, doublings: int) -> None:
    enlarged = TrialResources(1.0, gpus, 8.0).enlarged(2**doublings)  # Refuses what is not valid.
    assert gpus <= enlarged.gpus <= max(1.0, gpus)
    assert enlarged.gpus in (gpus, 1.0) or enlarged.gpus == gpus * 2**doublings


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
