"""Environment variables that hold for a while."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


def without_ray() -> dict[str, str]:
    """The environment without what makes Ray's processes use, or ask for, another cluster's."""
    return {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}


@contextmanager
def variables(given: Mapping[str, str]) -> Iterator[None]:
    """``os.environ`` has `given` too, and is as it was afterwards."""
    before = dict(os.environ)
    os.environ.update(given)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
