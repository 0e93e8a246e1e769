"""The audit: a sound run passes every check, and each planted fault turns its own check red."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.batch import run_batch
from jobs.verify.audit import Audit, audit
from jobs.verify.checks import State
from jobs.verify.recorded import open_recorded
from pipeline.commit import Destination, commit_outcomes, part_uri, read_part, read_stats
from pipeline.config import parse_config
from pipeline.errors import ErrorCode, RunMismatchError
from pipeline.records import ADDED_LATER, Failure, Outcome, Status
from pipeline.run import find_run
from tests.recorded_runs import SHARD_ROWS, make_run, rewrite, with_value


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound run, to be copied: nothing may change it, as its input must stay where it is."""
    return make_run(tmp_path_factory.mktemp("sound"))


@pytest.fixture
def out(sound: Path, tmp_path: Path) -> Path:
    """A copy of the run folder, to be damaged."""
    return Path(shutil.copytree(sound, tmp_path / "out"))


def look(out: Path) -> Audit:
    return audit(open_recorded(str(out)))


def red(found: Audit) -> dict[str, str]:
    """The checks with faults, and what each names."""
    return {
        check.name: "; ".join(fault.what for fault in check.examples)
        for check in found.checks
        if check.state is State.FAULT
    }


def edit(column: str, position: int, value: object) -> Callable[[pa.Table], pa.Table]:
    return lambda table: with_value(table, column, position, value)


@pytest.mark.parametrize("jsonl", [False, True])
def test_a_sound_run_passes_every_check_and_is_counted_from_its_records(
    tmp_path: Path, jsonl: bool
) -> None:
    found = look(make_run(tmp_path, jsonl=jsonl))
    assert {check.name: check.state for check in found.checks} == dict.fromkeys(
        [check.name for check in found.checks], State.OK
    )
    assert found.totals.rows == {"succeeded": 21, "errored": 3, "expired": 0, "cancelled": 0}
    assert (found.totals.records, found.totals.tokens["completion"]) == (26, 71)
    assert found.totals.errors == {"invalid_messages": 2, "duplicate_custom_id": 1}


def test_a_run_of_an_input_without_rows_is_sound(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    empty = pa.table({"prompt": pa.array([], pa.string()), "label": pa.array([], pa.int8())})
    pq.write_table(empty, tmp_path / "in" / "a.parquet")
    document = {
        "input": {"uri": str(tmp_path / "in")},
        "output": {"uri": str(tmp_path / "out")},
        "engine": {"profile": "mini-maverick-tp1"},
    }
    run_batch(parse_config(document, source="test"))
    found = look(tmp_path / "out")
    assert red(found) == {}
    assert found.totals.records == 0


def test_rows_that_expired_and_rows_with_one_sample_left_are_sound(out: Path) -> None:
    late = Failure(2, "f0-2", ErrorCode.BATCH_EXPIRED, "late", 0, 1, status=Status.EXPIRED)

    def expire(outcomes: list[Outcome]) -> list[Outcome]:
        kept = [each for each in outcomes if each.key != late.key]
        seed = next(each.seed for each in outcomes if each.key == late.key)
        return [*kept, replace(late, seed=seed)]

    recommit(out, 0, expire)
    assert set(red(look(out))) == {"report"}  # written before the change


def test_a_flipped_byte_of_a_part_is_found_wherever_it_is(out: Path) -> None:
    path = Path(part_uri(str(out), 1))
    content = path.read_bytes()
    footer = int.from_bytes(content[-8:-4], "little")
    for position in range(4, len(content) - footer - 8, 397):
        path.write_bytes(
            content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]
        )
        assert {"parts", "checksums"} & red(look(out)).keys(), position


def test_a_part_that_was_written_anew_with_one_text_changed_is_found(out: Path) -> None:
    rewrite(out, 2, edit("text", 0, "text 1 0 1"))
    assert set(red(look(out))) == {"checksums"}
    assert list(read_stats(str(out), [2]))  # all else of it is as it was


def test_a_copied_footer_does_not_hide_a_changed_text(out: Path) -> None:
    path = Path(part_uri(str(out), 2))
    footer = pq.read_metadata(path).metadata
    table = with_value(pq.read_table(path), "text", 0, "text 1 0 1")
    with pq.ParquetWriter(path, table.schema, compression="zstd") as writer:
        writer.write_table(table)
        writer.add_key_value_metadata(
            {key.decode(): value.decode() for key, value in footer.items() if b"ARROW" not in key}
        )
    assert "changed" in red(look(out))["checksums"]


