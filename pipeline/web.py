"""Images from web servers: from allowed hosts only, at public addresses only, bounded in all.

In: http(s) URIs of rows. Out: bytes (at most one more than the limit) or the URI's ``RowError``.
Rows are written by strangers, so a URI is an attempt to reach what they cannot: the host must be
in the allowlist, and the address that is connected to (there is no second look-up) must be public.
Redirects are followed by hand, each held to the same rules.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from threading import Lock
from typing import TYPE_CHECKING
from urllib.parse import quote, urljoin, urlsplit

from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt
from tenacity import wait_random_exponential as backoff

from pipeline import __version__, faults
from pipeline.errors import ErrorCode, RowError, StorageUnavailableError
from pipeline.redact import shown_uri

if TYPE_CHECKING:
    import aiohttp
    from aiohttp.abc import AbstractResolver

SCHEMES = ("http", "https")
_PORTS = {"http": 80, "https": 443}
MOST_BLOCK_BYTES = 2 * 2**30
"""Of fetched images that a task holds at once: 128 rows with 16 MB each."""
_ATTEMPTS = 4
_MAX_REDIRECTS = 5
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_GONE = frozenset({404, 410})
_USER_AGENT = f"maverick-batch/{__version__} (batch inference; images of its input's rows) aiohttp"
"""Some hosts, Wikimedia's among them, answer no client that does not name itself."""
_CHUNK = 64 * 2**10
_NAT64 = IPv6Network("64:ff9b::/96")
_AZURE_HOST = IPv4Address("168.63.129.16")  # a public number for Azure's own machine service
_URI = re.compile(r"[!#-\[\]_a-z~]+", re.I)  # printable ASCII; neither quotes nor backslashes
_KEPT = "!#$%&'()*+,-./:;=?@[]_~"
"""Punctuation that is not percent-encoded; ``%`` as it may begin what is."""
_LABEL = r"[a-z0-9_](?:[a-z0-9_-]*[a-z0-9])?"
_HOST = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
_NUMERIC = re.compile(r"(?:.*\.)?(?:0x[0-9a-f]*|[0-9]+)")


