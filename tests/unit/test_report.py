"""Reports: totals over parts, how a run is judged, and pages that open without a network."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.commit import PartStats
from pipeline.errors import AccountingError, ExitCode
from pipeline.report import Result, RunStatus, judge, total, write_report
from tests.report_cases import MANIFEST as CASE_MANIFEST
from tests.report_cases import SEVERAL_STARTS
from tests.report_cases import result as case

PARTS = [
    PartStats(
        0,
        {"succeeded": 7, "errored": 1},
        8,
        {"prompt": 80, "completion": 40, "cached": 0, "image": 7},
        {"image_invalid": 1},
        {"stop": 7},
        {"3": 7},
        1.0,
    ),
    PartStats(
        1,
        {"succeeded": 2, "errored": 0},
        2,
        {"prompt": 20, "completion": 130, "cached": 16, "image": 0},
        {},
        {"stop": 1, "length": 1},
        {"2": 1, "7": 1},
        2.0,
    ),
]
MANIFEST = {
    "config": {"name": "<night>", "seed": 1, "engine": {"profile": "p", "replicas": 1}},
    "model": {"name": "m", "revision": "sha256:0"},
    "input": {"uri": "s3://b/in", "files": 1, "rows": 10, "fingerprint": "sha256:1"},
    "versions": {"ray": "1", "vllm": "2"},
}
MONEY = {
    "currency": "EUR",
    "cluster": None,
    "hosted": [{"name": "an API", "cost": 0.5, "as_of": "2026-11-25"}],
}


def result(run: str, status: RunStatus = RunStatus.COMPLETE) -> Result:
    return Result(status, run, 10, total(PARTS), 12.3456)


def test_a_run_that_ended_at_its_deadline_is_complete_and_exits_with_75() -> None:
    ended = replace(result("r"), deadline_passed=True)
    assert (ended.to_json()["status"], ended.exit_code) == ("complete", ExitCode.INTERRUPTED)
    over = replace(ended, status=RunStatus.OVER_ERROR_RATE)
    assert over.exit_code == ExitCode.OVER_ERROR_RATE


def test_totals_are_sums_with_all_four_states() -> None:
    totals = total(PARTS)
    assert totals.rows == {"succeeded": 9, "errored": 1, "expired": 0, "cancelled": 0}
    assert totals.tokens == {"prompt": 100, "completion": 170, "cached": 16, "image": 7}
    assert totals.finish_reasons == {"stop": 8, "length": 1}


@pytest.mark.parametrize(
    ("limit", "status", "code"),
    [
        (0.1, RunStatus.COMPLETE, ExitCode.DONE),
        (0.099, RunStatus.OVER_ERROR_RATE, ExitCode.OVER_ERROR_RATE),
    ],
)
def test_a_run_above_its_error_rate_exits_with_3(
    limit: float, status: RunStatus, code: ExitCode
) -> None:
    judged = judge(10, total(PARTS), limit)
    assert judged == status
    assert result("r", judged).exit_code == code


@pytest.mark.parametrize("rows_in", [9, 11])
def test_rows_that_do_not_add_up_are_an_error(rows_in: int) -> None:
    with pytest.raises(AccountingError, match=f"{rows_in} rows in, 10 rows out"):
        judge(rows_in, total(PARTS), 1.0)


def test_a_run_without_rows_is_complete() -> None:
    assert judge(0, total([]), 0.0) == RunStatus.COMPLETE


def test_the_result_has_the_contracts_keys() -> None:
    document = result("file:///r").to_json()
    assert {"status", "run", "rows", "tokens", "seconds"} <= set(document)
    assert set(document["rows"]) == {"total", "succeeded", "errored", "expired", "cancelled"}
    assert set(document["tokens"]) == {"prompt", "completion", "cached", "image"}
    json.dumps(document)


def test_the_reports_hold_the_totals_and_escape_what_users_wrote(tmp_path: Path) -> None:
    write_report(result(f"file://{tmp_path}"), MANIFEST)
    document = json.loads((tmp_path / "report.json").read_text())
    assert document["rows"]["succeeded"] == 9
    assert document["exit_code"] == 0
    assert document["completion_lengths"] == [
        {"from": 2, "to": 3, "completions": 1},
        {"from": 4, "to": 7, "completions": 7},
        {"from": 64, "to": 127, "completions": 1},
    ]
    page = (tmp_path / "report.html").read_text()
    assert "&lt;night&gt;" in page
    assert "<night>" not in page
    assert "image_invalid" in page
    assert "http://" not in page
    assert "https://" not in page
    assert "<script" not in page


def test_report_json_tells_the_course_of_the_run(tmp_path: Path) -> None:
    write_report(replace(case(SEVERAL_STARTS), run=f"file://{tmp_path}"), CASE_MANIFEST, MONEY)
    report = json.loads((tmp_path / "report.json").read_text())
    rows = sum(sum(stretch["rows"]) for stretch in report["throughput"]["stretches"])
    assert rows == report["throughput"]["rows"] == report["rows"]["total"] == 96 * 512
    assert report["throughput"]["rows_without_time"] == 0
    assert [start["rows"] for start in report["time"]["starts"]] == [10_240, 25_600, 13_312]
    assert sum(replica["rows"] for replica in report["replicas"]) == rows
    assert report["latency_s"]["p50"] <= report["latency_s"]["p99"] <= report["latency_s"]["max"]
    assert report["latency_s"]["completions"] == report["rows"]["succeeded"]
    (detail,) = report["error_details"]
    assert (detail["code"], detail["records"], detail["share"]) == ("image_invalid", 192, 0.003906)
    assert [example["input_row"] for example in detail["examples"]] == [0, 512, 1_024]
    assert detail["remedy"].startswith("Convert the image")
    assert report["made_with"]["sampling"] == {"temperature": 0.7, "max_completion_tokens": 256}
    assert report["money"] == MONEY
    page = (tmp_path / "report.html").read_text()
    assert "0.50 EUR" in page
    assert "Cost of the GPUs" not in page


def test_parts_of_an_earlier_version_make_a_report_without_a_course(tmp_path: Path) -> None:
    write_report(result(f"file://{tmp_path}"), MANIFEST)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["throughput"]["rows_without_time"] == 10
    assert (report["throughput"]["stretches"], report["replicas"]) == ([], [])
    assert "No row has finished at a known time" in (tmp_path / "report.html").read_text()
