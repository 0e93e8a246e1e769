"""Images from web hosts that the config allows, and from nowhere else, whatever a row says.

In: http(s) URLs. Out: bytes per URL, or the ``RowError`` of that URL. A row's author must not reach
through this cluster what they could not reach from outside (server-side request forgery): the host
must be allowed by name, its addresses must be public, and they are checked where the connection is
made, so that no second look at DNS can tell another story. Redirects are followed by hand, each
under the same rules. No proxy, no cookie, no credentials, no decompression.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from pipeline import redact
from pipeline.errors import ErrorCode, RowError

if TYPE_CHECKING:
    import aiohttp
    from yarl import URL

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
Fetched = bytes | RowError

_SCHEMES = ("http", "https")
_MAX_REDIRECTS = 5
_ATTEMPTS = 3
_PAUSE_S = 0.5
"""Before the second attempt; doubled before each further one."""
_CHUNK = 64 * 1024  # bytes
_RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
_NAT64_LOCAL = ipaddress.IPv6Network("64:ff9b:1::/48")


def is_web(uri: str) -> bool:
    """Whether ``uri`` is of the web, in whatever case its scheme is written."""
    return uri.partition(":")[0].strip().lower() in _SCHEMES


def is_public(address: IPAddress) -> bool:
    """Whether anybody on the internet could connect to ``address``.

    An IPv6 address that stands for an IPv4 one (mapped, 6to4, Teredo) is public only if that one
    is; those of NAT64 are reserved, so never.
    """
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        if address in _NAT64_LOCAL or not all(map(is_public, _inside(address))):
            return False
    return address.is_global and not (
        address.is_multicast or address.is_reserved or address.is_unspecified
    )


def _inside(address: ipaddress.IPv6Address) -> list[ipaddress.IPv4Address]:
    """The IPv4 addresses that an IPv6 one carries."""
    return [each for each in (address.sixtofour, *(address.teredo or ())) if each is not None]


class _ForbiddenAddressError(OSError):
    """A host name leads to an address that may not be connected to."""


class _AgainError(Exception):
    """The attempt failed in a way that may pass."""


@dataclass(frozen=True, slots=True)
class WebFetcher:
    """Fetches images from allowed hosts; picklable."""

    domains: tuple[str, ...] = ()
    """Allowed hosts: ``name``, ``*.name`` for all below it, ``name:port`` for another port than the
    scheme's own."""
    max_bytes: int = 20 * 2**20
    timeout_s: float = 30.0
    """For one image, redirects and retries included."""
    concurrency: int = 16
    address_allowed: Callable[[IPAddress], bool] = field(default=is_public)

    def fetch(self, urls: Sequence[str]) -> Mapping[str, Fetched]:
        """Each URL's bytes, at most one more than ``max_bytes``, or why they could not be had."""
        if not urls:
            return {}
        return dict(zip(urls, asyncio.run(self._fetch_all(urls)), strict=True))

    async def _fetch_all(self, urls: Sequence[str]) -> list[Fetched]:
        import aiohttp  # 0.2 s that `--help` need not wait for

        connector = aiohttp.TCPConnector(resolver=_resolver(self.address_allowed), force_close=True)
        places = asyncio.Semaphore(self.concurrency)

        async def one(url: str) -> Fetched:
            async with places:
                return await self._fetch(session, url)

        async with aiohttp.ClientSession(
            connector=connector,
            timeout=aiohttp.ClientTimeout(total=None),
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            auto_decompress=False,
            headers={"Accept": "image/*", "Accept-Encoding": "identity"},
        ) as session:
            return await asyncio.gather(*(one(url) for url in urls))

    async def _fetch(self, session: aiohttp.ClientSession, url: str) -> Fetched:
        shown = redact.text(url)
        try:
            async with asyncio.timeout(self.timeout_s):
                return await self._attempts(session, url)
        except RowError as error:
            return error
        except TimeoutError:
            reason = f"not there within images.timeout_s = {self.timeout_s:g} s"
            return RowError(ErrorCode.IMAGE_FETCH_FAILED, f"image {shown}: {reason}")

    async def _attempts(self, session: aiohttp.ClientSession, url: str) -> bytes:
        for attempt in range(_ATTEMPTS):
            try:
                return await self._follow(session, url)
            except _AgainError as error:
                reason = str(error)
            await asyncio.sleep(_PAUSE_S * 2**attempt)
        raise _failed(url, reason)

    async def _follow(self, session: aiohttp.ClientSession, url: str) -> bytes:
        """The body behind ``url`` and its redirects."""
        target = self._checked(url, url)
        for _ in range(_MAX_REDIRECTS + 1):
            answer = await self._get(session, target, url)
            if isinstance(answer, bytes):
                return answer
            try:
                following = target.join(_url(answer))
            except ValueError:
                raise _failed(url, "it redirects to no URL") from None
            if (target.scheme, following.scheme) == ("https", "http"):
                raise _forbidden(url, "it redirects from https to http")
            target = self._checked(str(following), url)
        raise _failed(url, f"more than {_MAX_REDIRECTS} redirects")

    async def _get(self, session: aiohttp.ClientSession, target: URL, url: str) -> bytes | str:
        """The body at ``target``, or where it redirects to."""
        import aiohttp

        try:
            async with session.get(target, allow_redirects=False) as response:
                if response.status in _RETRIED:
                    raise _AgainError(f"HTTP {response.status}")
                if 300 <= response.status < 400 and "Location" in response.headers:
                    return response.headers["Location"]
                if response.status in (HTTPStatus.NOT_FOUND, HTTPStatus.GONE):
                    raise RowError(ErrorCode.IMAGE_NOT_FOUND, f"no image at {redact.text(url)}")
                if response.status != HTTPStatus.OK:
                    raise _failed(url, f"HTTP {response.status}")
                return await self._body(response)
        except _ForbiddenAddressError as error:
            raise _forbidden(url, str(error)) from None
        except aiohttp.ClientConnectorError as error:
            if isinstance(error.os_error, _ForbiddenAddressError):
                raise _forbidden(url, str(error.os_error)) from None
            raise _AgainError(f"no connection: {error.os_error.strerror}") from None
        except (aiohttp.InvalidURL, ValueError) as error:
            raise _failed(url, f"not a URL: {type(error).__name__}") from None
        except (aiohttp.ClientError, OSError) as error:
            raise _AgainError(f"{type(error).__name__}") from None

    async def _body(self, response: aiohttp.ClientResponse) -> bytes:
        """At most one byte more than allowed: the size check tells the rest."""
        pieces: list[bytes] = []
        left = self.max_bytes + 1
        async for piece in response.content.iter_chunked(_CHUNK):
            pieces.append(piece[:left])
            left -= len(pieces[-1])
            if left == 0:
                break
        return b"".join(pieces)

    def _checked(self, address: str, url: str) -> URL:
        """``address`` as a URL that may be asked for; ``url`` is the row's own, for errors."""
        try:
            target = _url(address)
            host, port = (target.host or "").rstrip(".").lower(), target.port
        except ValueError:
            raise _failed(url, "not a URL") from None
        if target.scheme not in _SCHEMES or not host:
            raise _failed(url, "not an http or https URL")
        if target.user is not None or target.password is not None:
            raise _forbidden(url, "it holds a user or password")
        if not any(_allows(entry, host, port, target.scheme) for entry in self.domains):
            raise _forbidden(
                url, f"host {host}:{port} is not in images.domains, the list of web hosts"
            )
        try:
            literal = ipaddress.ip_address(host)
        except ValueError:
            return target
        if not self.address_allowed(literal):
            raise _forbidden(url, f"{literal} is not a public address")
        return target


