"""reopen: rows that have a record and are to be done again (``--retry``).

In: which records, by status or error code. Out: their shards are pending again, with every other
record of theirs in the journal, so that nothing but those rows is generated. Safe to interrupt: a
part goes only once its other records are written down. The caller then writes the retry into the
manifest: from there on such records of earlier epochs count nowhere, in journals of open shards or
in parts and entries that an attempt of before brings late.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from pipeline import storage
from pipeline.commit import Destination, is_any, part_uri, read_part, read_stats
from pipeline.errors import ConfigError, ErrorCode
from pipeline.journal import Journal, journaled_shards
from pipeline.parallel import mapped
from pipeline.plan import Plan, Shard
from pipeline.records import Status

_THREADS = 16
_STATUSES = (Status.ERRORED, Status.EXPIRED)


def parse_retry(text: str) -> frozenset[str]:
    """``--retry``'s value: statuses and error codes, separated by commas.

    Raises:
        ConfigError: one of them is neither.
    """
    words = frozenset(word.strip() for word in text.split(",") if word.strip())
    known = [*map(str, _STATUSES), *map(str, ErrorCode)]
    for word in sorted(words):
        if word not in known:
            raise ConfigError(f"--retry {word}: must be some of {', '.join(known)}.")
    if not words:
        raise ConfigError(f"--retry: name some of {', '.join(known)}.")
    return words


@dataclass(frozen=True, slots=True)
class Reopened:
    """What there is to do again."""

    records: int
    shards: frozenset[int]
    """Those that had a part."""


def matches_any(to: Destination, done: Collection[int], what: Collection[str]) -> bool:
    """Whether a part of the shards ``done`` has a record whose status or error code is in ``what``.

    Raises:
        StorageError: a part cannot be read.
    """
    return any(stats.has_any(what) for stats in read_stats(to.output_uri, sorted(done)))


def reopen(
    to: Destination,
    plan: Plan,
    done: Collection[int],
    what: Collection[str],
    confirm: Callable[[], None] = lambda: None,
) -> Reopened:
    """Reopen the records whose status or error code is in ``what``.

    Args:
        to: the run.
        plan: its shards.
        done: those that have a part; the others may have a journal.
        what: statuses and error codes.
        confirm: called before each change; raises if the run is another driver's.

    Raises:
        StorageError: a part or a journal cannot be read or written; the others are as they should.
    """
    committed = [shard for shard in plan.shards if shard.index in done]
    stats = read_stats(to.output_uri, (shard.index for shard in committed))
    touched = [shard for shard, of in zip(committed, stats, strict=True) if of.has_any(what)]
    journaled = journaled_shards(to.output_uri).difference(done)
    still_open = [shard for shard in plan.shards if shard.index in journaled]
    of_parts = mapped(lambda shard: _reopen_part(to, shard, what, confirm), touched, _THREADS)
    of_journals = mapped(lambda shard: _count(to, shard, what), still_open, _THREADS)
    return Reopened(
        records=sum(of_parts) + sum(of_journals),
        shards=frozenset(shard.index for shard in touched),
    )


def _reopen_part(
    to: Destination, shard: Shard, what: Collection[str], confirm: Callable[[], None]
) -> int:
    records = read_part(to.output_uri, shard.index)
    kept = [record for record in records if not is_any(record, what)]
    Journal(to, shard).replace(kept, confirm)
    confirm()
    storage.delete(part_uri(to.output_uri, shard.index))
    return len(records) - len(kept)


def _count(to: Destination, shard: Shard, what: Collection[str]) -> int:
    return sum(is_any(outcome, what) for outcome in Journal(to, shard).read())
