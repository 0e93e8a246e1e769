"""Images by URI: which ones may be read, and fetching a shard's worth of them at once.

In: URIs as rows give them, and the input's root. Out: bytes per URI, or the ``RowError`` of that
URI. A URI that many rows share is fetched once. Only the input's own bucket (or folder, for local
files) may be read: a row must not reach what its author could not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from pipeline import storage
from pipeline.errors import ErrorCode, RowError, StorageError

_FILE = "file://"
Fetched = bytes | RowError


@dataclass(frozen=True, slots=True)
class ImageFetcher:
    """Fetches the images that rows name by URI."""

    root: str
    """Folder of the input: relative URIs start here."""
    max_bytes: int
    concurrency: int

    def fetch(self, uris: Iterable[str]) -> Mapping[str, Fetched]:
        """Each distinct URI's bytes, or why it could not be had."""
        distinct = list(dict.fromkeys(uris))
        if not distinct:
            return {}
        with ThreadPoolExecutor(min(self.concurrency, len(distinct))) as pool:
            return dict(zip(distinct, pool.map(self._fetch_one, distinct), strict=True))

    def _fetch_one(self, uri: str) -> Fetched:
        try:
            return self._read(self._resolve(uri), uri)
        except RowError as error:
            return error
        except (OSError, ValueError) as error:  # a path that no file system takes
            return RowError(ErrorCode.IMAGE_FETCH_FAILED, f"image {uri}: {error}")

    def _resolve(self, uri: str) -> str:
        """The absolute URI, once it is known to lie inside what may be read."""
        if "\0" in uri:
            raise _forbidden(uri, "it holds a NUL character")
        if "://" not in uri and not uri.startswith("/"):
            target = storage.join(self.root, uri)
        else:
            target = storage.absolute(uri)
        wanted, allowed = urlsplit(target), urlsplit(self.root)
        if (wanted.scheme, wanted.netloc) != (allowed.scheme, allowed.netloc):
            raise _forbidden(uri, f"only {allowed.scheme}://{allowed.netloc} may be read")
        if allowed.scheme != "file":
            return target
        inside = Path(self.root.removeprefix(_FILE)).resolve()
        if not Path(target.removeprefix(_FILE)).resolve().is_relative_to(inside):
            raise _forbidden(uri, f"it is outside of {inside}")
        return target

    def _read(self, target: str, uri: str) -> bytes:
        try:
            data = storage.read_bytes(target, limit=self.max_bytes + 1)
        except FileNotFoundError:
            raise RowError(ErrorCode.IMAGE_NOT_FOUND, f"no image at {uri}") from None
        except StorageError as error:
            raise RowError(ErrorCode.IMAGE_FETCH_FAILED, str(error)) from None
        return data


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
    return RowError(ErrorCode.IMAGE_FORBIDDEN, f"image {uri} may not be read: {reason}")
