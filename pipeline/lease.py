"""The lease: one driver owns a run, by one object, ``<run>/_lease.json``.

In: a run's URI. Out: a ``Lease`` that is ours, renewed in the background, until it is released or
another driver takes it over. The object is created and replaced by conditional writes alone, so of
several contenders one wins (see ``storage.replace_bytes`` for stores that have none).

Clocks of two machines are never compared: a contender watches the object. If it changes, its owner
lives; if the contender has looked at it for ``TTL_S`` without a change or a gap, the owner is dead
or cut off, and the lease is taken over. The former owner learns that at its next renewal, at most
``RENEWAL_S`` after it is back; until then it may write, so writes must be harmless by themselves.
Times in the object are for people.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from types import TracebackType
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline import metrics, storage
from pipeline.budget import Budget
from pipeline.errors import LeaseLostError, RunBusyError, StorageError

TTL_S = 20.0
"""How long the object is watched before its owner counts as gone: four missed renewals."""
RENEWAL_S = 5.0
_FRESH = 0.2
"""The part of ``RENEWAL_S``, by the owner's own clock, for which a renewal confirms the lease.
Nobody else can have taken it by then, and many threads may ask before each of their changes."""
_LOOKS_PER_RENEWAL = 5
_MOST_SKEW_S = 900.0
"""How far clocks may be apart: S3 refuses requests of a machine that is off by more."""
_REMINDER_S = 60.0

logger = logging.getLogger(__name__)


class LeaseState(StrEnum):
    """Whether the owner still has it."""

    HELD = "held"
    RELEASED = "released"


class LeaseRecord(BaseModel):
    """What ``_lease.json`` holds. No two states of it are alike: versions follow from content."""

    model_config = ConfigDict(frozen=True)

    owner: str
    """One acquisition, a UUID."""
    host: str
    pid: int
    taken_at: str
    renewed_at: str
    renewals: int
    state: LeaseState
    taken_over_from: str | None
    """Whose lease had gone stale, for people; null if nobody's."""

    @classmethod
    def new(cls) -> LeaseRecord:
        """A lease of this process, held from now on."""
        now = _now()
        return cls(
            owner=str(uuid.uuid4()),
            host=socket.gethostname(),
            pid=os.getpid(),
            taken_at=now,
            renewed_at=now,
            renewals=0,
            state=LeaseState.HELD,
            taken_over_from=None,
        )

    def renewed(self, state: LeaseState = LeaseState.HELD) -> LeaseRecord:
        """The next record of the same owner."""
        return self.model_copy(
            update={"renewed_at": _now(), "renewals": self.renewals + 1, "state": state}
        )

    def to_bytes(self) -> bytes:
        """The object's content."""
        return (self.model_dump_json(indent=2) + "\n").encode()

    def __str__(self) -> str:
        return f"host {self.host}, pid {self.pid}, since {self.taken_at}"


@dataclass(frozen=True, slots=True)
class _Seen:
    """The lease object at one moment."""

    record: LeaseRecord
    version: str


@dataclass(frozen=True, slots=True)
class LeaseView:
    """What somebody who does not want the lease sees of it."""

    record: LeaseRecord
    age_s: float
    """Seconds since the last renewal."""
    lives: bool
    """Whether it is held by an owner that renews it."""