class _RefusedError(Exception):
    """This address may not be read; the message says why."""


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the internet at large, whatever form it is written in."""
    ip = ip_address(address)
    if isinstance(ip, IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if ip in _NAT64:
            inner = IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        if ip.is_site_local:
            return False
    refused = ip.is_multicast or ip.is_reserved or ip.is_unspecified or ip.is_link_local
    return ip.is_global and not refused and ip != _AZURE_HOST


class Allowance:
    """The bytes that the distinct images of one block may have together.

    What is being read as it runs out comes on top: ``image_fetch_concurrency`` images at most.
    """

    def __init__(self, most: int = MOST_BLOCK_BYTES) -> None:
        self._most = most
        self._lock = Lock()
        self._used = 0

    def check(self) -> None:
        """Refuse one more image once all are used.

        Raises:
            RowError: ``image_too_large``.
        """
        if self._used >= self._most:
            raise RowError(
                ErrorCode.IMAGE_TOO_LARGE,
                f"the images of this row's shard have {self._used} bytes before it, above "
                f"{self._most}; start a new run with a lower limits.shard_rows",
            )

    def taken(self, data: bytes) -> bytes:
        """``data``, counted."""
        with self._lock:
            self._used += len(data)
        return data


@dataclass(frozen=True, slots=True)
class WebReader:
    """Reads the images that rows name by http(s) URIs."""

    domains: tuple[str, ...]
    """Allowed hosts: ``example.com``, ``*.example.com`` (hosts below it), ``example.com:8443``."""
    timeout_s: float
    """For one image, with its redirects and attempts."""
    max_bytes: int
    concurrency: int
    may_connect: Callable[[str], bool] = is_public
    """Whether an IP address may be connected to."""

    def read(
        self, uris: Sequence[str], allowance: Allowance | None = None
    ) -> Mapping[str, bytes | RowError]:
        """Each URI's bytes, or why they could not be had. Not to be called inside an event loop."""
        return asyncio.run(self._read_all(uris, allowance or Allowance())) if uris else {}

    async def _read_all(
        self, uris: Sequence[str], allowance: Allowance
    ) -> Mapping[str, bytes | RowError]:
        import aiohttp  # 0.2 s that a run without web images need not wait for

        connector = aiohttp.TCPConnector(
            resolver=_public_resolver(self.may_connect), limit=self.concurrency
        )
        async with aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None),
            headers={"Accept-Encoding": "identity", "User-Agent": _USER_AGENT},
            auto_decompress=False,
            trust_env=False,
        ) as session:
            gate = asyncio.Semaphore(self.concurrency)
            found = await asyncio.gather(
                *(self._read_one(session, gate, uri, allowance) for uri in uris)
            )
        return dict(zip(uris, found, strict=True))

    async def _read_one(
        self,
        session: aiohttp.ClientSession,
        gate: asyncio.Semaphore,
        uri: str,
        allowance: Allowance,
    ) -> bytes | RowError:
        shown = shown_uri(uri)
        try:
            async with gate, asyncio.timeout(self.timeout_s):
                allowance.check()
                return allowance.taken(await self._patiently(session, uri))
        except RowError as error:
            return error
        except _RefusedError as error:
            message = f"image {shown} may not be read: {shown_uri(str(error))}"
            return RowError(ErrorCode.IMAGE_FORBIDDEN, message)
        except FileNotFoundError:
            return RowError(ErrorCode.IMAGE_NOT_FOUND, f"no image at {shown}")
        except TimeoutError:
            message = f"image {shown}: not there within images.timeout_s = {self.timeout_s:g} s"
            return RowError(ErrorCode.IMAGE_FETCH_FAILED, message)
        except (StorageUnavailableError, OSError, ValueError) as error:
            message = f"image {shown}: {shown_uri(faults.describe(error))}"
            return RowError(ErrorCode.IMAGE_FETCH_FAILED, message)

    async def _patiently(self, session: aiohttp.ClientSession, uri: str) -> bytes:
        """``_follow``, anew after faults that may pass."""
        async for attempt in AsyncRetrying(
            retry=retry_if_exception_type(StorageUnavailableError),
            stop=stop_after_attempt(_ATTEMPTS),
            wait=backoff(multiplier=0.2, max=5),
            reraise=True,
        ):
            with attempt:
                return await self._follow(session, uri)
        raise AssertionError("the last attempt returns or raises")

    async def _follow(self, session: aiohttp.ClientSession, uri: str) -> bytes:
        """The body behind ``uri`` and at most five redirects."""
        for _ in range(_MAX_REDIRECTS + 1):
            uri = _encoded(uri)
            found = await self._get(session, uri)
            if isinstance(found, bytes):
                return found
            if uri.lower().startswith("https:") and not found.lower().startswith("https:"):
                raise _RefusedError("it redirects from https to http")
            uri = found
        raise _RefusedError(f"it redirects more than {_MAX_REDIRECTS} times")

    async def _get(self, session: aiohttp.ClientSession, uri: str) -> bytes | str:
        """The body, or where the server redirects to."""
        import aiohttp  # as above
        from yarl import URL

        host, port = self._checked(uri)
        url = URL(uri.partition("#")[0], encoded=True)
        if (url.host, url.port) != (host, port):
            raise _RefusedError("its host can be read in two ways")
        try:
            async with session.get(url, allow_redirects=False) as response:
                if response.status in _REDIRECTS and "Location" in response.headers:
                    return urljoin(uri, response.headers["Location"])
                _check_answer(response)
                return await self._body(response)
        except aiohttp.InvalidURL as error:
            raise _RefusedError(f"it is no URL: {error}") from None
        except aiohttp.ClientError as error:
            raise StorageUnavailableError(faults.describe(error)) from error

    async def _body(self, response: aiohttp.ClientResponse) -> bytes:
        """At most one byte more than allowed: enough for ``check_size`` to refuse it."""
        limit = self.max_bytes + 1
        if (response.content_length or 0) >= limit:
            raise too_large(self.max_bytes)
        data = bytearray()
        while len(data) < limit:
            chunk = await response.content.read(min(_CHUNK, limit - len(data)))
            if not chunk:
                break
            data += chunk
        return bytes(data)

    def _checked(self, uri: str) -> tuple[str, int]:
        """Host and port of a URI that may be asked for.

        Raises:
            _RefusedError: it may not.
        """
        if not _URI.fullmatch(uri):
            raise _RefusedError("it is no URL")
        try:
            parts = urlsplit(uri)
            host, port = parts.hostname or "", parts.port
        except ValueError as error:
            raise _RefusedError(f"it is no URL: {error}") from None
        if parts.scheme not in SCHEMES:
            raise _RefusedError("it leads to something other than http or https")
        if "@" in parts.netloc:
            raise _RefusedError("it holds a user or password")
        usual = _PORTS[parts.scheme]
        self._check_host(host, port, usual)
        return host, port or usual

    def _check_host(self, host: str, port: int | None, usual: int) -> None:
        named = f"[{host}]" if ":" in host else host
        if ":" in host or _NUMERIC.fullmatch(host):
            try:
                allowed = self.may_connect(str(ip_address(host)))
            except ValueError:
                raise _RefusedError(f"{host!r} is no host") from None
            if not allowed:
                raise _RefusedError(f"{host} is no public address")
        elif not _HOST.fullmatch(host):
            raise _RefusedError(f"{host!r} is no host")
        candidates = {f"{named}:{port or usual}"}
        if port in (None, 80, 443):
            candidates.add(named)
        if not any(_matches(entry.lower(), candidates) for entry in self.domains):
            raise _RefusedError(
                f"{named}:{port or usual} is not in the config's images.domains; add it there, "
                "or put the image's bytes into the row"
            )


