"""``cluster/ray-aws.yaml`` is what ``ray up`` takes, and brings up what the job needs.

Checked by Ray's own code and schema, with AWS's defaults filled in. Not covered: AWS's answers.
"""

from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from pipeline.capacity import NodeCapacity, missing
from pipeline.config import LimitsSection
from pipeline.profile import REPO_ROOT, load_profile

PATH = REPO_ROOT / "cluster" / "ray-aws.yaml"


@pytest.fixture
def config() -> dict[str, Any]:
    """As ``ray up`` reads it."""
    document: dict[str, Any] = yaml.safe_load(PATH.read_text())
    return document


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    full: dict[str, Any] = prepare_config(config)
    validate_config(full)
    return full


def test_it_fits_rays_schema(config: dict[str, Any]) -> None:
    assert prepared(config)["head_node_type"] == "head"


@pytest.mark.parametrize("where", [(), ("docker",), ("auth",), ("available_node_types", "h100")])
def test_an_unknown_key_does_not_fit(config: dict[str, Any], where: tuple[str, ...]) -> None:
    place = config
    for key in where:
        place = place[key]
    place["unknown"] = True
    with pytest.raises(Exception, match="unknown"):
        prepared(config)


def test_its_nodes_hold_four_replicas_and_the_head_none(config: dict[str, Any]) -> None:
    kinds = prepared(config)["available_node_types"]
    resources = kinds["h100"]["resources"]
    worker = NodeCapacity(
        "h100", resources["CPU"], resources["GPU"], resources["memory"] / 2**30, "H100"
    )
    nodes = [worker] * kinds["h100"]["max_workers"]
    profile = load_profile("maverick-fp8-8xh100")
    assert missing(profile, 4, nodes) == []
    assert missing(profile, 5, nodes)
    assert kinds["head"]["resources"] == {"CPU": 0}
    assert kinds["head"]["max_workers"] == 0


def test_jobs_have_their_grace_and_the_cluster_a_token(config: dict[str, Any]) -> None:
    options = dict(
        option.removeprefix("--env ").split("=")
        for option in config["docker"]["run_options"]
        if option.startswith("--env ")
    )
    assert int(options["RAY_JOB_STOP_WAIT_TIME_S"]) > LimitsSection().drain_s
    assert options["RAY_AUTH_MODE"] == "token"
    assert config["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}


def test_boto3_is_of_the_version_that_fits_the_pinned_botocore(config: dict[str, Any]) -> None:
    pins = (REPO_ROOT / "cluster" / "constraints.txt").read_text().splitlines()
    (botocore,) = (pin for pin in pins if pin.startswith("botocore=="))
    (command,) = config["head_setup_commands"]
    assert command.endswith(botocore.replace("botocore", "boto3"))


def test_no_key_is_written_down(config: dict[str, Any]) -> None:
    assert "AWS_" not in PATH.read_text()
    for kind in config["available_node_types"].values():
        assert kind["node_config"]["IamInstanceProfile"] == {"Name": "maverick-batch"}
