"""Images from the web: allowed hosts only, public addresses only, bounded in time and bytes.

A real server on loopback plays the hosts. As no public address can be had in a test, the rule on
addresses is handed in where a body is wanted, and checked by itself.
"""

from __future__ import annotations

import gzip
import ipaddress
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pipeline.errors import RowError
from pipeline.web import Fetched, IPAddress, WebFetcher, is_public, is_web

BODY = b"\x89PNG and so on"
SECRET = "PLANTED-signature"


class Handler(BaseHTTPRequestHandler):
    """Answers by path; ``asked`` counts."""

    asked: dict[str, int]
    headers_seen: list[dict[str, str]]

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        times = self.asked[path] = self.asked.get(path, 0) + 1
        self.headers_seen.append({k.lower(): v for k, v in self.headers.items()})
        if path == "/image":
            self._send(200, BODY, {"Set-Cookie": "a=b"})
        elif path.startswith("/status/"):
            self._send(int(path.rsplit("/", 1)[1]), b"")
        elif path == "/flaky":
            self._send(200 if times == 3 else 503, BODY)
        elif path == "/zipped":
            self._send(200, gzip.compress(bytes(10_000_000)), {"Content-Encoding": "gzip"})
        elif path == "/endless":
            self._endless()
        elif path == "/slow":
            self._slow()
        elif path == "/cut":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(BODY)
        elif path.startswith("/to/"):
            self._send(302, b"", {"Location": self.path.removeprefix("/to/")})
        elif path == "/loop":
            self._send(302, b"", {"Location": "/loop"})

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _endless(self) -> None:
        self.send_response(200)
        self.end_headers()
        try:
            while True:
                self.wfile.write(bytes(65536))
        except OSError:
            return

    def _slow(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000000")
        self.end_headers()
        try:
            for _ in range(600):
                self.wfile.write(b"x")
                time.sleep(0.05)
        except OSError:
            return


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    handler = type("Fresh", (Handler,), {"asked": {}, "headers_seen": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def loopback_too(address: IPAddress) -> bool:
    return address.is_loopback or is_public(address)


def base(server: ThreadingHTTPServer, host: str = "localhost") -> str:
    return f"http://{host}:{server.server_address[1]}"


def fetch(server: ThreadingHTTPServer, *paths: str, timeout_s: float = 20) -> list[Fetched]:
    """Under rules that let this one server be reached."""
    host = f"localhost:{server.server_address[1]}"
    fetcher = WebFetcher((host,), 1_000, timeout_s, 4, address_allowed=loopback_too)
    urls = [f"{base(server)}{path}" for path in paths]
    return list(fetcher.fetch(urls).values())


def code(found: Fetched) -> str:
    assert isinstance(found, RowError), found
    assert SECRET not in found.message
    return str(found.code)


def test_an_allowed_host_gives_its_images(server: ThreadingHTTPServer) -> None:
    assert fetch(server, "/image", "/image?a=1") == [BODY, BODY]
    assert all("cookie" not in seen for seen in server.RequestHandlerClass.headers_seen)  # type: ignore[attr-defined]


def test_what_is_not_there_is_told_and_not_asked_for_again(server: ThreadingHTTPServer) -> None:
    found = fetch(server, f"/status/404?sig={SECRET}", "/status/403", "/status/204")
    assert [code(each) for each in found] == [
        "image_not_found",
        "image_fetch_failed",
        "image_fetch_failed",
    ]
    assert set(server.RequestHandlerClass.asked.values()) == {1}  # type: ignore[attr-defined]


def test_a_server_that_has_a_bad_moment_is_asked_three_times(server: ThreadingHTTPServer) -> None:
    flaky, busy, cut = fetch(server, "/flaky", "/status/429", "/cut")
    assert flaky == BODY
    assert [code(busy), code(cut)] == ["image_fetch_failed"] * 2
    assert server.RequestHandlerClass.asked == {"/flaky": 3, "/status/429": 3, "/cut": 3}  # type: ignore[attr-defined]


def test_no_more_is_read_than_one_byte_above_the_limit(server: ThreadingHTTPServer) -> None:
    endless, zipped = fetch(server, "/endless", "/zipped")
    assert isinstance(endless, bytes)
    assert len(endless) == 1_001
    assert isinstance(zipped, bytes)  # as it came, not unpacked
    assert zipped[:2] == b"\x1f\x8b"


def test_a_server_that_drips_is_left_after_the_time_limit(server: ThreadingHTTPServer) -> None:
    started = time.monotonic()
    (found,) = fetch(server, "/slow", timeout_s=1)
    assert code(found) == "image_fetch_failed"
    assert "images.timeout_s = 1 s" in str(found)
    assert time.monotonic() - started < 20  # it would drip for 30 s


def test_redirects_are_followed_where_each_step_is_allowed(server: ThreadingHTTPServer) -> None:
    good, loop, elsewhere, metadata, scheme, nowhere = fetch(
        server,
        "/to//image",
        "/loop",
        f"/to/http://example.com/x?sig={SECRET}",
        "/to/http://169.254.169.254/latest",
        "/to/file:///etc/passwd",
        "/to/http://",
    )
    assert good == BODY
    assert code(loop) == "image_fetch_failed"
    assert code(elsewhere) == "image_forbidden"
    assert code(metadata) == "image_forbidden"
    assert code(scheme) == "image_fetch_failed"
    assert code(nowhere) == "image_fetch_failed"


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_an_allowed_name_that_is_no_public_address_is_refused(
    server: ThreadingHTTPServer, host: str
) -> None:
    port = server.server_address[1]
    (found,) = WebFetcher((f"{host}:{port}",)).fetch([f"{base(server, host)}/image"]).values()
    assert code(found) == "image_forbidden"
    assert server.RequestHandlerClass.asked == {}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/x",
        "http://localhost/x",
        "http://2130706433/x",
        "http://0x7f000001/x",
        "http://0177.0.0.1/x",
        "http://127.1/x",
        "http://[::ffff:127.0.0.1]/x",
        "http://allowed.org@evil.org/x",
        "http://me:pw@allowed.org/x",
        "http://allowed.org:22/x",
        "http://allowed.org.evil.org/x",
        "http://notallowed.org/x",
        "HTTP://EXAMPLE.COM/x",
    ],
)
def test_hosts_that_are_not_allowed_are_never_asked(url: str) -> None:
    (found,) = WebFetcher(("allowed.org", "*.below.org")).fetch([url]).values()
    assert code(found) == "image_forbidden"


@pytest.mark.parametrize("url", ["http:///x", "http://", "http:x", "https://[bad/x", "http://:80/"])
def test_what_is_no_url_is_told(url: str) -> None:
    assert is_web(url)
    (found,) = WebFetcher(("allowed.org",)).fetch([url]).values()
    assert code(found) == "image_fetch_failed"


def test_a_wildcard_allows_what_is_below_and_not_the_name_itself(
    server: ThreadingHTTPServer,
) -> None:
    port = server.server_address[1]
    fetcher = WebFetcher((f"*.localhost:{port}",), address_allowed=loopback_too)
    below, itself = fetcher.fetch(
        [f"http://a.localhost:{port}/image", f"http://localhost:{port}/image"]
    ).values()
    assert code(itself) == "image_forbidden"
    assert below == BODY or code(below) == "image_fetch_failed"  # not every resolver knows it


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("240.0.0.1", False),
        ("255.255.255.255", False),
        ("198.18.0.1", False),
        ("192.0.2.1", False),
        ("::", False),
        ("::1", False),
        ("fe80::1", False),
        ("fc00::1", False),
        ("fd00:ec2::254", False),
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:8.8.8.8", True),
        ("2002:7f00:1::", False),
        ("2002:a9fe:a9fe::", False),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b:1::1", False),
        ("2001:db8::1", False),
    ],
)
def test_only_addresses_of_the_internet_are_public(address: str, public: bool) -> None:
    assert is_public(ipaddress.ip_address(address)) is public


def test_nothing_is_asked_where_nothing_is_allowed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as trap:
        trap.settimeout(0.3)
        port = trap.getsockname()[1]
        (found,) = WebFetcher().fetch([f"http://127.0.0.1:{port}/x"]).values()
        assert code(found) == "image_forbidden"
        with pytest.raises(TimeoutError):
            trap.accept()
