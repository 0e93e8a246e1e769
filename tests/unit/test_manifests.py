"""What is deployed on Kubernetes: valid objects, room for the replicas, and time for them to stop.

Objects are checked against Kubernetes' and KubeRay's schemas, unknown fields refused
(``tests/data/kubernetes/README.md``). Not covered: an API server's own further checks, an operator.
"""

import json
import re
from copy import deepcopy
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema_rs import Registry, ValidationError, validator_for

from pipeline.capacity import NodeCapacity, missing
from pipeline.config import LimitsSection, load_config
from pipeline.deadline import resolve_deadline
from pipeline.profile import REPO_ROOT, EngineProfile, load_profile

FOLDER = REPO_ROOT / "cluster" / "kuberay"
SCHEMAS = REPO_ROOT / "tests" / "data" / "kubernetes"
KUBERNETES = "https://kubernetes.io/api/_definitions.json"
PLACES = {
    "ConfigMap": f"{KUBERNETES}#/$defs/io.k8s.api.core.v1.ConfigMap",
    "Job": f"{KUBERNETES}#/$defs/io.k8s.api.batch.v1.Job",
    "Namespace": f"{KUBERNETES}#/$defs/io.k8s.api.core.v1.Namespace",
    "NetworkPolicy": f"{KUBERNETES}#/$defs/io.k8s.api.networking.v1.NetworkPolicy",
    "PersistentVolumeClaim": f"{KUBERNETES}#/$defs/io.k8s.api.core.v1.PersistentVolumeClaim",
    "PriorityClass": f"{KUBERNETES}#/$defs/io.k8s.api.scheduling.v1.PriorityClass",
    "RayCluster": "https://ray.io/v1#/$defs/RayCluster",
    "RayJob": "https://ray.io/v1#/$defs/RayJob",
}
CONTAINER = ("spec", "workerGroupSpecs", 0, "template", "spec", "containers", 0)
CLUSTERS = ["raycluster", "raycluster-2x8xh100", "rayjob"]
UNITS = {"Gi": 2**30, "Ti": 2**40, "": 1}
REPORTED_S = 10
"""What a job may take beyond ``limits.drain_s`` before it is killed."""


def read(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / f"{name}.yaml").read_text()))


def spec_of(name: str) -> dict[str, Any]:
    """The RayClusterSpec in a file."""
    (document,) = read(name)
    spec: dict[str, Any] = document["spec"].get("rayClusterSpec", document["spec"])
    return spec


def pods(name: str) -> dict[str, dict[str, Any]]:
    """The pods' specs: of the head and of each worker group."""
    spec = spec_of(name)
    workers = {group["groupName"]: group["template"] for group in spec["workerGroupSpecs"]}
    templates = {"head": spec["headGroupSpec"]["template"], **workers}
    return {group: template["spec"] for group, template in templates.items()}


def environment(pod: dict[str, Any]) -> dict[str, str]:
    (container,) = pod["containers"]
    return {item["name"]: item.get("value", "") for item in container["env"]}


def quantity(text: str) -> float:
    number, unit = re.fullmatch(r"([0-9.]+)(\w*)", text).groups()  # type: ignore[union-attr]
    return float(number) * UNITS[unit]


def within_s(pod: dict[str, Any]) -> int:
    """The time that ``preStop`` gives ``cluster.leave``."""
    (container,) = pod["containers"]
    command = container["lifecycle"]["preStop"]["exec"]["command"]
    assert command[:-1] == ["python", "-m", "cluster.leave", "--within"]
    return int(command[-1])


def check(document: dict[str, Any]) -> None:
    resources = [
        json.loads((SCHEMAS / name).read_text()) for name in ("kubernetes.json", "kuberay.json")
    ]
    registry = Registry([(schema["$id"], schema) for schema in resources])
    schema = {"$ref": PLACES[document["kind"]]}
    validator_for(schema, registry=registry).validate(document)


