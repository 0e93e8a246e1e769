"""The command line of jobs.verify: exit codes, the last line, where it writes. No engine."""

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.verify.__main__ import main
from pipeline.commit import part_uri
from tests.recorded_runs import make_run, rewrite, with_value

Verify = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture
def verify(capfd: pytest.CaptureFixture[str]) -> Iterator[Verify]:
    """Runs the job in this process: exit code, last line, stderr."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def run(*arguments: str) -> tuple[int, dict[str, Any], str]:
        capfd.readouterr()
        code = main(arguments)
        told = capfd.readouterr()
        (line,) = told.out.splitlines()
        return code, json.loads(line), told.err

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


def files(out: Path) -> set[str]:
    return {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}


def test_a_sound_run_exits_with_0_and_leaves_its_verdict_beside_it(
    verify: Verify, out: Path
) -> None:
    before = files(out)
    code, result, log = verify(str(out), "--audit-only")
    assert (code, result["status"], result["run"]) == (0, "complete", f"file://{out}"), log
    assert result["rows"]["succeeded"] == 21
    assert result["checks"]["replay"] == {"state": "skipped", "note": "--audit-only"}
    assert files(out) - before == {"_verify/verify.json"}
    verdict = json.loads((out / "_verify" / "verify.json").read_text())
    assert verdict["checks"] == result["checks"]
    assert "each input row has its records" in log


def test_the_jobs_config_names_the_run_too(verify: Verify, out: Path, tmp_path: Path) -> None:
    config = str(out.parent / "job.yaml")
    code, result, log = verify("--config", config, "--audit-only", "--out", str(tmp_path / "v"))
    assert (code, result["run"]) == (0, f"file://{out}"), log
    assert (tmp_path / "v" / "verify.json").exists()


def test_faults_exit_with_1_and_the_first_is_told_with_its_remedy(
    verify: Verify, tmp_path: Path
) -> None:
    out = make_run(tmp_path)
    rewrite(out, 0, lambda table: with_value(table, "seed", 1, 5))
    code, result, log = verify(str(out), "--audit-only")
    assert (code, result["status"]) == (1, "failed")
    assert "2 of 14 checks found faults (checksums, seeds)" in result["error"]
    assert result["checks"]["seeds"]["faults"] == 1
    assert "part-000000.parquet" in result["checks"]["seeds"]["examples"][0]["where"]
    assert "Remedy: restore the part, or delete the part" in result["error"]
    assert "row 1 sample 0 has a seed" in log


def test_an_unfinished_run_is_no_success_and_is_not_replayed(
    verify: Verify, tmp_path: Path
) -> None:
    out = make_run(tmp_path, finish=False)
    Path(part_uri(str(out), 1)).unlink()
    code, result, _ = verify(str(out))
    assert (code, result["status"]) == (1, "failed")
    assert "is not finished: 1 of 4 shards" in result["error"]
    assert result["checks"]["replay"]["note"] == "the run is not finished"


def test_a_run_whose_input_changed_is_not_replayed(verify: Verify, tmp_path: Path) -> None:
    out = make_run(tmp_path)
    (tmp_path / "in" / "0.parquet").unlink()
    code, result, _ = verify(str(out))
    assert code == 1
    assert result["checks"]["replay"]["state"] == "skipped"
    assert "0.parquet: is gone" in result["error"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("{tmp}/nowhere",), "holds no run"),
        (("{out}/run.json",), "run.json holds no run"),
        ((), "name the run's folder"),
        (("{out}", "--set", "seed=1"), "--set is for --config"),
        (("{out}", "--sample", "0"), "must be a whole number from 1"),
        (("{out}", "--max-mismatch", "2"), "must be a share from 0 to 1"),
        (("{out}", "--row", "nobody"), "no record has this custom_id"),
        (("{out}", "--audit-only", "--out", "{out}/run.json"), "--out"),
    ],
)
def test_what_cannot_be_done_exits_with_2_and_one_sentence(
    verify: Verify, out: Path, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    filled = [each.format(tmp=tmp_path, out=out) for each in arguments]
    code, result, _ = verify(*filled)
    assert (code, result["status"]) == (2, "invalid")
    assert words in result["error"]


def test_a_row_is_shown_on_stderr_and_in_the_last_line(verify: Verify, out: Path) -> None:
    code, result, log = verify(str(out), "--row", "f0-3")
    assert code == 0, log
    assert result["row"]["request"]["token_ids"]
    assert '"token_ids": [ 256, ' in log
    assert result["row"]["records"][0]["custom_id"] == "f0-3"
