"""Object storage through fsspec: list, read, put whole objects. The one module that imports fsspec.

In: URIs (``s3://``, ``gs://``, ``file://`` or plain paths). Out: bytes, seekable files, listings.
URIs are literal: no character of a name is a wildcard, an escape or a separator of drivers, but in
``match_files``. Only a plain path, one without a scheme, may begin with ``~``.
A put is one whole object or nothing: object stores promise that for one PUT, local files get it by
writing beside and renaming; ``open_output`` does it for objects larger than memory. A put that
cannot be confirmed raises ``StorageError``.

Every operation is tried again, for ``PATIENCE_S`` seconds or what ``patience`` says, while the
store gives no answer (``StorageUnavailableError``); any other ``StorageError`` rises at once.
``check_reachable`` alone asks once.

Credentials and endpoints come from the environment (``AWS_ENDPOINT_URL``, ``AWS_ACCESS_KEY_ID``,
...), never from a config, so that they reach no manifest or log.
"""

from __future__ import annotations

import functools
import hashlib
import os
import posixpath
import re
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import IO, Any, TypeVar

import fsspec
from botocore.exceptions import ConnectionError as NobodyThereError
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from pipeline import faults, local_files, metrics, s3
from pipeline.errors import InputError, StorageError, StorageUnavailableError
from pipeline.faults import PATIENCE_S as PATIENCE_S
from pipeline.faults import patience as patience
from pipeline.faults import patience_in_all as patience_in_all
from pipeline.faults import retrying as retrying

T = TypeVar("T")

