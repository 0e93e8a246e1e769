"""What driver and replicas measure: each row once, whatever is lost, and states as they are."""

import threading
import time
from pathlib import Path

import pytest

from pipeline import metrics, storage
from pipeline.admission import AdmissionWindow
from pipeline.errors import EngineError, LeaseLostError
from pipeline.lease import Lease
from pipeline.live import About, LiveRun
from pipeline.metrics import REGISTRY, Metric
from pipeline.progress import Tally
from pipeline.records import Prepared
from pipeline.replica import Replica, ReplicaLimits
from pipeline.replica_metrics import ReplicaMetrics
from pipeline.report import Result, RunStatus
from pipeline.roster import Snapshot
from pipeline.run_metrics import RunMetrics
from pipeline.sampling import Sampling
from pipeline.totals import Totals, total
from tests.fakes import EchoEngine


def totals(
    succeeded: int, errored: int, completion: int, errors: dict[str, int] | None = None
) -> Totals:
    rows = {"succeeded": succeeded, "errored": errored, "expired": 0, "cancelled": 0}
    empty = total([])
    tokens = {**empty.tokens, "completion": completion}
    return Totals(rows, succeeded + errored, tokens, errors or {}, {}, {}, parts=1)


def taken(*wanted: Metric) -> dict[tuple[str, ...], float]:
    """Values by name and labels."""
    return {(s.metric.name, *s.labels): s.value for s in REGISTRY.take() if s.metric in wanted}


COUNTERS = (metrics.ROWS, metrics.TOKENS, metrics.FAILURES)
REPLICA_GAUGES = (
    metrics.REPLICA_STATE,
    metrics.WINDOW_LIMIT,
    metrics.WINDOW_REQUESTS,
    metrics.BACKLOG_REQUESTS,
    metrics.ENGINE_START_SECONDS,
)
GAUGES = (metrics.RUN_ROWS, metrics.RUN_ACTIVE, metrics.REPLICAS_RUNNING)


def test_rows_that_a_lost_replica_makes_again_are_counted_once() -> None:
    REGISTRY.take()
    run = RunMetrics(planned=100, before=0, replicas=1)
    run.tell(Snapshot(Tally(rows=10, failed=1, tokens=50, errors={"timeout": 1})), None)
    run.tell(Snapshot(Tally(rows=4, failed=0, tokens=20)), None)  # the journal had those
    run.tell(Snapshot(Tally(rows=12, failed=1, tokens=60, errors={"timeout": 1})), None)
    assert taken(*COUNTERS) == {
        ("maverick_rows", "succeeded"): 11,
        ("maverick_rows", "errored"): 1,
        ("maverick_tokens", "completion"): 60,
        ("maverick_failures", "timeout"): 1,
    }


def test_the_end_counts_what_the_last_look_missed_and_nothing_of_earlier_starts() -> None:
    REGISTRY.take()
    earlier = totals(20, 2, 200, {"timeout": 2})
    run = RunMetrics(planned=40, before=22, replicas=1)
    run.tell(Snapshot(Tally(rows=8, failed=1, tokens=70, errors={"timeout": 1})), earlier)
    assert taken(*GAUGES)["maverick_run_rows", "errored"] == 3
    REGISTRY.take()
    whole = totals(37, 3, 350, {"timeout": 2, "schema_violation": 1})
    run.conclude(Result(RunStatus.COMPLETE, "run", 40, whole, 1.0), earlier)
    run.end()
    assert taken(*COUNTERS, *GAUGES) == {
        ("maverick_rows", "succeeded"): 10,
        ("maverick_tokens", "completion"): 80,
        ("maverick_failures", "schema_violation"): 1,
        ("maverick_run_rows", "planned"): 40,
        ("maverick_run_rows", "done"): 40,
        ("maverick_run_rows", "errored"): 3,
        ("maverick_run_active",): 0,
        ("maverick_replicas_running",): 0,
    }


