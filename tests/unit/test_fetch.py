"""pipeline.fetch and pipeline.web: what a row may reach, and what hostile servers and URIs do."""

from __future__ import annotations

import gzip
import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipeline.errors import ErrorCode, RowError
from pipeline.fetch import Fetched, ImageFetcher
from pipeline.web import WebReader, is_public, too_large

LIMIT = 1000
BODY = b"an image, let us say"


class _Handler(BaseHTTPRequestHandler):
    """Each path is a way to answer; the server counts what it was asked."""

    def do_GET(self) -> None:
        seen: list[str] = self.server.seen  # type: ignore[attr-defined]
        seen.append(self.path)
        name = self.path.partition("?")[0]
        if name == "/loop":
            self._answer(302, b"", Location="/loop")
        elif name == "/once":
            self._answer(302, b"", Location="/ok")
        elif name == "/away":
            self._answer(302, b"", Location="http://169.254.169.254/latest/meta-data")
        elif name == "/local-file":
            self._answer(302, b"", Location="file:///etc/passwd")
        elif name == "/busy-then-ok":
            self._answer(429 if seen.count(self.path) < 3 else 200, BODY)
        elif name == "/named":
            self._answer(200, self.headers["User-Agent"].encode())
        elif name == "/to-blanks":
            self._answer(302, b"", Location="/a b.png")
        elif name.startswith("/status/"):
            self._answer(int(name.rpartition("/")[2]), b"")
        elif name == "/gzip":
            self._answer(200, gzip.compress(b"0" * 10**6), **{"Content-Encoding": "gzip"})
        elif name == "/declared":
            self._answer(200, b"", **{"Content-Length": str(10**12)})
        elif name == "/endless":
            self._answer(200, b"x" * 100_000)
        elif name == "/short":
            self._answer(200, BODY, **{"Content-Length": "500"})
        elif name == "/slow":
            self._answer(200, b"", **{"Content-Length": "500"})
            for _ in range(50):
                self.wfile.write(b"x")
                time.sleep(0.1)
        else:
            self._answer(200, BODY)

    def _answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def handle(self) -> None:
        try:
            super().handle()
        except ConnectionError:  # the client has had enough
            return

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
        return


class _Server:
    def __init__(self, server: ThreadingHTTPServer) -> None:
        self.host = f"127.0.0.1:{server.server_port}"
        self.seen: list[str] = server.seen  # type: ignore[attr-defined]


@pytest.fixture
def server() -> Iterator[_Server]:
    serving = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    serving.daemon_threads = True
    serving.seen = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=serving.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield _Server(serving)
    serving.shutdown()
    serving.server_close()
    thread.join()


def anything(address: str) -> bool:
    return address.startswith("127.")


def get(server: _Server, path: str, *, timeout_s: float = 60) -> Fetched:
    uri = f"http://{server.host}{path}"
    reader = WebReader((server.host,), timeout_s, LIMIT, 4, anything)
    return ImageFetcher("s3://in/rows", LIMIT, 4, web=reader).fetch([uri, uri])[uri]


def code(found: Fetched) -> ErrorCode:
    assert isinstance(found, RowError), found
    return found.code


def test_an_image_that_many_rows_name_is_asked_for_once(server: _Server) -> None:
    assert get(server, "/ok") == BODY
    assert server.seen == ["/ok"]


def test_a_busy_server_is_asked_again_and_a_redirect_followed(server: _Server) -> None:
    assert get(server, "/busy-then-ok") == BODY
    assert get(server, "/once") == BODY
    assert len(server.seen) == 5


@pytest.mark.parametrize(
    ("path", "expected", "requests"),
    [
        ("/loop", ErrorCode.IMAGE_FORBIDDEN, 6),
        ("/away", ErrorCode.IMAGE_FORBIDDEN, 1),
        ("/local-file", ErrorCode.IMAGE_FORBIDDEN, 1),
        ("/status/404", ErrorCode.IMAGE_NOT_FOUND, 1),
        ("/status/403", ErrorCode.IMAGE_FETCH_FAILED, 1),
        ("/status/500", ErrorCode.IMAGE_FETCH_FAILED, 4),
        ("/gzip", ErrorCode.IMAGE_FETCH_FAILED, 1),
        ("/declared", ErrorCode.IMAGE_TOO_LARGE, 1),
        ("/short", ErrorCode.IMAGE_FETCH_FAILED, 4),
    ],
)
def test_a_hostile_answer_is_one_rows_error(
    server: _Server, path: str, expected: ErrorCode, requests: int
) -> None:
    assert code(get(server, path)) == expected
    assert len(server.seen) == requests


def test_no_more_than_the_limit_and_one_byte_is_read(server: _Server) -> None:
    assert get(server, "/endless") == b"x" * (LIMIT + 1)


def test_a_server_that_drips_ends_at_the_timeout_and_its_message_hides_the_query(
    server: _Server,
) -> None:
    found = get(server, "/slow?X-Amz-Signature=planted", timeout_s=0.5)
    assert code(found) == ErrorCode.IMAGE_FETCH_FAILED
    assert "0.5 s" in str(found)
    assert "planted" not in str(found)


