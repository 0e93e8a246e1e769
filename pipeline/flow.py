"""The steps as one Ray Data flow. The one module (with its replica actor) that imports Ray.

    ShardSource (read) -> prepare_block (prepare) -> ReplicaActor (generate, commit) -> PartStats

In: a ``FlowSpec`` and the shards to do. Out: ``PartStats`` in order of completion. Every block on
the way is exactly one shard: Ray Data may neither split nor merge them, so the block size cap is
off, and each step checks the shard it was given.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
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
from ray.util.annotations import RayDeprecationWarning

from pipeline.capacity import NodeCapacity
from pipeline.commit import PartStats, commit_part, summarize
from pipeline.engine import Engine, EngineSpec
from pipeline.errors import CapacityError, EngineError, PipelineError
from pipeline.plan import Shard
from pipeline.prepare import PrepareSpec, prepare_block
from pipeline.profile import Needs
from pipeline.progress import Tally
from pipeline.read import InputColumns, read_shard
from pipeline.records import (
    Completion,
    Outcome,
    block_shard,
    carried_columns,
    input_block,
    part_table,
    read_prepared,
)
from pipeline.replica import Replica

log = logging.getLogger(__name__)

_SHARDS_PER_REPLICA = 4
"""Shards a replica works on at a time: while the last rows of one end, others fill the window."""
_REPLICA_RESTARTS = 2
"""Times a replica whose process died is started again before the run fails (resumable)."""
_TALLY_INTERVAL_S = 1.0
_CONNECT_S = 3.0
_GIB = 2**30


@dataclass(frozen=True)
class FlowSpec:
    """Everything the flow's tasks and actors need; picklable."""

    output_uri: str
    model_name: str
    columns: InputColumns
    prepare: PrepareSpec
    engine: EngineSpec
    window: int
    """Requests in flight per replica."""
    replicas: int
    needs: Needs
    start_engine: Callable[[EngineSpec], Engine]
    """Builds a replica's engine on its node."""


class ShardSource(Datasource):
    """A Ray Data source of one read task, and one block, per shard."""

    def __init__(self, shards: Sequence[Shard], columns: InputColumns) -> None:
        super().__init__()
        self._shards = shards
        self._columns = columns

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
                partial(_read_block, shard, self._columns),
                BlockMetadata(
                    num_rows=shard.rows,
                    size_bytes=None,
                    exec_stats=None,
                    input_files=(shard.uri,),
                ),
            )
            for shard in self._shards
        ]


class ReplicaActor:
    """A Ray Data actor that holds one replica: prepared blocks in, committed parts' stats out."""

    def __init__(self, spec: FlowSpec, tally: Any) -> None:
        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
        self._spec = spec
        self._tally = tally
        self._replica = Replica(partial(spec.start_engine, spec.engine), window=spec.window)

    def __call__(self, block: pa.Table) -> pa.Table:
        """Complete and commit one shard; called from several threads at a time."""
        started = time.monotonic()
        shard = block_shard(block)
        meter = _Meter(self._tally)
        outcomes = self._replica.generate(shard.index, read_prepared(block), meter.count)
        meter.flush()
        table = part_table(shard, outcomes, carried_columns(block), model=self._spec.model_name)
        stats = summarize(shard.index, outcomes, time.monotonic() - started)
        commit_part(self._spec.output_uri, table, shard, stats)
        return pa.table({"stats": [stats.to_json()]})

    def __del__(self) -> None:
        """Ray Data drops its actors at the end of a flow; the engine's processes end here."""
        replica = getattr(self, "_replica", None)
        if replica is not None:
            replica.shutdown()


class _Meter:
    """Counts one shard's outcomes and reports them to the driver about once a second."""

    def __init__(self, tally: Any) -> None:
        self._tally = tally
        self._counted = Tally()
        self._last = time.monotonic()

    def count(self, outcome: Outcome) -> None:
        completed = isinstance(outcome, Completion)
        self._counted += Tally(
            rows=int(outcome.sample_index == 0),
            failed=int(not completed),
            tokens=outcome.completion_tokens if isinstance(outcome, Completion) else 0,
        )
        if time.monotonic() - self._last >= _TALLY_INTERVAL_S:
            self.flush()

    def flush(self) -> None:
        self._last = time.monotonic()
        counted, self._counted = self._counted, Tally()
        self._tally.add.remote(counted)


