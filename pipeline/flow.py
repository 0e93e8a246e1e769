"""The steps as one flow: Ray Data reads and prepares, the pool's replicas generate and commit.

    ShardSource (read) -> prepare_block (prepare) -> ReplicaActor (generate, commit) -> PartStats

With ``blocks``, ``ray_cluster``, ``roster_actor``, ``actor``, ``leaving`` and ``ray_metrics``, what
imports Ray.

In: a ``FlowSpec`` and the shards to do. Out: ``PartStats`` in order of completion. Every block on
the way is exactly one shard: Ray Data may neither split nor merge them, so the block size cap is
off, and each step checks the shard it was given. Blocks stay in Ray's object store; the driver
hands them on (see ``pool``) and looks after the replicas (see ``roster``) meanwhile.
"""

from __future__ import annotations

import logging
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial

import pyarrow as pa
import ray
from ray.data import DataContext
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup

from pipeline import logs
from pipeline.actor import ReplicaSpec
from pipeline.blocks import Blocks, Window, end_datasets, rest_when_idle
from pipeline.budget import Budget
from pipeline.capacity import PREPARE_CPUS, NodeCapacity
from pipeline.children import descendants, reap
from pipeline.commit import PartStats
from pipeline.count import ShardCounts, count_block, spread_rows
from pipeline.cpu import Laps, Step, added, block_cpu, with_cpu
from pipeline.duplicates import Duplicates
from pipeline.errors import CapacityError, EngineError, PipelineError
from pipeline.expire import expire_shard
from pipeline.model import load_prompt_format
from pipeline.plan import OPEN_SHARDS, FirstUse, InputFile, Shard
from pipeline.pool import Pool
from pipeline.prepare import PrepareSpec, prepare_block
from pipeline.profile import Needs
from pipeline.ray_cluster import RayCluster, RayWorker, last_line, node_capacity
from pipeline.read import InputColumns, read_shard
from pipeline.records import block_shard, input_block
from pipeline.redact import configure_logging
from pipeline.roster import Snapshot
from pipeline.roster_actor import RosterActor
from pipeline.survey import Pick
from pipeline.threads import bound_threads

log = logging.getLogger(__name__)

_POLL_S = 0.25
_HUNGRY_POLL_S = 0.02
"""While replicas could take more shards than are prepared."""
_AHEAD = 2
"""Prepared blocks that the driver holds for the next replica that is free."""
_WINDOW_SHARDS = 1_000
"""Shards of one dataset: Ray Data plans them in about a second, before the first is read."""
_WINDOWS_STORE = 0.25
"""Share of the object store that each of two datasets at a time may fill; of one, it is half."""
_LOOK_INTERVAL_S = 1.0
_REPORT_S = 6.0
"""Of the time for an end, what is left for the replicas' processes, the report and Ray."""
_LAST_JOURNAL_S = 4.0
"""Of it, what replicas get to write down what they have, once nobody may finish."""
_DATASETS_END_S = 5.0
"""What Ray Data gets to end what it is at."""
_RAY_END_S = 1.5
"""What Ray's own shutdown takes."""
_STARTS_HERE = 3
"""Of Ray in this process, which may be slow to come up."""
_RAY_ADVICE = "\nFailed to "
"""How the advice begins that Ray Data appends to the message of whatever a step raises."""
_CONNECT_S = 3.0
_NODE_GROUP = "ray.io/node-group"
"""Ray's label of a node, by what made it."""
_IN_PROCESS = "local"
"""To Ray: start one, whatever cluster was started on this machine before."""
_Pool = Pool[PlacementGroup, RayWorker, ray.ObjectRef, str | None]
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
    """Most replicas at a time; fewer while the cluster holds no more."""
    needs: Needs
    stall_s: float
    """Seconds without a pulse of a replica's process before it is ended."""
    drain_s: float
    """Seconds replicas get to write down what they have if the run fails."""
    adjust: Callable[[pa.Table], pa.Table] | None = None
    """What is made of each prepared block before an engine sees it; picklable. None: nothing."""


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
def cluster(*, local_cpus: int, budget: Callable[[], Budget] = Budget) -> Iterator[None]:
    """A connection to the cluster in ``RAY_ADDRESS``, else a Ray of ``local_cpus`` in the process.

    ``budget`` is asked at its end.

    Raises:
        CapacityError: the cluster cannot be reached.
        EngineError: Ray does not start here; the machine may be too busy.
    """
    address = os.environ.get("RAY_ADDRESS") or _IN_PROCESS
    if address == _IN_PROCESS:
        _start_here(local_cpus)
    else:
        _check_answers(address)
        try:
            ray.init(address=address, logging_level=logging.WARNING)
        except Exception as error:
            raise CapacityError(f"cannot use the Ray cluster at {address}: {error}") from error
    try:
        yield
    finally:
        end_datasets(budget().left(_DATASETS_END_S, keep=_RAY_END_S))
        ray.shutdown()


