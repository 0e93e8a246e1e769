"""Faults: which of the drivers' errors pass by themselves, and what is said of them."""

import errno
from functools import partial

import aiohttp
import pytest
from botocore.exceptions import (
    ClientError,
    ConnectionClosedError,
    ConnectTimeoutError,
    EndpointConnectionError,
    NoCredentialsError,
    ParamValidationError,
    ReadTimeoutError,
    ResponseStreamingError,
)
from botocore.parsers import ResponseParserError
from s3fs.errors import translate_boto_error
from s3fs.utils import FileExpired

from pipeline import faults
from pipeline.errors import StorageUnavailableError

URL = "http://user:hidden@store/bucket/key?X-Amz-Signature=hidden"


def answered(status: int, code: str) -> ClientError:
    return ClientError(
        {
            "Error": {"Code": code, "Message": "said the server"},
            "ResponseMetadata": {"HTTPStatusCode": status},
        },
        "PutObject",
    )


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (500, "InternalError"),
        (500, "500"),
        (502, "502"),
        (503, "SlowDown"),
        (503, "ServiceUnavailable"),
        (504, "504"),
        (429, "TooManyRequests"),
        (408, "408"),
        (400, "RequestTimeout"),
        (400, "IncompleteBody"),
        (409, "OperationAborted"),
        (409, "ConditionalRequestConflict"),
    ],
)
def test_answers_that_say_later_pass(status: int, code: str) -> None:
    assert faults.is_transient(answered(status, code))
    assert faults.is_transient(translate_boto_error(answered(status, code)))


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (403, "AccessDenied"),
        (403, "SignatureDoesNotMatch"),
        (403, "RequestTimeTooSkewed"),
        (404, "NoSuchBucket"),
        (400, "InvalidArgument"),
        (412, "PreconditionFailed"),
        (416, "InvalidRange"),
        (501, "NotImplemented"),
        (507, "InsufficientStorage"),
        (409, "BucketAlreadyExists"),
    ],
)
def test_answers_that_say_no_stay(status: int, code: str) -> None:
    assert not faults.is_transient(answered(status, code))
    assert not faults.is_transient(translate_boto_error(answered(status, code)))


@pytest.mark.parametrize(
    "error",
    [
        EndpointConnectionError(endpoint_url=URL, error="refused"),
        ConnectTimeoutError(endpoint_url=URL, error="timeout"),
        ReadTimeoutError(endpoint_url=URL, error="timeout"),
        ConnectionClosedError(endpoint_url=URL, error="closed"),
        ResponseStreamingError(error="broken off"),
        ResponseParserError("not XML"),
        aiohttp.ClientPayloadError("not all of the body"),
        ConnectionResetError(errno.ECONNRESET, "reset"),
        BrokenPipeError(errno.EPIPE, "pipe"),
        TimeoutError(),
        OSError(errno.ESTALE, "stale file handle"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_missing_and_broken_answers_pass(error: Exception) -> None:
    assert isinstance(error, faults.driver_errors())
    assert faults.is_transient(error)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "no space left on device"),
        OSError(errno.EDQUOT, "quota"),
        OSError(errno.EROFS, "read-only"),
        OSError(errno.EIO, "disk"),
        PermissionError(errno.EACCES, "denied"),
        IsADirectoryError(errno.EISDIR, "folder"),
        NoCredentialsError(),
        ParamValidationError(report="bad"),
        ValueError("bad"),
    ],
    ids=lambda error: f"{type(error).__name__}-{error}",
)
def test_what_no_waiting_mends_stays(error: Exception) -> None:
    assert isinstance(error, faults.driver_errors())
    assert not faults.is_transient(error)


def test_a_file_that_changed_while_it_was_read_stays_changed() -> None:
    error = FileExpired("bucket/key", "etag")  # its errno alone is EBUSY
    error.__cause__ = translate_boto_error(answered(412, "PreconditionFailed"))
    assert not faults.is_transient(error)


def test_urls_are_described_without_user_and_query() -> None:
    text = faults.describe(EndpointConnectionError(endpoint_url=URL, error="refused"))
    assert "http://store/bucket/key" in text
    assert "hidden" not in text
    assert "said the server (HTTP 503 SlowDown)" in faults.describe(
        translate_boto_error(answered(503, "SlowDown"))
    )


def test_patience_holds_inside_its_block_only() -> None:
    with faults.patience(3.0):
        assert faults.current_patience() == 3.0
    assert faults.current_patience() == faults.PATIENCE_S


def test_patience_in_all_is_shared_by_the_operations_inside() -> None:
    tries = {"first": 0, "second": 0, "after": 0}

    def failing(name: str) -> None:
        tries[name] += 1
        raise StorageUnavailableError(name)

    with faults.patience_in_all(0.5):
        for name in ("first", "second"):
            with pytest.raises(StorageUnavailableError):
                faults.retrying(partial(failing, name), what=name)
    with faults.patience(0.5), pytest.raises(StorageUnavailableError):
        faults.retrying(partial(failing, "after"), what="after")
    assert tries["second"] == 1 < tries["first"]
    assert tries["after"] > 1


def test_expired_credentials_say_what_to_renew() -> None:
    error = translate_boto_error(answered(400, "ExpiredToken"))
    assert not faults.is_transient(error)
    assert "expired: renew AWS_ACCESS_KEY_ID" in faults.describe(error)
