"""Seeds that depend on what a row is, never on where or when it runs.

In: the run's seed, a row's ``custom_id`` and the sample's index. Out: a 63-bit seed. The same row
gets the same seed on any cluster, in any shard, in any order; two rows practically never share one.
"""

from __future__ import annotations

from hashlib import blake2b

_SEED_BITS = 63  # vLLM takes a signed 64-bit integer; 63 bits keep it positive


def derive_seed(run_seed: int, custom_id: str, sample_index: int) -> int:
    """The sampling seed of one sample, in ``[0, 2**63)``: BLAKE2b over length-prefixed fields."""
    identity = custom_id.encode("utf-8", "surrogatepass")
    message = b"%d\x00%d\x00%d\x00%s" % (run_seed, sample_index, len(identity), identity)
    digest = blake2b(message, digest_size=8, person=b"maverick-seed").digest()
    return int.from_bytes(digest, "big") >> (64 - _SEED_BITS)


def sample_seed(base: int, sample_index: int) -> int:
    """The seed of one sample of a row that brings ``base``, in ``[-2**63, 2**63)``.

    It is never -1, by which vLLM means none.
    """
    seed = base + sample_index
    if base >= 0:
        return seed % (1 << _SEED_BITS)
    return seed + 1 if seed >= -1 > base else seed