def test_an_allowed_name_that_leads_to_this_machine_is_not_connected_to(server: _Server) -> None:
    port = server.host.partition(":")[2]
    uris = [f"http://localhost:{port}/ok", f"http://{server.host}/ok"]
    reader = WebReader((f"localhost:{port}", server.host), 10, LIMIT, 4)
    assert {code(found) for found in reader.read(uris).values()} == {ErrorCode.IMAGE_FORBIDDEN}
    assert server.seen == []


@pytest.mark.parametrize(
    "uri",
    [
        "http://2130706433/",
        "http://0x7f000001/",
        "http://0177.0.0.1/",
        "http://127.1/",
        "http://[::1]/",
        "http://[::ffff:127.0.0.1]/",
        "http://user:planted@good.example/",
        "http://good.example@127.0.0.1/",
        "http://good.example\\@127.0.0.1/",
        "http://good.example./",
        "http://evil\u3002example/",
        "http://\uff11\uff12\uff17.0.0.1/",
        "http://good.example\u2100evil.example/",
        "http://good.example/a\\b",
        "http://good.example:22/",
        "http://evilgood.example/",
        "http:///a.png",
        "http://",
        "http:good.example",
        "HtTp://127.0.0.1/",
        "http://good.example/\r\nHost: x",
        "http://good.example:99999/",
        "http://[bad/",
    ],
)
def test_an_odd_host_is_refused_without_a_connection(uri: str) -> None:
    reader = WebReader(("good.example", "2130706433", "127.0.0.1"), 5, LIMIT, 4)
    found = ImageFetcher("s3://in/rows", LIMIT, 4, web=reader).fetch([uri])[uri]
    assert code(found) == ErrorCode.IMAGE_FORBIDDEN
    assert "planted" not in str(found)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "0.0.0.0",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "168.63.129.16",
        "::",
        "::1",
        "fe80::1",
        "fc00::1",
        "fd00:ec2::254",
        "ff02::1",
        "fec0::1",
        "::ffff:10.0.0.1",
        "2002:7f00:1::1",
        "64:ff9b::7f00:1",
        "64:ff9b:1::1",
        "::7f00:1",
    ],
)
def test_an_address_of_a_private_kind_is_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "64:ff9b::808:808"])
def test_an_address_of_the_internet_is_public(address: str) -> None:
    assert is_public(address)


def test_local_files_stay_inside_their_folders(tmp_path: Path) -> None:
    inside, further, outside = (tmp_path / name for name in ("in", "further", "in-secret"))
    for folder in (inside, further, outside):
        folder.mkdir()
        (folder / "a.png").write_bytes(BODY)
    (inside / "link.png").symlink_to(outside / "a.png")
    os.mkfifo(inside / "pipe")
    fetcher = ImageFetcher(f"file://{inside}", LIMIT, 4, (str(further),))
    good = ["a.png", str(inside / "a.png"), f"file://{further}/a.png", "../further/a.png"]
    bad = ["../in-secret/a.png", "link.png", "pipe", "/dev/zero", "file:///etc/passwd", "a\0.png"]
    bad += [f"file://host{inside}/a.png", f"x::file://{outside}/a.png", "http://good.example/"]
    assert set(fetcher.fetch(good).values()) == {BODY}
    assert {uri: code(found) for uri, found in fetcher.fetch(bad).items()} == dict.fromkeys(
        bad, ErrorCode.IMAGE_FORBIDDEN
    )
    escaped = "%2e%2e/in-secret/a.png"
    assert code(fetcher.fetch([escaped])[escaped]) == ErrorCode.IMAGE_NOT_FOUND


@pytest.mark.parametrize(
    "uri",
    [
        "s3://other/a.png",
        "s3://input/a.png",
        "s3a://other/a.png",
        "s3://in/../other/a.png",
        "../../other/a.png",
        "s3://more/open/../shut/a.png",
        "s3://more/opened/a.png",
        "s3://in\n/a.png",
        "gs://in/a.png",
        "memory://in/a.png",
        "a.png::s3://other",
    ],
)
def test_other_buckets_and_neighbours_of_a_root_are_refused(uri: str) -> None:
    fetcher = ImageFetcher("s3://in/rows", LIMIT, 4, ("s3://more/open",))
    assert code(fetcher.fetch([uri])[uri]) == ErrorCode.IMAGE_FORBIDDEN


