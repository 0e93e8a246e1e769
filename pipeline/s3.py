"""Requests to S3 that fsspec has no words for: conditional on a version, or about many objects.

In: an s3fs driver, paths as it wants them. Out: contents and ETags without their quotes. Errors are
the driver's; ``storage.py`` translates and retries.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from botocore.utils import parse_timestamp

from pipeline import faults
from pipeline.errors import StorageError, StorageUnavailableError

DELETE_BATCH = 1000  # objects: S3's limit for one request


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


def read_version(fs: Any, path: str) -> tuple[bytes, str]:
    """Content and ETag of one and the same state of the object."""

    async def get() -> tuple[bytes, str]:
        bucket, key, _ = fs.split_path(path)
        answer = await fs._call_s3("get_object", Bucket=bucket, Key=key)
        async with answer["Body"] as body:
            return await body.read(), answer["ETag"].strip('"')

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