_S3_PROTOCOLS = ("s3", "s3a")
_CONNECT_TIMEOUT_S = 5
_READ_AHEAD = 4 * 2**20
"""Bytes fetched beyond what was asked for: s3fs's default, 50 MiB, would follow each seek."""
_READ_TIMEOUT_S = 30
"""Between two pieces of an answer."""
_CONNECTIONS = 64
_PROBE_S = 10.0
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
# A first look before anything starts: a wrong endpoint or bucket must be told in seconds.
_S3_PROBE: dict[str, Any] = {
    "config_kwargs": {
        "connect_timeout": 3,
        "read_timeout": 8,
        "retries": {"max_attempts": 0},
    }
}


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One object of a listing."""

    uri: str
    size: int
    """Bytes."""
    version: str
    """What changes when the object does: its ETag, else its modification time."""


@dataclass(frozen=True, slots=True)
class Aged:
    """An object and its age."""

    content: bytes
    version: str
    """As ``read_version`` gives it."""
    age_s: float
    """Seconds since it was written."""
    one_clock: bool
    """Whether the store told both times, of the write and of the answer; else this machine's clock
    was compared with the one of the disk or store, which may differ."""


def join(base: str, *parts: str) -> str:
    """``base`` and ``parts`` with single slashes between."""
    return "/".join([base.rstrip("/"), *(part.strip("/") for part in parts)])


def name(uri: str) -> str:
    """The last path segment of ``uri``."""
    return posixpath.basename(uri.rstrip("/"))


def parent(uri: str) -> str | None:
    """The folder that ``uri`` lies in, without a slash at its end; None of a bucket or a root."""
    folder = absolute(uri).rstrip("/").rpartition("/")[0]
    return None if folder.endswith(("/", ":")) else folder


def has_glob(uri: str) -> bool:
    """Whether ``uri`` holds a wildcard."""
    return any(mark in uri for mark in "*?[")


def check_reachable(uri: str) -> None:
    """Fail in seconds if ``uri``'s bucket cannot be reached or is not there. Writes nothing.

    Raises:
        InputError: unknown scheme, missing driver, no such bucket, wrong keys, or no answer.
    """
    protocol = _protocol(uri)
    if protocol not in ("file", "local") and not uri.partition("://")[2].strip("/"):
        raise InputError(f"{uri}: names no bucket; write it as {protocol}://bucket/folder.")
    try:
        with patience(_PROBE_S):
            retrying(functools.partial(_probe, uri, protocol), what=f"look at {uri}")
    except FileNotFoundError:
        raise InputError(
            f"{uri}: there is no bucket {_bucket(uri)!r}; create it, or mend the URI."
        ) from None
    except PermissionError:
        raise InputError(
            f"{uri}: access to bucket {_bucket(uri)!r} is denied; check AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY."
        ) from None
    except (StorageError, ImportError) as error:
        raise InputError(
            f"{uri}: the bucket cannot be reached: {error.__cause__ or error}"
        ) from None
    except faults.driver_errors() as error:
        raise InputError(f"{uri}: the bucket cannot be reached: {error}") from None


def _probe(uri: str, protocol: str) -> None:
    """One quick look at the bucket. A bad moment of the store is told from a wrong name."""
    is_s3 = protocol in _S3_PROTOCOLS
    fs, path = _driver(uri, skip_instance_cache=is_s3, **(_S3_PROBE if is_s3 else {}))
    try:
        if is_s3:
            fs.retries = 1
            _look_at_bucket(fs, uri)
        elif not isinstance(fs, LocalFileSystem) and not fs.exists(path.lstrip("/").split("/")[0]):
            raise FileNotFoundError(uri)
    except faults.driver_errors() as error:
        if faults.is_transient(error) and not isinstance(error, NobodyThereError):
            raise StorageUnavailableError(f"cannot look at {uri}") from error
        raise


def _look_at_bucket(fs: Any, uri: str) -> None:
    """Ask for the bucket, or, where that is denied, for the folder: rights may end at a prefix."""
    try:
        fs.call_s3("head_bucket", Bucket=_bucket(uri))
    except PermissionError:
        key = uri.partition("://")[2].lstrip("/").partition("/")[2]
        folder = re.split(r"[*?\[]", key, maxsplit=1)[0]
        fs.call_s3("list_objects_v2", Bucket=_bucket(uri), Prefix=folder, MaxKeys=1)


def _bucket(uri: str) -> str:
    return uri.partition("://")[2].lstrip("/").split("/", 1)[0]


def check_folder(uri: str) -> None:
    """Refuse a local folder that is, or lies below, a file.

    Raises:
        InputError: naming the file.
    """
    fs, path = _filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        for place in (Path(path), *Path(path).parents):
            if place.exists() and not place.is_dir():
                raise InputError(f"{uri}: {place} is a file, not a folder.")


def list_files(
    uri: str, *, suffixes: tuple[str, ...] = ("",), hidden: bool = False
) -> list[FileEntry]:
    """Files at ``uri`` (a file, or a folder taken recursively), sorted by URI.

    In folders, names that start with ``_`` or ``.`` are skipped at every level (the convention
    of Spark, Arrow and DuckDB) unless ``hidden`` asks for them, and only names ending in one of
    ``suffixes`` are kept. An absent folder gives an empty list.

    Raises:
        StorageError: some of it cannot be listed; there is no listing of the rest.
    """
    entries = list(iterate_folder(uri, suffixes=suffixes, hidden=hidden))
    if not entries and _protocol(uri) in _S3_PROTOCOLS:
        entries = _attempted(uri, "list", lambda fs, path: _entries(fs, _itself(fs, path)))
    chosen = (entry for entry in entries if entry.uri.endswith(suffixes))
    return sorted(chosen, key=lambda entry: entry.uri)


def iterate_folder(
    uri: str, *, suffixes: tuple[str, ...] = ("",), hidden: bool = False
) -> Iterator[FileEntry]:
    """The files of a folder that ``list_files`` has, in any order.

    On S3 they come page by page: one is held at a time, and each is tried again by itself.

    Raises:
        StorageError: some of it cannot be listed; also after files that were given.
    """
    for page in _pages(uri, hidden=hidden):
        yield from (entry for entry in page if entry.uri.endswith(suffixes))


def is_pattern(uri: str) -> bool:
    """Whether ``uri`` is read as a pattern: it holds a wildcard, and nothing is called so.

    Raises:
        StorageError: the store does not tell.
    """
    return has_glob(uri) and not exists(uri)


def match_files(
    uri: str, *, suffixes: tuple[str, ...] = ("",), hidden: bool = False
) -> list[FileEntry]:
    """As ``list_files``; if ``uri`` is a pattern, all files that match it, sorted by URI.

    Raises:
        StorageError: some of it cannot be listed; there is no listing of the rest.
    """
    if not is_pattern(uri):
        return list_files(uri, suffixes=suffixes, hidden=hidden)

    entries = _attempted(uri, "list", lambda fs, path: _entries(fs, _glob(fs, path)))
    chosen = (entry for entry in entries if entry.uri.endswith(suffixes))
    return sorted(chosen, key=lambda entry: entry.uri)


def list_folder(uri: str) -> list[str]:
    """URIs of the files directly in the folder ``uri``, whatever their names, sorted."""

    def found(fs: fsspec.AbstractFileSystem, path: str) -> list[str]:
        infos = fs.ls(path, detail=True)
        return sorted(fs.unstrip_protocol(info["name"]) for info in infos if _is_file(info))

    return _attempted(uri, "list", found)


def list_folders(uri: str) -> list[str]:
    """URIs of the folders directly in the folder ``uri``, sorted; none if it is not there.

    Raises:
        StorageError: it cannot be listed.
    """

    def found(fs: fsspec.AbstractFileSystem, path: str) -> list[str]:
        try:
            infos = fs.ls(path, detail=True)
        except FileNotFoundError:
            return []
        return sorted(
            fs.unstrip_protocol(info["name"]).rstrip("/")
            for info in infos
            if info["type"] == "directory"
        )

    return _attempted(uri, "list", found)


def version(uri: str) -> tuple[int, str]:
    """Size (bytes) and version of the object at ``uri``, asked anew, as ``list_files`` gives them.

    Raises:
        FileNotFoundError: no such object.
        StorageError: the store does not tell.
    """

    def found(fs: fsspec.AbstractFileSystem, path: str) -> FileEntry:
        info = fs.info(path)
        if not _is_file(info):
            raise FileNotFoundError(uri)
        return _entry(fs, info)

    entry = _attempted(uri, "look at", found)
    return entry.size, entry.version


def read_bytes(uri: str, *, limit: int | None = None) -> bytes:
    """The object at ``uri``; at most ``limit`` bytes of it when given.

    Raises:
        FileNotFoundError: no such object.
        StorageError: it cannot be read.
    """

    def content(fs: fsspec.AbstractFileSystem, path: str) -> bytes:
        try:
            return bytes(fs.cat_file(path, start=None if limit is None else 0, end=limit))
        except OSError as error:
            if limit is None or faults.answer(error)[0] != 416:
                raise
            return b""  # S3 has no range of an empty object

    return _attempted(uri, "read", content)


def read_tail(uri: str, size: int) -> bytes:
    """The last ``size`` bytes of the object at ``uri``, all of it if it has fewer.

    Raises:
        FileNotFoundError: no such object.
        StorageError: it cannot be read.
    """

    def content(fs: fsspec.AbstractFileSystem, path: str) -> bytes:
        if _protocol(uri) not in _S3_PROTOCOLS:
            return bytes(fs.cat_file(path, start=max(0, fs.info(path)["size"] - size)))
        try:
            return s3.read_tail(fs, path, size)
        except OSError as error:
            if faults.answer(error)[0] != 416:
                raise
            return b""  # S3 has no range of an empty object

    return _attempted(uri, "read", content)


def read_version(uri: str) -> tuple[bytes, str]:
    """The object at ``uri``, and the version that ``replace_bytes`` wants: ETag or content hash.

    Raises:
        FileNotFoundError: no such object.
        StorageError: it cannot be read.
    """
    return _attempted(uri, "read", _read_version)


def read_aged(uri: str) -> Aged:
    """The object at ``uri``, and how long it has been there.

    Raises:
        FileNotFoundError: no such object.
        StorageError: it cannot be read.
    """

    def read(fs: fsspec.AbstractFileSystem, path: str) -> Aged:
        if _protocol(uri) in _S3_PROTOCOLS:
            return Aged(*s3.read_aged(fs, path), one_clock=True)
        content, version = _read_version(fs, path)
        age_s = (datetime.now(UTC) - fs.modified(path)).total_seconds()
        return Aged(content, version, age_s, one_clock=False)

    return _attempted(uri, "read", read)


def written_at(uri: str) -> datetime:
    """When the object at ``uri`` was written, by the clock of its store or disk; to the second.

    Raises:
        FileNotFoundError: no such object.
        StorageError: the store does not tell.
    """

    def look(fs: fsspec.AbstractFileSystem, path: str) -> datetime:
        moment: datetime = fs.modified(path)
        return moment

    return _attempted(uri, "look at", look)


@contextmanager
def open_input(uri: str, *, ahead: int = _READ_AHEAD) -> Iterator[IO[bytes]]:
    """A seekable file that reads ranges as they are asked for, each retried by itself.

    Args:
        uri: the object.
        ahead: bytes fetched beyond each range; 0 = none, for a reader that has its own buffers.

    Raises:
        FileNotFoundError: no such object.
        StorageError: it cannot be read, or changed since it was opened; also from inside the block.
    """

    def opened(fs: fsspec.AbstractFileSystem, path: str) -> Any:
        cache = "readahead" if ahead else "none"
        return fs.open(path, "rb", cache_type=cache, block_size=ahead or _READ_AHEAD)

    file = _attempted(uri, "read", opened)
    if cache := getattr(file, "cache", None):  # local files have none, and need none
        cache.fetcher = _patient_fetcher(uri, cache.fetcher)
    with _translated(uri, "read"), file:
        yield file


def put_bytes(uri: str, data: bytes) -> None:
    """Write one whole object, over what was there.

    S3's answer confirms it; of other stores, its size is looked at.

    Raises:
        StorageError: the write failed or cannot be confirmed. If it is a
            ``StorageUnavailableError``, the object may be there all the same.
    """

    def put(fs: fsspec.AbstractFileSystem, path: str) -> None:
        if isinstance(fs, LocalFileSystem):
            local_files.put(path, data, publish=os.replace)
        else:
            fs.pipe_file(path, data)
        _confirm(fs, path, uri, len(data))

    _attempted(uri, "write", put)


def check_writable(uri: str) -> None:
    """Whether an object could be put at ``uri``: one beside it is, and deleted.

    Raises:
        StorageError: it could not.
    """
    probe = f"{uri}.probe"
    put_bytes(probe, b"")
    delete(probe)


@contextmanager
def open_output(uri: str) -> Iterator[Callable[[bytes], object]]:
    """A function that appends to one whole object of any size, which appears, over what was there,
    once the block ends well; if it raises, nothing does.

    On S3 by an upload in parts, each of which is tried again by itself; a local file is written
    beside and renamed; for other stores the object is gathered in a temporary file.

    Raises:
        StorageError: as ``put_bytes``; also from inside the block.
    """
    if _protocol(uri) in _S3_PROTOCOLS:
        with s3.uploading(functools.partial(_attempted, uri)) as write:
            yield write
        return
    fs, path = _filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        with _translated(uri, "write"), local_files.writing(path, publish=os.replace) as file:
            yield file.write
        return
    with tempfile.NamedTemporaryFile() as gathered:
        yield gathered.write
        gathered.flush()
        size = gathered.tell()

        def put(fs: fsspec.AbstractFileSystem, path: str) -> None:
            fs.put_file(gathered.name, path)
            _confirm(fs, path, uri, size)

        _attempted(uri, "write", put)


def create_bytes(uri: str, data: bytes) -> bool:
    """Write one whole object only if nothing is there; whether ``data`` is there now.

    Of several at once, one wins: S3 by ``If-None-Match``, local files by a hard link; elsewhere
    it is up to the driver. A request whose answer was lost finds its own object when it is
    repeated, so an object with the very same content counts as written: let contents differ
    between writers.

    Raises:
        StorageError: the write failed or cannot be confirmed.
    """

    def create(fs: fsspec.AbstractFileSystem, path: str) -> bool:
        try:
            if isinstance(fs, LocalFileSystem):
                local_files.put(path, data, publish=os.link)
            else:
                fs.pipe_file(path, data, mode="create")
        except OSError as error:
            if not _is_refused(error):
                raise
            try:
                return bool(fs.info(path)["size"] == len(data)) and fs.cat_file(path) == data
            except FileNotFoundError:
                raise StorageUnavailableError(f"cannot write {uri}: it came and went") from error
        _confirm(fs, path, uri, len(data))
        return True

    return _attempted(uri, "write", create)


def replace_bytes(uri: str, data: bytes, version: str) -> str | None:
    """Replace the object only if it still has ``version``; its new version, None if it has another.

    Of several at once, one wins: S3 by ``If-Match``, local files by a lock. Elsewhere (``gs://``)
    version and content are compared just before and after: two writers within the same moment may
    both believe to have won until they look again. As with ``create_bytes``, the very same content
    counts as written. Versions of S3 follow from the content: no two states may be alike.

    Raises:
        StorageError: the write failed or cannot be confirmed.
    """

    def replace(fs: fsspec.AbstractFileSystem, path: str) -> str | None:
        try:
            if isinstance(fs, LocalFileSystem):
                with local_files.locked(path):
                    return _replace_if(fs, path, data, version)
            if _protocol(uri) in _S3_PROTOCOLS:
                return s3.replace(fs, path, data, version)
            return _replace_if(fs, path, data, version)
        except FileNotFoundError:
            return None
        except OSError as error:
            if not _is_refused(error):
                raise
            return _version_if(fs, path, data)

    return _attempted(uri, "write", replace)


def delete(uri: str) -> None:
    """Remove the object at ``uri`` if it is there."""

    def remove(fs: fsspec.AbstractFileSystem, path: str) -> None:
        try:
            fs.rm_file(path)
        except FileNotFoundError:
            return

    _attempted(uri, "delete", remove)


def delete_all(uris: Collection[str]) -> None:
    """Remove the objects at ``uris`` that are there; on S3 by one request per thousand.

    Raises:
        StorageError: naming one that is left.
    """
    bulk = [uri for uri in uris if _protocol(uri) in _S3_PROTOCOLS]
    for uri in uris:
        if _protocol(uri) not in _S3_PROTOCOLS:
            delete(uri)
    for bucket, group in groupby(sorted(bulk), key=lambda uri: uri.split("/")[2]):
        keys = [uri.split("/", 3)[3] for uri in group]
        for start in range(0, len(keys), s3.DELETE_BATCH):
            batch = keys[start : start + s3.DELETE_BATCH]
            remove = functools.partial(s3.delete, bucket=bucket, keys=batch)
            _attempted(f"s3://{bucket}/{batch[0]}", f"delete {len(batch)} objects from", remove)


def deletes_at_once(uri: str) -> bool:
    """Whether ``delete_all`` is one request there, not a sequence of them."""
    return _protocol(uri) in _S3_PROTOCOLS


def remove_empty_folders(uri: str) -> None:
    """Remove the folder at ``uri`` with those below it if they are empty. Only disks have any."""
    fs, path = _filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        local_files.remove_empty_folders(path)


def exists(uri: str) -> bool:
    """Whether an object or folder is there, asked anew."""

    def look(fs: fsspec.AbstractFileSystem, path: str) -> bool:
        return bool(fs.exists(path))

    return _attempted(uri, "look for", look)


def absolute(uri: str) -> str:
    """``uri`` with its scheme; plain paths become absolute ``file://`` URIs."""
    if _SCHEME.match(uri):
        return uri
    return f"file://{Path(uri).expanduser().absolute()}{'/' if uri.endswith('/') else ''}"


def _protocol(uri: str) -> str:
    scheme = _SCHEME.match(uri)
    return scheme[1] if scheme else "file"


def _attempted(uri: str, verb: str, action: Callable[[fsspec.AbstractFileSystem, str], T]) -> T:
    """What ``action`` returns for ``uri``'s driver and path, tried until patience is over."""

    def attempt() -> T:
        with _translated(uri, verb):
            fs, path = _filesystem(uri)
            return action(fs, path)

    with metrics.STORE_SECONDS.timed(verb.split()[0]):  # "look at", "delete 3 objects from"
        return retrying(attempt, what=f"{verb} {uri}")


def _patient_fetcher(uri: str, fetch: Callable[[int, int], bytes]) -> Callable[[int, int], bytes]:
    def fetch_range(start: int, end: int) -> bytes:
        def attempt() -> bytes:
            with _translated(uri, "read"):
                return fetch(start, end)

        return retrying(attempt, what=f"read {uri} from byte {start}")

    return fetch_range


def _filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    if _protocol(uri) not in _S3_PROTOCOLS:
        fs, path = _driver(uri)
        fs.invalidate_cache()
        return fs, path
    environment = tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))
    read_timeout_s = max(1, min(_READ_TIMEOUT_S, round(faults.current_patience())))
    fs = _s3_filesystem(os.getpid(), environment, read_timeout_s)
    return fs, fs._strip_protocol(uri)


