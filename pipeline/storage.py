"""Object storage through fsspec: list, read, put whole objects. The one module that imports fsspec.

In: URIs (``s3://``, ``gs://``, ``file://`` or plain paths). Out: bytes, seekable files, listings.
A put is one whole object or nothing: object stores promise that for one PUT, local files get it by
writing beside and renaming. A put that cannot be confirmed raises ``StorageError``.

Credentials and endpoints come from the environment (``AWS_ENDPOINT_URL``, ``AWS_ACCESS_KEY_ID``,
...), never from a config, so that they reach no manifest or log.
"""

from __future__ import annotations

import os
import posixpath
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import fsspec
from botocore.exceptions import BotoCoreError
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import get_protocol

from pipeline.errors import InputError, StorageError

_S3_PROTOCOLS = ("s3", "s3a")
# Patient enough for a store that restarts, bounded so that a dead one is reported.
_S3_OPTIONS: dict[str, Any] = {
    "config_kwargs": {
        "connect_timeout": 10,
        "read_timeout": 60,
        "retries": {"max_attempts": 6, "mode": "standard"},
        "max_pool_connections": 32,
    }
}
# A first look before anything starts: a wrong endpoint or bucket must be told in seconds.
_S3_PROBE: dict[str, Any] = {
    "config_kwargs": {
        "connect_timeout": 1.5,
        "read_timeout": 3,
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


def join(base: str, *parts: str) -> str:
    """``base`` and ``parts`` with single slashes between."""
    return "/".join([base.rstrip("/"), *(part.strip("/") for part in parts)])


def name(uri: str) -> str:
    """The last path segment of ``uri``."""
    return posixpath.basename(uri.rstrip("/"))


def has_glob(uri: str) -> bool:
    """Whether ``uri`` holds a wildcard."""
    return any(mark in uri for mark in "*?[")


def check_reachable(uri: str) -> None:
    """Fail in seconds if ``uri``'s bucket cannot be reached or is not there. Writes nothing.

    Raises:
        InputError: unknown scheme, missing driver, no such bucket, wrong keys, or no answer.
    """
    protocol = get_protocol(uri)
    is_s3 = protocol in _S3_PROTOCOLS
    if protocol not in ("file", "local") and not uri.partition("://")[2].strip("/"):
        raise InputError(f"{uri}: names no bucket; write it as {protocol}://bucket/folder.")
    try:
        fs, path = url_to_fs(uri, skip_instance_cache=is_s3, **(_S3_PROBE if is_s3 else {}))
        bucket = path.lstrip("/").split("/", 1)[0]
        if is_s3:
            fs.retries = 1
            fs.call_s3("head_bucket", Bucket=bucket)
        elif not isinstance(fs, LocalFileSystem) and not fs.exists(bucket):
            raise InputError(f"{uri}: there is no bucket {bucket!r}.")
    except FileNotFoundError:
        raise InputError(f"{uri}: there is no bucket {bucket!r}.") from None
    except PermissionError:
        raise InputError(
            f"{uri}: access to bucket {bucket!r} is denied; check AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY."
        ) from None
    except (OSError, ValueError, ImportError, BotoCoreError) as error:
        raise InputError(f"{uri}: the bucket cannot be reached: {error}") from None


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


def list_files(uri: str, *, suffixes: tuple[str, ...] = ("",)) -> list[FileEntry]:
    """Files at ``uri`` (a file, a folder taken recursively, or a glob), sorted by URI.

    In folders, names that start with ``_`` or ``.`` are skipped at every level (the convention
    of Spark, Arrow and DuckDB), and only names ending in one of ``suffixes`` are kept. An absent
    folder gives an empty list.
    """
    with _translated(uri, "list"):
        fs, path = _filesystem(uri)
        if has_glob(uri):
            found = fs.glob(path, detail=True)
        else:
            fs.invalidate_cache()
            found = fs.find(path, detail=True)
    root = path.rstrip("/")
    entries = [
        _entry(fs, info)
        for key, info in found.items()
        if info["type"] == "file"
        and (key.rstrip("/") == root or has_glob(uri) or _is_visible(key[len(root) :]))
        and key.endswith(suffixes)
    ]
    return sorted(entries, key=lambda entry: entry.uri)


def list_folder(uri: str) -> list[str]:
    """URIs of the files directly in the folder ``uri``, whatever their names, sorted."""
    with _translated(uri, "list"):
        fs, path = _filesystem(uri)
        fs.invalidate_cache()
        found = fs.ls(path, detail=True)
    return sorted(fs.unstrip_protocol(info["name"]) for info in found if info["type"] == "file")


def read_bytes(uri: str, *, limit: int | None = None) -> bytes:
    """The object at ``uri``; at most ``limit`` bytes of it when given.

    Raises:
        FileNotFoundError: no such object.
        StorageError: it cannot be read.
    """
    with _translated(uri, "read"):
        fs, path = _filesystem(uri)
        return bytes(fs.cat_file(path, start=None if limit is None else 0, end=limit))


@contextmanager
def open_input(uri: str) -> Iterator[IO[bytes]]:
    """A seekable file that reads ranges as they are asked for."""
    with _translated(uri, "read"):
        fs, path = _filesystem(uri)
        with fs.open(path, "rb", cache_type="readahead") as file:
            yield file


def put_bytes(uri: str, data: bytes) -> None:
    """Write one whole object and confirm its size.

    Raises:
        StorageError: the write failed or cannot be confirmed.
    """
    with _translated(uri, "write"):
        fs, path = _filesystem(uri)
        if isinstance(fs, LocalFileSystem):
            _put_local(path, data)
        else:
            fs.pipe_file(path, data)
            fs.invalidate_cache(path)
        stored = fs.info(path)["size"]
    if stored != len(data):
        raise StorageError(f"cannot write {uri}: stored {stored} of {len(data)} bytes")


def delete(uri: str) -> None:
    """Remove the object at ``uri`` if it is there."""
    with _translated(uri, "delete"):
        fs, path = _filesystem(uri)
        try:
            fs.rm_file(path)
        except FileNotFoundError:
            return
        fs.invalidate_cache(path)


def exists(uri: str) -> bool:
    """Whether an object or folder is there, asked anew."""
    with _translated(uri, "look for"):
        fs, path = _filesystem(uri)
        fs.invalidate_cache()
        return bool(fs.exists(path))


def absolute(uri: str) -> str:
    """``uri`` with its scheme; plain paths become absolute ``file://`` URIs."""
    if "://" in uri:
        return uri
    return f"file://{Path(uri).expanduser().absolute()}{'/' if uri.endswith('/') else ''}"


def _filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    options = _S3_OPTIONS if get_protocol(uri) in _S3_PROTOCOLS else {}
    fs, path = url_to_fs(uri, **options)
    return fs, path


def _entry(fs: fsspec.AbstractFileSystem, info: dict[str, Any]) -> FileEntry:
    version = info.get("ETag") or info.get("etag") or info.get("mtime") or info.get("LastModified")
    return FileEntry(
        uri=fs.unstrip_protocol(info["name"]),
        size=int(info["size"]),
        version=str(version).strip('"'),
    )


def _is_visible(relative: str) -> bool:
    return not any(part.startswith(("_", ".")) for part in relative.split("/") if part)


def _put_local(path: str, data: bytes) -> None:
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def _translated(uri: str, verb: str) -> Iterator[None]:
    """Drivers raise their own families (OSError, botocore's); callers see one."""
    try:
        yield
    except (FileNotFoundError, StorageError):
        raise
    except ImportError as error:
        raise StorageError(f"cannot {verb} {uri}: its driver is not installed: {error}") from error
    except (OSError, ValueError, BotoCoreError) as error:
        raise StorageError(f"cannot {verb} {uri}: {error}") from error
