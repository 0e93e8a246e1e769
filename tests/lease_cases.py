"""What a lease promises, on whatever store: the cases that unit and integration tests share."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import pytest

from pipeline import storage
from pipeline.errors import ExitCode, LeaseLostError, RunBusyError, StorageError
from pipeline.lease import Lease, LeaseRecord, LeaseState, LeaseView, check_not_driven, observe
from tests.waiting import suspend_driver, wait_until

_OWNER = """
import sys, time
from pipeline.lease import Lease
run_uri, ttl_s, renewal_s = sys.argv[1:]
lease = Lease.acquire(run_uri, wait=False, ttl_s=float(ttl_s), renewal_s=float(renewal_s))
print("owner", flush=True)
while lease.lost is None:
    time.sleep(0.02)
print(lease.lost, flush=True)
"""
"""A driver in a process of its own, which can be killed and paused."""


def record_at(run_uri: str) -> LeaseRecord:
    """What is stored."""
    return LeaseRecord.model_validate_json(storage.read_bytes(f"{run_uri}/_lease.json"))


class LeaseCases:
    """The store is chosen by the fixture ``run_uri``; the times, by how fast the store is."""

    ttl_s: ClassVar[float]
    renewal_s: ClassVar[float]

    def acquire(self, run_uri: str, *, wait: bool = False) -> Lease:
        return Lease.acquire(run_uri, wait=wait, ttl_s=self.ttl_s, renewal_s=self.renewal_s)

    def seen(self, run_uri: str) -> LeaseView:
        view = observe(run_uri, ttl_s=self.ttl_s, renewal_s=self.renewal_s)
        assert view is not None
        return view

    def owner_process(self, run_uri: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", _OWNER, run_uri, str(self.ttl_s), str(self.renewal_s)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "owner\n"
        return process

    def test_a_free_lease_is_taken_and_says_by_whom(self, run_uri: str) -> None:
        with self.acquire(run_uri) as lease:
            document = json.loads(storage.read_bytes(f"{run_uri}/_lease.json"))
            assert document["owner"] == lease.owner
            assert (document["host"], document["pid"]) == (socket.gethostname(), os.getpid())
            assert (document["state"], document["taken_over_from"]) == ("held", None)
            secret = os.environ.get("AWS_SECRET_ACCESS_KEY", "none")
            assert secret not in json.dumps(document)
        assert record_at(run_uri).state == "released"

    def test_an_onlooker_sees_whether_the_owner_lives(self, run_uri: str) -> None:
        assert observe(run_uri) is None
        with self.acquire(run_uri) as lease:
            while not (view := self.seen(run_uri)).lives:  # a busy machine may pause the owner
                time.sleep(self.renewal_s)
            assert view.record.owner == lease.owner
        view = self.seen(run_uri)
        assert (view.lives, view.record.state) == (False, LeaseState.RELEASED)

    def test_an_onlooker_sees_that_the_owner_was_killed(self, run_uri: str) -> None:
        with self.owner_process(run_uri) as process:
            process.kill()
        while self.seen(run_uri).lives:
            time.sleep(self.renewal_s)
        view = self.seen(run_uri)
        assert view.age_s >= self.ttl_s
        assert view.record.state is LeaseState.HELD

    def test_of_contenders_at_once_exactly_one_wins(self, run_uri: str) -> None:
        barrier = threading.Barrier(6)

        def contend(_: int) -> Lease | RunBusyError:
            barrier.wait()
            try:
                return self.acquire(run_uri)
            except RunBusyError as error:
                return error

        with ThreadPoolExecutor(6) as pool:
            results = list(pool.map(contend, range(6)))
        (winner,) = [result for result in results if isinstance(result, Lease)]
        with winner:
            winner.confirm()
            assert record_at(run_uri).owner == winner.owner

    def test_a_live_owner_is_named_and_left_alone(self, run_uri: str) -> None:
        with self.acquire(run_uri) as lease:
            with pytest.raises(RunBusyError) as caught:
                self.acquire(run_uri)
            message = str(caught.value)
            assert f"host {socket.gethostname()}, pid {os.getpid()}, since 20" in message
            assert run_uri in message
            assert "--wait" in message
            assert caught.value.exit_code is ExitCode.FAILED
            lease.confirm()
            assert lease.lost is None

    def test_a_live_owner_is_seen_without_touching_the_lease(self, run_uri: str) -> None:
        with self.acquire(run_uri) as lease:
            with pytest.raises(RunBusyError, match=rf"pid {os.getpid()}, .*--wait"):
                check_not_driven(run_uri, renewal_s=20 * self.renewal_s)
            assert record_at(run_uri).owner == lease.owner

    def test_what_nobody_renews_is_not_refused_and_left_as_it_is(self, run_uri: str) -> None:
        check_not_driven(run_uri, renewal_s=self.renewal_s)
        assert not storage.exists(f"{run_uri}/_lease.json")
        stale = LeaseRecord.new()
        for record in (stale, stale.renewed(LeaseState.RELEASED)):
            storage.put_bytes(f"{run_uri}/_lease.json", record.to_bytes())
            check_not_driven(run_uri, renewal_s=self.renewal_s)
            assert record_at(run_uri) == record

    def test_a_lease_that_is_released_meanwhile_is_not_refused(self, run_uri: str) -> None:
        lease = self.acquire(run_uri)
        with ThreadPoolExecutor(1) as pool:
            looking = pool.submit(check_not_driven, run_uri, renewal_s=100 * self.renewal_s)
            time.sleep(self.renewal_s / 2)
            lease.release()
            looking.result(timeout=60)

    def test_a_released_lease_is_taken_at_once(self, run_uri: str) -> None:
        with self.acquire(run_uri) as first:
            pass
        with self.acquire(run_uri) as second:
            assert second.owner != first.owner
            assert record_at(run_uri).taken_over_from is None

    def test_who_waits_gets_it_once_it_is_released(self, run_uri: str) -> None:
        first = self.acquire(run_uri)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(self.acquire, run_uri, wait=True)
            time.sleep(2 * self.ttl_s)
            assert not waiting.done()
            assert first.lost is None
            first.release()
            with waiting.result(timeout=60) as second:
                assert record_at(run_uri).owner == second.owner

    def test_the_lease_of_a_killed_driver_is_taken_over_when_stale(self, run_uri: str) -> None:
        with self.owner_process(run_uri) as process:
            process.kill()
        begun = time.monotonic()
        with self.acquire(run_uri) as lease:
            assert time.monotonic() - begun >= self.ttl_s
            assert record_at(run_uri).owner == lease.owner
            assert f"pid {process.pid}," in (record_at(run_uri).taken_over_from or "")

    def test_of_contenders_for_a_stale_lease_exactly_one_wins(self, run_uri: str) -> None:
        storage.put_bytes(f"{run_uri}/_lease.json", LeaseRecord.new().to_bytes())

        def contend(_: int) -> Lease | RunBusyError:
            try:
                return self.acquire(run_uri)
            except RunBusyError as error:
                return error

        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(contend, range(4)))
        (winner,) = [result for result in results if isinstance(result, Lease)]
        with winner:
            winner.confirm()

    def test_a_driver_that_was_paused_learns_that_it_lost(self, run_uri: str) -> None:
        with self.owner_process(run_uri) as process:
            suspend_driver(process, Path(run_uri.removeprefix("file://")))
            try:
                with self.acquire(run_uri) as lease:
                    process.send_signal(signal.SIGCONT)
                    output, _ = process.communicate(timeout=60)
                    assert f"taken over by another driver (host {socket.gethostname()}" in output
                    assert f"pid {os.getpid()}," in output
                    lease.confirm()
            finally:
                process.kill()

    def test_a_lost_lease_is_not_confirmed_and_not_released_for_its_new_owner(
        self, run_uri: str
    ) -> None:
        lease = self.acquire(run_uri)
        other = LeaseRecord.new()
        with lease._lock:  # or a renewal on its way could undo it
            storage.put_bytes(f"{run_uri}/_lease.json", other.to_bytes())
        with pytest.raises(LeaseLostError, match="taken over by another driver"):
            lease.confirm()
        assert lease.lost is not None
        lease.release()
        assert record_at(run_uri) == other

    def test_a_deleted_lease_is_lost(self, run_uri: str) -> None:
        with self.acquire(run_uri) as lease:
            with lease._lock:
                storage.delete(f"{run_uri}/_lease.json")
            wait_until(lambda: lease.lost)
            assert "was deleted" in (lease.lost or "")
        assert not storage.exists(f"{run_uri}/_lease.json")

    def test_releasing_twice_is_fine_and_confirming_afterwards_is_not(self, run_uri: str) -> None:
        lease = self.acquire(run_uri)
        lease.release()
        released = record_at(run_uri)
        lease.release()
        with pytest.raises(LeaseLostError, match="released"):
            lease.confirm()
        assert record_at(run_uri) == released

    @pytest.mark.parametrize("content", [b"", b"{", b'{"a": 1}', b"\xff\xfe", b"[]"])
    def test_something_else_in_its_place_is_named_with_a_remedy(
        self, run_uri: str, content: bytes
    ) -> None:
        storage.put_bytes(f"{run_uri}/_lease.json", content)
        with pytest.raises(StorageError, match=r"_lease\.json is not a lease.*delete the object"):
            self.acquire(run_uri)
        assert storage.read_bytes(f"{run_uri}/_lease.json") == content
