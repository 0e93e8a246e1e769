"""Requests to S3 that fsspec has no words for: conditional on a version, about many objects, or
about parts of one.

In: an s3fs driver, paths as it wants them. Out: contents and ETags without their quotes. Errors are
the driver's; ``storage.py`` translates and retries, one request at a time.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from typing import Any, Protocol, TypeVar

from botocore.utils import parse_timestamp

from pipeline import faults
from pipeline.errors import StorageError, StorageUnavailableError

log = logging.getLogger(__name__)

T = TypeVar("T")

DELETE_BATCH = 1000  # objects: S3's limit for one request
MOST_PARTS = 10_000
"""Of an upload: S3's limit. A part may have 5 MiB to 5 GiB, but for the last one."""
_PART_BYTES = 16 * 2**20
_ALIKE_PARTS = 6_000
"""Parts of one size, 94 GiB of them: R2 wants all parts alike, S3 does not care."""
_PART_GROWTH = 512 * 2**10
"""Bytes by which each further part is larger, up to 2 GiB: an object may have 3.9 TiB."""


def session() -> Any:
    """A session whose parser reads a listing's times at once: botocore's own takes most of the
    seconds, and half of the memory, that a listing of 100,000 objects costs."""
    from aiobotocore.session import AioSession  # s3fs brings it; `--help` does without

    made = AioSession()
    factory = made.get_component("response_parser_factory")
    factory.set_parser_defaults(timestamp_parser=_parse_time)
    return made


def _parse_time(value: Any) -> datetime:
    try:
        return datetime.fromisoformat(value)
    except (TypeError, ValueError):  # HTTP dates and seconds, in headers and other services
        parsed: datetime = parse_timestamp(value)
        return parsed


def list_page(fs: Any, path: str, token: str | None) -> tuple[list[dict[str, Any]], str | None]:
    """Up to 1,000 objects below the folder ``path``, as fsspec describes files, and the token of
    the next page; None if this is the last one."""
    bucket, key, _ = fs.split_path(path)
    prefix = f"{key.rstrip('/')}/" if key else ""
    more = {"ContinuationToken": token} if token else {}
    answer = fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, **more)
    infos = [
        {
            "name": f"{bucket}/{found['Key']}",
            "type": "file",
            "size": found["Size"],
            "ETag": found["ETag"],
        }
        for found in answer.get("Contents", ())
    ]
    return infos, answer["NextContinuationToken"] if answer.get("IsTruncated") else None


def read_tail(fs: Any, path: str, size: int) -> bytes:
    """The last ``size`` bytes of the object, or all of it, by one request."""

    async def get() -> bytes:
        bucket, key, _ = fs.split_path(path)
        answer = await fs._call_s3("get_object", Bucket=bucket, Key=key, Range=f"bytes=-{size}")
        async with answer["Body"] as body:
            return bytes(await body.read())

    return asyncio.run_coroutine_threadsafe(get(), fs.loop).result()


def read_version(fs: Any, path: str) -> tuple[bytes, str]:
    """Content and ETag of one and the same state of the object."""

    async def get() -> tuple[bytes, str]:
        bucket, key, _ = fs.split_path(path)
        answer = await fs._call_s3("get_object", Bucket=bucket, Key=key)
        async with answer["Body"] as body:
            return await body.read(), answer["ETag"].strip('"')

    return asyncio.run_coroutine_threadsafe(get(), fs.loop).result()


