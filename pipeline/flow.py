"""The steps as one Ray Data flow. With the replica's actor, the one module that imports Ray.

    ShardSource (read) -> prepare_block (prepare) -> ReplicaActor (generate, commit) -> PartStats

In: a ``FlowSpec`` and the shards to do. Out: ``PartStats`` in order of completion. Every block on
the way is exactly one shard: Ray Data may neither split nor merge them, so the block size cap is
off, and each step checks the shard it was given. The caller's thread stays free to look after the
replicas (see ``roster``) and to stop them.
"""

from __future__ import annotations

import logging
import math
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask
from ray.exceptions import ActorDiedError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.actor import ReplicaActor, ReplicaSpec
from pipeline.capacity import NodeCapacity
from pipeline.commit import PartStats
from pipeline.cpu import Laps, Step, added, block_cpu, with_cpu
from pipeline.duplicates import Duplicates
from pipeline.errors import CapacityError, EngineError, PipelineError
from pipeline.expire import expire_shard
from pipeline.model import load_prompt_format
from pipeline.plan import FirstUse, InputFile, Shard
from pipeline.prepare import PrepareSpec, prepare_block
from pipeline.profile import Needs
from pipeline.read import InputColumns, read_shard
from pipeline.records import input_block
from pipeline.redact import configure_logging
from pipeline.replica import OPEN_SHARDS
from pipeline.roster import Roster, Snapshot

log = logging.getLogger(__name__)

_STARTS_PER_REPLICA = 4
"""Starts of a replica's process without one more completed row, after which the run fails."""
_POLL_S = 0.25
_LOOK_INTERVAL_S = 1.0
_ANSWER_S = 30.0  # the roster answers at once; a driver's node may be short of CPU
_REPORT_S = 5.0
"""Of ``drain_s``, what is left for Ray's shutdown and the report."""
_LAST_JOURNAL_S = 4.0
"""Of ``drain_s``, what replicas get to write down what they have, once nobody may finish."""
_EXECUTOR_STOP_S = 3.0
"""What Ray Data gets to end in order; a dataset without a block on its way cannot."""
_RAY_ADVICE = "\nFailed to "
"""How the advice begins that Ray Data appends to the message of whatever a step raises."""
_CONNECT_S = 3.0
_GIB = 2**30
_task_cpu = Laps()
"""Of the worker process this is imported in: it runs one task at a time."""


@dataclass(frozen=True)
class FlowSpec:
    """Everything the flow's tasks and actors need; picklable."""

    replica: ReplicaSpec
    prepare: PrepareSpec
    columns: InputColumns
    files: Mapping[str, InputFile]
    """The planned input files by URI."""
    duplicates: Duplicates
    replicas: int
    needs: Needs
    stall_s: float
    """Seconds without a pulse of a replica's process before it is ended."""
    drain_s: float
    """Seconds ``run_shards`` may take to end once it is told to."""


class ShardSource(Datasource):
    """A Ray Data source of one read task, and one block, per shard."""

    def __init__(self, spec: FlowSpec, shards: Sequence[Shard]) -> None:
        super().__init__()
        self._spec = spec
        self._shards = shards

    def estimate_inmemory_data_size(self) -> int | None:
        """Unknown until read: images may be fetched by URI."""
        return None

    def get_read_tasks(
        self,
        parallelism: int,
        per_task_row_limit: int | None = None,
        data_context: DataContext | None = None,
    ) -> list[ReadTask]:
        """One task per shard, whatever ``parallelism`` asks for."""
        del parallelism, per_task_row_limit, data_context
        return [
            ReadTask(
                partial(
                    _read_block,
                    shard,
                    self._spec.columns,
                    self._spec.files[shard.uri],
                    self._spec.duplicates.of(shard),
                ),
                BlockMetadata(
                    num_rows=shard.rows,
                    size_bytes=None,
                    exec_stats=None,
                    input_files=(shard.uri,),
                ),
            )
            for shard in self._shards
        ]


