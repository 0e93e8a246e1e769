"""Images by URI: which ones may be read, and fetching a shard's worth of them at once.

In: URIs as rows give them, and the input's root. Out: bytes per URI, or the ``RowError`` of that
URI. A URI that many rows share is fetched once. Only the input's own bucket (or folder, for local
files), the config's further roots and its web hosts (``web``) may be read: a row must not reach
what its author could not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pipeline import storage
from pipeline.errors import ErrorCode, RowError, StorageError
from pipeline.redact import shown_uri
from pipeline.web import MOST_BLOCK_BYTES, SCHEMES, Allowance, WebReader, too_large

Fetched = bytes | RowError
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_MOST_URI = 8192
"""Characters: what servers take, and eight times a key of S3."""
_ALIASES = {"s3a": "s3", "local": "file"}


@dataclass(frozen=True, slots=True)
class ImageFetcher:
    """Fetches the images that rows name by URI."""

    root: str
    """Folder of the input: relative URIs start here."""
    max_bytes: int
    concurrency: int
    roots: tuple[str, ...] = ()
    """Further folders or buckets that may be read."""
    web: WebReader | None = None
    """Reads http(s) URIs; None: there are no such hosts."""
    max_block_bytes: int = MOST_BLOCK_BYTES
    """Of a block's distinct images together."""

    def fetch(self, uris: Iterable[str]) -> Mapping[str, Fetched]:
        """Each distinct URI's bytes, or why it could not be had."""
        distinct = list(dict.fromkeys(uris))
        if not distinct:
            return {}
        online: list[str] = []
        stored: list[str] = []
        for uri in distinct:
            by_web = self.web is not None and len(uri) <= _MOST_URI and _scheme(uri) in SCHEMES
            (online if by_web else stored).append(uri)
        targets = {uri: self._target(uri) for uri in stored}
        places = {t: uri for uri, t in targets.items() if isinstance(t, str)}  # by any spelling
        allowance = Allowance(self.max_block_bytes)
        with ThreadPoolExecutor(min(self.concurrency, len(distinct)) + 1) as pool:
            answers = pool.submit(self.web.read, online, allowance) if self.web and online else None
            read_one = partial(self._read, allowance)
            read = dict(zip(places, pool.map(read_one, places, places.values()), strict=True))
            found = {uri: read[t] if isinstance(t, str) else t for uri, t in targets.items()}
            return {**found, **(answers.result() if answers else {})}

    def _target(self, uri: str) -> str | RowError:
        try:
            return self._resolve(uri)
        except RowError as error:
            return error
        except (OSError, ValueError) as error:  # a path that no file system takes
            return _unreadable(uri, error)

    def _resolve(self, uri: str) -> str:
        """The absolute URI, once it is known to lie inside what may be read."""
        if len(uri) > _MOST_URI:
            raise _forbidden(uri, f"it has {len(uri)} characters, above {_MOST_URI}")
        if _CONTROL.search(uri):
            raise _forbidden(uri, "it holds a control character")
        if "::" in uri:  # fsspec takes it for a chain of drivers, each of which reads what it likes
            raise _forbidden(uri, "it holds ::")
        if _scheme(uri) in SCHEMES:
            reason = "add its host to the config's images.domains, or put its bytes into the row"
            raise _forbidden(uri, reason)
        if "://" not in uri and not uri.startswith("/"):
            target = storage.join(self.root, uri)
        else:
            target = storage.absolute(uri)
        scheme, path = _parts(target)
        if scheme == "file":
            return self._resolve_file(path, uri)
        segments = _segments(path, uri)
        allowed = [_own_bucket(self.root), *(_parts(root) for root in self.roots)]
        if not any(
            scheme == kind and segments[: len(inside)] == inside
            for kind, inside in ((kind, _segments(base.rstrip("/"), uri)) for kind, base in allowed)
        ):
            raise _forbidden(uri, f"only {self._named_roots()} may be read")
        return f"{scheme}://{'/'.join(segments)}"

    def _resolve_file(self, path: str, uri: str) -> str:
        roots = [_parts(storage.absolute(root)) for root in (self.root, *self.roots)]
        folders = [Path(base).resolve() for kind, base in roots if kind == "file"]
        target = Path(path)
        resolved = target.resolve()
        if not target.is_absolute() or not any(resolved.is_relative_to(each) for each in folders):
            raise _forbidden(uri, f"it is outside of {self._named_roots()}")
        if resolved.exists() and not resolved.is_file():  # a pipe or device could be read for ever
            raise _forbidden(uri, "it is no regular file")
        return f"file://{resolved}"

    def _named_roots(self) -> str:
        scheme, inside = _own_bucket(self.root)
        return ", ".join([f"{scheme}://{inside}", *self.roots])

    def _read(self, allowance: Allowance, target: str, uri: str) -> Fetched:
        try:
            allowance.check()
            data = storage.read_bytes(target, limit=self.max_bytes + 1)
            return allowance.taken(check_size(data, self.max_bytes))
        except RowError as error:
            return error
        except FileNotFoundError:
            return RowError(ErrorCode.IMAGE_NOT_FOUND, f"no image at {shown_uri(uri)}")
        except StorageError as error:
            reason = shown_uri(str(error.__cause__ or error))
            return RowError(ErrorCode.IMAGE_FETCH_FAILED, f"image {shown_uri(uri)}: {reason}")
        except (OSError, ValueError) as error:
            return _unreadable(uri, error)


