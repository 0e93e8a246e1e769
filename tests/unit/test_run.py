"""Runs: what is written when, what may resume, and what is refused with the difference named."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import parse_config
from pipeline.errors import ConfigError, LeaseLostError, RunMismatchError, StorageError
from pipeline.plan import FirstUse
from pipeline.profile import load_profile
from pipeline.read import open_input
from pipeline.run import Run, open_run, planned_files
from pipeline.sampling import DefaultsOf

FOREIGN = {"_lease.json", "notes.txt", "data/readme.md", "more/data/part-000000.parquet"}
"""What a run folder may hold that no new run may touch."""


def settle(
    tmp_path: Path,
    *,
    new_run: bool = False,
    accept_changed: Collection[str] = (),
    **changes: Any,
) -> Run:
    document = {
        "input": {"uri": str(tmp_path / "in")},
        "output": {"uri": str(tmp_path / "out")},
        "engine": {"profile": "mini-maverick-tp1"},
        **changes,
    }
    config = parse_config(document, source="test")
    profile = load_profile(config.engine.profile, overrides=config.engine.overrides)
    found = open_input(
        config.input.uri,
        renamed=config.input.columns,
        carry=config.output.carry,
        planned=planned_files(config.output.uri),
    )
    return open_run(config, profile, found, new_run=new_run, accept_changed=accept_changed)


def manifest(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "out" / "run.json").read_text())
    return document


def put_input(folder: Path, name: str, **columns: list[Any]) -> Path:
    path = folder / "in" / name
    pq.write_table(pa.table(columns), path)
    return path


def fill(folder: Path) -> set[str]:
    """All that a run leaves behind, written by hand, beside what is not the run's own."""
    settle(folder).start()
    out = folder / "out"
    for name in (
        "data/part-000000.parquet",
        "_journal/000000/1-a-0.parquet",
        "_duplicates.parquet",
        "report.json",
        "report.html",
        "output.jsonl",
        "errors.jsonl",
        "_SUCCESS",
        *FOREIGN,
    ):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(b"old")
    return stored(out)


def stored(out: Path) -> set[str]:
    return {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"prompt": ["a", "b"]}), tmp_path / "in" / "a.parquet")
    return tmp_path


def test_nothing_is_written_before_the_start(folder: Path) -> None:
    settle(folder)
    assert not (folder / "out").exists()


def test_a_started_run_is_found_again_with_its_saved_plan(folder: Path) -> None:
    first = settle(folder)
    first.start()
    again = settle(folder, limits={"shard_rows": 1})
    assert again.exists
    assert again.plan == first.plan
    assert again.pending == first.plan.shards


def test_what_an_earlier_version_did_not_save_stands_at_its_default(folder: Path) -> None:
    """Fields of sampling and template that were added since, whatever their defaults are."""
    template = {"prompt": "{{ prompt }}"}
    source = {"uri": str(folder / "in"), "template": template}
    settle(folder, input=source).start()
    document = manifest(folder)
    del document["config"]["sampling"]["top_k"]
    del document["config"]["input"]["template"]["requires_id"]
    (folder / "out" / "run.json").write_text(json.dumps(document))
    assert settle(folder, input=source).exists
    with pytest.raises(
        RunMismatchError, match=r"another input\.template\.requires_id: false there"
    ):
        settle(folder, input={**source, "template": {**template, "requires_id": True}})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 8}, "another seed: 0 there, 8 here"),
        (
            {"sampling": {"temperature": 0.5}},
            r"another sampling\.temperature: null there, 0\.5 here\. .*--accept-changed sampling",
        ),
        ({"output": {"uri": "OUT", "carry": []}}, r"another output\.carry: null there, \[\] here"),
        (
            {"input": {"uri": "IN", "columns": {"prompt": "prompt"}}},
            r"another input\.columns\.prompt: null there, \"prompt\" here",
        ),
        (
            {"seed": 8, "sampling": {"top_k": 3}},
            r"seed: 0 there, 8 here; another sampling\.top_k: null there, 3 here",
        ),
    ],
)
def test_a_changed_request_is_refused_with_what_differs_and_the_way_out(
    folder: Path, changes: dict[str, Any], named: str
) -> None:
    settle(folder).start()
    places = {"input": str(folder / "in"), "output": str(folder / "out")}
    changes = {
        key: {**value, "uri": places[key]} if key in places else value
        for key, value in changes.items()
    }
    with pytest.raises(RunMismatchError, match=named) as caught:
        settle(folder, **changes)
    assert "--new-run" in str(caught.value)
    acceptable = set(changes) <= {"seed", "sampling"}
    assert ("--accept-changed" in str(caught.value)) == acceptable


