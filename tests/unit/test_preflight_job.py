"""The whole preflight with nodes that are this process: what it tells, and how it ends.

tests/integration/test_preflight.py has it on Ray nodes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.preflight.__main__ import main
from cluster.preflight.crew import Node, Unanswered
from cluster.preflight.findings import Check
from cluster.preflight.inspection import inspect
from cluster.preflight.machine import Machine, look_at_machine
from cluster.preflight.memory import MemoryFacts
from cluster.preflight.ranks import RankReport, Stage, Timing
from cluster.preflight.report import Outcome, Report
from pipeline.config import JobConfig, parse_config
from pipeline.errors import ExitCode
from pipeline.profile import EngineProfile, load_profile
from tests.preflight_cases import FIRST, HereCrew, cpu_node, put_model

NODES = [cpu_node("a"), cpu_node("b")]
REDUCED = {
    ("a", "run_part"): (RankReport(0, Stage.DONE, (Timing(2**24, 0.01, True),)),),
    ("b", "run_part"): (RankReport(1, Stage.DONE, (Timing(2**24, 0.02, True),)),),
}


@pytest.fixture
def profile(tmp_path: Path) -> EngineProfile:
    """A sound model in a profile for two nodes."""
    mini = load_profile("mini-maverick-tp1")
    return mini.model_copy(
        update={
            "model": str(put_model(tmp_path / "model")),
            "needs": mini.needs.model_copy(
                update={"nodes": 2, "cpus_per_node": 1, "memory_gib_per_node": 0.5}
            ),
        }
    )


def config_of(tmp_path: Path) -> JobConfig:
    (tmp_path / "in").mkdir(exist_ok=True)
    (tmp_path / "in" / "rows.parquet").write_bytes(b"PAR1")
    document = {
        "input": {"uri": str(tmp_path / "in")},
        "output": {"uri": str(tmp_path / "runs" / "x")},
        "engine": {"profile": "two-nodes"},
    }
    return parse_config(document, source="test")


def inspected(
    tmp_path: Path,
    profile: EngineProfile,
    planted: dict[tuple[str, str], Any],
    nodes: list[Node] = NODES,
    *,
    grows: bool = False,
) -> Report:
    crew = HereCrew(nodes, REDUCED | planted, grows=grows)
    return inspect(config_of(tmp_path), profile, crew, checksums=True)


def test_a_sound_cluster_has_no_fault(tmp_path: Path, profile: EngineProfile) -> None:
    report = inspected(tmp_path, profile, {})
    assert report.faults == ()
    assert (report.status, report.exit_code, report.error) == ("ok", ExitCode.DONE, None)
    told = report.to_json()
    assert told["checks"] == {
        **{check.value: "ok" for check in Check},
        "gpus": "not_needed",
    }
    assert [node["name"] for node in told["nodes"]] == ["a", "b"]
    assert [node["model"]["hashed"] for node in told["nodes"]] == [4, 4]
    (group,) = told["all_reduce"]
    assert group["bus_gb_s"] == pytest.approx(2**24 / 0.02 / 1e9, rel=1e-3)
    assert not (tmp_path / "runs").exists(), "a preflight leaves nothing"


def test_every_check_is_carried_out_whatever_the_others_find(
    tmp_path: Path, profile: EngineProfile
) -> None:
    sound = look_at_machine(with_gpus=False)
    odd = Machine({**sound.installed, "ray": "2.59.0"}, sound.gpus, MemoryFacts(16, 0.1, 64 / 1024))
    (tmp_path / "model" / FIRST).unlink()
    (tmp_path / "runs").write_text("a file where the run folder is to be")
    report = inspected(
        tmp_path,
        profile,
        {
            ("b", "look_at_machine"): odd,
            ("b", "time"): lambda: 0.0,
            ("b", "run_part"): Unanswered("no answer within 5 s"),
        },
    )
    assert {fault.check for fault in report.faults} == {
        *(Check.MEMORY, Check.SHARED_MEMORY, Check.VERSIONS, Check.CLOCKS),
        *(Check.WEIGHTS, Check.BUCKET, Check.ALL_REDUCE),
    }
    assert report.exit_code == ExitCode.FAILED
    assert report.outcome(Check.CAPACITY) is Outcome.OK


def test_a_node_that_hangs_is_a_fault_of_each_check(tmp_path: Path, profile: EngineProfile) -> None:
    hung = Unanswered("no answer within 1 s")
    names = ("look_at_machine", "look_at_weights", "try_bucket", "run_part")
    report = inspected(tmp_path, profile, {("b", name): hung for name in names})
    silent = [fault for fault in report.faults if "no answer within 1 s" in fault.message]
    assert {fault.check for fault in silent} == {
        *(Check.VERSIONS, Check.WEIGHTS, Check.BUCKET, Check.ALL_REDUCE)
    }
    assert all("b" in fault.nodes for fault in silent)
    (node,) = [node for node in report.to_json()["nodes"] if node["name"] == "b"]
    assert (node["memory"], node["model"]) == (None, None)
    checks = report.to_json()["checks"]
    assert [checks[name] for name in ("memory", "shared_memory", "clocks")] == ["not_done"] * 3


def test_too_few_nodes_are_a_fault_and_the_rest_is_still_looked_at(
    tmp_path: Path, profile: EngineProfile
) -> None:
    report = inspected(tmp_path, profile, {}, [cpu_node("a")])
    (fault,) = report.faults
    assert fault.check is Check.CAPACITY
    assert "1 of 1 nodes have that" in fault.message
    assert "add nodes, or lower engine.replicas (now 1 x two-nodes)" in fault.message
    assert report.outcome(Check.ALL_REDUCE) is Outcome.NOT_DONE
    assert report.to_json()["nodes"][0]["model"]["files"] == 4


def test_a_gpu_profile_on_nodes_without_gpus_is_a_fault(tmp_path: Path) -> None:
    profile = load_profile("maverick-fp8-8xh100").model_copy(update={"model": "/absent/model"})
    report = inspected(tmp_path, profile, {})
    (capacity,) = [fault for fault in report.faults if fault.check is Check.CAPACITY]
    assert "8 H100 GPUs" in capacity.message
    assert "0 of 2 nodes have that" in capacity.message
    (weights,) = [fault for fault in report.faults if fault.check is Check.WEIGHTS]
    assert weights.nodes == ("a", "b"), "where they will be needed is not known: all are looked at"
    assert report.outcome(Check.GPUS) is Outcome.NOT_DONE
    assert {fault.check for fault in report.faults} == {Check.CAPACITY, Check.WEIGHTS}


def test_what_an_autoscaler_will_add_is_told_and_is_no_fault(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = load_profile("maverick-fp8-8xh100").model_copy(update={"model": "/absent/model"})
    report = inspected(tmp_path, profile, {}, grows=True)
    assert report.faults == ()
    told = report.to_json()
    assert (told["checks"]["capacity"], told["checks"]["weights"]) == ("waits", "not_done")
    assert (told["checks"]["bucket"], told["exit_code"]) == ("ok", 0)
    (waits,) = told["waits"]
    assert "0 of 2 nodes have that" in waits
    report.show()
    shown = capsys.readouterr().err
    assert f"capacity: {waits}." in shown
    assert "its autoscaler is asked for more nodes" in shown


def test_people_read_a_table_and_a_sentence_for_each_fault(
    tmp_path: Path, profile: EngineProfile, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model" / FIRST).unlink()
    report = inspected(tmp_path, profile, {("b", "time"): lambda: 0.0})
    report.show()
    shown = capsys.readouterr().err
    assert [line for line in shown.splitlines() if line.startswith(("weights: ", "clocks: "))] == [
        f"{fault.check}: {fault.sentence}" for fault in report.faults
    ]
    assert "0.84 GB/s, 20.00 ms" in shown
    assert "No fault was found" not in shown


def test_secrets_of_the_environment_are_masked_in_what_is_shown(
    tmp_path: Path,
    profile: EngineProfile,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-secret")
    planted = Unanswered("the process there ended (planted-secret)")
    inspected(tmp_path, profile, {("b", "look_at_weights"): planted}).show()
    shown = capsys.readouterr().err
    assert "the process there ended (***)" in shown


def put_config(tmp_path: Path) -> str:
    document = config_of(tmp_path).model_dump(mode="json", exclude_none=True)
    document["engine"]["profile"] = "mini-maverick"
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(document))
    return str(path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--config"),
        (("--config", "absent.yaml"), "absent.yaml: no such config file"),
        (("--config", "{config}", "--set", "engine.replicaz=2"), "replicas"),
        (("--config", "{config}", "--set", "engine.profile=mini-mavrick"), "did you mean"),
    ],
)
def test_a_bad_config_ends_with_2_and_one_json_object(
    tmp_path: Path, arguments: tuple[str, ...], words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    config = put_config(tmp_path)
    code = main([argument.format(config=config) for argument in arguments])
    out, err = capfd.readouterr()
    assert code == ExitCode.USAGE
    (line,) = out.splitlines()
    assert json.loads(line)["status"] == "invalid"
    assert words in err


def test_a_cluster_that_does_not_answer_ends_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert main(["--config", put_config(tmp_path)]) == ExitCode.USAGE
    assert "no Ray cluster answers there" in capfd.readouterr().err
