"""The plan job without Ray: what it tells, what it refuses, and that it writes nothing.

Counting is done in this process; tests/integration/test_plan.py has it on Ray.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from jobs.cli import run_job
from jobs.plan import Looked, plan, plan_parser
from jobs.settle import Job, flow_spec
from pipeline.count import ShardCounts, count_block, spread_rows
from pipeline.prepare import prepare_block
from pipeline.read import read_shard
from pipeline.records import input_block
from pipeline.survey import Pick
from tests.unit.test_previous import completion, put_run


@contextmanager
def look_here(job: Job, picks: Sequence[Pick]) -> Iterator[Looked]:
    """Counts in this process; the cluster lacks something."""
    spec = flow_spec(job)
    limit = job.profile.engine_args["max_model_len"]

    def counted() -> Iterator[ShardCounts]:
        for pick in picks:
            table = read_shard(pick.shard, spec.columns, planned=spec.files[pick.shard.uri])
            block = input_block(pick.shard, table, spec.duplicates.of(pick.shard))
            prepared = prepare_block(spread_rows(block, pick.rows), spec=spec.prepare)
            yield count_block(prepared, max_model_len=limit)

    yield ["8 GPUs"], counted()


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "in").mkdir()
    return {
        "input": {"uri": f"{tmp_path}/in"},
        "output": {"uri": f"{tmp_path}/runs/next"},
        "sampling": {"max_completion_tokens": 50},
        "engine": {"profile": "mini-maverick-tp1"},
        "limits": {"max_error_rate": 0.25, "shard_rows": 10},
    }


class Planned:
    """One run of the job."""

    def __init__(
        self,
        capfd: pytest.CaptureFixture[str],
        folder: Path,
        config: dict[str, Any],
        *arguments: str,
    ) -> None:
        path = folder / "job.yaml"
        path.write_text(yaml.safe_dump(config))
        job = partial(plan, look=look_here)
        self.code = run_job(job, plan_parser("jobs.plan"), ["--config", str(path), *arguments])
        printed = capfd.readouterr()
        (line,) = printed.out.splitlines()
        self.line: dict[str, Any] = json.loads(line)
        self.text = " ".join(printed.err.replace("│", " ").split())

    @property
    def plan(self) -> dict[str, Any]:
        found: dict[str, Any] = self.line["plan"]
        return found


def put_prompts(folder: Path, prompts: Sequence[str | None]) -> None:
    table = pa.table({"prompt": pa.array(prompts, pa.string())})
    pq.write_table(table, folder / "in" / "a.parquet")


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.name != "job.yaml")


def test_a_plan_counts_the_input_and_writes_nothing(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, config: dict[str, Any]
) -> None:
    put_prompts(tmp_path, [*(f"Count to {i}." for i in range(35)), None, "", "x", "y", "z"])
    before = files(tmp_path)
    done = Planned(capfd, tmp_path, config)
    assert (done.code, done.line["status"]) == (0, "plan"), done.text
    assert files(tmp_path) == before
    assert done.line["rows"] == {
        "total": 40,
        **dict.fromkeys(("succeeded", "errored", "expired", "cancelled"), 0),
    }
    assert done.plan["rows"]["bad"] == {"value": 2, "low": 2, "high": 2}
    assert done.plan["completions"]["value"] == 38
    assert done.plan["completion_source"]["kind"] == "caps"
    assert done.plan["tokens"]["completion"] == {
        "value": 38 * 50,
        "low": 0,
        "high": 38 * 50,
        "most": 38 * 50,
    }
    bad = done.plan["errors"]["invalid_messages"]
    assert (bad["rows"], bad["example"]["input_row"]) == (2, 35)
    assert "neither prompt nor messages" in bad["example"]["message"]
    assert bad["remedy"].startswith("Mend the row")
    assert done.plan["engine"]["fits"] is False
    for shown in ("8 GPUs", "invalid_messages", "1,900 (0 to 1,900)", "nothing was written"):
        assert shown in done.text


def test_too_many_bad_rows_exit_with_3_and_say_so(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, config: dict[str, Any]
) -> None:
    put_prompts(tmp_path, [None] * 20)
    done = Planned(capfd, tmp_path, config)
    assert (done.code, done.line["status"]) == (3, "over_error_rate")
    assert "20 of 20 rows are bad (100.0%)" in done.line["error"]
    assert done.plan["tokens"]["completion"]["value"] == 0


def test_an_empty_input_has_an_empty_plan(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, config: dict[str, Any]
) -> None:
    put_prompts(tmp_path, [])
    done = Planned(capfd, tmp_path, config, "--sample", "0.5")
    assert done.code == 0, done.text
    assert done.plan["rows"]["total"] == done.plan["tokens"]["prompt"]["value"] == 0
    assert done.plan["seconds"]["value"] == 0


def test_jsonl_is_planned_alike_and_repeated_ids_are_bad(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, config: dict[str, Any]
) -> None:
    def line(number: int) -> str:
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 7}
        request = {"custom_id": f"id-{number}", "method": "POST", "url": "/v1/chat/completions"}
        return json.dumps({**request, "body": body})

    lines = [line(number) for number in range(25)] + [line(3), "{no json"]
    (tmp_path / "in" / "a.jsonl").write_text("\n".join(lines))
    done = Planned(capfd, tmp_path, config)
    assert done.code == 0, done.text
    errors = {code: found["rows"] for code, found in done.plan["errors"].items()}
    assert errors == {"duplicate_custom_id": 1, "invalid_json_line": 1}
    assert done.plan["tokens"]["completion"]["most"] == 25 * 7


def test_a_sample_is_scaled_up_with_ranges(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, config: dict[str, Any]
) -> None:
    put_prompts(tmp_path, ["a" * (1 + i % 7) for i in range(2000)])
    whole = Planned(capfd, tmp_path, config).plan
    done = Planned(capfd, tmp_path, config, "--sample", "400")
    sample = done.plan
    assert not sample["exact"]
    assert 400 <= sample["rows"]["looked_at"] < 500
    prompt, truth = sample["tokens"]["prompt"], whole["tokens"]["prompt"]["value"]
    assert prompt["low"] <= truth <= prompt["high"]
    assert prompt["low"] < prompt["value"] < prompt["high"]
    assert sample["completions"]["value"] == 2000
    assert "95 %" in done.text


def test_lengths_come_from_the_newest_run_beside_it_or_the_one_that_is_named(
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    config: dict[str, Any],
) -> None:
    put_prompts(tmp_path, ["Hello"] * 30)
    (tmp_path / "runs").mkdir()
    put_run(
        tmp_path / "runs" / "old", [completion(i, 20) for i in range(60)], model="mini-maverick"
    )
    put_run(tmp_path / "elsewhere", [completion(i, 40) for i in range(60)], model="another")
    found = Planned(capfd, tmp_path, config).plan
    assert found["tokens"]["completion"]["value"] == 30 * 20
    assert found["completion_source"]["run"] == f"file://{tmp_path}/runs/old"
    named = Planned(capfd, tmp_path, config, "--previous", f"{tmp_path}/elsewhere")
    assert named.plan["tokens"]["completion"]["value"] == 30 * 40
    assert "is a run of another, not of mini-maverick" in caplog.text
    given = Planned(capfd, tmp_path, config, "--expected-tokens", "12").plan
    assert given["tokens"]["completion"]["value"] == 30 * 12


def test_time_and_money_follow_from_rates_and_prices(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, config: dict[str, Any]
) -> None:
    put_prompts(tmp_path, ["Hello"] * 30)
    profile = yaml.safe_load(Path("cluster/engines/mini-maverick-tp1.yaml").read_text())
    profile["needs"] |= {"gpus_per_node": 1, "accelerator": "H100"}
    profile["rates"] = {
        "basis": "estimate",
        "prompt_tokens_per_s": 1e9,
        "completion_tokens_per_s": 10,
        "load_s": 60,
        "hardware": "h",
        "source": "s",
        "as_of": "2026-11-22",
    }
    path = tmp_path / "gpu.yaml"
    path.write_text(yaml.safe_dump(profile))
    config["engine"] = {"profile": str(path), "replicas": 3}
    config["prices"] = {"gpu_hour": 7.2}
    done = Planned(capfd, tmp_path, config, "--expected-tokens", "40").plan
    work = 30 * 40 / 10
    total = 60 + work / 3 + work * 10 / 30
    assert done["seconds"]["value"] == pytest.approx(total, abs=0.1)
    cluster = done["money"]["expected"]["cluster"]
    assert cluster["gpu_hours"] == pytest.approx(3 * total / 3600, rel=1e-3)
    assert cluster["cost"] == pytest.approx(7.2 * 3 * total / 3600, rel=1e-3)
    assert done["money"]["low"]["cluster"]["cost"] < cluster["cost"]
    prompt = done["tokens"]["prompt"]["value"]
    hosted = done["money"]["expected"]["hosted"][0]["cost"]
    assert hosted == pytest.approx((prompt * 0.17 + 1200 * 0.85) / 1e6, abs=1e-6)


def test_a_plan_is_written_where_it_is_asked_for(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, config: dict[str, Any]
) -> None:
    put_prompts(tmp_path, ["Hello"])
    out = tmp_path / "plan.json"
    done = Planned(capfd, tmp_path, config, "--out", str(out))
    assert json.loads(out.read_text()) == done.plan


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--sample", "0"), "--sample 0: must be"),
        (("--sample", "1.5"), "--sample 1.5: must be"),
        (("--sample", "many"), "--sample many: must be"),
        (("--expected-tokens", "-3"), "--expected-tokens -3: must be a number from 0"),
        (("--expected-tokens", "nan"), "--expected-tokens nan: must be"),
        (("--previous", "TMP/in"), "is no finished run"),
        (("--previous", "x", "--expected-tokens", "3"), "not allowed with argument"),
        (("--set", "prices.file=TMP/none.yaml"), "none.yaml: No such file or directory."),
        (("--set", "prices.gpu_hour=-1"), "prices.gpu_hour"),
        (("--out", "s3://"), "names no bucket"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_counted(
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    config: dict[str, Any],
    arguments: tuple[str, ...],
    words: str,
) -> None:
    put_prompts(tmp_path, ["Hello"])
    given = [each.replace("TMP", str(tmp_path)) for each in arguments]
    done = Planned(capfd, tmp_path, config, *given)
    assert (done.code, done.line["status"]) == (2, "invalid")
    assert words in done.line["error"]


def test_a_plan_that_cannot_be_written_is_refused_before_the_survey(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, config: dict[str, Any]
) -> None:
    put_prompts(tmp_path, ["a", "b"])
    out = tmp_path / "in" / "a.parquet" / "plan.json"
    done = Planned(capfd, tmp_path, config, "--out", str(out))
    assert (done.code, done.line["status"]) == (2, "invalid")
    assert f"--out {out}" in done.line["error"]
    assert "plan" not in done.line
    kept = tmp_path / "plan.json"
    assert Planned(capfd, tmp_path, config, "--out", str(kept)).code == 0
    assert [path.name for path in tmp_path.glob("plan*")] == ["plan.json"]