def test_a_file_that_changed_under_the_run_is_named_with_old_and_new(folder: Path) -> None:
    settle(folder).start()
    path = put_input(folder, "a.parquet", prompt=["a", "b", "c"])
    os.utime(path, (1, 1))
    with pytest.raises(RunMismatchError) as caught:
        settle(folder)
    message = str(caught.value)
    assert re.search(
        r"1 file changed: \S+/in/a\.parquet "
        r"\(size \d+ -> \d+, rows 2 -> 3, version 20\S+ -> 1970-01-01T00:00:01\+00:00\)",
        message,
    )
    assert "--new-run" in message
    assert "--accept-changed" not in message


def test_files_that_were_added_or_are_gone_are_named(folder: Path) -> None:
    for number in range(4):
        put_input(folder, f"z{number}.parquet", prompt=["z"])
    settle(folder).start()
    put_input(folder, "b.parquet", prompt=["b"])
    for number in range(4):
        (folder / "in" / f"z{number}.parquet").unlink()
    with pytest.raises(RunMismatchError) as caught:
        settle(folder)
    message = str(caught.value)
    assert re.search(r"1 file added: \S+/b\.parquet; 4 files gone: \S+/z0\.parquet, ", message)
    assert "z2.parquet and 1 more" in message
    assert "z3.parquet" not in message


def test_cluster_changes_may_resume(folder: Path) -> None:
    settle(folder).start()
    changed = {"profile": "mini-maverick", "replicas": 2, "overrides": {"max_num_seqs": 8}}
    assert settle(folder, engine=changed).exists


def test_a_run_of_a_version_with_fewer_request_parameters_may_resume(folder: Path) -> None:
    settle(folder, sampling={"temperature": 0.5}).start()
    document = manifest(folder)
    document["config"]["sampling"] = {"temperature": 0.5, "top_p": None}
    (folder / "out" / "run.json").write_text(json.dumps(document))
    assert settle(folder, sampling={"temperature": 0.5}).exists
    with pytest.raises(RunMismatchError, match=r"another sampling\.min_tokens: null there, 2 here"):
        settle(folder, sampling={"temperature": 0.5, "min_tokens": 2})


@pytest.mark.parametrize("saved", [None, "program", "server"])
def test_a_resumed_run_keeps_the_defaults_it_began_with(folder: Path, saved: str | None) -> None:
    new = settle(folder)
    assert new.defaults is DefaultsOf.PROGRAM
    new.start()
    document = manifest(folder)
    del document["defaults"]  # as runs of an earlier version, and then another's
    document |= {"defaults": saved} if saved else {}
    (folder / "out" / "run.json").write_text(json.dumps(document))
    assert settle(folder).defaults is DefaultsOf(saved or "program")


def test_a_missing_part_takes_the_end_marker_away_until_it_is_back(folder: Path) -> None:
    run = settle(folder)
    run.start()
    run.mark_success()
    again = settle(folder)
    assert again.finished
    assert not again.complete
    again.start()
    assert not (folder / "out" / "_SUCCESS").exists()


def test_parts_without_a_manifest_are_not_taken_for_this_run(folder: Path) -> None:
    (folder / "out" / "data").mkdir(parents=True)
    (folder / "out" / "data" / "part-000000.parquet").write_bytes(b"x")
    with pytest.raises(RunMismatchError, match=r"data/ .* but no run\.json.*--new-run"):
        settle(folder)