def nightly(tmp_path: Path) -> tuple[EngineProfile, int, LimitsSection]:
    """The profile, replicas and limits of the ConfigMap's job."""
    (config_map,) = (document for document in read("base") if document["kind"] == "ConfigMap")
    path = tmp_path / "nightly.yaml"
    path.write_text(config_map["data"]["nightly.yaml"])
    config = load_config(str(path), [])
    return load_profile(config.engine.profile), config.engine.most_replicas, config.limits


def nodes(name: str) -> list[NodeCapacity]:
    """What Ray would tell of the cluster's nodes, head included."""
    spec = spec_of(name)
    found = [NodeCapacity("head", float(spec["headGroupSpec"]["rayStartParams"]["num-cpus"]), 0, 0)]
    for group in spec["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        product = group["template"]["spec"]["nodeSelector"]["nvidia.com/gpu.product"]
        start = group["rayStartParams"]
        node = NodeCapacity(
            name=group["groupName"],
            cpus=float(start["num-cpus"]),
            gpus=int(container["resources"]["limits"]["nvidia.com/gpu"]),
            memory_gib=float(start["memory"]) / 2**30,
            accelerator=product.split("-")[1],
        )
        found += [node] * (group["replicas"] * group.get("numOfHosts", 1))
    return found


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_object_fits_its_schema(path: Path) -> None:
    documents = read(path.stem)
    assert documents
    for document in documents:
        check(document)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("spec", "workerGroupSpec"), []),
        (("spec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("spec", "workerGroupSpecs", 0, "maxReplicas"), "4"),
        (("spec", "workerGroupSpecs", 0, "template", "metadata", "label"), {}),
        (("spec", "workerGroupSpecs", 0, "template", "spec", "toleration"), []),
        ((*CONTAINER, "image"), 5),
        ((*CONTAINER, "resources", "limits", "memory"), "448 GB"),
    ],
)
def test_the_schemas_refuse_unknown_fields_and_wrong_values(
    where: tuple[Any, ...], value: Any
) -> None:
    (document,) = deepcopy(read("raycluster"))
    check(document)
    place: Any = document
    for key in where[:-1]:
        place = place[key]
    place[where[-1]] = value
    with pytest.raises(ValidationError):
        check(document)


def test_the_job_brings_up_the_cluster_that_otherwise_stays_up() -> None:
    assert spec_of("rayjob") == spec_of("raycluster")


def test_the_cluster_of_pairs_differs_in_its_workers_count_alone() -> None:
    pairs, one = spec_of("raycluster-2x8xh100"), spec_of("raycluster")
    own = {"groupName", "replicas", "maxReplicas", "numOfHosts"}
    for spec in (pairs, one):
        (group,) = spec["workerGroupSpecs"]
        spec["workerGroupSpecs"] = {key: group[key] for key in group.keys() - own}
    assert pairs == one


@pytest.mark.parametrize("name", CLUSTERS)
def test_ray_is_of_the_pinned_version_and_asks_for_a_token(name: str) -> None:
    pins = (REPO_ROOT / "cluster" / "constraints.txt").read_text().splitlines()
    assert f"ray=={spec_of(name)['rayVersion']}" in pins
    assert spec_of(name)["authOptions"] == {"mode": "token"}


@pytest.mark.parametrize("name", ["raycluster", "rayjob"])
def test_the_cluster_holds_the_replicas_of_the_nightly_job(name: str, tmp_path: Path) -> None:
    profile, replicas, _ = nightly(tmp_path)
    assert missing(profile, replicas, nodes(name)) == []
    assert missing(profile, replicas + 1, nodes(name))


def test_the_cluster_of_pairs_holds_two_replicas_over_two_nodes() -> None:
    profile = load_profile("maverick-fp8-2x8xh100")
    assert missing(profile, 2, nodes("raycluster-2x8xh100")) == []
    assert missing(profile, 3, nodes("raycluster-2x8xh100"))


