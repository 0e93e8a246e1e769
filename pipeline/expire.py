"""expire: what a deadline left of a shard -> its part, without an engine.

In: a shard's input block, and what its journal has. Out: the committed part, in which rows without
a completion are ``expired``; they can be reopened (``--retry expired``).
"""

from __future__ import annotations

import pyarrow as pa

from pipeline.commit import Destination, commit_outcomes, committed_stats
from pipeline.journal import Journal
from pipeline.prepare import PrepareSpec, carried, expired_rows
from pipeline.records import Failure, block_shard, samples_asked, with_known


def expire_shard(block: pa.Table, *, to: Destination, prepare: PrepareSpec) -> pa.Table:
    """Commit one shard as it stands; the stats as a block.

    Raises:
        StorageError, AccountingError: the part could not be written whole.
    """
    shard = block_shard(block)
    stats = committed_stats(to, shard)
    if stats is None:
        journal = Journal(to, shard)
        rows = expired_rows(block, prepare)
        known = {outcome.key: outcome for outcome in journal.read()}
        expired = {row.key: row for row in with_known(rows, known) if isinstance(row, Failure)}
        stats = commit_outcomes(
            to,
            shard,
            list({**expired, **known}.values()),
            carried(block, prepare.columns),
            known=known,
            samples=samples_asked(rows, known.values()),
        )
        journal.clear()
    return pa.table({"stats": [stats.to_json()]})