def states(now: str) -> dict[tuple[str, ...], float]:
    every = ("starting", "running", "drained")
    return {("maverick_replica_state", state): float(state == now) for state in every}


def row(number: int) -> Prepared:
    return Prepared(
        input_row=number,
        custom_id=str(number),
        token_ids=[1],
        images=(),
        image_tokens=0,
        prompt_tokens=1,
        sampling=Sampling(),
        seeds=(0,),
    )


def test_a_replica_shows_its_state_its_window_and_how_long_its_engine_started() -> None:
    REGISTRY.take()
    measured = ReplicaMetrics()
    measured.look()
    assert taken(metrics.REPLICA_STATE) == states("starting")
    start = measured.timed(lambda: EchoEngine(delay_s=30))
    replica = Replica(start, ReplicaLimits(), AdmissionWindow(first=4, most=4))
    measured.attach(replica)
    rows = [row(number) for number in range(6)]
    work = threading.Thread(target=lambda: list(replica.generate(0, rows)))
    work.start()
    try:
        while replica.requests.inside < 4:
            time.sleep(0.01)
        measured.look()
        seen = taken(*REPLICA_GAUGES)
        assert seen.pop(("maverick_engine_start_seconds",)) >= 0
        assert seen == {
            **states("running"),
            ("maverick_window_limit",): 4,
            ("maverick_window_requests",): 4,
            ("maverick_backlog_requests",): 2,
        }
        replica.drain(0)
        measured.look()
        assert taken(metrics.REPLICA_STATE) == states("drained")
    finally:
        replica.drain(0)
        work.join()
        replica.shutdown()


def test_an_engine_that_does_not_start_tells_how_long_it_tried() -> None:
    REGISTRY.take()

    def start() -> EchoEngine:
        raise EngineError("no memory")

    with pytest.raises(EngineError):
        ReplicaMetrics().timed(start)()
    assert list(taken(metrics.ENGINE_START_SECONDS)) == [("maverick_engine_start_seconds",)]


def test_a_start_is_measured_from_its_first_moment_to_its_end(tmp_path: Path) -> None:
    REGISTRY.take()
    about = About(
        f"file://{tmp_path}/run", "run-1", "nightly", "p", "m", 2, 40, 22, 1, "owner-1", 2
    )
    earlier, whole = totals(20, 2, 200), totals(38, 2, 350)
    measured = (*GAUGES, metrics.ROWS, metrics.REPLICAS_WANTED)
    with LiveRun(about, earlier_totals=lambda: earlier, lease_lost=lambda: None) as live:
        assert taken(*measured)["maverick_run_active",] == 1
        live.tell(Snapshot(Tally(rows=8), running=2))
        seen = taken(*measured)
        assert seen["maverick_rows", "succeeded"] == 8
        assert seen["maverick_run_rows", "done"] == 30
        assert seen["maverick_replicas_running",] == seen["maverick_replicas_wanted",] == 2
        live.conclude(Result(RunStatus.COMPLETE, "run", 40, whole, 1.0))
    seen = taken(*measured)
    assert seen["maverick_rows", "succeeded"] == 10
    assert seen["maverick_run_active",] == seen["maverick_replicas_running",] == 0


def test_a_lease_shows_when_it_was_renewed_and_that_it_was_lost(tmp_path: Path) -> None:
    REGISTRY.take()
    began = time.time()
    with Lease.acquire(f"file://{tmp_path}/run", wait=False, renewal_s=5) as lease:
        lease.confirm()
        seen = taken(metrics.LEASE_RENEWED, metrics.LEASE_LOST)
        assert seen["maverick_lease_lost",] == 0
        assert began <= seen["maverick_lease_renewed_timestamp_seconds",] <= time.time()
        storage.delete(f"file://{tmp_path}/run/_lease.json")
        time.sleep(1.1)  # what was confirmed holds for a fifth of the renewal period
        with pytest.raises(LeaseLostError):
            lease.confirm()
    assert taken(metrics.LEASE_LOST) == {("maverick_lease_lost",): 1}
