"""The lease on local files; tests/integration/test_object_store.py runs the same cases on S3."""

import logging
from pathlib import Path
from typing import ClassVar

import pytest

from pipeline import storage
from pipeline.lease import LeaseRecord
from tests.lease_cases import LeaseCases


@pytest.fixture
def run_uri(tmp_path: Path) -> str:
    return f"file://{tmp_path}/run"


class TestLeaseOnLocalFiles(LeaseCases):
    ttl_s: ClassVar[float] = 1.5
    renewal_s: ClassVar[float] = 0.2

    def test_it_leaves_only_the_lease_in_the_folder(self, run_uri: str) -> None:
        with self.acquire(run_uri) as lease:
            lease.confirm()
        folder = Path(run_uri.removeprefix("file://"))
        assert [path.name for path in folder.iterdir()] == ["_lease.json"]

    def test_who_waits_says_so_once(self, run_uri: str, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, logger="pipeline.lease")
        storage.put_bytes(f"{run_uri}/_lease.json", LeaseRecord.new().to_bytes())
        with self.acquire(run_uri, wait=True):
            pass
        told = [record.message for record in caplog.records if "watching" in record.message]
        assert len(told) == 1
        assert "waiting" in told[0]
