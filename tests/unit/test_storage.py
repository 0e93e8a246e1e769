"""Storage: whole objects or nothing, listings that skip what readers skip, errors that name."""

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipeline import s3, storage
from pipeline.errors import InputError, StorageError, StorageUnavailableError
from tests.s3_front import ACCESS_DENIED, INTERNAL_ERROR, RESET, SLOW_DOWN, S3Front, s3_front


@pytest.fixture(scope="module")
def listening_front() -> Iterator[S3Front]:
    with s3_front() as front:
        yield front


@pytest.fixture
def front(listening_front: S3Front, monkeypatch: pytest.MonkeyPatch) -> S3Front:
    """A store that only ever refuses, and has a driver already, which takes a second to load."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", listening_front.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAPLANTED")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-secret")
    listening_front.otherwise = SLOW_DOWN
    with storage.patience(0.0), pytest.raises(StorageUnavailableError):
        storage.exists("s3://bucket/x")
    listening_front.methods.clear()
    return listening_front


def test_what_was_put_is_read_back_and_replaced_whole(tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/deep/er/object"
    storage.put_bytes(uri, b"long first version")
    storage.put_bytes(uri, b"second")
    assert storage.read_bytes(uri) == b"second"
    assert [path.name for path in (tmp_path / "deep" / "er").iterdir()] == ["object"]


def test_a_failed_put_leaves_the_old_object_and_nothing_beside_it(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "object").mkdir()
    with pytest.raises(StorageError, match=r"cannot write file://.*/object"):
        storage.put_bytes(f"file://{tmp_path}/folder/object", b"data")
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["object"]


@pytest.mark.parametrize("place", ["file", "memory"])
def test_an_object_written_piece_by_piece_appears_at_the_end(tmp_path: Path, place: str) -> None:
    uri = f"{place}://{tmp_path}/deep/object"
    with storage.open_output(uri) as write:
        write(b"one ")
        write(b"two")
        assert not storage.exists(uri)
    assert storage.read_bytes(uri) == b"one two"
    with suppress(RuntimeError), storage.open_output(uri) as write:
        write(b"half")
        raise RuntimeError
    assert storage.read_bytes(uri) == b"one two"
    assert [entry.uri for entry in storage.list_files(f"{place}://{tmp_path}/deep")] == [uri]
    with storage.open_output(uri) as write:
        write(b"new")
    assert storage.read_bytes(uri) == b"new"


def test_an_object_that_cannot_be_written_piece_by_piece_is_named(tmp_path: Path) -> None:
    (tmp_path / "object").mkdir()
    with (
        pytest.raises(StorageError, match=r"cannot write file://.*/object"),
        storage.open_output(f"file://{tmp_path}/object") as write,
    ):
        write(b"data")
    assert [path.name for path in tmp_path.iterdir()] == ["object"]


def test_a_listing_skips_hidden_names_at_every_level(tmp_path: Path) -> None:
    for name in (
        "a.parquet",
        "sub/b.parquet",
        "_journal/c.parquet",
        "sub/.d.parquet",
        "_e.parquet",
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    found = storage.list_files(f"file://{tmp_path}/", suffixes=(".parquet",))
    assert [entry.uri.removeprefix(f"file://{tmp_path}/") for entry in found] == [
        "a.parquet",
        "sub/b.parquet",
    ]


def test_a_hidden_folder_above_the_root_hides_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "_hidden" / ".deep"
    folder.mkdir(parents=True)
    (folder / "a.parquet").write_bytes(b"x")
    assert len(storage.list_files(f"file://{folder}")) == 1
    assert len(storage.list_files(f"file://{folder}/a.parquet")) == 1


def test_a_glob_lists_what_matches(tmp_path: Path) -> None:
    for name in ("a1.parquet", "a2.parquet", "b1.parquet"):
        (tmp_path / name).write_bytes(b"x")
    assert len(storage.match_files(f"file://{tmp_path}/a*.parquet")) == 2


def test_an_absent_folder_lists_as_empty(tmp_path: Path) -> None:
    assert storage.list_files(f"file://{tmp_path}/nowhere") == []


def test_an_absent_object_is_file_not_found(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path in ("nowhere", "file/below"):
        with pytest.raises(FileNotFoundError):
            storage.read_bytes(f"file://{tmp_path}/{path}")


def test_deleting_twice_is_fine(tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/object"
    storage.put_bytes(uri, b"x")
    storage.delete(uri)
    storage.delete(uri)
    assert not storage.exists(uri)


def test_an_unknown_scheme_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"nope://bucket/x.*nope"):
        storage.check_reachable("nope://bucket/x")


def test_an_endpoint_without_a_server_is_refused_in_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAPLANTED")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-secret")
    with pytest.raises(InputError, match="s3://bucket/x: the bucket cannot be reached") as caught:
        storage.check_reachable("s3://bucket/x")
    assert "planted" not in str(caught.value).lower()


def test_plain_paths_become_file_uris(tmp_path: Path) -> None:
    assert storage.absolute(str(tmp_path)) == f"file://{tmp_path}"
    assert storage.absolute("s3://b/k") == "s3://b/k"


def test_what_is_created_stays_whoever_comes_later(tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/deep/object"
    assert storage.create_bytes(uri, b"first")
    assert not storage.create_bytes(uri, b"other")
    assert storage.create_bytes(uri, b"first")  # what a repeated request finds
    assert storage.read_bytes(uri) == b"first"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["object"]


def test_an_object_is_replaced_only_at_the_version_that_was_read(tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/object"
    storage.put_bytes(uri, b"first")
    content, version = storage.read_version(uri)
    second = storage.replace_bytes(uri, b"second", version)
    assert (content, second) == (b"first", storage.read_version(uri)[1])
    assert storage.replace_bytes(uri, b"third", version) is None
    assert storage.replace_bytes(uri, b"second", version) == second
    assert storage.read_bytes(uri) == b"second"
    assert [path.name for path in tmp_path.iterdir()] == ["object"]


@pytest.mark.parametrize("place", ["object", "nowhere/object"])
def test_what_is_gone_is_not_replaced(tmp_path: Path, place: str) -> None:
    assert storage.replace_bytes(f"file://{tmp_path}/{place}", b"data", "0" * 64) is None
    assert list(tmp_path.iterdir()) == []


def test_of_many_that_replace_one_version_one_wins(tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/object"
    for turn in range(20):
        storage.put_bytes(uri, f"turn {turn}".encode())
        _, version = storage.read_version(uri)
        barrier = threading.Barrier(8)

        def replace(
            writer: int, version: str = version, barrier: threading.Barrier = barrier
        ) -> bool:
            barrier.wait()
            return storage.replace_bytes(uri, f"writer {writer}".encode(), version) is not None

        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(replace, range(8)))
        assert won.count(True) == 1
        assert storage.read_bytes(uri) == f"writer {won.index(True)}".encode()


def test_a_version_is_the_listings_and_changes_with_the_file(tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/object"
    storage.put_bytes(uri, b"first")
    (listed,) = storage.list_files(f"file://{tmp_path}")
    assert storage.version(uri) == (listed.size, listed.version) == (5, listed.version)
    os.utime(tmp_path / "object", (1, 1))
    assert storage.version(uri) == (5, "1.0")
    for absent in ("nowhere", ""):
        with pytest.raises(FileNotFoundError):
            storage.version(f"file://{tmp_path}/{absent}")


def test_deleting_many_passes_over_absent_ones(tmp_path: Path) -> None:
    uris = [f"file://{tmp_path}/{name}" for name in ("a", "b", "nowhere", "c")]
    for uri in uris[:2]:
        storage.put_bytes(uri, b"x")
    storage.delete_all(uris)
    storage.delete_all([])
    assert list(tmp_path.iterdir()) == []


def test_globs_match_at_their_depth_only(tmp_path: Path) -> None:
    for name in ("a.parquet", "x/a.parquet", "x/b.txt", "x/deep/a.parquet", "y/a1.parquet"):
        storage.put_bytes(f"file://{tmp_path}/{name}", b"x")

    def found(pattern: str) -> list[str]:
        root = f"file://{tmp_path}/"
        return [entry.uri.removeprefix(root) for entry in storage.match_files(root + pattern)]

    assert found("*.parquet") == ["a.parquet"]
    assert found("*/a.parquet") == ["x/a.parquet"]
    assert found("[xy]/a?.parquet") == ["y/a1.parquet"]
    assert found("x/**/*.parquet") == ["x/a.parquet", "x/deep/a.parquet"]
    assert found("nowhere/*.parquet") == []


_WRITE_BEYOND_LIMIT = """
import resource, sys
from pipeline import storage
from pipeline.errors import StorageError, StorageUnavailableError
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
for write in (storage.put_bytes, storage.create_bytes):
    try:
        write(sys.argv[1], b"x" * 10_000)
    except StorageUnavailableError:
        print("retried")
    except StorageError as error:
        print(error)
