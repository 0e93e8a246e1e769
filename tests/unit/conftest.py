"""Unit tests know no cluster and no bucket, whatever this process, or its user, has at hand."""

import os

import pytest


@pytest.fixture(autouse=True)
def _no_cluster_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("RAY_ADDRESS", "RAY_AUTH", "AWS_")):
            monkeypatch.delenv(name)