class Lease:
    """A run's lease while it is ours. As a context manager it is released at the end."""

    def __init__(self, uri: str, seen: _Seen, *, ttl_s: float, renewal_s: float) -> None:
        """Use ``acquire``."""
        self.uri = uri
        self._record = seen.record
        self._version = seen.version
        self._ttl_s = ttl_s
        self._renewal_s = renewal_s
        self._renewed_at = -math.inf
        self._budget: Callable[[], Budget] = Budget
        self._lost: str | None = None
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew_always, name="lease", daemon=True)

    @classmethod
    def acquire(
        cls,
        run_uri: str,
        *,
        wait: bool,
        ttl_s: float = TTL_S,
        renewal_s: float = RENEWAL_S,
        pause: Callable[[float], None] = time.sleep,
        budget: Callable[[], Budget] = Budget,
    ) -> Lease:
        """Take the lease of the run at ``run_uri`` and start renewing it.

        A free or released lease is taken at once; one whose owner died, after ``ttl_s``. If the
        owner lives, this is refused within about ``renewal_s``, or waited for if ``wait``. What
        ``pause`` raises instead of sleeping ends the wait. ``budget`` is asked at the release.

        Raises:
            RunBusyError: another driver has the run, and lives.
            StorageError: the object cannot be read or written, or is no lease.
        """
        uri = storage.join(run_uri, "_lease.json")
        contender = _Contender(uri, wait=wait, ttl_s=ttl_s, renewal_s=renewal_s, pause=pause)
        lease = cls(uri, contender.win(), ttl_s=ttl_s, renewal_s=renewal_s)
        lease._budget = budget
        metrics.LEASE_LOST.set(0)
        lease._thread.start()
        return lease

    @property
    def lost(self) -> str | None:
        """Why the lease is no longer ours; None as far as is known."""
        return self._lost

    @property
    def owner(self) -> str:
        """The UUID of this acquisition."""
        return self._record.owner

    def confirm(self) -> None:
        """Make sure that the lease was ours a moment ago: a fifth of ``renewal_s`` at most.

        Raises:
            LeaseLostError: it is not ours any more, or was released.
            StorageError: the store does not tell.
        """
        if self._stop.is_set():
            raise LeaseLostError(f"the lease at {self.uri} was released")
        self._replace(LeaseState.HELD, unless_fresh=True)
        if self._lost:
            raise LeaseLostError(self._lost)

    def release(self) -> None:
        """Give the lease back, if it is ours; a lost one is left alone. Twice is fine.

        A store that is away is logged: the lease goes stale then.
        """
        if self._stop.is_set():
            return
        self._stop.set()
        try:
            with storage.patience_in_all(self._budget().left(max(self._renewal_s, RENEWAL_S))):
                self._replace(LeaseState.RELEASED)
        except StorageError as error:
            logger.warning("the lease could not be released and goes stale: %s", error)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def _renew_always(self) -> None:
        """In the thread: until released or lost. A store that is away is away for contenders."""
        while not self._stop.wait(self._renewal_s) and self._lost is None:
            try:
                with storage.patience(self._renewal_s):
                    self._replace(LeaseState.HELD, unless_stopped=True)
            except StorageError as error:
                logger.warning("the lease could not be renewed, trying on: %s", error)

    def _replace(
        self, state: LeaseState, *, unless_stopped: bool = False, unless_fresh: bool = False
    ) -> None:
        """Write the next record over ours; ``_lost`` says afterwards if there was another's."""
        with self._lock:
            now = time.monotonic()
            if self._lost or (unless_stopped and self._stop.is_set()):
                return
            if unless_fresh and now - self._renewed_at < _FRESH * self._renewal_s:
                return
            record = self._record.renewed(state)
            version = storage.replace_bytes(self.uri, record.to_bytes(), self._version)
            while version is None:
                seen = _look(self.uri)
                if seen is None or seen.record.owner != self._record.owner:
                    self._lost = _why_lost(self.uri, seen)
                    metrics.LEASE_LOST.set(1)
                    return
                # a renewal whose answer never came was written all the same
                version = storage.replace_bytes(self.uri, record.to_bytes(), seen.version)
            self._record, self._version, self._renewed_at = record, version, now
            metrics.LEASE_RENEWED.set(time.time())


def check_not_driven(run_uri: str, *, renewal_s: float = RENEWAL_S) -> None:
    """Refuse a run whose owner is seen to renew its lease; takes and writes nothing.

    A look before anything is started. Returns at once if the lease is free or released, and within
    about ``renewal_s`` if it is held: an owner that is not seen to live is for ``Lease.acquire``.

    Raises:
        RunBusyError: another driver has the run, and lives.
        StorageError: the object cannot be read, or is no lease.
    """
    uri = storage.join(run_uri, "_lease.json")
    first = seen = _look(uri)
    for look in range(_LOOKS_PER_RENEWAL + 3):
        if look:
            time.sleep(renewal_s / _LOOKS_PER_RENEWAL)
            seen = _look(uri)
        if first is None or seen is None or seen.record.state is LeaseState.RELEASED:
            return
        if seen.version != first.version:
            raise _busy(uri, seen.record)


def observe(
    run_uri: str, *, ttl_s: float = TTL_S, renewal_s: float = RENEWAL_S
) -> LeaseView | None:
    """Tell whether the run has a driver that lives; takes and writes nothing. None: no lease.

    If the store dates both the lease and its answer (S3 does), their difference decides at once.
    Elsewhere the age is by two clocks: one that looks fresh is believed, one that looks like that
    of a dead owner only if no two clocks are so far apart; in between, the lease is watched for a
    renewal, for up to ``1.5 * renewal_s``.

    Raises:
        StorageError: the object cannot be read, or is no lease.
    """
    uri = storage.join(run_uri, "_lease.json")
    try:
        found = storage.read_aged(uri)
    except FileNotFoundError:
        return None
    record = _parsed(uri, found.content)
    if record.state is LeaseState.RELEASED:
        return LeaseView(record, found.age_s, lives=False)
    if found.one_clock or abs(found.age_s) < ttl_s or found.age_s > _MOST_SKEW_S:
        return LeaseView(record, found.age_s, lives=found.age_s < ttl_s)
    return _watched(uri, LeaseView(record, found.age_s, lives=False), found.version, renewal_s)