def read_aged(fs: Any, path: str) -> tuple[bytes, str, float]:
    """Content and ETag of the object, and the seconds since it was written, by the store's clock:
    its answer has both moments, to the second."""

    async def get() -> tuple[bytes, str, float]:
        bucket, key, _ = fs.split_path(path)
        answer = await fs._call_s3("get_object", Bucket=bucket, Key=key)
        async with answer["Body"] as body:
            content = await body.read()
        now = parse_timestamp(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
        age_s = (now - answer["LastModified"]).total_seconds()
        return content, answer["ETag"].strip('"'), age_s

    return asyncio.run_coroutine_threadsafe(get(), fs.loop).result()


def replace(fs: Any, path: str, data: bytes, version: str) -> str:
    """Put ``data`` if the object's ETag is ``version``; the new ETag.

    Raises:
        FileNotFoundError: the object is gone.
        OSError: caused by an answer of status 412 if it has another ETag.
    """
    bucket, key, _ = fs.split_path(path)
    answer = fs.call_s3("put_object", Bucket=bucket, Key=key, Body=data, IfMatch=f'"{version}"')
    return str(answer["ETag"]).strip('"')


def delete(fs: Any, _: str, *, bucket: str, keys: Sequence[str]) -> None:
    """Delete up to ``DELETE_BATCH`` objects by one request; absent ones are fine.

    Raises:
        StorageError: naming the first that is left.
    """
    wanted = {"Objects": [{"Key": key} for key in keys], "Quiet": True}
    answer = fs.call_s3("delete_objects", Bucket=bucket, Delete=wanted)
    for error in answer.get("Errors", []):
        code = error.get("Code", "")
        kind = StorageUnavailableError if faults.is_transient_code(code) else StorageError
        raise kind(f"cannot delete s3://{bucket}/{error.get('Key')}: {code} {error.get('Message')}")


def part_bytes(number: int) -> int:
    """Bytes of an upload's part ``number`` (from 1), unless it is the last."""
    return _PART_BYTES + max(0, number - _ALIKE_PARTS) * _PART_GROWTH


class Attempt(Protocol):
    """Carries out a request: ``action`` gets driver and path, and is tried while that may help."""

    def __call__(self, verb: str, action: Callable[[Any, str], T]) -> T:
        """What ``action`` returns."""


@contextmanager
def uploading(attempt: Attempt) -> Iterator[Callable[[bytes], None]]:
    """A function that appends to one object, which appears once the block ends well.

    Raises:
        StorageError: the object could not be written and confirmed; what was there is left.
    """
    upload = _Upload(attempt)
    try:
        yield upload.write
        upload.complete()
    except BaseException:
        upload.abort()
        raise


class _Upload:
    """One object in parts, each of them tried by itself; a small object is a single PUT."""

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt
        self._id: str | None = None
        self._tags: list[str] = []
        self._buffer = bytearray()
        self._sent = 0
        self._tried_to_complete = False

    def write(self, data: bytes) -> None:
        self._buffer += data
        while len(self._buffer) >= (size := part_bytes(len(self._tags) + 1)):
            self._send(bytes(self._buffer[:size]))
            del self._buffer[:size]

    def complete(self) -> None:
        if self._id is None:
            data = bytes(self._buffer)
            self._sent = len(data)
            self._attempt("write", lambda fs, path: fs.pipe_file(path, data))
        else:
            if self._buffer:
                self._send(bytes(self._buffer))
            self._attempt("write", self._complete)
        self._attempt("write", self._confirm)

    def abort(self) -> None:
        """Parts that cannot be dropped are left to the bucket's rules: nobody sees them."""
        if self._id is None:
            return
        try:
            self._attempt("end an upload of", self._abort)
        except (StorageError, FileNotFoundError) as error:
            log.warning("parts of an upload are left behind: %s", error)

    def _send(self, data: bytes) -> None:
        if self._id is None:
            self._id = self._attempt("write", _begin_upload)
        number = len(self._tags) + 1
        if number > MOST_PARTS:
            raise StorageError(
                f"an upload has {self._sent} bytes in {MOST_PARTS} parts, which is all that S3 "
                "takes; split the input into several runs"
            )
        send = partial(_upload_part, upload=self._id, number=number, data=data)
        self._tags.append(self._attempt("write", send))
        self._sent += len(data)

    def _complete(self, fs: Any, path: str) -> None:
        bucket, key, _ = fs.split_path(path)
        parts = [{"PartNumber": number, "ETag": tag} for number, tag in enumerate(self._tags, 1)]
        again, self._tried_to_complete = self._tried_to_complete, True
        try:
            fs.call_s3(
                "complete_multipart_upload",
                Bucket=bucket,
                Key=key,
                UploadId=self._id,
                MultipartUpload={"Parts": parts},
            )
        except OSError as error:  # gone once the try before, whose answer was lost, was carried out
            if not again or faults.answer(error)[1] != "NoSuchUpload":
                raise

    def _abort(self, fs: Any, path: str) -> None:
        bucket, key, _ = fs.split_path(path)
        fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=self._id)

    def _confirm(self, fs: Any, path: str) -> None:
        stored = fs.info(path)["size"]
        if stored != self._sent:
            raise StorageUnavailableError(f"cannot write {path}: {stored} of {self._sent} bytes")


def _begin_upload(fs: Any, path: str) -> str:
    bucket, key, _ = fs.split_path(path)
    return str(fs.call_s3("create_multipart_upload", Bucket=bucket, Key=key)["UploadId"])


def _upload_part(fs: Any, path: str, *, upload: str, number: int, data: bytes) -> str:
    """Send one part (numbers start at 1), over an earlier attempt at it; its ETag."""
    bucket, key, _ = fs.split_path(path)
    answer = fs.call_s3(
        "upload_part", Bucket=bucket, Key=key, UploadId=upload, PartNumber=number, Body=data
    )
    return str(answer["ETag"])