def _allows(entry: str, host: str, port: int | None, scheme: str) -> bool:
    name, _, wanted_port = entry.lower().partition(":")
    own = 443 if scheme == "https" else 80
    if port != (int(wanted_port) if wanted_port else own):
        return False
    return host.endswith(name[1:]) and host != name[2:] if name.startswith("*.") else host == name


def _url(address: str) -> URL:
    from yarl import URL

    return URL(address)


def _resolver(allowed: Callable[[IPAddress], bool]) -> Any:
    """aiohttp's resolver, giving allowed addresses only: the connection is made to these."""
    from aiohttp.abc import AbstractResolver, ResolveResult
    from aiohttp.resolver import ThreadedResolver

    class Checking(AbstractResolver):
        def __init__(self) -> None:
            self._inner = ThreadedResolver()

        async def resolve(
            self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
        ) -> list[ResolveResult]:
            found = await self._inner.resolve(host, port, family)
            for each in found:
                address = ipaddress.ip_address(each["host"].partition("%")[0])
                if not allowed(address):
                    raise _ForbiddenAddressError(f"{host} is {address}, not a public address")
            return found

        async def close(self) -> None:
            await self._inner.close()

    return Checking()


def _failed(url: str, reason: str) -> RowError:
    return RowError(ErrorCode.IMAGE_FETCH_FAILED, f"image {redact.text(url)}: {reason}")


def _forbidden(url: str, reason: str) -> RowError:
    return RowError(
        ErrorCode.IMAGE_FORBIDDEN, f"image {redact.text(url)} may not be read: {reason}"
    )
