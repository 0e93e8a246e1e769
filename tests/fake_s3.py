"""An S3 server in this process, in memory, with the defects that a test plants.

Knows what the pipeline asks for: objects with conditional PUTs, ranges, listings, bulk deletions.
Signatures are not checked.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import escape, unescape

from tests.http_server import serving


@dataclass
class FakeS3:
    """What the server holds, and how it misbehaves."""

    url: str
    buckets: set[str] = field(default_factory=lambda: {"batch"})
    objects: dict[str, bytes] = field(default_factory=dict)
    """By ``bucket/key``."""
    conditional: bool = True
    """Whether If-None-Match and If-Match are honoured."""
    denied: set[str] = field(default_factory=set)
    """HTTP methods that are answered with 403."""
    ahead: timedelta = timedelta()
    """How far its clock is ahead."""
    puts: list[str] = field(default_factory=list)
    """``bucket/key`` of each PUT."""
    requests: list[str] = field(default_factory=list)
    """Method and ``bucket/key`` of each request; of listings and deletions just the bucket."""
    page_keys: int = 1000
    """Objects in one answer to a listing."""
    busy_pages: set[int] = field(default_factory=set)
    """Listings, counted from 0, that are answered once with 503."""
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextmanager
def fake_s3() -> Iterator[FakeS3]:
    """A server at a port of its own."""
    with serving(_Handler) as server:
        store = FakeS3(f"http://127.0.0.1:{server.server_port}")
        server.store = store  # type: ignore[attr-defined]
        yield store


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        store: FakeS3 = self.server.store  # type: ignore[attr-defined]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = urlsplit(self.path)
        path, query = unquote(parts.path).strip("/"), parse_qs(parts.query, keep_blank_values=True)
        bucket, _, key = path.partition("/")
        with store.lock:
            store.requests.append(f"{self.command} {path}")
            if self.command in store.denied:
                self._refuse(403, "AccessDenied")
            elif bucket not in store.buckets:
                self._refuse(404, "NoSuchBucket")
            elif self.command == "POST":
                for name in re.findall(rb"<Key>(.*?)</Key>", body):
                    store.objects.pop(f"{bucket}/{unescape(name.decode())}", None)
                self._send(200, b"<DeleteResult/>")
            elif key:
                self._on_object(store, path, body)
            else:
                self._on_listing(store, bucket, query)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _answer  # noqa: N815

    def _on_object(self, store: FakeS3, path: str, body: bytes) -> None:
        if self.command == "PUT":
            self._put(store, path, body)
        elif self.command == "DELETE":
            store.objects.pop(path, None)
            self._send(204, b"")
        elif path not in store.objects:
            self._refuse(404, "NoSuchKey")
        else:
            content = store.objects[path]
            asked = re.fullmatch(r"bytes=(\d*)-(\d+)", self.headers.get("Range") or "")
            if asked and asked[1]:
                content = content[int(asked[1]) : int(asked[2]) + 1]
            elif asked:
                content = content[-int(asked[2]) :]
            written = datetime.now(UTC) + store.ahead
            self._send(
                206 if asked else 200,
                content,
                ETag=_tag(store.objects[path]),
                **{"Last-Modified": format_datetime(written, usegmt=True)},
            )

    def _on_listing(self, store: FakeS3, bucket: str, query: dict[str, list[str]]) -> None:
        first = int(query.get("continuation-token", ["0"])[0])
        page = first // store.page_keys
        if page in store.busy_pages:
            store.busy_pages.remove(page)
            self._refuse(503, "SlowDown")
            return
        self._send(200, _listing(store, bucket, query.get("prefix", [""])[0], first))

    def _put(self, store: FakeS3, path: str, body: bytes) -> None:
        held = store.objects.get(path)
        wanted = self.headers.get("If-Match")
        taken = self.headers.get("If-None-Match") == "*" and held is not None
        other = wanted is not None and (held is None or _tag(held) != wanted)
        if store.conditional and (taken or other):
            self._refuse(412, "PreconditionFailed")
            return
        store.puts.append(path)
        store.objects[path] = body
        self._send(200, b"", ETag=_tag(body))

    def _refuse(self, status: int, code: str) -> None:
        content = f"<Error><Code>{code}</Code><Message>planted</Message></Error>"
        self._send(status, content.encode())

    def _send(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base's name
        pass


def _tag(content: bytes) -> str:
    return f'"{hashlib.md5(content, usedforsecurity=False).hexdigest()}"'


def _listing(store: FakeS3, bucket: str, prefix: str, first: int) -> bytes:
    begin = f"{bucket}/"
    matching = [
        item for item in sorted(store.objects.items()) if item[0].startswith(begin + prefix)
    ]
    end = first + store.page_keys
    more = end < len(matching)
    token = f"<NextContinuationToken>{end}</NextContinuationToken>" if more else ""
    found = "".join(
        f"<Contents><Key>{escape(quote(path.removeprefix(begin)))}</Key><Size>{len(content)}</Size>"
        f"<ETag>{escape(_tag(content))}</ETag>"
        f"<LastModified>{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.000Z}</LastModified></Contents>"
        for path, content in matching[first:end]
    )
    return (
        f"<ListBucketResult><Name>{bucket}</Name><IsTruncated>{str(more).lower()}</IsTruncated>"
        f"<EncodingType>url</EncodingType>{token}{found}</ListBucketResult>"
    ).encode()
