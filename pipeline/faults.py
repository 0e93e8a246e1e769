"""Which faults of a store pass by themselves, and how long one waits for that.

In: errors as the drivers raise them (OSError, botocore's, aiohttp's), and functions that talk to
a store. Out: ``is_transient``, decided by type, errno and response code, never by a message; and
``retrying``, the one layer that asks again. The drivers' own retries are off, or each would
multiply the others' patience.
"""

from __future__ import annotations

import errno
import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from botocore.exceptions import (
    BotoCoreError,
    ChecksumError,
    ClientError,
    CredentialRetrievalError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    MetadataRetrievalError,
)
from botocore.exceptions import ConnectionError as BotoConnectionError
from botocore.parsers import ResponseParserError
from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_random_exponential

from pipeline import metrics
from pipeline.errors import StorageUnavailableError

T = TypeVar("T")

PATIENCE_S = 120.0
"""How long one operation is tried: twice what a store that restarts needs."""
_BACKOFF = wait_random_exponential(multiplier=0.4, min=0.1, max=5)  # seconds, full jitter

_TRANSIENT_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504, 509, 529, 598, 599})
_TRANSIENT_CODES = frozenset(
    {
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "RequestLimitExceeded",
        "RequestTimeout",  # S3 sends these three with status 400: the body did not arrive whole
        "IncompleteBody",
        "BadDigest",
        "XAmzContentSHA256Mismatch",
        "OperationAborted",  # status 409: another request was just at work on the same object
        "ConditionalRequestConflict",
        "InternalError",
        "ServiceUnavailable",
    }
)
_TRANSIENT_ERRNOS = frozenset(
    {
        errno.EAGAIN,
        errno.EBUSY,
        errno.ECONNABORTED,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.EHOSTUNREACH,
        errno.EINTR,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.EPIPE,
        errno.ESTALE,  # NFS
        errno.ETIMEDOUT,
        getattr(errno, "EREMOTEIO", errno.EAGAIN),  # not on macOS
    }
)
_TRANSIENT_BOTOCORE = (
    BotoConnectionError,  # refused, unknown host, TLS, connect timeout, proxy
    HTTPClientError,  # reset, read timeout, broken off in the middle of an answer
    IncompleteReadError,
    ChecksumError,
    FlexibleChecksumError,
    ResponseParserError,  # an overloaded server's or proxy's page instead of XML
    CredentialRetrievalError,  # of a machine's role; its service has bad moments, too
    MetadataRetrievalError,
)

_patience: ContextVar[float] = ContextVar("patience", default=PATIENCE_S)
_give_up_at: ContextVar[float] = ContextVar("give_up_at", default=float("inf"))

_EXPIRED = frozenset({"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"})
_RENEW = (
    "; the session's credentials have expired: renew AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and "
    "AWS_SESSION_TOKEN together on all nodes, then start the same command again, which resumes"
)
_MOST_SHOWN = 8192  # characters: some errors repeat a whole URL, which may be of any length
_USER = re.compile(r"(?<=://)[^/\s@\"']*@")
_QUERY = re.compile(r"(://[^\s\"'?]*+)(?:\?[^\s\"']*)?")  # always matches what it has read

logger = logging.getLogger(__name__)


def driver_errors() -> tuple[type[Exception], ...]:
    """The families of errors that drivers raise. For ``except`` clauses, which ask when needed."""
    import aiohttp  # 0.2 s that `--help` need not wait for; s3fs and gcsfs have loaded it

    return (
        OSError,
        ValueError,
        BotoCoreError,
        ClientError,
        ResponseParserError,
        aiohttp.ClientError,
    )


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed in a while."""
    import aiohttp  # as above

    status, code = answer(error)
    if status is not None:
        return status in _TRANSIENT_STATUSES or is_transient_code(code)
    if isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNOS:
        return True
    return isinstance(
        error, (TimeoutError, ConnectionError, aiohttp.ClientError, *_TRANSIENT_BOTOCORE)
    )


def is_transient_status(status: int) -> bool:
    """The same for the HTTP status of a plain web server."""
    return status in _TRANSIENT_STATUSES


def is_transient_code(code: str) -> bool:
    """The same for S3's error code of one object in an answer about many."""
    return code in _TRANSIENT_CODES


def answer(error: BaseException) -> tuple[int | None, str]:
    """HTTP status and S3's error code, (None, "") if the server did not answer.

    s3fs makes OSErrors of S3's answers and keeps the original as their cause.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, ClientError):
            response = seen.response
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return status, str(response.get("Error", {}).get("Code", ""))
        seen = seen.__cause__
    return None, ""


def describe(error: BaseException) -> str:
    """What happened, in one line that may be logged: URLs lose their user and query."""
    text = _USER.sub("", (str(error) or type(error).__name__)[:_MOST_SHOWN])
    text = _QUERY.sub(r"\1", text)
    status, code = answer(error)
    remedy = _RENEW if code in _EXPIRED else ""
    return text if status is None else f"{text} (HTTP {status} {code}){remedy}"


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Inside, each operation of this thread is tried for ``seconds`` only."""
    token = _patience.set(seconds)
    try:
        yield
    finally:
        _patience.reset(token)


@contextmanager
def patience_in_all(seconds: float) -> Iterator[None]:
    """Inside, all operations of this thread together are tried for ``seconds`` only."""
    token = _give_up_at.set(min(_give_up_at.get(), time.monotonic() + seconds))
    try:
        with patience(min(seconds, _patience.get())):
            yield
    finally:
        _give_up_at.reset(token)


def current_patience() -> float:
    """Seconds for which an operation of this thread is tried."""
    return _patience.get()


def retrying(function: Callable[[], T], *, what: str) -> T:
    """What ``function`` returns, called anew while it raises ``StorageUnavailableError``.

    Nested calls share the outermost one's time. ``what`` is for the log: operation and URI.

    Raises:
        StorageUnavailableError: the last one, once patience is over; any other error at once.
    """
    begun = time.monotonic()
    give_up_at = min(begun + _patience.get(), _give_up_at.get())

    def wait(state: RetryCallState) -> float:
        return max(0.0, min(_BACKOFF(state), give_up_at - time.monotonic()))

    def log(state: RetryCallState) -> None:
        metrics.STORE_RETRIES.add(1)
        logger.warning(
            "%s: attempt %d failed, again in %.1f s: %s",
            what,
            state.attempt_number,
            state.upcoming_sleep,
            state.outcome.exception() if state.outcome else "",
        )

    token = _give_up_at.set(give_up_at)
    try:
        return Retrying(
            retry=retry_if_exception_type(StorageUnavailableError),
            wait=wait,
            stop=lambda _: time.monotonic() >= give_up_at,
            before_sleep=log,
            reraise=True,
        )(function)
    finally:
        _give_up_at.reset(token)
