"""The lease on local files; tests/integration/test_object_store.py runs the same cases on S3."""

import logging
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import pytest

from pipeline import storage
from pipeline.lease import Lease, LeaseRecord, observe
from tests.lease_cases import LeaseCases, record_at


@pytest.fixture
def run_uri(tmp_path: Path) -> str:
    return f"file://{tmp_path}/run"


class TestLeaseOnLocalFiles(LeaseCases):
    ttl_s: ClassVar[float] = 3.0
    renewal_s: ClassVar[float] = 0.2

    def test_it_leaves_only_the_lease_in_the_folder(self, run_uri: str) -> None:
        with self.acquire(run_uri) as lease:
            lease.confirm()
        folder = Path(run_uri.removeprefix("file://"))
        assert [path.name for path in folder.iterdir()] == ["_lease.json"]

    def test_many_threads_confirm_by_one_renewal_while_it_is_fresh(self, run_uri: str) -> None:
        with Lease.acquire(run_uri, wait=False, ttl_s=2000.0, renewal_s=500.0) as lease:
            with ThreadPoolExecutor(8) as pool:
                list(pool.map(lambda _: lease.confirm(), range(100)))
            assert record_at(run_uri).renewals == 1

    def test_who_waits_says_so_once(self, run_uri: str, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, logger="pipeline.lease")
        storage.put_bytes(f"{run_uri}/_lease.json", LeaseRecord.new().to_bytes())
        with self.acquire(run_uri, wait=True):
            pass
        told = [record.message for record in caplog.records if "watching" in record.message]
        assert len(told) == 1
        assert "waiting" in told[0]

    @pytest.mark.parametrize("off_by_s", [-300.0, 300.0])
    def test_by_two_clocks_a_renewal_decides_not_an_age(
        self, run_uri: str, off_by_s: float
    ) -> None:
        """The disk's clock is ahead, or behind, by minutes: each renewal is dated so."""
        path = Path(run_uri.removeprefix("file://")) / "_lease.json"
        record = LeaseRecord.new()

        def renew(record: LeaseRecord) -> None:
            storage.put_bytes(str(path), record.to_bytes())
            os.utime(path, (time.time() + off_by_s,) * 2)

        renew(record)
        assert not self.seen(run_uri).lives
        stop = threading.Event()

        def renew_on() -> None:
            mine = record
            while not stop.wait(self.renewal_s / 2):
                mine = mine.renewed()
                renew(mine)

        thread = threading.Thread(target=renew_on)
        thread.start()
        try:
            view = observe(run_uri, ttl_s=self.ttl_s, renewal_s=5.0)
            assert view is not None
            assert view.lives
        finally:
            stop.set()
            thread.join()

    def test_no_clocks_are_so_far_apart_that_an_hour_is_not_enough(self, run_uri: str) -> None:
        path = Path(run_uri.removeprefix("file://")) / "_lease.json"
        storage.put_bytes(str(path), LeaseRecord.new().to_bytes())
        os.utime(path, (time.time() - 3600,) * 2)
        began = time.monotonic()
        view = observe(run_uri, renewal_s=1000.0)
        assert view is not None
        assert not view.lives
        assert time.monotonic() - began < 500  # not watched: that would take 1,500 s
