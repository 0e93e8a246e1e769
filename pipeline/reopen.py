"""reopen: rows that have a record and are to be done again (``--retry``).

In: which records, by status or error code. Out: their shards are pending again, with every other
record of theirs in the journal, so that nothing but those rows is generated. Journals of shards
that are pending anyway lose the records, too. Safe to interrupt: a part, or an object of a journal,
goes only once its other records are written down.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from pipeline import storage
from pipeline.commit import Destination, PartStats, part_uri, read_part, read_stats
from pipeline.errors import ConfigError, ErrorCode
from pipeline.journal import Journal, journaled_shards
from pipeline.parallel import mapped
from pipeline.plan import Plan, Shard
from pipeline.records import Outcome, Status

_THREADS = 8
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


def reopen(
    to: Destination,
    plan: Plan,
    done: Collection[int],
    what: Collection[str],
    confirm: Callable[[], None] = lambda: None,
) -> int:
    """Reopen the records whose status or error code is in ``what``.

    Args:
        to: the run.
        plan: its shards.
        done: those that have a part; the others may have a journal.
        what: statuses and error codes.
        confirm: called before each change; raises if the run is another driver's.

    Returns:
        How many records there are to do again.

    Raises:
        StorageError: a part or a journal cannot be read or written; the others are as they should.
    """
    matches = _matching(what)
    committed = [shard for shard in plan.shards if shard.index in done]
    stats = read_stats(to.output_uri, (shard.index for shard in committed))
    touched = [shard for shard, of in zip(committed, stats, strict=True) if _has_any(of, what)]
    journaled = journaled_shards(to.output_uri).difference(done)
    still_open = [shard for shard in plan.shards if shard.index in journaled]
    of_parts = mapped(lambda shard: _reopen_part(to, shard, matches, confirm), touched, _THREADS)
    of_journals = mapped(
        lambda shard: Journal(to, shard).drop(matches, confirm), still_open, _THREADS
    )
    return sum(of_parts) + sum(of_journals)


def _has_any(stats: PartStats, what: Collection[str]) -> bool:
    return any(stats.rows.get(word, 0) or stats.errors.get(word, 0) for word in what)


def _matching(what: Collection[str]) -> Callable[[Outcome], bool]:
    def matches(outcome: Outcome) -> bool:
        return outcome.status in what or outcome.code in what

    return matches


def _reopen_part(
    to: Destination,
    shard: Shard,
    matches: Callable[[Outcome], bool],
    confirm: Callable[[], None],
) -> int:
    records = read_part(to.output_uri, shard.index)
    kept = [record for record in records if not matches(record)]
    Journal(to, shard).replace(kept, confirm)
    confirm()
    storage.delete(part_uri(to.output_uri, shard.index))
    return len(records) - len(kept)