def _driver(uri: str, **options: Any) -> tuple[fsspec.AbstractFileSystem, str]:
    """A driver for ``uri``, and its path there. (fsspec's own would take ``::`` for a chain.)"""
    uri = absolute(uri)
    kind = fsspec.get_filesystem_class(_protocol(uri))
    return kind(**kind._get_kwargs_from_urls(uri), **options), kind._strip_protocol(uri)


@functools.lru_cache(maxsize=8)
def _s3_filesystem(
    pid: int,  # noqa: ARG001 - of the key
    environment: tuple[tuple[str, str], ...],  # noqa: ARG001 - of the key, read by botocore
    read_timeout_s: int,
) -> fsspec.AbstractFileSystem:
    """One driver for all threads (fsspec keeps one per thread); it does not outlive a fork.

    Neither it nor botocore retries: ``faults.retrying`` does. Listings are not kept: they would be
    stale, and large.
    """
    fs = fsspec.filesystem(
        "s3",
        skip_instance_cache=True,
        use_listings_cache=False,
        session=s3.session(),
        config_kwargs={
            "connect_timeout": min(_CONNECT_TIMEOUT_S, read_timeout_s),
            "read_timeout": read_timeout_s,
            "retries": {"max_attempts": 0},
            "max_pool_connections": _CONNECTIONS,
        },
    )
    fs.retries = 1
    return fs