@pytest.mark.parametrize(
    ("change", "check", "words"),
    [
        (lambda t: t.slice(1), "rows", "1 rows have no record, the first is row 0"),
        (lambda t: pa.concat_tables([t, t.slice(0, 1)]), "rows", "row 0 sample 0 twice"),
        (lambda t: t.take([1, 0, *range(2, len(t))]), "rows", "out of order"),
        (lambda t: t.filter(pa.array([i != 3 for i in range(7)])), "rows", "n = 2"),
        (lambda t: t.filter(pa.array([i != 2 for i in range(7)])), "rows", "no record of sample 0"),
        (edit("input_row", 6, 77), "rows", "the first is row 77"),
        (edit("input_file", 0, "s3://b/other.parquet"), "rows", "s3://b/other.parquet"),
        (edit("status", 0, "done"), "records", "unknown status"),
        (edit("error_code", 0, "timeout"), "records", "succeeded with an error_code"),
        (edit("error_code", 5, "oops"), "records", "unknown error_code"),
        (edit("text", 1, None), "records", "succeeded without a text"),
        (edit("finish_reason", 1, "abort"), "records", "unknown finish_reason"),
        (edit("model", 1, "llama"), "records", "another model"),
        (edit("custom_id", 1, None), "records", "1 records have no custom_id"),
        (edit("total_tokens", 1, 1), "tokens", "total_tokens"),
        (edit("cached_tokens", 1, 99), "tokens", "cached"),
        (edit("prompt_tokens", 1, 99), "stats", "its footer says tokens"),
        (edit("seed", 1, 5), "seeds", "row 1 sample 0"),
        (edit("custom_id", 1, "f0-9"), "seeds", "row 1 sample 0"),
        (edit("seed", 4, 1_001), "seeds", "row 3 sample 0"),
        (lambda t: t.drop_columns(["latency_s"]), "schema", "no column latency_s"),
        (lambda t: t.drop_columns(["label"]), "schema", "no column label"),
        (lambda t: t.append_column("x", t["label"]), "schema", "has a column x"),
    ],
)
def test_each_fault_of_a_part_turns_its_check_red(
    out: Path, change: Callable[[pa.Table], pa.Table], check: str, words: str
) -> None:
    rewrite(out, 0, change)
    found = red(look(out))
    assert words in found[check], found


def test_a_duplicate_that_was_answered_and_one_that_is_none_are_found(out: Path) -> None:
    refused = edit("error_code", 5, "duplicate_custom_id")
    rewrite(out, 0, refused)
    assert "repeats no custom_id" in red(look(out))["duplicates"]
    rewrite(out, 2, edit("error_code", 6, "invalid_messages"))
    faults = next(check for check in look(out).checks if check.name == "duplicates")
    assert faults.faults == 2


def test_a_part_of_an_earlier_version_lacks_columns_without_fault(out: Path) -> None:
    rewrite(out, 1, lambda table: table.drop_columns(sorted(ADDED_LATER)))
    assert set(red(look(out))) == {"checksums"}  # as this test wrote it anew


