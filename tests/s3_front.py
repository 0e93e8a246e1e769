"""A front before an S3 server that follows a script: which request is answered how is exact.

(The chaos tests' proxy draws its faults at random.) Each step of the script is used up by one
request; with the script at its end, requests go through, or get ``otherwise`` if nothing is behind.
"""

from __future__ import annotations

import http.client
import socket
import struct
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.http_server import serving

RESET = "reset"
"""The connection breaks before the server hears of the request."""
LOST = "lost"
"""The server carries the request out, but its answer does not arrive."""
CUT = "cut"
"""The answer's body breaks off in the middle."""
SLOW_DOWN, INTERNAL_ERROR, ACCESS_DENIED = "SlowDown", "InternalError", "AccessDenied"
_STATUS = {SLOW_DOWN: 503, INTERNAL_ERROR: 500, ACCESS_DENIED: 403}


class S3Front:
    """What the front was told and has seen."""

    def __init__(self, url: str, upstream: str | None, otherwise: str) -> None:
        self.url = url
        self.upstream = upstream
        self.otherwise = otherwise
        self.script: deque[str] = deque()
        self.methods: list[str] = []
        """Of the requests so far."""


@contextmanager
def s3_front(upstream: str | None = None, *, otherwise: str = SLOW_DOWN) -> Iterator[S3Front]:
    """A front at a port of its own; ``upstream`` is ``host:port``."""
    with serving(_Handler) as server:
        front = S3Front(f"http://127.0.0.1:{server.server_port}", upstream, otherwise)
        server.front = front  # type: ignore[attr-defined]
        yield front


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        front: S3Front = self.server.front  # type: ignore[attr-defined]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        front.methods.append(self.command)
        step = front.script.popleft() if front.script else None
        if step is None and front.upstream is None:
            step = front.otherwise
        if step in _STATUS:
            self._refuse(step)
        elif step == RESET:
            self._break()
        else:
            self._forward(front.upstream, body, step)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _answer  # noqa: N815

    def _forward(self, upstream: str | None, body: bytes, step: str | None) -> None:
        assert upstream is not None
        connection = http.client.HTTPConnection(upstream, timeout=30)
        connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in ("connection", "expect"):
                connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        if step == LOST:
            self._break()
            return
        self.send_response_only(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else len(content)
        self.send_header("Content-Length", str(length or 0))
        self.end_headers()
        if step == CUT:
            self.wfile.write(content[: len(content) // 2])
            self._break()
            return
        if self.command != "HEAD":
            self.wfile.write(content)

    def _refuse(self, code: str) -> None:
        content = f"<Error><Code>{code}</Code><Message>scripted</Message></Error>".encode()
        self.send_response_only(_STATUS[code])
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _break(self) -> None:
        """A reset, not an orderly end."""
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def finish(self) -> None:
        if self.connection.fileno() >= 0:
            super().finish()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base's name
        pass