@contextmanager
def cluster(*, local_cpus: int) -> Iterator[None]:
    """A connection to the cluster in ``RAY_ADDRESS``, else a Ray of ``local_cpus`` in the process.

    Raises:
        CapacityError: the cluster cannot be reached.
        EngineError: Ray does not start here; the machine may be too busy.
    """
    address = os.environ.get("RAY_ADDRESS")
    if address:
        _check_answers(address)
    options = {} if address else {"num_cpus": local_cpus, "include_dashboard": False}
    try:
        ray.init(address=address, logging_level=logging.WARNING, **options)
    except Exception as error:  # Ray raises a bare Exception when a start times out
        if address is None:
            raise EngineError(f"Ray could not be started on this machine: {error}") from error
        raise CapacityError(f"cannot use the Ray cluster at {address}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Ray would try a dead address for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in host:
        return  # "auto", ray://...: Ray's own to judge
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise CapacityError(
            f"RAY_ADDRESS={address}: no Ray cluster answers there ({error}); start it, or unset "
            "RAY_ADDRESS to use this machine."
        ) from None


def cluster_nodes() -> list[NodeCapacity]:
    """What the connected cluster's live nodes hold in total, free or not."""
    return [
        NodeCapacity(
            name=node["NodeManagerHostname"],
            cpus=node["Resources"].get("CPU", 0.0),
            gpus=int(node["Resources"].get("GPU", 0)),
            memory_gib=node["Resources"].get("memory", 0.0) / _GIB,
            accelerator=_accelerator(node["Resources"]),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def run_shards(
    spec: FlowSpec, shards: Sequence[Shard], watch: Callable[[Snapshot], bool]
) -> Iterator[PartStats]:
    """Run ``shards`` to committed parts; stats come as parts are committed, in any order.

    Args:
        spec: what the flow's tasks and actors need.
        shards: what to run.
        watch: sees the replicas' state about once a second; True = stop now. Replicas then write
            down what they have, and this ends within ``spec.drain_s``.

    Raises:
        EngineError: a replica could not start, or replicas died again and again.
        StorageError, AccountingError: a part could not be read or written whole.
    """
    roster = _start_roster()
    driver = _Driver(spec, roster, watch)
    with _own_errors():
        results = _Results(_dataset(spec, shards, roster))
        while not results.finished and not driver.wants_stop():
            yield from results.take(_POLL_S)
        if not results.finished:
            yield from driver.drain(results)
        yield from results.take(0)
        results.raise_error()


def expire_shards(spec: FlowSpec, shards: Sequence[Shard]) -> Iterator[PartStats]:
    """Commit ``shards`` without an engine: what their journals have, and the rest ``expired``.

    Raises:
        StorageError, AccountingError: a part could not be read or written whole.
    """
    _configure_ray_data()
    with _own_errors():
        expired = _read(spec, shards).map_batches(
            partial(expire_shard, to=spec.replica.to, prepare=spec.prepare),
            batch_size=None,
            batch_format="pyarrow",
        )
        for batch in expired.iter_batches(batch_size=None, batch_format="pyarrow"):
            yield from map(PartStats.from_json, batch.column("stats").to_pylist())


class _Driver:
    """The driver's side of the roster: looks, decides, orders."""

    def __init__(self, spec: FlowSpec, roster: Any, watch: Callable[[Snapshot], bool]) -> None:
        self._spec = spec
        self._roster = roster
        self._watch = watch
        self._next_look = 0.0
        self._killed: dict[str, float] = {}

    def wants_stop(self) -> bool:
        """Look, at most once a second, and hear what the caller makes of it.

        Raises:
            EngineError: replicas are started again and again and get nowhere.
        """
        if time.monotonic() < self._next_look:
            return False
        self._next_look = time.monotonic() + _LOOK_INTERVAL_S
        snapshot = self._look()
        self._restart_hung(snapshot)
        starts = snapshot.starts_without_progress
        if starts > _STARTS_PER_REPLICA * self._spec.replicas:
            raise EngineError(
                f"{starts} replicas were started without one more row completed; "
                f"the last error: {snapshot.last_error or 'their processes were killed'}"
            )
        return self._watch(snapshot)

    def drain(self, results: _Results) -> Iterator[PartStats]:
        """Have the replicas stop; parts committed meanwhile, until all have or time is up."""
        until = time.monotonic() + self._spec.drain_s - _REPORT_S
        grace = max(0.0, self._spec.drain_s - _REPORT_S - _LAST_JOURNAL_S)
        ray.get(self._roster.drain.remote(grace), timeout=_ANSWER_S)
        while time.monotonic() < until and not results.finished and self._look().running:
            yield from results.take(_POLL_S)
        results.stop(_EXECUTOR_STOP_S)

    def _look(self) -> Snapshot:
        found: Snapshot = ray.get(self._roster.look.remote(), timeout=_ANSWER_S)
        return found

    def _restart_hung(self, snapshot: Snapshot) -> None:
        """End replicas that have not been heard of; Ray starts others in their place."""
        now = time.monotonic()
        for silent in snapshot.silent:
            since_kill = now - self._killed.get(silent.replica, -math.inf)
            if min(silent.seconds, since_kill) > self._spec.stall_s and silent.handle is not None:
                log.warning("a replica was silent for %.0f s and is ended", silent.seconds)
                self._killed[silent.replica] = now
                ray.kill(silent.handle, no_restart=False)


class _Results:
    """A dataset's stats, taken by a thread of its own, so that the caller can look up meanwhile."""

    def __init__(self, dataset: ray.data.Dataset) -> None:
        self._queue: queue.SimpleQueue[PartStats] = queue.SimpleQueue()
        self._error: Exception | None = None
        self._stopped = False
        self._thread = threading.Thread(
            target=self._pull, args=(dataset,), name="results", daemon=True
        )
        self._thread.start()

    @property
    def finished(self) -> bool:
        """Whether the dataset came to its end, good or bad."""
        return not self._thread.is_alive()

    def take(self, timeout_s: float) -> Iterator[PartStats]:
        """What came in; waits for the first up to ``timeout_s``."""
        try:
            yield self._queue.get(timeout=timeout_s) if timeout_s else self._queue.get_nowait()
            while True:
                yield self._queue.get_nowait()
        except queue.Empty:
            return

    def stop(self, timeout_s: float) -> None:
        """End the dataset at its next block; waits for that up to ``timeout_s``."""
        self._stopped = True
        self._thread.join(timeout_s)
        if not self.finished:  # its executor will complain once Ray is shut down under it
            logging.getLogger("ray.data").setLevel(logging.CRITICAL)

    def raise_error(self) -> None:
        """Raise what ended the dataset, if anything did, unless it was to end anyway."""
        if self._error is not None and not self._stopped:
            raise self._error

    def _pull(self, dataset: ray.data.Dataset) -> None:
        try:
            for batch in dataset.iter_batches(
                batch_size=None, batch_format="pyarrow", prefetch_batches=0
            ):
                for stats in map(PartStats.from_json, batch.column("stats").to_pylist()):
                    self._queue.put(stats)
                if self._stopped:
                    return
        except Exception as error:  # noqa: BLE001 - raised again on the caller's thread
            self._error = error


def _start_roster() -> Any:
    """The roster's actor, on the driver's own node: it is of no use without the driver."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(Roster).remote()


@contextmanager
def _own_errors() -> Iterator[None]:
    """Ray wraps what tasks and actors raise; callers see this project's errors."""
    try:
        yield
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, PipelineError):
            raise type(cause)(str(cause).partition(_RAY_ADVICE)[0]) from error
        first_line = str(cause).partition("\n")[0]
        raise EngineError(f"a step failed: {type(cause).__name__}: {first_line}") from error
    except ActorDiedError as error:
        raise EngineError(f"a replica could not start, or died: {_last_line(error)}") from error
    except RayError as error:
        raise EngineError(f"Ray gave up: {_last_line(error)}") from error


def _last_line(error: Exception) -> str:
    """What a remote traceback ends with: the exception itself."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _read(spec: FlowSpec, shards: Sequence[Shard]) -> ray.data.Dataset:
    return ray.data.read_datasource(ShardSource(spec, shards), override_num_blocks=len(shards))


def _prepare(block: pa.Table, spec: PrepareSpec) -> pa.Table:
    configure_logging(logging.WARNING, "%(levelname)s %(name)s: %(message)s")
    spent = {Step.RAY: _task_cpu.lap()}
    load_prompt_format(spec.model)
    spent[Step.START] = _task_cpu.lap()
    prepared = prepare_block(block, spec=spec)
    spent[Step.PREPARE] = _task_cpu.lap()
    return with_cpu(prepared, added(block_cpu(block), spent))


def _dataset(spec: FlowSpec, shards: Sequence[Shard], roster: Any) -> ray.data.Dataset:
    _configure_ray_data()
    prepared = _read(spec, shards).map_batches(
        partial(_prepare, spec=spec.prepare), batch_size=None, batch_format="pyarrow"
    )
    return prepared.map_batches(
        ReplicaActor,
        fn_constructor_args=(spec.replica, roster),
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(
            size=spec.replicas,
            max_concurrent_calls_per_actor=OPEN_SHARDS,
            max_tasks_in_flight_per_actor=OPEN_SHARDS + 1,
            enable_true_multi_threading=True,
        ),
        num_cpus=spec.needs.cpus_per_node,
        # An engine over several nodes gets its GPUs from vLLM's Ray backend, not the actor.
        num_gpus=spec.needs.gpus_per_node if spec.needs.nodes == 1 else 0,
        accelerator_type=spec.needs.accelerator if spec.needs.nodes == 1 else None,
        # Also what keeps Ray Data from fusing prepare into the replica's process.
        memory=spec.needs.memory_gib_per_node * _GIB,
        # Ray restarts replicas, and retries their shards, without end (its default): the driver
        # bounds restarts that get nowhere, which a night of lost nodes must not add up to.
    )


def _configure_ray_data() -> None:
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    context = DataContext.get_current()
    context.target_max_block_size = None  # a block is a shard: never split
    context.raise_original_map_exception = True  # else the cause is lost on its way to the driver
    context.enable_progress_bars = False
    context.execution_options.preserve_order = False
    context.execution_options.verbose_progress = False


def _read_block(
    shard: Shard, columns: InputColumns, planned: InputFile, first_uses: Mapping[int, FirstUse]
) -> list[pa.Table]:
    between = _task_cpu.lap()
    block = input_block(shard, read_shard(shard, columns, planned=planned), first_uses)
    return [with_cpu(block, {Step.READ: _task_cpu.lap(), Step.RAY: between})]


def _accelerator(resources: dict[str, float]) -> str | None:
    prefix = "accelerator_type:"
    return next((key[len(prefix) :] for key in resources if key.startswith(prefix)), None)