def test_a_run_keeps_its_id_and_a_new_one_gets_another(folder: Path) -> None:
    first = settle(folder)
    first.start()
    assert re.fullmatch(r"[0-9a-f]{32}", first.id)
    assert settle(folder).id == manifest(folder)["id"] == first.id
    second = settle(folder, new_run=True)
    second.start()
    assert settle(folder).id == second.id != first.id


def test_a_run_of_an_older_version_has_no_id(folder: Path) -> None:
    settle(folder).start()
    old = {key: value for key, value in manifest(folder).items() if key != "id"}
    old["input"].pop("duplicates")
    (folder / "out" / "run.json").write_text(json.dumps(old))
    run = settle(folder)
    assert run.exists
    assert run.id == ""
    assert len(run.duplicates) == 0


def test_an_accepted_change_goes_on_and_is_written_down_at_the_start(folder: Path) -> None:
    first = settle(folder)
    first.start()
    changes: dict[str, Any] = {"seed": 8, "sampling": {"temperature": 0.5}}
    run = settle(folder, accept_changed=["seed", "sampling"], **changes)
    assert "history" not in manifest(folder)
    run.start()
    saved = manifest(folder)
    assert saved["id"] == first.id
    assert saved["config"]["seed"] == 8
    assert saved["config"]["sampling"]["temperature"] == 0.5
    seed, sampling = saved["history"]
    assert (sampling["key"], sampling["to"]["temperature"]) == ("sampling", 0.5)
    assert (seed["key"], seed["from"], seed["to"]) == ("seed", 0, 8)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", seed["at"])
    assert settle(folder, **changes).exists
    settle(folder, seed=9, sampling=changes["sampling"], accept_changed=["seed"]).start()
    assert [entry["to"] for entry in manifest(folder)["history"] if entry["key"] == "seed"] == [
        8,
        9,
    ]


def test_an_accepted_model_is_the_runs_model_from_then_on(folder: Path) -> None:
    settle(folder).start()
    old = manifest(folder)
    old["model"]["revision"] = "sha256:older"
    (folder / "out" / "run.json").write_text(json.dumps(old))
    with pytest.raises(RunMismatchError, match=r'another model\.revision: "sha256:older" there'):
        settle(folder)
    settle(folder, accept_changed=["model"]).start()
    assert manifest(folder)["model"]["revision"] != "sha256:older"
    assert manifest(folder)["history"][0]["from"]["revision"] == "sha256:older"
    assert settle(folder).exists


def test_what_is_not_accepted_is_still_refused(folder: Path) -> None:
    settle(folder).start()
    changes: dict[str, Any] = {"seed": 8, "sampling": {"temperature": 0.5}}
    with pytest.raises(RunMismatchError, match="sampling") as caught:
        settle(folder, accept_changed=["seed"], **changes)
    assert "another seed" not in str(caught.value)
    put_input(folder, "b.parquet", prompt=["b"])
    with pytest.raises(RunMismatchError, match="1 file added"):
        settle(folder, accept_changed=["seed", "sampling"], **changes)


def test_only_what_may_change_can_be_accepted(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"--accept-changed input: .* model, sampling, seed\."):
        settle(folder, accept_changed=["input"])


def test_a_new_run_discards_what_the_old_one_wrote_and_nothing_else(folder: Path) -> None:
    fill(folder)
    run = settle(folder, new_run=True, seed=8)
    assert not run.complete
    assert run.pending == run.plan.shards
    assert (folder / "out" / "_SUCCESS").exists()  # nothing is discarded before the start
    run.start()
    assert stored(folder / "out") == FOREIGN | {"run.json", "_plan.json"}
    assert manifest(folder)["config"]["seed"] == 8
    assert settle(folder, seed=8).pending == run.plan.shards