def _watched(uri: str, view: LeaseView, version: str, renewal_s: float) -> LeaseView:
    """The view again, once a renewal was seen, or none came in time."""
    until = time.monotonic() + 1.5 * renewal_s
    while time.monotonic() < until:
        time.sleep(renewal_s / _LOOKS_PER_RENEWAL)
        seen = _look(uri)
        if seen is not None and seen.version != version:
            return LeaseView(seen.record, 0.0, lives=seen.record.state is LeaseState.HELD)
    return view


class _Contender:
    """A driver that wants the lease at ``uri``."""

    def __init__(
        self,
        uri: str,
        *,
        wait: bool,
        ttl_s: float,
        renewal_s: float,
        pause: Callable[[float], None],
    ) -> None:
        self._uri = uri
        self._wait = wait
        self._pause = pause
        self._ttl_s = ttl_s
        self._renewal_s = renewal_s
        self._mine = LeaseRecord.new()
        self._told_at: float | None = None

    def win(self) -> _Seen:
        """The object, once it is ours.

        Raises:
            RunBusyError: somebody else's is alive, and we are not to wait.
        """
        watched: _Seen | None = None
        since = looked = time.monotonic()
        while True:
            seen = self._look_or_create()
            if seen.record.owner == self._mine.owner:
                return seen
            if seen.record.state is LeaseState.RELEASED:
                self._take(seen, over=None)
                continue
            # A gap, ours or the store's, may have kept the owner's renewals away, too.
            gap, looked = time.monotonic() - looked, time.monotonic()
            if watched is None or seen.version != watched.version or gap > self._ttl_s / 2:
                self._meet(seen.record, lives=bool(watched and seen.version != watched.version))
                watched, since = seen, looked
            elif looked - since >= self._ttl_s:
                self._take(seen, over=str(seen.record))
                continue
            self._pause(self._renewal_s / _LOOKS_PER_RENEWAL)

    def _look_or_create(self) -> _Seen:
        while True:
            if seen := _look(self._uri):
                return seen
            storage.create_bytes(self._uri, self._mine.to_bytes())

    def _take(self, seen: _Seen, *, over: str | None) -> None:
        """Put our record in place of the one seen, unless somebody was faster."""
        self._mine = self._mine.renewed().model_copy(update={"taken_over_from": over})
        won = storage.replace_bytes(self._uri, self._mine.to_bytes(), seen.version)
        if won and over:
            logger.warning("took the run over from %s: no sign of life for %g s", over, self._ttl_s)

    def _meet(self, holder: LeaseRecord, *, lives: bool) -> None:
        """Say who has the lease: once, then every minute.

        Raises:
            RunBusyError: the holder lives, and we are not to wait.
        """
        run = self._uri.rpartition("/")[0]
        if lives and not self._wait:
            raise _busy(self._uri, holder)
        now = time.monotonic()
        if self._told_at is None or now - self._told_at >= _REMINDER_S:
            self._told_at = now
            logger.info(
                "%s has a driver (%s); watching whether it lives, for up to %g s%s",
                run,
                holder,
                self._ttl_s,
                ", and waiting while it does" if self._wait else "",
            )


def _look(uri: str) -> _Seen | None:
    """The lease object; None if there is none.

    Raises:
        StorageError: it cannot be read, or is no lease.
    """
    try:
        content, version = storage.read_version(uri)
    except FileNotFoundError:
        return None
    return _Seen(_parsed(uri, content), version)


def _parsed(uri: str, content: bytes) -> LeaseRecord:
    try:
        return LeaseRecord.model_validate_json(content)
    except ValidationError as error:
        raise StorageError(
            f"{uri} is not a lease of this program ({error.error_count()} faults, the first: "
            f"{error.errors()[0]['msg']}). Make sure that nobody works on the run, delete the "
            "object, and start again."
        ) from None


def _busy(uri: str, holder: LeaseRecord) -> RunBusyError:
    return RunBusyError(
        f"{uri.rpartition('/')[0]} is being run by another driver ({holder}). Wait for it to end, "
        "or start with --wait."
    )


def _why_lost(uri: str, seen: _Seen | None) -> str:
    run = uri.rpartition("/")[0]
    if seen is None:
        return f"the lease of {run} was deleted"
    return f"the lease of {run} was taken over by another driver ({seen.record})"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