def _pages(uri: str, *, hidden: bool) -> Iterator[list[FileEntry]]:
    """The files below a folder; of S3 a whole tree, page by page."""
    is_s3 = _protocol(uri) in _S3_PROTOCOLS
    token: str | None = None

    def page(fs: fsspec.AbstractFileSystem, path: str) -> tuple[list[FileEntry], str | None]:
        root = len(path.rstrip("/"))
        infos, following = (
            s3.list_page(fs, path, token) if is_s3 else (_walk(fs, path, depth=None), None)
        )
        seen = (i for i in infos if hidden or _is_visible(i["name"].rstrip("/")[root:]))
        return _entries(fs, seen), following

    while True:
        entries, token = _attempted(uri, "list", page)
        yield entries
        if token is None:
            return


def _itself(fs: fsspec.AbstractFileSystem, path: str) -> list[dict[str, Any]]:
    """The file ``path``; empty if it is none."""
    try:
        info = fs.info(path)
    except FileNotFoundError:
        return []
    return [info] if _is_file(info) else []


def _entries(fs: fsspec.AbstractFileSystem, infos: Iterable[dict[str, Any]]) -> list[FileEntry]:
    return [_entry(fs, info) for info in infos]


def _glob(fs: fsspec.AbstractFileSystem, path: str) -> list[dict[str, Any]]:
    """Files that match. (fsspec's own glob leaves out, silently, folders it cannot list.)"""
    pattern = re.compile(glob_translate(path))
    root = re.split(r"[*?\[]", path, maxsplit=1)[0].rpartition("/")[0]
    depth = None if "**" in path else path[len(root) + 1 :].count("/") + 1
    return [info for info in _walk(fs, root, depth) if pattern.match(info["name"])]