def test_a_new_run_that_fails_while_discarding_has_taken_the_manifest_away(folder: Path) -> None:
    fill(folder)
    (folder / "out" / "report.html").unlink()
    (folder / "out" / "report.html").mkdir()  # cannot be deleted as a file
    with pytest.raises(StorageError, match=r"report\.html"):
        settle(folder, new_run=True).start()
    assert not {"_SUCCESS", "run.json"} & stored(folder / "out")


@pytest.mark.parametrize("confirmed", range(2, 8))
def test_a_driver_that_was_relieved_while_discarding_deletes_no_more(
    folder: Path, confirmed: int
) -> None:
    fill(folder)
    for number in range(1, 5):
        (folder / "out" / "data" / f"part-{number:06d}.parquet").write_bytes(b"old")
    run = settle(folder, new_run=True)
    answers = iter([True] * confirmed)
    relieved_with: list[set[str]] = []

    def confirm() -> None:
        if not next(answers, False):
            relieved_with.append(stored(folder / "out"))
            raise LeaseLostError("taken over")

    with pytest.raises(LeaseLostError):
        run.start(confirm)
    (left,) = relieved_with
    assert stored(folder / "out") == left
    doomed = [name for name in left if name.startswith(("data/part", "_journal"))]
    assert len(doomed) == 6 - (confirmed - 1)


def test_a_file_of_others_that_came_before_the_start_is_not_discarded(folder: Path) -> None:
    fill(folder)
    run = settle(folder, new_run=True)
    late = {"data/sales.parquet", "data/part-1.parquet", "data/part-000001.parquet.bak"}
    for name in late:
        (folder / "out" / name).write_bytes(b"theirs")
    run.start()
    assert stored(folder / "out") == FOREIGN | late | {"run.json", "_plan.json"}


def test_a_new_run_in_an_empty_folder_is_any_new_run(folder: Path) -> None:
    settle(folder, new_run=True).start()
    assert stored(folder / "out") == {"run.json", "_plan.json"}


@pytest.mark.parametrize(
    "left",
    [
        {"_SUCCESS", "data/part-000000.parquet", "_journal/000000/1-a-0.parquet", "_plan.json"},
        {"data/part-000000.parquet", "report.json"},
        {"_journal/000000/1-a-0.parquet", "_plan.json"},
    ],
)
def test_a_new_run_that_was_cut_short_is_refused_until_it_is_finished(
    folder: Path, left: set[str]
) -> None:
    for name in fill(folder) - left - FOREIGN:
        (folder / "out" / name).unlink()
    with pytest.raises(RunMismatchError, match=r"no run\.json, as after a --new-run"):
        settle(folder)
    settle(folder, new_run=True).start()
    assert stored(folder / "out") == FOREIGN | {"run.json", "_plan.json"}


def test_a_new_run_that_was_cut_short_at_its_end_leaves_nothing_to_refuse(folder: Path) -> None:
    for name in fill(folder) - FOREIGN - {"_plan.json", "_duplicates.parquet", "_SUCCESS"}:
        (folder / "out" / name).unlink()
    run = settle(folder)
    run.start()
    assert not settle(folder).finished
    assert len(settle(folder).duplicates) == 0


@pytest.mark.parametrize("new_run", [False, True])
def test_parts_of_others_are_never_discarded(folder: Path, new_run: bool) -> None:
    (folder / "out" / "data").mkdir(parents=True)
    (folder / "out" / "data" / "sales.parquet").write_bytes(b"x")
    with pytest.raises(RunMismatchError, match=r"sales\.parquet is no part of a run; move it away"):
        settle(folder, new_run=new_run)


@pytest.mark.parametrize("new_run", [False, True])
def test_a_manifest_of_others_is_never_replaced(folder: Path, new_run: bool) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "run.json").write_text('{"steps": 3}')
    with pytest.raises(RunMismatchError, match=r"run\.json is not this program's"):
        settle(folder, new_run=new_run)


