"""Requests to an S3 store: how many a write, a commit, a resume and a listing take."""

from collections.abc import Iterator

import pyarrow as pa
import pytest

from pipeline import storage
from pipeline.commit import (
    Destination,
    commit_outcomes,
    committed_shards,
    committed_stats,
    read_stats,
)
from pipeline.errors import StorageUnavailableError
from pipeline.journal import Journal
from pipeline.plan import Plan, Shard
from pipeline.records import Completion
from tests.fake_s3 import FakeS3, fake_s3

TO = Destination("s3://batch/run", "run-1", "m")
SHARD = Shard(0, "s3://batch/in/a.parquet", 0, 2)
OUTCOMES = [
    Completion(row, f"r{row}", 0, "text", "stop", 10, 3, 2, 7, 2**62, 0.25) for row in (0, 1)
]


@pytest.fixture(scope="module")
def server() -> Iterator[FakeS3]:
    with fake_s3() as store:
        yield store


@pytest.fixture
def store(server: FakeS3, monkeypatch: pytest.MonkeyPatch) -> FakeS3:
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAPLANTED")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-secret")
    server.objects.clear()
    server.busy_pages.clear()
    server.page_keys = 1000
    storage.exists("s3://batch/warm-up")
    server.requests.clear()
    return server


def methods(store: FakeS3) -> list[str]:
    return [request.partition(" ")[0] for request in store.requests]


def commit(carried: pa.Table) -> None:
    commit_outcomes(TO, SHARD, OUTCOMES, carried)


def test_a_shard_takes_two_looks_and_a_put_and_each_journal_write_a_put(store: FakeS3) -> None:
    journal = Journal(TO, SHARD)
    assert committed_stats(TO, SHARD) is None
    assert journal.read() == []
    journal.append(OUTCOMES[:1])
    commit(pa.table({}))
    journal.clear()
    assert methods(store) == ["GET", "GET", "PUT", "PUT", "POST"]
    assert sorted(store.objects) == ["batch/run/data/part-000000.parquet"]


def test_a_resume_reads_a_part_by_one_request(store: FakeS3) -> None:
    commit(pa.table({}))
    store.requests.clear()
    (stats,) = read_stats(TO.output_uri, [0])
    assert (stats.shard, stats.rows["succeeded"]) == (0, 2)
    assert store.requests == ["GET batch/run/data/part-000000.parquet"]


def test_a_footer_that_is_longer_than_what_is_read_first_is_read_whole(store: FakeS3) -> None:
    commit(pa.table({f"column {n} of a wide input": ["a", "b"] for n in range(900)}))
    assert len(store.objects["batch/run/data/part-000000.parquet"]) > 2**16
    store.requests.clear()
    (stats,) = read_stats(TO.output_uri, [0])
    assert stats.records == 2
    assert methods(store) == ["GET", "GET"]


def test_a_bad_moment_costs_a_listing_one_page(store: FakeS3) -> None:
    shards = tuple(Shard(n, SHARD.uri, n, 1) for n in range(45))
    for shard in shards:
        store.objects[f"batch/run/data/part-{shard.index:06d}.parquet"] = b""
    store.objects["batch/run/data/_hidden/part-000001.parquet"] = b""
    store.page_keys, store.busy_pages = 10, {0, 2, 4}
    assert committed_shards(TO.output_uri, Plan((), shards)) == set(range(45))
    assert len(store.requests) == 5 + 3


def test_a_page_that_stays_away_ends_the_listing(store: FakeS3) -> None:
    store.objects.update({f"batch/run/data/part-{n:06d}.parquet": b"" for n in range(20)})
    store.page_keys, store.busy_pages = 10, {1}
    with storage.patience(0.0), pytest.raises(StorageUnavailableError, match="cannot list"):
        storage.list_files("s3://batch/run/data")


def test_a_listing_of_one_file_or_of_none_is_as_long(store: FakeS3) -> None:
    store.objects["batch/run/a.parquet"] = b"abc"
    (entry,) = storage.list_files("s3://batch/run/a.parquet")
    assert (entry.uri, entry.size) == ("s3://batch/run/a.parquet", 3)
    assert storage.list_files("s3://batch/absent/") == []
    assert [each.uri for each in storage.list_files("s3://batch")] == [entry.uri]