@pytest.mark.parametrize("name", CLUSTERS)
def test_the_head_has_no_gpu_and_runs_no_replica(name: str) -> None:
    head = pods(name)["head"]
    (container,) = head["containers"]
    assert "nvidia.com/gpu" not in container["resources"]["limits"]
    assert nodes(name)[0].cpus == 0


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_job_has_its_grace_before_anything_is_killed(name: str) -> None:
    head = pods(name)["head"]
    stop_s = int(environment(head)["RAY_JOB_STOP_WAIT_TIME_S"])
    assert LimitsSection().drain_s + REPORTED_S <= stop_s
    assert stop_s < within_s(head) < head["terminationGracePeriodSeconds"]


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_worker_drains_within_its_grace_and_a_spot_machines_two_minutes(name: str) -> None:
    for group, pod in pods(name).items():
        if group != "head":
            assert within_s(pod) < pod["terminationGracePeriodSeconds"] < 120
            assert environment(pod)["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] == "0"
            effects = {item["key"] for item in pod["tolerations"]}
            assert {"nvidia.com/gpu", "cloud.google.com/gke-spot"} <= effects


@pytest.mark.parametrize("name", CLUSTERS)
def test_pods_are_probed_have_a_priority_that_exists_and_no_rights(name: str) -> None:
    classes = {d["metadata"]["name"] for d in read("base") if d["kind"] == "PriorityClass"}
    for pod in pods(name).values():
        (container,) = pod["containers"]
        assert {"startupProbe", "livenessProbe", "readinessProbe"} <= container.keys()
        assert pod["priorityClassName"] in classes
        assert pod["securityContext"]["runAsNonRoot"]
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert pod["automountServiceAccountToken"] is False


@pytest.mark.parametrize("name", CLUSTERS)
def test_shared_memory_holds_the_object_store_and_fits_in_the_memory(name: str) -> None:
    for group in spec_of(name)["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        (shm,) = (v["emptyDir"] for v in pod["volumes"] if v["name"] == "shm")
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert (mounts["shm"], shm["medium"]) == ("/dev/shm", "Memory")
        size = quantity(shm["sizeLimit"])
        assert quantity(group["rayStartParams"]["object-store-memory"]) <= size / 2
        taken = quantity(group["rayStartParams"]["memory"]) + size
        assert taken <= quantity(container["resources"]["limits"]["memory"])


@pytest.mark.parametrize("name", CLUSTERS)
def test_weights_come_from_the_volume_that_the_download_fills(name: str) -> None:
    (download,) = read("weights")
    pod = download["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"][:2] == ["hf", "download"]
    profile = load_profile("maverick-fp8-8xh100")
    assert [container["command"][2], *container["args"]] == [
        profile.model,
        "--revision",
        profile.revision,
    ]
    for used in pods(name).values():
        assert environment(used)["HF_HOME"] == environment(pod)["HF_HOME"]
        assert environment(used)["HF_HUB_OFFLINE"] == "1"
        claims = [v["persistentVolumeClaim"]["claimName"] for v in used["volumes"][:1]]
        assert claims == [v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"]]


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_secrets_are_named_and_never_written_down(path: Path) -> None:
    for document in read(path.stem):
        assert document["kind"] != "Secret"
    text = path.read_text()
    for line in text.splitlines():
        if re.search(r"(?i)(secret|token|password|access_key)\w*\W+value:", line):
            pytest.fail(f"{path.name}: {line.strip()}")
    if path.stem in CLUSTERS:
        for pod in pods(path.stem).values():
            (container,) = pod["containers"]
            assert container["envFrom"] == [{"secretRef": {"name": "batch-s3"}}]


def test_the_night_ends_by_its_own_deadline_and_is_run_again_when_it_was_interrupted(
    tmp_path: Path,
) -> None:
    (job,) = read("rayjob")
    _, _, limits = nightly(tmp_path)
    now = datetime.now(UTC)
    assert limits.deadline is not None
    end = resolve_deadline(limits.deadline, started=now)
    assert (end - now).total_seconds() < job["spec"]["activeDeadlineSeconds"]
    assert job["spec"]["backoffLimit"] > 0
    assert "--resume-latest" in job["spec"]["entrypoint"]
    (claim,) = (v for v in pods("rayjob")["head"]["volumes"] if "configMap" in v)
    assert claim["configMap"]["name"] == "nightly"
    assert "--config /etc/batch/nightly.yaml" in job["spec"]["entrypoint"]