def _encoded(uri: str) -> str:
    """``uri`` as it is sent: without blanks around it, in ASCII.

    Raises:
        _RefusedError: it could be read in two ways, or its host is none.
    """
    uri = uri.strip()
    if "\\" in uri or any(character < " " or character == "\x7f" for character in uri):
        raise _RefusedError("it holds a backslash or a control character")
    scheme, separator, rest = uri.partition("://")
    end = min((at for mark in "/?#" if (at := rest.find(mark)) >= 0), default=len(rest))
    host, colon, port = rest[:end].partition(":")
    try:
        return f"{scheme}{separator}{_ascii(host)}{colon}{port}{quote(rest[end:], safe=_KEPT)}"
    except UnicodeError as error:
        raise _RefusedError(f"it is no URL: {error}") from None


def _ascii(host: str) -> str:
    """A host as DNS knows it.

    Raises:
        UnicodeError: it is none.
    """
    import idna  # aiohttp brings it

    return host if host.isascii() else idna.encode(host, uts46=True).decode()


def too_large(max_bytes: int) -> RowError:
    """What becomes of a row whose image is above ``limits.max_image_bytes``."""
    return RowError(
        ErrorCode.IMAGE_TOO_LARGE, f"image is larger than limits.max_image_bytes = {max_bytes}"
    )


def _matches(entry: str, candidates: set[str]) -> bool:
    name = _ascii(entry.removeprefix("*."))
    if not entry.startswith("*."):
        return name in candidates
    return any(candidate.endswith(f".{name}") for candidate in candidates)


def _check_answer(response: aiohttp.ClientResponse) -> None:
    """Only a plain 200 has an image.

    Raises:
        StorageUnavailableError: the same request may succeed in a while.
        FileNotFoundError: there is none.
        OSError: any other answer.
    """
    status = response.status
    if status in _GONE:
        raise FileNotFoundError
    if faults.is_transient_status(status):
        raise StorageUnavailableError(f"the server answers HTTP {status}")
    if status != 200:
        raise OSError(f"the server answers HTTP {status}")
    coding = response.headers.get("Content-Encoding", "identity")
    if coding.lower() != "identity":
        raise OSError(
            f"the server answers in the encoding {coding[:20]!r}, which was not asked for"
        )


def _public_resolver(may_connect: Callable[[str], bool]) -> AbstractResolver:
    """A resolver that gives no address but those that may be connected to."""
    from aiohttp import ThreadedResolver
    from aiohttp.abc import ResolveResult

    class Resolver(ThreadedResolver):
        async def resolve(
            self,
            host: str,
            port: int = 0,
            family: socket.AddressFamily = socket.AF_UNSPEC,
        ) -> list[ResolveResult]:
            found = await super().resolve(host, port, family)
            if not all(may_connect(each["host"]) for each in found):
                raise _RefusedError(f"{host} has an address that is not public")
            return found

    return Resolver()
