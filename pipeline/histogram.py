"""Histograms with logarithmic buckets: small enough for a part's footer, and exact when summed.

In: latencies and lengths, one by one. Out: counts by bucket, whose ends follow from the bucket's
number alone, so parts of any run, written by anyone, add up. The price: a quantile is known to a
bucket, and told as the bucket's upper end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

LATENCY_ERROR = 2 ** (1 / 8) - 1
"""How far a latency's bucket reaches above its lower end: 9 %."""
_PER_OCTAVE = 8
_LEAST_S = 2.0**-10
"""Latencies below a millisecond count as one."""


def latency_bucket(seconds: float) -> int:
    """The bucket k that holds ``seconds``: above 2**((k-1)/8), up to 2**(k/8)."""
    return math.ceil(_PER_OCTAVE * math.log2(max(seconds, _LEAST_S)))


def latency_bounds(bucket: int) -> tuple[float, float]:
    """Seconds: above the first, up to the second."""
    return 2 ** ((bucket - 1) / _PER_OCTAVE), 2 ** (bucket / _PER_OCTAVE)


def length_bucket(tokens: int) -> int:
    """The bucket k that holds a text of ``tokens``: [2**(k-1), 2**k); 0 holds empty ones."""
    return tokens.bit_length()


def length_bounds(bucket: int) -> tuple[int, int]:
    """Tokens, both included."""
    return (2 ** (bucket - 1) if bucket else 0), 2**bucket - 1


def quantile_bucket(counts: Mapping[int, int], share: float) -> int | None:
    """The bucket below or in which at least ``share`` of all lie; None: there are none."""
    wanted = share * sum(counts.values())
    reached = 0
    for bucket in sorted(counts):
        reached += counts[bucket]
        if reached >= wanted and reached:
            return bucket
    return None