def test_an_image_is_read_once_whatever_the_spelling_of_its_name(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(BODY)
    spellings = ["a.png", "./a.png", f"{tmp_path}/a.png", f"file://{tmp_path}/./a.png"]
    found = ImageFetcher(f"file://{tmp_path}", LIMIT, 4).fetch(spellings)
    assert list(found) == spellings
    assert len({id(data) for data in found.values()}) == 1
    assert found["a.png"] == BODY


@pytest.mark.parametrize("web", [None, WebReader(("a.example",), 1, LIMIT, 4, anything)])
@pytest.mark.parametrize("uri", ["https://" + "http:" * 200_000, "x" * 10**6, "x/" * 4097])
def test_a_uri_above_8_kb_is_refused_at_once_and_not_repeated(
    uri: str, web: WebReader | None
) -> None:
    started = time.thread_time()
    found = ImageFetcher("s3://in/rows", LIMIT, 4, web=web).fetch([uri])[uri]
    assert time.thread_time() - started < 10  # the message of a library's error: 40 minutes
    assert code(found) == ErrorCode.IMAGE_FORBIDDEN
    assert isinstance(found, RowError)
    assert f"it has {len(uri)} characters" in found.message
    assert len(found.message) < 1000


def test_an_error_that_repeats_a_long_uri_is_cut() -> None:
    uri = "https://[" + "http:" * 1000
    reader = WebReader(("a.example",), 1, LIMIT, 4, anything)
    found = ImageFetcher("s3://in/rows", LIMIT, 4, web=reader).fetch([uri])[uri]
    assert isinstance(found, RowError)
    assert len(found.message) < 1100


def test_a_server_is_told_who_asks(server: _Server) -> None:
    found = get(server, "/named")
    assert isinstance(found, bytes)
    assert found.startswith(b"maverick-batch/")


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/Caf\u00e9 1.jpg", "/Caf%C3%A9%201.jpg"),
        ("/a%20b.png?x=\u00e9 f&y=%C3%A9#part", "/a%20b.png?x=%C3%A9%20f&y=%C3%A9"),
        ("/ok \t\n", "/ok"),
        ("/{a}|^`<b>.png", "/%7Ba%7D%7C%5E%60%3Cb%3E.png"),
        ("/100%.png", "/100%.png"),
        ("/to-blanks", "/a%20b.png"),
    ],
)
def test_a_uri_as_people_write_it_is_encoded(server: _Server, path: str, asked: str) -> None:
    uri = f" http://{server.host}{path}"
    reader = WebReader((server.host,), 60, LIMIT, 4, anything)
    assert ImageFetcher("s3://in/rows", LIMIT, 4, web=reader).fetch([uri]) == {uri: BODY}
    assert server.seen[-1] == asked


def test_a_host_in_any_script_is_the_one_that_dns_knows(server: _Server) -> None:
    port = server.host.partition(":")[2]
    names = ("b\u00fccher.example", "*.b\u00fccher.example", "xn--bcher-kva.example")
    for name in names:
        host = name.replace("*", "www")
        reader = WebReader((f"{name}:{port}",), 60, LIMIT, 4, lambda _: False)
        uris = [f"http://{host}:{port}/ok", f"http://{host.upper()}:{port}/ok"]
        for found in ImageFetcher("s3://in/rows", LIMIT, 4, web=reader).fetch(uris).values():
            assert isinstance(found, RowError)
            assert "images.domains" not in found.message  # it is allowed, and not to be found


class _Counted(str):
    """A URI that counts how often it is looked up."""

    __slots__ = ()
    hashed = 0

    def __hash__(self) -> int:
        _Counted.hashed += 1
        return super().__hash__()


def test_each_of_many_web_images_is_looked_up_a_few_times() -> None:
    uris = [_Counted(f"http://bad.example/{number}") for number in range(200)]
    found = ImageFetcher("s3://in/rows", LIMIT, 4, web=WebReader((), 5, LIMIT, 4)).fetch(uris)
    assert list(found) == uris
    assert _Counted.hashed < 10 * len(uris)  # in a set made anew for each: 200 times


def test_images_that_are_too_large_take_nothing_from_what_the_others_may(tmp_path: Path) -> None:
    names = [*(f"big-{number}.png" for number in range(6)), "small.png"]
    for name in names:
        (tmp_path / name).write_bytes(bytes(2000 if name.startswith("big") else 400))
    fetcher = ImageFetcher(f"file://{tmp_path}", 1000, 1, max_block_bytes=5000)
    found = fetcher.fetch(names)
    assert found["small.png"] == bytes(400)
    assert {str(found[name]) for name in names[:-1]} == {str(too_large(1000))}


def test_the_images_of_a_block_are_bounded_together(server: _Server, tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"{number}.png").write_bytes(bytes(400))
    reader = WebReader((server.host,), 60, LIMIT, 1, anything)
    fetcher = ImageFetcher(f"file://{tmp_path}", LIMIT, 1, web=reader, max_block_bytes=1000)
    found = fetcher.fetch([f"{number}.png" for number in range(5)])
    refused = [each for each in found.values() if isinstance(each, RowError)]
    assert len(found) - len(refused) in (3, 4)  # two threads may both see room for one more
    assert {each.code for each in refused} == {ErrorCode.IMAGE_TOO_LARGE}
    assert "lower limits.shard_rows" in refused[0].message
    online = [f"http://{server.host}/{number}" for number in range(60)]
    refused = [each for each in fetcher.fetch(online).values() if isinstance(each, RowError)]
    assert {each.code for each in refused} == {ErrorCode.IMAGE_TOO_LARGE}
    assert len(server.seen) == 60 - len(refused) == -(-1000 // len(BODY))