def _start_here(cpus: int) -> None:
    """Ray gives what it starts 30 s, which is little where a machine starts much at once."""
    for attempt in range(1, _STARTS_HERE + 1):
        before = descendants()
        try:
            ray.init(
                address=_IN_PROCESS,
                logging_level=logging.WARNING,
                num_cpus=cpus,
                include_dashboard=False,
            )
            return
        except Exception as error:  # Ray raises a bare Exception when a start times out
            ray.shutdown()  # what it keeps in this process of what it began
            reap(descendants() - before)
            if attempt == _STARTS_HERE:
                raise EngineError(f"Ray could not be started on this machine: {error}") from error
            log.warning("Ray did not start on this machine, and is tried again: %s", error)


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
        node_capacity(node["NodeManagerHostname"], node["Resources"])
        for node in ray.nodes()
        if node["Alive"]
    ]


def cluster_grows() -> bool:
    """Whether the connected cluster's nodes come from KubeRay or ``ray up``, whose autoscalers add
    some for what waits.

    They name each node's group. Ray tells nobody whether the autoscaler itself is on.
    """
    return any(_NODE_GROUP in node["Labels"] for node in ray.nodes() if node["Alive"])


def run_shards(
    spec: FlowSpec, shards: Sequence[Shard], watch: Callable[[Snapshot], Budget | None]
) -> Iterator[PartStats]:
    """Run ``shards`` to committed parts; stats come as parts are committed, in any order.

    Args:
        spec: what the flow's tasks and actors need.
        shards: what to run.
        watch: sees the replicas' state about once a second; None, or what there is to end it all:
            replicas then write down what they have, and some seconds of it are left at the end.

    Raises:
        EngineError: an engine refuses to start, or replicas died again and again.
        StorageError, AccountingError: a part could not be read or written whole.
    """
    roster = RosterActor.start()
    names = [uuid.uuid4().hex for _ in range(min(spec.replicas, len(shards)))]
    replicas = RayCluster(spec.replica, spec.needs, roster.handle)
    with (
        _own_errors(),
        Pool(replicas, names, depth=OPEN_SHARDS + 1, spare_cpus=PREPARE_CPUS) as pool,
        Blocks(_windows(shards, partial(_prepared, spec)), ahead=_AHEAD) as blocks,
    ):
        driver = _Driver(spec, roster, pool, watch)
        budget: Budget | None = None
        try:
            while not (blocks.all_taken and pool.idle):
                if (budget := driver.wants_stop()) is not None:
                    break
                yield from _step(pool, blocks)
        except (PipelineError, RayTaskError) as error:  # what replicas have finished is kept
            log.error("the run fails, replicas write down what they have: %s", last_line(error))
            with suppress(RayError):
                yield from driver.drain(Budget.of(spec.drain_s))
            raise
        if budget is not None:
            yield from driver.drain(budget)