def _walk(fs: fsspec.AbstractFileSystem, path: str, depth: int | None) -> Iterator[dict[str, Any]]:
    """Files down to ``depth`` levels below the folder ``path``; none if it is not there."""
    try:
        infos = fs.ls(path, detail=True)
    except FileNotFoundError:
        return
    for info in infos:
        if _is_file(info):
            yield info
        elif info["name"].rstrip("/") != path and depth != 1:
            yield from _walk(fs, info["name"], None if depth is None else depth - 1)


def _entry(fs: fsspec.AbstractFileSystem, info: dict[str, Any]) -> FileEntry:
    version = info.get("ETag") or info.get("etag") or info.get("mtime") or info.get("LastModified")
    return FileEntry(
        uri=fs.unstrip_protocol(info["name"]),
        size=int(info["size"]),
        version=str(version).strip('"'),
    )


def _is_file(info: dict[str, Any]) -> bool:
    return bool(info["type"] == "file")


def _is_visible(relative: str) -> bool:
    return not any(part.startswith(("_", ".")) for part in relative.split("/") if part)


def _read_version(fs: fsspec.AbstractFileSystem, path: str) -> tuple[bytes, str]:
    if "s3" in fs.protocol:
        return s3.read_version(fs, path)
    content = bytes(fs.cat_file(path))
    return content, hashlib.sha256(content).hexdigest()


