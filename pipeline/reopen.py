"""reopen: rows of committed parts that are to be done again (``--retry``).

In: which records, by status or error code. Out: their shards are pending again, with every other
record of theirs in the journal, so that nothing but those rows is generated. Safe to interrupt: a
part goes only once its other records are written down.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.commit import Destination, PartStats, part_uri, read_stats
from pipeline.errors import ConfigError, ErrorCode
from pipeline.journal import Journal
from pipeline.plan import Shard
from pipeline.records import Outcome, Status, read_records

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
    shards: Iterable[Shard],
    what: Collection[str],
    confirm: Callable[[], None] = lambda: None,
) -> int:
    """Reopen the records of ``shards``' parts whose status or error code is in ``what``.

    ``confirm`` is called before each part is deleted, and raises if the run is another driver's.

    Returns:
        How many records there are to do again.

    Raises:
        StorageError: a part or a journal cannot be read or written; the others are as they should.
    """
    by_index = {shard.index: shard for shard in shards}
    touched = [stats for stats in read_stats(to.output_uri, by_index) if _has_any(stats, what)]
    with ThreadPoolExecutor(_THREADS) as pool:
        counts = pool.map(
            lambda stats: _reopen_part(to, by_index[stats.shard], _matching(what), confirm), touched
        )
        return sum(counts)


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
    uri = part_uri(to.output_uri, shard.index)
    records = read_records(pq.read_table(pa.BufferReader(storage.read_bytes(uri))))
    kept = [record for record in records if not matches(record)]
    confirm()
    Journal(to, shard).replace(kept)
    confirm()
    storage.delete(uri)
    return len(records) - len(kept)
