"""Paths are literal: whatever folders are called, what is committed is found and paid once."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.batch import run_batch
from jobs.settle import Job, Options, settle
from pipeline import storage
from pipeline.commit import commit_outcomes, read_stats
from pipeline.config import parse_config
from pipeline.engine import VLLMEngine
from pipeline.journal import Journal, journaled_shards
from pipeline.plan import Shard
from pipeline.records import Completion
from pipeline.report import RunStatus
from pipeline.run import find_run
from tests.fake_s3 import FakeS3, fake_s3
from tests.odd_names import ODD_NAMES, pattern_twins

ROWS = 4


@pytest.fixture(scope="module")
def server() -> Iterator[FakeS3]:
    with fake_s3() as server:
        yield server


@pytest.fixture(params=["path", "file://", "s3://"])
def base(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    server: FakeS3,
    monkeypatch: pytest.MonkeyPatch,
) -> str:
    """A place on a disk, by path or URI, or in a store."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    server.objects.clear()
    return {"path": f"{tmp_path}", "file://": f"file://{tmp_path}", "s3://": "s3://batch"}[
        request.param
    ]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_objects_are_where_their_names_say(base: str, name: str) -> None:
    folder = storage.join(base, name)
    uri = storage.absolute(storage.join(folder, name))
    twins = [storage.join(base, twin, each) for twin in pattern_twins(name) for each in (twin, "x")]
    for twin in twins:
        storage.put_bytes(twin, b"twin")
    assert storage.list_files(folder) == []
    assert storage.create_bytes(uri, b"one")
    assert not storage.create_bytes(uri, b"two")
    _, version = storage.read_version(uri)
    assert storage.replace_bytes(uri, b"three", version)
    assert storage.read_bytes(uri) == b"three"
    with storage.open_output(uri) as write:
        write(b"fo")
        write(b"ur")
    with storage.open_input(uri) as handle:
        assert handle.read() == b"four"
    assert [(entry.uri, entry.size) for entry in storage.list_files(folder)] == [(uri, 4)]
    assert [entry.uri for entry in storage.list_files(uri)] == [uri]
    assert [entry.uri for entry in storage.match_files(folder)] == [uri]
    assert storage.list_folder(folder) == [uri]
    assert storage.version(uri)[0] == 4
    assert storage.exists(folder)
    storage.delete_all([uri])
    assert not storage.exists(uri)
    assert all(storage.read_bytes(twin) == b"twin" for twin in twins)


def job(base: str, name: str) -> Job:
    document: dict[str, Any] = {
        "input": {"uri": storage.join(base, "in", name)},
        "output": {"uri": storage.join(base, "out", name)},
        "engine": {"profile": "mini-maverick-tp1"},
        "limits": {"shard_rows": 2},
    }
    return settle(parse_config(document, source="test"), Options(), VLLMEngine)


def completions(shard: Shard) -> list[Completion]:
    rows = range(shard.first_row, shard.first_row + shard.rows)
    return [Completion(row, f"r{row}", 0, "x", "stop", 1, 1, 0, 0, 1, 0.1) for row in rows]


def test_nothing_is_paid_twice_wherever_a_run_reads_and_writes(base: str) -> None:
    name = "/".join(ODD_NAMES)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"prompt": ["a"] * ROWS}), sink)
    storage.put_bytes(
        storage.join(base, "in", name, f"{storage.name(name)}.parquet"),
        sink.getvalue().to_pybytes(),
    )
    begun = job(base, name)
    begun.run.start()
    first, second = begun.run.plan.shards
    commit_outcomes(begun.to, first, completions(first), pa.table({}))
    Journal(begun.to, second).append(completions(second))

    resumed = job(base, name)
    assert [shard.index for shard in resumed.run.pending] == [1]
    assert len(Journal(resumed.to, second).read()) == 2
    assert journaled_shards(resumed.run.uri) == {1}
    commit_outcomes(resumed.to, second, completions(second), pa.table({}))

    if base == "s3://batch":
        return  # each look at a bucket is a driver of its own, which takes a second
    result = run_batch(job(base, name).config, Options())
    assert result.run is not None
    assert (result.status, result.generated_rows) == (RunStatus.COMPLETE, 0)
    assert find_run(storage.join(base, "out", name)).complete
    assert len(list(read_stats(result.run, range(2)))) == 2
    assert journaled_shards(result.run) == set()


@pytest.mark.parametrize("name", ["a[1].parquet", "what?.parquet", "x*.parquet"])
def test_an_input_that_is_there_is_no_pattern(tmp_path: Path, name: str) -> None:
    pq.write_table(pa.table({"prompt": ["a"]}), tmp_path / name)
    for twin in ("a1", "whats", "xyz"):
        (tmp_path / f"{twin}.parquet").write_bytes(b"no input")
    (found,) = storage.match_files(f"{tmp_path}/{name}")
    assert found.uri == f"file://{tmp_path}/{name}"