DAMAGED = [b"", b"null", b"[]", b"{}", b"7", b'{"id": "a", "con', b"\xff\x00PAR1", b"[" * 100_000]


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_manifest_is_named_with_the_remedy_which_works(
    folder: Path, content: bytes
) -> None:
    fill(folder)
    (folder / "out" / "run.json").write_bytes(content)
    with pytest.raises(RunMismatchError, match=r"out/run\.json is .*damaged .*--new-run") as caught:
        settle(folder)
    assert len(str(caught.value)) < 500
    settle(folder, new_run=True).start()
    assert stored(folder / "out") == FOREIGN | {"run.json", "_plan.json"}
    assert settle(folder).exists


@pytest.mark.parametrize("key", ["input", "model", "config"])
def test_a_manifest_without_what_a_resumed_run_asks_for_is_no_defect(
    folder: Path, key: str
) -> None:
    settle(folder).start()
    document = {**manifest(folder), key: "?"}
    (folder / "out" / "run.json").write_text(json.dumps(document))
    with pytest.raises(RunMismatchError, match=r"run\.json is not this program's"):
        settle(folder)


@pytest.mark.parametrize("content", [*DAMAGED, b'{"files": []}', b'{"files": [], "shards": []}'])
def test_a_damaged_plan_is_named_with_the_remedy_which_works(folder: Path, content: bytes) -> None:
    fill(folder)
    (folder / "out" / "_plan.json").write_bytes(content)
    with pytest.raises(RunMismatchError, match=r"out/_plan\.json is .*damaged .*--new-run"):
        settle(folder)
    settle(folder, new_run=True).start()
    assert settle(folder).exists


def test_a_lost_plan_is_named_with_the_remedy(folder: Path) -> None:
    settle(folder).start()
    (folder / "out" / "_plan.json").unlink()
    with pytest.raises(RunMismatchError, match=r"_plan\.json is missing .*--new-run"):
        settle(folder)


def test_a_plan_without_its_last_shard_is_damaged_not_the_part_of_that_shard(folder: Path) -> None:
    settle(folder, limits={"shard_rows": 1}).start()
    path = folder / "out" / "_plan.json"
    plan = json.loads(path.read_text())
    path.write_text(json.dumps({**plan, "shards": plan["shards"][:-1]}))
    (folder / "out" / "data").mkdir()
    (folder / "out" / "data" / "part-000001.parquet").write_bytes(b"x")
    with pytest.raises(RunMismatchError, match=r"_plan\.json is .*1 of 2 rows .*a\.parquet"):
        settle(folder)


def test_rows_that_repeat_an_id_are_found_once_and_saved_with_the_run(folder: Path) -> None:
    names: dict[str, Any] = {"input": {"uri": str(folder / "in"), "columns": {"custom_id": "key"}}}
    put_input(folder, "a.parquet", prompt=["a", "b"], key=[1, 2])
    put_input(folder, "b.parquet", prompt=["c", "d"], key=[3, 1])
    settle(folder, **names).start()
    assert (folder / "out" / "_duplicates.parquet").exists()
    again = settle(folder, **names)
    (second,) = [shard for shard in again.plan.shards if shard.uri.endswith("b.parquet")]
    for path in (folder / "in").iterdir():
        path.unlink()  # a resume does not read the column again
    assert again.duplicates.of(second) == {1: FirstUse(f"file://{folder}/in/a.parquet", 0)}


def test_a_lost_list_of_repeated_ids_is_an_error(folder: Path) -> None:
    put_input(folder, "a.parquet", prompt=["a", "b"], custom_id=["x", "x"])
    settle(folder).start()
    (folder / "out" / "_duplicates.parquet").write_bytes(b"not parquet")
    with pytest.raises(StorageError, match=r"_duplicates\.parquet is missing or damaged"):
        _ = settle(folder).duplicates
    (folder / "out" / "_duplicates.parquet").unlink()
    with pytest.raises(StorageError, match=r"_duplicates\.parquet is missing or damaged"):
        _ = settle(folder).duplicates