def _step(pool: _Pool, blocks: Blocks) -> Iterator[PartStats]:
    """Hand prepared blocks on, and take what came of others."""
    while pool.waiting < _AHEAD + pool.room and (block := blocks.take()) is not None:
        pool.offer(block)
    pool.all_read = blocks.all_taken
    hungry = pool.room > 0 and not blocks.all_taken
    yield from _committed(pool, _HUNGRY_POLL_S if hungry else _POLL_S)


def _committed(pool: _Pool, timeout_s: float) -> Iterator[PartStats]:
    """One step of the pool: the parts of it; shards that a drain left open have none."""
    return map(PartStats.from_json, filter(None, pool.step(timeout_s)))


def expire_shards(spec: FlowSpec, shards: Sequence[Shard]) -> Iterator[PartStats]:
    """Commit ``shards`` without an engine: what their journals have, and the rest ``expired``.

    Raises:
        StorageError, AccountingError: a part could not be read or written whole.
    """
    expire = partial(expire_shard, to=spec.replica.to, prepare=spec.prepare)
    for table in _tables(spec, shards, expire):
        yield from map(PartStats.from_json, table.column("stats").to_pylist())


def count_shards(spec: FlowSpec, picks: Sequence[Pick]) -> Iterator[ShardCounts]:
    """Read and prepare the picked rows as a run would, and count them; in any order.

    Prepared blocks are counted in the task that made them and go no further. Nothing is written.

    Raises:
        StorageError: an input file cannot be read, or changed.
        EngineError: Ray gave up.
    """
    rows = {pick.shard.index: pick.rows for pick in picks}
    count = partial(_count, spec=spec.prepare, rows=rows)
    for table in _tables(spec, [pick.shard for pick in picks], count):
        yield from map(ShardCounts.from_json, table.column("counts").to_pylist())


class _Driver:
    """The driver's side of the roster: looks, decides, orders."""

    def __init__(
        self,
        spec: FlowSpec,
        roster: RosterActor,
        pool: _Pool,
        watch: Callable[[Snapshot], Budget | None],
    ) -> None:
        self._spec = spec
        self._roster = roster
        self._pool = pool
        self._watch = watch
        self._next_look = 0.0
        self._seen = Snapshot()
        self._made_tokens = 0

    def wants_stop(self) -> Budget | None:
        """Look, at most once a second, and hear what the caller makes of it.

        Raises:
            EngineError: replicas end again and again and get nowhere.
        """
        if time.monotonic() < self._next_look:
            return None
        self._next_look = time.monotonic() + _LOOK_INTERVAL_S
        found = self._roster.look()
        if found is not None:
            self._seen = found
            self._note_progress(found)
            self._replace_hung(found)
        if deaths := self._pool.dead_ends:
            raise EngineError(
                f"{deaths} replicas ended without one more row completed; "
                f"the last error: {self._seen.last_error or 'their processes were killed'}"
            )
        return self._watch(replace(self._seen, lacking=self._pool.lacking))

    def drain(self, budget: Budget) -> Iterator[PartStats]:
        """Have the replicas stop; parts committed meanwhile, until all have or time is up."""
        self._pool.draining, self._pool.budget = True, budget
        self._roster.drain(budget.left(keep=_REPORT_S + _LAST_JOURNAL_S))
        while budget.left(keep=_REPORT_S) and self._pool.working:
            self._roster.look()  # a driver that does not look is taken for dead
            yield from _committed(self._pool, _POLL_S)

    def _note_progress(self, snapshot: Snapshot) -> None:
        if snapshot.made_tokens > self._made_tokens:
            self._made_tokens = snapshot.made_tokens
            self._pool.note_progress()

    def _replace_hung(self, snapshot: Snapshot) -> None:
        """End replicas that have not been heard of; others start in their places."""
        for silent in snapshot.silent:
            if silent.seconds > self._spec.stall_s and self._pool.kill(silent.replica):
                log.warning("a replica was silent for %.0f s and is ended", silent.seconds)


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
    except RayError as error:
        raise EngineError(f"Ray gave up: {last_line(error)}") from error


