"""The object store as a preflight tries it: on disk, and on an S3 server with planted defects."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from cluster.preflight.bucket import (
    BucketFacts,
    Trial,
    clean_up,
    first_files,
    judge_bucket,
    new_folder,
    put_marker,
    try_bucket,
)
from cluster.preflight.clocks import judge_clocks
from tests.fake_s3 import FakeS3, fake_s3

SECRET = "planted-secret-of-the-bucket"
MARKER = "s3://batch/runs/x/_preflight-1"
TRIAL = Trial(
    files=("s3://batch/in/a.parquet",),
    roots=("s3://batch/images",),
    output="s3://batch/runs/x",
    probe="_preflight-1-node",
)


@pytest.fixture(scope="module")
def server() -> Iterator[FakeS3]:
    with fake_s3() as store:
        yield store


@pytest.fixture
def store(server: FakeS3, monkeypatch: pytest.MonkeyPatch) -> FakeS3:
    """A sound store with one input file."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAPLANTED")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    server.buckets = {"batch"}
    server.objects = {"batch/in/a.parquet": b"PAR1...."}
    server.conditional, server.denied, server.ahead = True, set(), timedelta()
    server.puts.clear()
    return server


def one_problem(facts: BucketFacts) -> str:
    (fault,) = judge_bucket({"a": facts})
    assert fault.nodes == ("a",)
    assert SECRET not in fault.sentence
    return fault.message


def test_a_sound_store_has_no_fault_and_nothing_is_left_there(store: FakeS3) -> None:
    assert put_marker(MARKER)
    facts = try_bucket(Trial(TRIAL.files, TRIAL.roots, TRIAL.output, TRIAL.probe, MARKER))
    assert facts.problems == ()
    assert set(store.puts) == {"batch/runs/x/_preflight-1", "batch/runs/x/_preflight-1-node"}
    clean_up([MARKER], None)
    assert list(store.objects) == ["batch/in/a.parquet"]


def test_a_disk_has_no_fault_and_no_folder_is_left(tmp_path: Path) -> None:
    (tmp_path / "in.parquet").write_bytes(b"PAR1")
    output = f"{tmp_path}/runs/deep/x"
    made = new_folder(output)
    marker = f"file://{output}/_preflight-1"
    assert put_marker(marker)
    facts = try_bucket(Trial((f"{tmp_path}/in.parquet",), (), output, "_preflight-1-n", marker))
    assert facts.problems == ()
    assert facts.clock is not None
    assert facts.clock.at_least_s == 0
    clean_up([marker], made)
    assert [path.name for path in tmp_path.iterdir()] == ["in.parquet"]


def test_a_folder_that_was_there_stays(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    assert try_bucket(Trial((), (), f"{tmp_path}/runs", "_preflight-1-n")).problems == ()
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_a_store_without_conditional_puts_is_a_fault(store: FakeS3) -> None:
    store.conditional = False
    (first, second) = judge_bucket({"a": try_bucket(TRIAL)})
    assert "a PUT with If-None-Match replaced an object" in first.message
    assert "a PUT with If-Match replaced an object of another version" in second.message
    assert "two drivers could both take a run's lease" in first.message


def test_a_missing_bucket_is_a_fault(store: FakeS3) -> None:
    assert not put_marker("s3://absent/runs/_preflight-1")
    assert store.puts == [], "some servers make a bucket for whoever writes to it"
    trial = Trial((), (), "s3://absent/runs", "_preflight-1-node")
    assert "there is no bucket 'absent'; create it, or mend the URI" in one_problem(
        try_bucket(trial)
    )


@pytest.mark.parametrize(
    ("denied", "words"),
    [
        ({"PUT"}, "cannot write s3://batch/runs/x/_preflight-1-node"),
        ({"DELETE", "POST"}, "cannot delete"),
        ({"GET"}, "cannot read s3://batch/in/a.parquet"),
    ],
)
def test_missing_rights_are_a_fault(store: FakeS3, denied: set[str], words: str) -> None:
    store.denied = denied
    message = one_problem(try_bucket(TRIAL)) if denied != {"GET"} else try_bucket(TRIAL).problems[0]
    assert words in message
    assert "check the credentials in that node's environment" in message


def test_a_bucket_that_may_not_be_looked_at_is_a_fault(store: FakeS3) -> None:
    store.denied = {"HEAD", "GET", "PUT", "POST", "DELETE"}
    messages = " ".join(try_bucket(TRIAL).problems)
    assert "access to bucket 'batch' is denied; check AWS_ACCESS_KEY_ID" in messages


def test_a_node_with_another_store_is_a_fault(store: FakeS3) -> None:
    trial = Trial((), (), TRIAL.output, TRIAL.probe, marker=MARKER)  # nobody wrote it here
    assert "what the driver writes there is not seen" in one_problem(try_bucket(trial))


def test_an_input_file_that_only_the_driver_has_is_a_fault(store: FakeS3) -> None:
    store.objects.clear()
    message = one_problem(try_bucket(TRIAL))
    assert "s3://batch/in/a.parquet is not there, though the driver sees it" in message


def test_an_input_without_files_is_a_fault(store: FakeS3) -> None:
    assert first_files(["s3://batch/in/"]) == (["s3://batch/in/a.parquet"], [])
    files, (problem,) = first_files(["s3://batch/empty/"])
    assert files == []
    assert "input.uri s3://batch/empty/: there is no file" in problem


def test_a_stores_clock_that_is_minutes_ahead_is_a_fault(store: FakeS3) -> None:
    store.ahead = timedelta(minutes=5)
    clock = try_bucket(TRIAL).clock
    assert clock is not None
    (fault,) = judge_clocks({}, {"a": clock})
    assert "ahead of the node's" in fault.message