class _TallyKeeper:
    """Sums what replicas report, for the driver's progress display. Losing it loses no row."""

    def __init__(self) -> None:
        self._sum = Tally()

    def add(self, counted: Tally) -> None:
        self._sum += counted

    def read(self) -> Tally:
        return self._sum


@contextmanager
def cluster(*, local_cpus: int) -> Iterator[None]:
    """A connection to the cluster in ``RAY_ADDRESS``, else a Ray of ``local_cpus`` in the process.

    Raises:
        CapacityError: the cluster cannot be reached.
    """
    address = os.environ.get("RAY_ADDRESS")
    if address:
        _check_answers(address)
    options = {} if address else {"num_cpus": local_cpus, "include_dashboard": False}
    try:
        ray.init(address=address, logging_level=logging.WARNING, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
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
    spec: FlowSpec, shards: Sequence[Shard], on_tally: Callable[[Tally], None]
) -> Iterator[PartStats]:
    """Run ``shards`` to committed parts; stats come as parts are committed, in any order.

    Raises:
        EngineError: a replica could not start or died more than twice.
        StorageError, AccountingError: a part could not be read or written whole.
    """
    keeper = ray.remote(num_cpus=0)(_TallyKeeper).remote()
    with _own_errors(), _polling(keeper, on_tally):
        for batch in _dataset(spec, shards, keeper).iter_batches(
            batch_size=None, batch_format="pyarrow", prefetch_batches=0
        ):
            yield from map(PartStats.from_json, batch.column("stats").to_pylist())
        on_tally(ray.get(keeper.read.remote()))


@contextmanager
def _own_errors() -> Iterator[None]:
    """Ray wraps what tasks and actors raise; callers see this project's errors."""
    try:
        yield
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, PipelineError):
            raise cause from error
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


def _dataset(spec: FlowSpec, shards: Sequence[Shard], keeper: Any) -> ray.data.Dataset:
    _configure_ray_data()
    rows = ray.data.read_datasource(
        ShardSource(shards, spec.columns), override_num_blocks=len(shards)
    )
    prepared = rows.map_batches(
        partial(prepare_block, spec=spec.prepare), batch_size=None, batch_format="pyarrow"
    )
    with warnings.catch_warnings():
        # 2.60 has no other way to bound restarts (its default: for ever), and warns of this one
        warnings.simplefilter("ignore", RayDeprecationWarning)
        return prepared.map_batches(
            ReplicaActor,
            fn_constructor_args=(spec, keeper),
            batch_size=None,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(
                size=spec.replicas,
                max_concurrent_calls_per_actor=_SHARDS_PER_REPLICA,
                max_tasks_in_flight_per_actor=_SHARDS_PER_REPLICA + 1,
                enable_true_multi_threading=True,
            ),
            num_cpus=spec.needs.cpus_per_node,
            # An engine over several nodes gets its GPUs from vLLM's Ray backend, not the actor.
            num_gpus=spec.needs.gpus_per_node if spec.needs.nodes == 1 else 0,
            accelerator_type=spec.needs.accelerator if spec.needs.nodes == 1 else None,
            max_restarts=_REPLICA_RESTARTS,
            # While a lost node is noticed, a task fails several times a second: the restarts are
            # the bound, and a task is tried as long as its replica lives.
            max_task_retries=-1,
        )


def _configure_ray_data() -> None:
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    context = DataContext.get_current()
    context.target_max_block_size = None  # a block is a shard: never split
    context.raise_original_map_exception = True  # else the cause is lost on its way to the driver
    context.enable_progress_bars = False
    context.execution_options.preserve_order = False
    context.execution_options.verbose_progress = False


def _read_block(shard: Shard, columns: InputColumns) -> list[pa.Table]:
    return [input_block(shard, read_shard(shard, columns))]


@contextmanager
def _polling(keeper: Any, on_tally: Callable[[Tally], None]) -> Iterator[None]:
    """Hand the replicas' counts to ``on_tally`` once a second while the flow runs."""
    stopped = threading.Event()

    def poll() -> None:
        while not stopped.wait(_TALLY_INTERVAL_S):
            try:
                on_tally(ray.get(keeper.read.remote(), timeout=5 * _TALLY_INTERVAL_S))
            except RayError as error:
                log.debug("no progress counts: %s", error)

    thread = threading.Thread(target=poll, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


def _accelerator(resources: dict[str, float]) -> str | None:
    prefix = "accelerator_type:"
    return next((key[len(prefix) :] for key in resources if key.startswith(prefix)), None)
