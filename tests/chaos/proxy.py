"""A reverse proxy before the S3 server that answers a share of the requests wrongly.

In: requests of S3 clients. Out: the server's answers, but for the share: 500, 503 SlowDown, late,
a connection reset, or an answer that is lost after the request was carried out. The Host header
and the raw path go through as they came, so signatures stay valid. Bodies are passed whole: it
stands before a test's objects, not before gigabytes.

It runs on a thread of its own. Which request meets which fault comes from a seeded generator, in
the order in which the requests arrive.
"""

from __future__ import annotations

import asyncio
import io
import socket
import struct
import threading
from collections import Counter
from collections.abc import Coroutine, Mapping
from enum import StrEnum
from random import Random
from types import TracebackType
from typing import Any, Self

import aiohttp
from aiohttp import web
from multidict import CIMultiDict
from yarl import URL

_START_S = 10.0
_SLOW_S = (2.0, 4.0)
_MAX_BODY = 2**30
_UPSTREAM_S = 120.0
_HOP_BY_HOP = frozenset(
    {"connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "expect"}
)
"""Headers that concern one connection only (RFC 9110, 7.6.1), and what the proxy has answered."""
_ERROR = """<?xml version="1.0" encoding="UTF-8"?>
<Error><Code>{code}</Code><Message>{message}</Message><Resource>{path}</Resource>\
<RequestId>chaos</RequestId></Error>"""


class Fault(StrEnum):
    """What the proxy does to a request."""

    INTERNAL_ERROR = "500"
    SLOW_DOWN = "503"
    SLOW = "slow"
    RESET = "reset"
    ANSWER_LOST = "answer lost"


class FaultProxy:
    """One proxy; as a context manager it listens inside. ``front`` points it at a server.

    with FaultProxy(share=0.05, seed=1) as proxy:
        url = proxy.front("http://127.0.0.1:8333")
    """

    def __init__(
        self, *, share: float, seed: int, faults: tuple[Fault, ...] = tuple(Fault)
    ) -> None:
        """``share`` (0-1) of the requests meet one of ``faults``, each equally often."""
        if not 0 <= share <= 1:
            raise ValueError(f"share must be 0 to 1, not {share}")
        self._share = share
        self._faults = faults
        self._rng = Random(seed)
        self._target = ""
        self._port = 0
        self._counts: Counter[str] = Counter()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._runner: web.AppRunner | None = None
        self._session: aiohttp.ClientSession | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        self._wait(self._start())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._wait(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_START_S)
        self._loop.close()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def counts(self) -> Mapping[str, int]:
        """Requests by fault, "passed" and "unreachable" (the server did not answer)."""
        return dict(self._counts)

    def front(self, target: str) -> str:
        """Stand before the server at ``target``; returns the proxy's own URL."""
        self._target = target.rstrip("/")
        return self.url

    def set_share(self, share: float) -> None:
        """From now on, this share of the requests meets a fault; they are counted anew."""
        self._share = share
        self._counts.clear()

    def _wait(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(_START_S)

    async def _start(self) -> None:
        self._session = aiohttp.ClientSession(
            auto_decompress=False,
            timeout=aiohttp.ClientTimeout(total=_UPSTREAM_S),
            connector=aiohttp.TCPConnector(force_close=True),  # a restarted server has no old ones
        )
        application = web.Application(client_max_size=_MAX_BODY)
        application.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(application, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self._port = self._runner.addresses[0][1]

    async def _stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
        if self._session is not None:
            await self._session.close()

    def _draw(self) -> Fault | None:
        return self._rng.choice(self._faults) if self._rng.random() < self._share else None

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        fault = self._draw()
        if fault is Fault.SLOW:
            await asyncio.sleep(self._rng.uniform(*_SLOW_S))
        self._counts[fault or "passed"] += 1
        try:
            body = await request.read()
        except ConnectionResetError:  # the client was killed half-way
            return _reset(request)
        match fault:
            case Fault.INTERNAL_ERROR:
                return _error(request, 500, "InternalError", "We encountered an internal error.")
            case Fault.SLOW_DOWN:
                return _error(request, 503, "SlowDown", "Please reduce your request rate.")
            case Fault.RESET:
                return _reset(request)
        try:
            answer = await self._forward(request, body)
        except (aiohttp.ClientError, TimeoutError):
            self._counts["unreachable"] += 1
            return _reset(request)
        return _reset(request) if fault is Fault.ANSWER_LOST else answer

    async def _forward(self, request: web.Request, body: bytes) -> web.Response:
        assert self._session is not None
        url = URL(self._target + request.raw_path, encoded=True)
        async with self._session.request(
            request.method,
            url,
            headers=_end_to_end(request.headers),
            data=io.BytesIO(body) if body else None,
            allow_redirects=False,
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
        ) as answer:
            headers = _end_to_end(answer.headers)
            if request.method == "HEAD":
                return web.Response(status=answer.status, headers=headers)
            headers.pop("Content-Length", None)
            return web.Response(status=answer.status, headers=headers, body=await answer.read())


def _end_to_end(headers: Mapping[str, str]) -> CIMultiDict[str]:
    kept = [(key, value) for key, value in headers.items() if key.lower() not in _HOP_BY_HOP]
    return CIMultiDict(kept)


def _error(request: web.Request, status: int, code: str, message: str) -> web.Response:
    text = _ERROR.format(code=code, message=message, path=request.path)
    return web.Response(status=status, text=text, content_type="application/xml")


def _reset(request: web.Request) -> web.Response:
    """Ends the connection with RST, as a server that died does."""
    transport = request.transport
    if transport is not None:
        connection: socket.socket | None = transport.get_extra_info("socket")
        if connection is not None:
            linger = struct.pack("ii", 1, 0)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        transport.abort()
    return web.Response(status=500)  # goes nowhere