def _unreadable(uri: str, error: Exception) -> RowError:
    """Without the error's own path, which may be of any length."""
    reason = (error.strerror if isinstance(error, OSError) else None) or type(error).__name__
    return RowError(ErrorCode.IMAGE_FETCH_FAILED, f"image {shown_uri(uri)}: {reason}")


def check_size(data: bytes, max_bytes: int) -> bytes:
    """``data``, unless it is larger than ``limits.max_image_bytes``.

    Raises:
        RowError: ``image_too_large``.
    """
    if len(data) > max_bytes:
        raise too_large(max_bytes)
    return data


def input_root(uri: str, first_file: str) -> str:
    """The folder relative image URIs start from: ``uri``, or the folder of a file or glob.

    ``first_file`` is a file of the input: it tells a file from a folder of the same kind of name,
    and a folder from a pattern.
    """
    absolute = storage.absolute(uri).rstrip("/")
    if absolute == first_file:
        return absolute.rsplit("/", 1)[0]
    while storage.has_glob(absolute) and not first_file.startswith(f"{absolute}/"):
        absolute = absolute.rsplit("/", 1)[0]
    return absolute


def _scheme(uri: str) -> str:
    return uri.partition(":")[0].strip().lower()


def _parts(uri: str) -> tuple[str, str]:
    """Scheme, aliases resolved, and the rest of an absolute URI."""
    scheme, _, rest = uri.partition("://")
    return _ALIASES.get(scheme.lower(), scheme.lower()), rest


def _own_bucket(root: str) -> tuple[str, str]:
    """What may be read without being named: the bucket, of local files the folder."""
    scheme, path = _parts(root)
    return scheme, path if scheme == "file" else path.split("/", 1)[0]


def _segments(path: str, uri: str) -> list[str]:
    """Bucket and key parts, with ``.`` and ``..`` resolved as some stores do themselves."""
    segments: list[str] = []
    for segment in path.split("/"):
        if segment == "..":
            if len(segments) <= 1:
                raise _forbidden(uri, "it leads out of its bucket")
            segments.pop()
        elif segment != ".":
            segments.append(segment)
    return segments


def _forbidden(uri: str, reason: str) -> RowError:
    message = f"image {shown_uri(uri)} may not be read: {reason}"
    return RowError(ErrorCode.IMAGE_FORBIDDEN, message)
