"""Images by URI: which ones may be read, and fetching a shard's worth of them at once.

In: URIs as rows give them, and where images may lie. Out: bytes per URI, or the ``RowError`` of
that URI. A URI that many rows share is fetched once. A row must not reach what its author could
not: only the input's own bucket (or folder, for local files), the roots the config names, and its
web hosts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from pipeline import redact, storage
from pipeline.errors import ErrorCode, RowError, StorageError
from pipeline.web import Fetched as Fetched
from pipeline.web import WebFetcher, is_web

_FILE = "file://"
_MOST_SHOWN = 500  # characters of a URI in a message
_SCHEME_ALIASES = {"s3a": "s3", "gcs": "gs"}


@dataclass(frozen=True, slots=True)
class ImageFetcher:
    """Fetches the images that rows name by URI."""

    root: str
    """Folder of the input: relative URIs start here."""
    max_bytes: int
    concurrency: int
    roots: tuple[str, ...] = ()
    """Further folders or buckets that may be read, recursively."""
    web: WebFetcher = field(default_factory=WebFetcher)

    def fetch(self, uris: Iterable[str]) -> Mapping[str, Fetched]:
        """Each distinct URI's bytes, or why it could not be had."""
        distinct = list(dict.fromkeys(uris))
        found = dict(self.web.fetch([uri for uri in distinct if is_web(uri)]))
        stored = [uri for uri in distinct if uri not in found]
        if stored:
            with ThreadPoolExecutor(min(self.concurrency, len(stored))) as pool:
                found.update(zip(stored, pool.map(self._fetch_one, stored), strict=True))
        return found

    def _fetch_one(self, uri: str) -> Fetched:
        try:
            return self._read(self._resolve(uri), uri)
        except RowError as error:
            return error
        except (OSError, ValueError) as error:  # a path that no file system takes
            reason = error.strerror if isinstance(error, OSError) else error
            return RowError(ErrorCode.IMAGE_FETCH_FAILED, f"image {_shown(uri)}: {reason}")

    def _resolve(self, uri: str) -> str:
        """The absolute URI, once it is known to lie inside what may be read."""
        if "\0" in uri:
            raise _forbidden(uri, "it holds a NUL character")
        if "://" not in uri and not uri.startswith("/"):
            target = storage.join(self.root, uri)
        else:
            target = storage.absolute(uri)
        scheme, separator, rest = target.partition("://")
        target = f"{scheme.lower()}{separator}{rest}"
        if target.startswith(_FILE) and not rest.startswith("/"):
            raise _forbidden(uri, "a file:// URI names no host; write it as file:///path")
        if not (_in_bucket(target, self.root) or any(_below(target, r) for r in self.roots)):
            raise _forbidden(
                uri, "it lies neither in the input's own place nor below one of images.roots"
            )
        return target

    def _read(self, target: str, uri: str) -> bytes:
        try:
            if target.startswith(_FILE):
                _check_regular(Path(target.removeprefix(_FILE)), uri)
            return storage.read_bytes(target, limit=self.max_bytes + 1)
        except FileNotFoundError:
            raise RowError(ErrorCode.IMAGE_NOT_FOUND, f"no image at {_shown(uri)}") from None
        except StorageError as error:
            raise RowError(ErrorCode.IMAGE_FETCH_FAILED, str(error)) from None


def _in_bucket(target: str, root: str) -> bool:
    """Whether ``target`` is in the bucket of ``root``, or in that folder if it is a local one."""
    if root.startswith(_FILE):
        return _below(target, root)
    return _place(target)[:2] == _place(root)[:2]


def _below(target: str, root: str) -> bool:
    """Whether ``target`` is ``root`` or below it; of local files, with all links followed."""
    if target.startswith(_FILE) and root.startswith(_FILE):
        inside = Path(root.removeprefix(_FILE)).resolve()
        return Path(target.removeprefix(_FILE)).resolve().is_relative_to(inside)
    scheme, bucket, path = _place(target)
    wanted = _place(root)
    steps, above = path.strip("/").split("/"), wanted[2].strip("/")
    if (scheme, bucket) != wanted[:2] or ".." in steps:
        return False
    return not above or steps[: above.count("/") + 1] == above.split("/")


def _place(uri: str) -> tuple[str, str, str]:
    parts = urlsplit(uri)
    return _SCHEME_ALIASES.get(parts.scheme, parts.scheme), parts.netloc, parts.path


def _check_regular(path: Path, uri: str) -> None:
    """A pipe or a device could keep its reader for ever."""
    if path.exists() and not path.is_file():
        raise RowError(ErrorCode.IMAGE_FETCH_FAILED, f"image {_shown(uri)}: is not a regular file")


def check_size(data: bytes, max_bytes: int) -> bytes:
    """``data``, unless it is larger than ``limits.max_image_bytes``.

    Raises:
        RowError: ``image_too_large``.
    """
    if len(data) > max_bytes:
        raise RowError(
            ErrorCode.IMAGE_TOO_LARGE, f"image is larger than limits.max_image_bytes = {max_bytes}"
        )
    return data


def input_root(uri: str, first_file: str) -> str:
    """The folder relative image URIs start from: ``uri``, or the folder of a file or glob.

    ``first_file`` is a file of the input: it tells a file from a folder of the same kind of name.
    """
    absolute = storage.absolute(uri).rstrip("/")
    if absolute == first_file:
        return absolute.rsplit("/", 1)[0]
    while storage.has_glob(absolute):
        absolute = absolute.rsplit("/", 1)[0]
    return absolute


def _forbidden(uri: str, reason: str) -> RowError:
    return RowError(ErrorCode.IMAGE_FORBIDDEN, f"image {_shown(uri)} may not be read: {reason}")


def _shown(uri: str) -> str:
    return redact.text(uri)[:_MOST_SHOWN]
