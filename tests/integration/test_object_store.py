"""Storage and lease on a real SeaweedFS, and behind a front that spoils chosen requests.

Only the S3 server is started, not Ray. Not covered: AWS itself, ``gs://``.
"""

from __future__ import annotations

import io
import os
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster import parts
from cluster.state import ClusterState
from pipeline import storage
from pipeline.errors import StorageError, StorageUnavailableError
from pipeline.lease import Lease, LeaseRecord
from tests.lease_cases import LeaseCases, record_at
from tests.odd_names import ODD_NAMES, pattern_twins
from tests.s3_front import CUT, INTERNAL_ERROR, LOST, RESET, SLOW_DOWN, S3Front, s3_front

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

FAULTS = [SLOW_DOWN, INTERNAL_ERROR, RESET, LOST]


@dataclass
class Store:
    """A SeaweedFS that can be killed and started again."""

    state: ClusterState
    ports: tuple[int, ...]
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        directory = self.state.directory
        command = parts.weed_command(
            parts.find_weed(None), directory=directory, bucket="batch", ports=self.ports
        )
        with (directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                command,
                env={
                    **os.environ,
                    **self.state.storage_environment(),
                    "TMPDIR": str(directory),
                },
                cwd=directory,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + 180
        while not parts.s3_takes_objects(self.state):
            assert self.process.poll() is None, (directory / "log").read_text()
            assert time.monotonic() < deadline, (directory / "log").read_text()
            time.sleep(0.1)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    directory = tmp_path_factory.mktemp("s3")
    (directory / "data").mkdir()
    ports = parts.weed_ports()
    state = ClusterState(
        cluster_id="s3-only",
        directory=directory,
        logs=directory,
        bucket="batch",
        cpus_per_node=1,
        object_store_mb=100,
        access_key="A" * 20,
        secret_key="s" * 40,
        token="t" * 64,
        s3_port=ports[0],
    )
    store = Store(state, ports)
    try:
        store.start()
        yield store
    finally:
        store.kill()
        for socket in (socket for port in ports for socket in parts.weed_sockets(port)):
            socket.unlink(missing_ok=True)


@pytest.fixture
def folder(store: Store, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URI of a folder of the test's own."""
    for name, value in store.state.storage_environment().items():
        monkeypatch.setenv(name, value)
    return f"s3://batch/{uuid.uuid4().hex}"


@pytest.fixture(scope="module")
def listening_front(store: Store) -> Iterator[S3Front]:
    with s3_front(f"127.0.0.1:{store.ports[0]}") as front:
        yield front


@pytest.fixture
def front(listening_front: S3Front, folder: str, monkeypatch: pytest.MonkeyPatch) -> S3Front:
    monkeypatch.setenv("AWS_ENDPOINT_URL", listening_front.url)
    listening_front.script.clear()
    listening_front.methods.clear()
    return listening_front


@pytest.mark.parametrize("fault", FAULTS)
def test_a_put_outlasts_faults_and_is_stored_whole(front: S3Front, folder: str, fault: str) -> None:
    front.script.extend([fault] * 3)
    storage.put_bytes(f"{folder}/object", b"content" * 1000)
    assert not front.script
    assert storage.read_bytes(f"{folder}/object") == b"content" * 1000


@pytest.mark.parametrize("fault", [*FAULTS, CUT])
def test_reads_outlast_faults_and_come_whole(front: S3Front, folder: str, fault: str) -> None:
    uri = f"{folder}/object"
    storage.put_bytes(uri, b"content" * 1000)
    reads: list[Callable[[], bytes]] = [
        lambda: storage.read_bytes(uri),
        lambda: storage.read_bytes(uri, limit=7000),
        lambda: storage.read_version(uri)[0],
    ]
    for read in reads:
        front.script.extend([fault] * 2)
        assert read() == b"content" * 1000
        assert not front.script


@pytest.mark.parametrize("megabytes", [0, 1, 16, 40])
def test_an_object_written_piece_by_piece_is_whole(
    front: S3Front, folder: str, megabytes: int
) -> None:
    uri = f"{folder}/object"
    pieces = [bytes([number % 251]) * 2**20 for number in range(megabytes)]
    storage.put_bytes(uri, b"old")
    with storage.open_output(uri) as write:
        for piece in pieces:
            write(piece)
        assert storage.read_bytes(uri) == b"old"
    assert storage.read_bytes(uri) == b"".join(pieces)
    assert ("POST" in front.methods) == (megabytes >= 16)


@pytest.mark.parametrize("fault", FAULTS)
def test_each_request_of_an_upload_in_parts_outlasts_faults(
    front: S3Front, folder: str, fault: str
) -> None:
    uri = f"{folder}/object"
    with storage.open_output(uri) as write:
        front.script.extend([fault, "", fault])
        write(b"a" * 16 * 2**20)
        assert not front.script
        write(b"b")
        front.script.extend([fault, "", fault, "", fault])
    assert not front.script
    assert storage.read_bytes(uri) == b"a" * 16 * 2**20 + b"b"


def test_an_upload_that_is_broken_off_leaves_what_was_there(front: S3Front, folder: str) -> None:
    uri = f"{folder}/object"
    storage.put_bytes(uri, b"old")
    with suppress(RuntimeError), storage.open_output(uri) as write:
        write(b"a" * 17 * 2**20)
        raise RuntimeError
    assert front.methods[-1] == "DELETE"
    assert storage.read_bytes(uri) == b"old"


def test_an_age_is_by_the_stores_own_clock(front: S3Front, folder: str) -> None:
    storage.put_bytes(f"{folder}/object", b"content")
    front.script.extend([SLOW_DOWN] * 2)
    found = storage.read_aged(f"{folder}/object")
    assert (found.content, found.one_clock) == (b"content", True)
    assert found.version == storage.read_version(f"{folder}/object")[1]
    assert found.age_s >= 0
    deadline = time.monotonic() + 60  # the store's dates are whole seconds
    while storage.read_aged(f"{folder}/object").age_s <= found.age_s:
        assert time.monotonic() < deadline, "the object does not age"
        time.sleep(0.2)


def test_folders_are_listed_one_level_deep(front: S3Front, folder: str) -> None:
    for name in ("b/x/1", "a/1", "c"):
        storage.put_bytes(f"{folder}/{name}", b"data")
    front.script.extend([SLOW_DOWN] * 2)
    assert storage.list_folders(folder) == [f"{folder}/a", f"{folder}/b"]
    assert storage.list_folders(f"{folder}/nowhere") == []


def test_an_empty_object_reads_as_empty(folder: str) -> None:
    storage.put_bytes(f"{folder}/object", b"")
    assert storage.read_bytes(f"{folder}/object") == b""
    assert storage.read_bytes(f"{folder}/object", limit=10) == b""
    assert storage.read_version(f"{folder}/object")[0] == b""


@pytest.mark.parametrize("fault", [SLOW_DOWN, RESET, CUT])
def test_listings_outlast_faults_and_are_whole(front: S3Front, folder: str, fault: str) -> None:
    uris = [f"{folder}/{part}/{name}" for part in ("x", "y") for name in ("a", "b")]
    for uri in uris:
        storage.put_bytes(uri, b"data")
    looks: list[Callable[[], list[str]]] = [
        lambda: [entry.uri for entry in storage.list_files(folder)],
        lambda: [entry.uri for entry in storage.match_files(f"{folder}/*/[ab]")],
        lambda: [uri for part in "xy" for uri in storage.list_folder(f"{folder}/{part}")],
    ]
    for look in looks:
        front.script.extend([fault] * 2)
        assert look() == uris
        assert not front.script
    assert [storage.exists(uris[0]), storage.exists(f"{folder}/x")] == [True, True]
    assert not storage.exists(f"{folder}/nowhere")


def test_a_glob_whose_second_folder_cannot_be_listed_is_no_shorter_list(
    front: S3Front, folder: str
) -> None:
    for part in ("x", "y"):
        storage.put_bytes(f"{folder}/{part}/a", b"data")
    front.script.extend(["", "", SLOW_DOWN])
    assert len(storage.match_files(f"{folder}/*/a")) == 2
    assert not front.script


@pytest.mark.parametrize("fault", FAULTS)
def test_deletes_outlast_faults(front: S3Front, folder: str, fault: str) -> None:
    uris = [f"{folder}/{number}" for number in range(5)]
    for uri in uris:
        storage.put_bytes(uri, b"data")
    front.script.extend([fault] * 2)
    storage.delete(uris[0])
    front.script.extend([fault] * 2)
    storage.delete_all([*uris, f"{folder}/nowhere"])
    assert not front.script
    assert storage.list_files(folder) == []


def test_thousands_are_deleted_by_one_request_each_thousand(front: S3Front, folder: str) -> None:
    kept = f"{folder}/kept é+%20"
    odd = f"{folder}/odd é+%20&<"
    for uri in (kept, odd):
        storage.put_bytes(uri, b"data")
    front.methods.clear()
    storage.delete_all([*(f"{folder}/absent-{number}" for number in range(2400)), odd])
    assert front.methods == ["POST"] * 3
    assert [entry.uri for entry in storage.list_files(folder)] == [kept]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_lost_answer_to_a_create_is_recognised(front: S3Front, folder: str, fault: str) -> None:
    uri = f"{folder}/object"
    front.script.append(fault)
    assert storage.create_bytes(uri, b"ours")
    assert not storage.create_bytes(uri, b"else")
    assert not storage.create_bytes(uri, b"longer")
    assert storage.read_bytes(uri) == b"ours"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_lost_answer_to_a_replace_is_recognised(front: S3Front, folder: str, fault: str) -> None:
    uri = f"{folder}/object"
    storage.put_bytes(uri, b"first")
    _, version = storage.read_version(uri)
    front.script.append(fault)
    second = storage.replace_bytes(uri, b"second", version)
    assert storage.read_version(uri) == (b"second", second)
    assert storage.replace_bytes(uri, b"third", version) is None
    storage.delete(uri)
    assert storage.replace_bytes(uri, b"third", second or "") is None
    assert not storage.exists(uri)


@pytest.mark.parametrize("conditional", ["create", "replace"])
def test_of_many_conditional_writers_one_wins(folder: str, conditional: str) -> None:
    for turn in range(3):
        uri = f"{folder}/{turn}"
        version = ""
        if conditional == "replace":
            storage.put_bytes(uri, b"first")
            _, version = storage.read_version(uri)
        barrier = threading.Barrier(8)

        def write(
            writer: int,
            uri: str = uri,
            version: str = version,
            barrier: threading.Barrier = barrier,
        ) -> bool:
            barrier.wait()
            data = f"writer {writer}".encode()
            if conditional == "create":
                return storage.create_bytes(uri, data)
            return storage.replace_bytes(uri, data, version) is not None

        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(write, range(8)))
        assert won.count(True) == 1
        assert storage.read_bytes(uri) == f"writer {won.index(True)}".encode()


def test_a_version_is_the_listings_and_changes_with_the_object(folder: str) -> None:
    uri = f"{folder}/object"
    storage.put_bytes(uri, b"first")
    (listed,) = storage.list_files(folder)
    assert storage.version(uri) == (listed.size, listed.version)
    assert storage.read_version(uri)[1] == listed.version
    storage.put_bytes(uri, b"other")
    assert storage.version(uri)[1] != listed.version
    for absent in (f"{folder}/nowhere", folder):
        with pytest.raises(FileNotFoundError):
            storage.version(absent)


def parquet(rows: int) -> bytes:
    sink = io.BytesIO()
    table = pa.table({"number": range(rows), "text": [uuid.uuid4().hex for _ in range(rows)]})
    pq.write_table(table, sink, row_group_size=rows // 10)
    return sink.getvalue()


def read_table(uri: str) -> pa.Table:
    with storage.open_input(uri) as file:
        return pq.ParquetFile(file).read()


@pytest.mark.parametrize("fault", [SLOW_DOWN, INTERNAL_ERROR, RESET, CUT])
def test_a_parquet_file_is_read_through_faults(front: S3Front, folder: str, fault: str) -> None:
    uri = f"{folder}/a.parquet"
    storage.put_bytes(uri, parquet(20_000))
    front.script.extend([fault, "", fault, fault])
    assert read_table(uri).column("number").to_pylist() == list(range(20_000))
    assert not front.script


def test_a_store_lost_in_the_middle_of_a_file_is_unavailable(front: S3Front, folder: str) -> None:
    uri = f"{folder}/a.parquet"
    storage.put_bytes(uri, parquet(20_000))

    def read_while_the_store_goes_away() -> None:
        with storage.open_input(uri) as file:
            front.script.extend([SLOW_DOWN] * 100)
            pq.read_table(file)

    with storage.patience(3), pytest.raises(StorageUnavailableError, match=uri):
        read_while_the_store_goes_away()
    assert len(front.script) < 99


def test_a_file_replaced_while_it_is_open_is_an_error_at_once(front: S3Front, folder: str) -> None:
    uri = f"{folder}/object"
    storage.put_bytes(uri, b"first")

    def read_while_it_changes() -> None:
        with storage.open_input(uri) as file:
            storage.put_bytes(uri, b"other")
            front.methods.clear()
            file.read()

    with pytest.raises(StorageError, match=uri) as caught:
        read_while_it_changes()
    assert not isinstance(caught.value, StorageUnavailableError)
    assert front.methods == ["GET"]


def test_wrong_keys_are_told_at_once(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-secret")
    begun = time.monotonic()
    with pytest.raises(StorageError, match="403") as caught:
        storage.put_bytes(f"{folder}/object", b"data")
    assert not isinstance(caught.value, StorageUnavailableError)
    assert "planted" not in str(caught.value)
    assert time.monotonic() - begun < 100


def test_a_store_that_is_killed_and_comes_back_fails_nothing(store: Store, folder: str) -> None:
    storage.put_bytes(f"{folder}/there", b"data")
    operations: list[Callable[[], object]] = [
        lambda: storage.put_bytes(f"{folder}/put", b"data"),
        lambda: storage.create_bytes(f"{folder}/created", b"data"),
        lambda: storage.read_bytes(f"{folder}/there"),
        lambda: storage.list_files(folder),
    ]
    store.kill()
    with ThreadPoolExecutor(len(operations)) as pool:
        started = [pool.submit(operation) for operation in operations]
        time.sleep(4)
        assert not any(future.done() for future in started)
        store.start()
        results = [future.result(timeout=60) for future in started]
    assert results[1:3] == [True, b"data"]
    assert storage.read_bytes(f"{folder}/put") == b"data"


@pytest.fixture
def run_uri(folder: str) -> str:
    return f"{folder}/run"


class TestLeaseOnS3(LeaseCases):
    ttl_s: ClassVar[float] = 4.0
    renewal_s: ClassVar[float] = 0.5

    def test_an_outage_of_the_store_moves_no_lease(self, run_uri: str, store: Store) -> None:
        with self.acquire(run_uri) as lease, ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(self.acquire, run_uri, wait=True)
            time.sleep(1)
            store.kill()
            time.sleep(1.5 * self.ttl_s)
            store.start()
            time.sleep(1.5 * self.ttl_s)
            assert lease.lost is None
            lease.confirm()
            assert record_at(run_uri).owner == lease.owner
            assert not waiting.done()
            lease.release()
            waiting.result(timeout=60).release()

    def test_time_in_which_the_store_was_away_makes_no_lease_stale(
        self, run_uri: str, store: Store
    ) -> None:
        storage.put_bytes(f"{run_uri}/_lease.json", LeaseRecord.new().to_bytes())
        with ThreadPoolExecutor(1) as pool:
            contender = pool.submit(self.acquire, run_uri)
            time.sleep(1)
            store.kill()
            time.sleep(1.5 * self.ttl_s)
            back = time.monotonic()
            store.start()
            contender.result(timeout=60).release()
            assert time.monotonic() - back >= self.ttl_s

    @pytest.mark.parametrize("fault", FAULTS)
    def test_faulty_answers_cost_no_lease(self, run_uri: str, front: S3Front, fault: str) -> None:
        front.script.append(fault)
        with self.acquire(run_uri) as lease:
            for _ in range(3):
                front.script.extend([fault, fault])
                lease.confirm()
            owner = lease.owner
        assert lease.lost is None
        assert (record_at(run_uri).owner, record_at(run_uri).state) == (owner, "released")


def test_a_renewal_that_was_given_up_but_carried_out_costs_no_lease(
    front: S3Front, folder: str
) -> None:
    with Lease.acquire(f"{folder}/run", wait=False, renewal_s=60) as lease:
        front.script.extend([LOST] + [SLOW_DOWN] * 10)
        with storage.patience(0.0), pytest.raises(StorageUnavailableError):
            lease.confirm()
        front.script.clear()
        assert record_at(f"{folder}/run").renewals == 1
        time.sleep(1.1)  # times in the record count in seconds: the next one is to differ
        lease.confirm()
        assert lease.lost is None


@pytest.mark.parametrize("name", ODD_NAMES)
def test_objects_are_where_their_names_say(folder: str, name: str) -> None:
    uri = storage.join(folder, name, name)
    twins = [storage.join(folder, twin, twin) for twin in pattern_twins(name)]
    for twin in twins:
        storage.put_bytes(twin, b"twin")
    assert storage.list_files(storage.join(folder, name)) == []
    assert storage.create_bytes(uri, b"one")
    _, version = storage.read_version(uri)
    assert storage.replace_bytes(uri, b"two", version)
    assert storage.read_bytes(uri) == b"two"
    assert [entry.uri for entry in storage.list_files(storage.join(folder, name))] == [uri]
    assert [entry.uri for entry in storage.match_files(storage.join(folder, name))] == [uri]
    assert storage.list_folder(storage.join(folder, name)) == [uri]
    assert storage.join(folder, name) in storage.list_folders(folder)
    storage.delete_all([uri])
    assert not storage.exists(uri)
    assert all(storage.read_bytes(twin) == b"twin" for twin in twins)
