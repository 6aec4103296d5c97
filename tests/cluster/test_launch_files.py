"""Check the files for Kubernetes and clouds by their own validators and for unsafe settings."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

CLUSTER = Path(__file__).parents[2] / "cluster"
KUBERNETES = sorted((CLUSTER / "kubernetes").glob("*.yaml"))
CLOUDS = sorted((CLUSTER / "cloud").glob("*.yaml"))

FIELDS: dict[str, set[str]] = {
    # The fields of KubeRay 1.6's ray.io/v1 that our files use.
    "RayCluster": {
        "rayVersion",
        "authOptions",
        "enableInTreeAutoscaling",
        "autoscalerOptions",
        "headGroupSpec",
        "workerGroupSpecs",
    },
    "RayJob": {
        "clusterSelector",
        "entrypoint",
        "backoffLimit",
        "submissionMode",
        "submitterPodTemplate",
    },
    "headGroupSpec": {"serviceType", "rayStartParams", "template"},
    "workerGroupSpecs": {
        "groupName",
        "replicas",
        "minReplicas",
        "maxReplicas",
        "rayStartParams",
        "template",
    },
    "authOptions": {"mode"},
    "autoscalerOptions": {"idleTimeoutSeconds"},
}


def _documents() -> Iterator[dict[str, Any]]:
    for path in KUBERNETES:
        yield from yaml.safe_load_all(path.read_text())


def _templates() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield name and pod template of each group of pods in KubeRay's resources.

    The schemas of Kubernetes do not cover templates inside custom resources.
    """
    for document in _documents():
        spec = document["spec"]
        if document["kind"] == "RayCluster":
            yield "head", spec["headGroupSpec"]["template"]
            for group in spec["workerGroupSpecs"]:
                yield group["groupName"], group["template"]
        if document["kind"] == "RayJob":
            yield "submitter", spec["submitterPodTemplate"]


def test_resources_of_kubernetes_fit_its_schemas() -> None:
    plain = [each for each in _documents() if not each["apiVersion"].startswith("ray.io/")]
    assert {each["kind"] for each in plain} == {"PersistentVolumeClaim", "NetworkPolicy"}
    for document in plain:
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


def test_pods_fit_the_schema_of_kubernetes() -> None:
    found = dict(_templates())
    assert found.keys() == {"head", "gpu", "gpu-spot", "submitter"}
    for name, template in found.items():
        metadata = {"name": name, **template.get("metadata", {})}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}
        kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)
    broken = {**pod, "spec": {**pod["spec"], "containrs": []}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, kubernetes_validate.latest_version(), strict=True)


def test_only_fields_that_kuberay_knows_are_used() -> None:
    resources = {each["kind"]: each for each in _documents() if each["kind"].startswith("Ray")}
    assert {each["apiVersion"] for each in resources.values()} == {"ray.io/v1"}
    for kind, document in resources.items():
        assert document["spec"].keys() <= FIELDS[kind]
    spec = resources["RayCluster"]["spec"]
    for name in ("headGroupSpec", "authOptions", "autoscalerOptions"):
        assert spec[name].keys() <= FIELDS[name]
    for group in spec["workerGroupSpecs"]:
        assert group.keys() <= FIELDS["workerGroupSpecs"]
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    assert resources["RayJob"]["spec"]["clusterSelector"] == {
        "ray.io/cluster": resources["RayCluster"]["metadata"]["name"]
    }


def test_the_kubernetes_cluster_asks_for_a_token_and_is_not_open_to_others() -> None:
    documents = {each["kind"]: each for each in _documents()}
    assert documents["RayCluster"]["spec"]["authOptions"] == {"mode": "token"}
    assert documents["RayCluster"]["spec"]["headGroupSpec"]["serviceType"] == "ClusterIP"
    policy = documents["NetworkPolicy"]["spec"]
    assert policy["policyTypes"] == ["Ingress"]
    assert all(rule["from"] for rule in policy["ingress"])
    text = "".join(path.read_text() for path in KUBERNETES)
    assert "LoadBalancer" not in text
    assert "NodePort" not in text


@pytest.mark.parametrize("path", CLOUDS, ids=lambda path: path.stem)
def test_rays_own_validator_accepts_the_cloud(path: Path) -> None:
    config = yaml.safe_load(path.read_text())
    prepared = prepare_config(config)
    validate_config(prepared)
    assert prepared["available_node_types"].keys() == {"head", "gpu", "gpu-spot"}
    with pytest.raises(Exception, match="provider"):
        validate_config({**prepared, "provider": {}})


@pytest.mark.parametrize("path", CLOUDS, ids=lambda path: path.stem)
def test_clouds_listen_on_themselves_and_ask_for_a_token(path: Path) -> None:
    config = yaml.safe_load(path.read_text())
    (start,) = (line for line in config["head_start_ray_commands"] if "ray start" in line)
    assert "--dashboard-host=127.0.0.1" in start
    for line in (start, *config["worker_start_ray_commands"]):
        assert "ray start" not in line or line.startswith("RAY_AUTH_MODE=token ")
    assert "~/.ray/auth_token" in config["file_mounts"]


def test_no_file_opens_a_cluster_to_the_world() -> None:
    files = [path for path in CLUSTER.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    for path in files:
        text = path.read_text()
        assert not re.search(r"dashboard-host[=: ]+[\"']?0\.0\.0\.0", text), path
        assert "RAY_AUTH_MODE=disabled" not in text, path