_RESUME = """
import json, re, sys, time
from pathlib import Path
from pipeline.config import parse_config
from pipeline.profile import load_profile
from pipeline.read import open_input
from pipeline.run import open_run

document = json.loads(sys.argv[1])
config = parse_config(document, source="test")
profile = load_profile(config.engine.profile)
found = open_input(config.input.uri, renamed={}, carry=None)
started = time.process_time()
run = open_run(config, profile, found)
seconds = time.process_time() - started
# not getrusage's ru_maxrss: that one starts with the parent's
peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
print(json.dumps({"cpu_seconds": seconds, "peak_mb": peak, "done": len(run.done),
                  "pending": len(run.pending), "finished": run.finished}))
"""


def test_a_hundred_thousand_finished_shards_are_planned_in_seconds(tmp_path: Path) -> None:
    shards = 100_000
    (tmp_path / "in").mkdir()
    put_input(tmp_path, "a.parquet", prompt=["?"] * shards)
    run = settle(tmp_path, limits={"shard_rows": 1})
    assert len(run.plan.shards) == shards
    run.start()
    data = tmp_path / "out" / "data"
    data.mkdir()
    for index in range(shards):
        (data / f"part-{index:06d}.parquet").touch()
    document = {
        "input": {"uri": str(tmp_path / "in")},
        "output": {"uri": str(tmp_path / "out")},
        "engine": {"profile": "mini-maverick-tp1"},
    }
    done = subprocess.run(
        [sys.executable, "-c", _RESUME, json.dumps(document)],
        capture_output=True,
        text=True,
        check=True,
    )
    measured = json.loads(done.stdout)
    print(measured)
    assert (measured["done"], measured["pending"]) == (shards, 0)
    assert measured["cpu_seconds"] < 90
    assert measured["peak_mb"] < 300


def test_a_resume_of_jsonl_trusts_the_plan_and_reads_no_line(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "a.jsonl"
    path.write_text('{"custom_id": "a"}\n' * 10)
    first = settle(tmp_path, limits={"shard_rows": 3})
    assert [shard.first_byte for shard in first.plan.shards] == [0, 57, 114, 171]
    assert len(first.duplicates) == 9
    first.start()
    assert first.defaults is DefaultsOf.SERVER
    status = path.stat()
    path.write_bytes(b"\0" * status.st_size)  # whoever looked inside would find another input
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    again = settle(tmp_path, limits={"shard_rows": 3})
    assert again.exists
    assert again.plan == first.plan
    assert len(again.duplicates) == 9


def test_jsonl_that_changed_under_the_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "a.jsonl"
    path.write_text("{}\n" * 10)
    settle(tmp_path).start()
    path.write_text("{}\n" * 11)
    with pytest.raises(RunMismatchError, match=r"a\.jsonl \(size 30 -> 33, rows 10 -> 11"):
        settle(tmp_path)


@pytest.mark.parametrize("damage", ["gone", "foreign"])
def test_a_folder_without_a_sound_plan_has_no_planned_files(tmp_path: Path, damage: str) -> None:
    assert planned_files(f"{tmp_path}/out") == ()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text("{}")
    if damage == "foreign":
        (tmp_path / "out" / "_plan.json").write_text("[]")
    assert planned_files(f"{tmp_path}/out") == ()


def test_the_manifest_says_what_ran_and_holds_no_secret(folder: Path) -> None:
    settle(
        folder,
        engine={"profile": "mini-maverick-tp1", "overrides": {"hf_token": "planted-secret"}},
    ).start()
    text = (folder / "out" / "run.json").read_text()
    assert "planted-secret" not in text
    manifest = json.loads(text)
    assert manifest["model"]["name"] == "mini-maverick"
    assert manifest["model"]["revision"].startswith("sha256:")
    assert manifest["input"]["rows"] == 2
    assert {"ray", "engine", "transformers"} <= set(manifest["versions"])


def test_another_tile_cap_is_another_model(folder: Path) -> None:
    settle(folder).start()
    engine = {
        "profile": "mini-maverick-tp1",
        "overrides": {"mm_processor_kwargs": {"max_patches": 4}},
    }
    with pytest.raises(RunMismatchError, match=r"another model\.max_patches: null there, 4 here"):
        settle(folder, engine=engine)
