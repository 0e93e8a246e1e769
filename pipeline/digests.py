"""Digests of what went into an engine and what came out: whether two requests were the same one.

In: token ids, encoded images. Out: 32 hex characters, 128 bits of BLAKE2b. They stand in every
record, so that a replay can prove that the prompt was the same to the pixel, and the completion to
the token, without either being stored.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from hashlib import blake2b

_BYTES = 16


def digest_tokens(token_ids: Sequence[int], images: Sequence[bytes] = ()) -> str:
    """BLAKE2b-128 of the ids as 4-byte little-endian integers, then of each image: its length as 8
    such bytes, and its bytes."""
    ids = array("i", token_ids)
    if sys.byteorder == "big":
        ids.byteswap()
    digest = blake2b(ids.tobytes(), digest_size=_BYTES)
    for image in images:
        digest.update(len(image).to_bytes(8, "little"))
        digest.update(image)
    return digest.hexdigest()


def digest_image(image: bytes) -> str:
    """BLAKE2b-128 of an encoded image."""
    return blake2b(image, digest_size=_BYTES).hexdigest()