def _windows(
    shards: Sequence[Shard], dataset: Callable[[Sequence[Shard], float], ray.data.Dataset]
) -> Iterator[Window]:
    """Windows of ``shards``; ``dataset`` gets some, and their share of the object store."""
    share = 2 * _WINDOWS_STORE if len(shards) <= _WINDOW_SHARDS else _WINDOWS_STORE
    for first in range(0, len(shards), _WINDOW_SHARDS):
        some = shards[first : first + _WINDOW_SHARDS]
        yield Window(partial(dataset, some, share), len(some))


def _tables(
    spec: FlowSpec, shards: Sequence[Shard], step: Callable[[pa.Table], pa.Table]
) -> Iterator[pa.Table]:
    """What ``step`` makes of each shard's block, in any order."""

    def dataset(some: Sequence[Shard], share: float) -> ray.data.Dataset:
        return _mapped(spec, some, share, step)

    with _own_errors(), Blocks(_windows(shards, dataset), ahead=_AHEAD) as blocks:
        yield from map(ray.get, blocks)


def _mapped(
    spec: FlowSpec, shards: Sequence[Shard], share: float, step: Callable[[pa.Table], pa.Table]
) -> ray.data.Dataset:
    """The dataset of ``step``'s blocks, one per shard."""
    _configure_ray_data(share)
    read = ray.data.read_datasource(ShardSource(spec, shards), override_num_blocks=len(shards))
    return read.map_batches(step, batch_size=None, batch_format="pyarrow")


def _prepare(
    block: pa.Table, spec: PrepareSpec, adjust: Callable[[pa.Table], pa.Table] | None, run: str
) -> pa.Table:
    bound_threads(PREPARE_CPUS)
    configure_logging(logging.WARNING, "%(levelname)s %(name)s: %(message)s")
    logs.name_process(run=run)
    spent = {Step.RAY: _task_cpu.lap()}
    load_prompt_format(spec.model)
    spent[Step.START] = _task_cpu.lap()
    with logs.about(shard=block_shard(block).index):
        prepared = prepare_block(block, spec=spec)
    if adjust is not None:
        prepared = adjust(prepared)
    spent[Step.PREPARE] = _task_cpu.lap()
    return with_cpu(prepared, added(block_cpu(block), spent))


def _count(block: pa.Table, spec: PrepareSpec, rows: Mapping[int, int]) -> pa.Table:
    bound_threads(PREPARE_CPUS)
    configure_logging(logging.WARNING, "%(levelname)s %(name)s: %(message)s")
    picked = spread_rows(block, rows[block_shard(block).index])
    limit = load_prompt_format(spec.model).max_model_len
    counts = count_block(prepare_block(picked, spec=spec), max_model_len=limit)
    return pa.table({"counts": [counts.to_json()]})


def _prepared(spec: FlowSpec, shards: Sequence[Shard], share: float) -> ray.data.Dataset:
    run = spec.replica.run_name
    prepare = partial(_prepare, spec=spec.prepare, adjust=spec.adjust, run=run)
    return _mapped(spec, shards, share, prepare)


def _configure_ray_data(share: float) -> None:
    """Set what the next dataset takes over; it may fill ``share`` of the object store."""
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    context = DataContext.get_current()
    context.target_max_block_size = None  # a block is a shard: never split
    context.raise_original_map_exception = True  # else the cause is lost on its way to the driver
    rest_when_idle(context)
    context.override_object_store_memory_limit_fraction = share
    context.execution_no_progress_timeout_s = -1  # replicas may need no block for hours
    context.enable_progress_bars = False
    context.execution_options.preserve_order = False
    context.execution_options.verbose_progress = False


def _read_block(
    shard: Shard, columns: InputColumns, planned: InputFile, first_uses: Mapping[int, FirstUse]
) -> list[pa.Table]:
    bound_threads(PREPARE_CPUS)
    between = _task_cpu.lap()
    block = input_block(shard, read_shard(shard, columns, planned=planned), first_uses)
    return [with_cpu(block, {Step.READ: _task_cpu.lap(), Step.RAY: between})]