"""


def test_a_full_disk_is_an_error_at_once_and_leaves_nothing(tmp_path: Path) -> None:
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", _WRITE_BEYOND_LIMIT, f"file://{tmp_path}/object"],
        capture_output=True,
        text=True,
        check=True,
        timeout=150,
    )
    assert time.monotonic() - begun < 100
    expected = f"cannot write file://{tmp_path}/object: [Errno 27] File too large"
    assert done.stdout.splitlines() == [expected, expected]
    assert list(tmp_path.iterdir()) == []


def _read_input(uri: str) -> None:
    with storage.open_input(uri) as file:
        file.read()


OPERATIONS: dict[str, Callable[[str], object]] = {
    "list": storage.list_files,
    "list folder": storage.list_folder,
    "list glob": lambda uri: storage.match_files(f"{uri}/*/x"),
    "read": storage.read_bytes,
    "read start": lambda uri: storage.read_bytes(uri, limit=10),
    "read version": storage.read_version,
    "open": _read_input,
    "put": lambda uri: storage.put_bytes(uri, b"data"),
    "create": lambda uri: storage.create_bytes(uri, b"data"),
    "replace": lambda uri: storage.replace_bytes(uri, b"data", "0"),
    "version": storage.version,
    "exists": storage.exists,
    "delete": storage.delete,
    "delete all": lambda uri: storage.delete_all([uri]),
}


@pytest.mark.parametrize(
    ("name", "fault"),
    [(name, SLOW_DOWN) for name in OPERATIONS]
    + [(name, fault) for name in ("list", "read", "put") for fault in (INTERNAL_ERROR, RESET)],
)
def test_a_store_that_is_away_is_asked_again_until_patience_ends(
    front: S3Front,
    caplog: pytest.LogCaptureFixture,
    name: str,
    fault: str,
) -> None:
    front.otherwise = fault
    caplog.clear()
    begun = time.monotonic()
    with storage.patience(1.0), pytest.raises(StorageUnavailableError, match="s3://bucket/folder"):
        OPERATIONS[name]("s3://bucket/folder")
    assert 1.0 <= time.monotonic() - begun < 100
    warnings = [record for record in caplog.records if record.name == "pipeline.faults"]
    assert len(warnings) >= 1 or len(front.methods) <= 2  # one try took all of the time
    assert all(record.levelno == logging.WARNING for record in warnings)
    assert all("s3://bucket/folder" in record.getMessage() for record in warnings)
    assert "planted" not in caplog.text.lower()
    # One layer of retries: aiohttp repeats, once, what a kept-open connection did not answer.
    assert len(front.methods) <= 2 * (len(warnings) + 1)


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS.keys())
def test_a_refusal_is_final_at_the_first_request(
    front: S3Front, operation: Callable[[str], object]
) -> None:
    front.otherwise = ACCESS_DENIED
    with pytest.raises(StorageError, match=r"s3://bucket/folder.*(AccessDenied|403)") as caught:
        operation("s3://bucket/folder")
    assert not isinstance(caught.value, StorageUnavailableError)
    assert len(front.methods) == 1


def test_a_port_without_a_server_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAPLANTED")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-secret")
    with storage.patience(0.3), pytest.raises(StorageUnavailableError) as caught:
        storage.put_bytes("s3://bucket/x", b"data")
    assert "planted" not in str(caught.value).lower()


def test_nested_retries_share_one_patience(front: S3Front) -> None:
    begun = time.monotonic()
    with storage.patience(1.0), pytest.raises(StorageUnavailableError):
        storage.retrying(lambda: storage.read_bytes("s3://bucket/x"), what="read twice")
    assert time.monotonic() - begun < 100


def test_an_upload_takes_objects_of_terabytes_within_the_limits_of_s3() -> None:
    sizes = [s3.part_bytes(number) for number in range(1, s3.MOST_PARTS + 1)]
    assert sum(sizes) > 3.8 * 2**40
    assert 5 * 2**20 <= min(sizes) <= max(sizes) <= 2 * 2**30  # an upload holds two of them
    assert len(set(sizes[:6000])) == 1


def test_new_names_in_local_folders_are_synced_to_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    storage.put_bytes(f"file://{tmp_path}/deep/er/object", b"x")
    folders = {f"{tmp_path}", f"{tmp_path}/deep", f"{tmp_path}/deep/er"}
    assert folders <= set(synced)
    assert synced[-1] == f"{tmp_path}/deep/er"  # once the object has its name


class _OnlyTeam(BaseHTTPRequestHandler):
    """An S3 whose caller may list the prefix ``team`` and nothing else."""

    def do_HEAD(self) -> None:
        self._answer(403, b"")

    def do_GET(self) -> None:
        if "prefix=team" in self.path:
            body = b"<ListBucketResult><Name>b</Name><KeyCount>0</KeyCount></ListBucketResult>"
            self._answer(200, body)
        else:
            self._answer(403, b"<Error><Code>AccessDenied</Code><Message>no</Message></Error>")

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
        return


def test_rights_that_end_at_a_prefix_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    serving = ThreadingHTTPServer(("127.0.0.1", 0), _OnlyTeam)
    thread = threading.Thread(target=serving.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{serving.server_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    try:
        storage.check_reachable("s3://bucket/team/in/*.parquet")
        with pytest.raises(InputError, match="access to bucket 'bucket' is denied"):
            storage.check_reachable("s3://bucket/other")
    finally:
        serving.shutdown()
        serving.server_close()
        thread.join()