def _replace_if(fs: fsspec.AbstractFileSystem, path: str, data: bytes, version: str) -> str | None:
    """For stores without conditional writes, or under a lock."""
    if _read_version(fs, path)[1] == version:
        if isinstance(fs, LocalFileSystem):
            local_files.put(path, data, publish=os.replace)
        else:
            fs.pipe_file(path, data)
    return _version_if(fs, path, data)


def _version_if(fs: fsspec.AbstractFileSystem, path: str, data: bytes) -> str | None:
    """The object's version if its content is ``data``: then the write was ours."""
    try:
        content, version = _read_version(fs, path)
    except FileNotFoundError:
        return None
    return version if content == data else None


def _is_refused(error: OSError) -> bool:
    """Whether a conditional write found its condition unmet."""
    return isinstance(error, FileExistsError) or faults.answer(error)[0] == 412


def _confirm(fs: fsspec.AbstractFileSystem, path: str, uri: str, size: int) -> None:
    if _protocol(uri) in _S3_PROTOCOLS:  # it has answered: a further request would say the same
        return
    stored = fs.info(path)["size"]
    if stored != size:
        raise StorageUnavailableError(f"cannot write {uri}: stored {stored} of {size} bytes")


@contextmanager
def _translated(uri: str, verb: str) -> Iterator[None]:
    """Drivers raise their own families (OSError, botocore's, aiohttp's); callers see one."""
    try:
        yield
    except StorageError:
        raise
    except FileNotFoundError as error:
        if verb == "write":
            raise StorageError(f"cannot write {uri}: there is no such bucket or folder") from error
        raise
    except ImportError as error:
        raise StorageError(f"cannot {verb} {uri}: its driver is not installed: {error}") from error
    except faults.driver_errors() as error:
        if isinstance(error, NotADirectoryError) and verb in ("read", "look at"):  # below a file
            raise FileNotFoundError(f"{uri}: {error.strerror}") from error
        kind = StorageUnavailableError if faults.is_transient(error) else StorageError
        raise kind(f"cannot {verb} {uri}: {faults.describe(error)}") from error