def test_parts_of_another_run_or_shard_are_found(out: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other")
    shutil.copy(part_uri(str(other), 0), part_uri(str(out), 0))
    shutil.copy(part_uri(str(out), 1), part_uri(str(out), 3))
    found = next(check for check in look(out).checks if check.name == "parts")
    whats = [fault.what for fault in found.examples]
    assert any("another run" in what for what in whats)
    assert any("the part of shard 1" in what for what in whats)


def test_a_part_that_cannot_be_read_costs_its_own_check_and_the_audit_goes_on(out: Path) -> None:
    Path(part_uri(str(out), 3)).write_bytes(b"PAR1")
    found = look(out)
    assert "part-000003.parquet is damaged" in red(found)["parts"]
    assert found.totals.parts == 3


def test_an_unfinished_run_is_audited_as_far_as_it_is_there(tmp_path: Path) -> None:
    out = make_run(tmp_path, finish=False)
    assert red(look(out)) == {"finished": "has all its parts, but no _SUCCESS"}
    Path(part_uri(str(out), 2)).unlink()
    found = look(out)
    assert f"1 of 4 shards ({SHARD_ROWS} rows) have no part yet" in red(found)["finished"]
    assert set(red(found)) == {"finished"}
    assert found.totals.records == 19


def test_an_input_file_that_changed_or_is_gone_is_named(tmp_path: Path) -> None:
    out = make_run(tmp_path)
    (tmp_path / "in" / "0.parquet").unlink()
    table = pq.read_table(tmp_path / "in" / "1.parquet")
    pq.write_table(table.slice(1), tmp_path / "in" / "1.parquet")
    found = look(out)
    check = next(check for check in found.checks if check.name == "input")
    assert [fault.what[:7] for fault in check.examples] == ["is gone", "changed"]
    assert not found.input_intact
    assert set(red(found)) == {"input"}


def test_a_report_that_says_otherwise_is_found(out: Path) -> None:
    report = json.loads((out / "report.json").read_text())
    report["tokens"]["completion"] += 1
    (out / "report.json").write_text(json.dumps(report))
    assert "says tokens" in red(look(out))["report"]
    (out / "report.json").unlink()
    assert red(look(out)) == {"report": "is missing"}


def test_openais_files_have_a_line_per_row(tmp_path: Path) -> None:
    out = make_run(tmp_path, jsonl=True)
    lines = (out / "output.jsonl").read_text().splitlines(keepends=True)
    (out / "output.jsonl").write_text("".join(lines[1:]))
    (out / "errors.jsonl").unlink()
    check = next(check for check in look(out).checks if check.name == "report")
    assert [fault.what for fault in check.examples] == ["has 20 lines for 21 rows", "is missing"]


def recommit(
    out: Path,
    shard: int,
    change: Callable[[list[Outcome]], list[Outcome]] = list,
    **stats: object,
) -> None:
    """The part once more, by the code that commits, with other outcomes or stats."""
    run = find_run(str(out))
    outcomes = change(read_part(str(out), shard))
    label = pq.read_table(part_uri(str(out), shard), columns=["input_row", "label"])
    rows = label.group_by("input_row").aggregate([("label", "min")]).sort_by("input_row")
    carried = pa.table({"label": rows.column("label_min")})
    Path(part_uri(str(out), shard)).unlink()
    to = Destination(str(out), run.id, "mini-maverick")
    commit_outcomes(to, run.plan.shards[shard], outcomes, carried, **stats)  # type: ignore[arg-type]


def test_engines_that_counted_otherwise_are_a_fault_unless_the_run_was_disturbed(
    out: Path,
) -> None:
    tokens = {"prompt": 89 + 40, "completion": 21 + 5}
    recommit(out, 0, engine_tokens=tokens, replica={"process": "p"})
    assert "prompt +" in red(look(out))["engine_tokens"]
    recommit(out, 0, engine_tokens=tokens, replica={"process": "another"})
    found = look(out)
    check = next(check for check in found.checks if check.name == "engine_tokens")
    assert check.state is State.OK
    assert "2 replica processes took turns at 1 places" in check.note


def test_rows_that_a_journal_kept_explain_what_the_engines_did_not_count(out: Path) -> None:
    recommit(out, 0, known=[(0, 0)], replica={"process": "p"})
    check = next(check for check in look(out).checks if check.name == "engine_tokens")
    assert check.state is State.OK
    assert "1 rows were taken over" in check.note


def test_engines_that_tell_no_counts_are_not_compared(out: Path) -> None:
    for shard in range(4):
        recommit(out, shard)
    check = next(check for check in look(out).checks if check.name == "engine_tokens")
    assert (check.state, check.note) == (State.SKIPPED, "no engine told its counts")


def test_rows_made_before_an_accepted_change_keep_their_seeds(out: Path) -> None:
    manifest = json.loads((out / "run.json").read_text())
    manifest["config"]["seed"] = 8
    (out / "run.json").write_text(json.dumps(manifest))
    assert "seeds" in red(look(out))
    manifest["history"] = [{"key": "seed", "from": 7, "to": 8, "at": "2026-11-25"}]
    (out / "run.json").write_text(json.dumps(manifest))
    assert red(look(out)) == {}


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunMismatchError, match="holds no run"):
        open_recorded(str(tmp_path))


def test_a_part_with_records_that_were_retried_since_is_a_fault(out: Path) -> None:
    manifest = json.loads((out / "run.json").read_text())
    manifest["retries"] = [{"what": ["duplicate_custom_id"], "at": "2026-12-01T00:00:00+00:00"}]
    (out / "run.json").write_text(json.dumps(manifest))
    assert red(look(out)) == {
        "parts": "has records that were retried since: an attempt from before --retry wrote it late"
    }
