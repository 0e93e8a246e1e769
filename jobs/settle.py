"""What a job settles before anything starts: config, engine, input, run folder, cluster.

In: a ``JobConfig`` and the command line's ``Options``. Out: a ``Job``, or an error of one sentence.
Nothing is written and no engine is started here.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from pipeline import storage
from pipeline.capacity import PREPARE_CPUS, NodeCapacity, missing, this_machine
from pipeline.commit import Destination
from pipeline.config import JobConfig
from pipeline.deadline import resolve_deadline
from pipeline.engine import Engine
from pipeline.engine_spec import EngineSpec
from pipeline.errors import CapacityError, ConfigError, InputError, RowError, StorageError
from pipeline.fetch import ImageFetcher, check_size
from pipeline.hardware import usable_cpus
from pipeline.input_files import HIDDEN
from pipeline.model import ImageFormat, ModelSpec, accepted_names, load_prompt_format
from pipeline.plan import InputFile
from pipeline.prepare import PrepareSpec
from pipeline.prices import PriceList, load_prices
from pipeline.profile import EngineProfile, load_profile, locate_model
from pipeline.read import Input, open_input
from pipeline.replica import ReplicaLimits
from pipeline.report import Result, RunStatus, total
from pipeline.run import Run, check_not_emptied, open_run, planned_files
from pipeline.sampling import DefaultsOf
from pipeline.template import Renderer
from pipeline.web import WebReader

if TYPE_CHECKING:
    from pipeline.flow import FlowSpec

log = logging.getLogger(__name__)

_UPLOADED = "/working_dir_files/"
"""In the path of every copy of a working folder that ``ray job submit`` made."""
_WILL_GROW = "its autoscaler is asked for more nodes"
"""What becomes of what a cluster lacks, if it grows."""


@dataclass(frozen=True)
class Options:
    """What a command line says of one start, beside the config."""

    retry: Collection[str] = frozenset()
    """Statuses and error codes of records to do again."""
    new_run: bool = False
    """Whether to discard what the output folder holds."""
    accept_changed: Sequence[str] = ()
    """Of ``run.ACCEPTABLE_CHANGES``, those a continued run may go on with."""
    wait: bool = False
    """Whether to wait for another driver of the run rather than fail."""
    dry_run: bool = False
    """Whether to check and tell only."""


@dataclass(frozen=True)
class Job:
    """Everything the job settled before starting anything."""

    config: JobConfig
    profile: EngineProfile
    prices: PriceList
    found: Input
    renderer: Renderer | None
    """What makes requests of rows; None: they are some."""
    run: Run
    start_engine: Callable[[EngineSpec], Engine]
    started: float
    """By the monotonic clock."""
    deadline: datetime | None
    options: Options
    open_run: Callable[[], Run]
    """Looks at the output folder anew."""

    @property
    def to(self) -> Destination:
        """Where the records go."""
        return self.run.to

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.started


def settle(
    config: JobConfig, options: Options, start_engine: Callable[[EngineSpec], Engine]
) -> Job:
    """Check everything that can be checked without an engine, a cluster or a write.

    Args:
        config: the job.
        options: of this start.
        start_engine: builds a replica's engine on its node; must be picklable.

    Raises:
        UsageError: config, input or output folder do not fit.
    """
    started = time.monotonic()
    if options.retry and options.new_run:
        raise ConfigError("give --retry or --new-run, not both.")
    profile = load_profile(config.engine.profile, overrides=config.engine.overrides)
    prices = load_prices(config.prices)
    found = _find_input(config, new_run=options.new_run)
    check_place(config, found)
    for left_out in found.left_out:
        if left_out.reason != HIDDEN:
            log.warning("input: %s", left_out)
    for near_miss in found.near_misses:
        log.warning("input: %s", near_miss)
    deadline = config.limits.deadline

    def look() -> Run:
        return open_run(
            config,
            profile,
            found,
            new_run=options.new_run,
            accept_changed=options.accept_changed,
        )

    run = look()
    return Job(
        config=config,
        profile=profile.at(run.manifest["model"]["revision"]),
        prices=prices,
        found=found,
        renderer=renderer_of(config),
        run=run,
        start_engine=start_engine,
        started=started,
        deadline=resolve_deadline(deadline, started=datetime.now(UTC)) if deadline else None,
        options=options,
        open_run=look,
    )


def configured_input(config: JobConfig, planned: Sequence[InputFile]) -> Input:
    """Open the job's input with the columns that its template takes, if it has one.

    Args:
        config: the job.
        planned: files as a saved plan has them, none before there is one.

    Raises:
        InputError: as ``open_input``.
    """
    template = config.input.template
    return open_input(
        config.input.uri,
        renamed=config.input.columns,
        carry=config.output.carry,
        template=None if template is None else template.columns,
        planned=planned,
    )


def _find_input(config: JobConfig, *, new_run: bool) -> Input:
    try:
        return configured_input(config, () if new_run else planned_files(config.output.uri))
    except InputError:
        if not new_run:
            check_not_emptied(config)
        raise


def check_place(config: JobConfig, found: Input) -> None:
    """An output inside the input's folder would be read as input by the next run, one in the very
    folder of an input file could replace that, one among a run's parts would count as that run's;
    one in the folder that ``ray job submit`` uploads would go with it.

    Raises:
        ConfigError: it is inside, and no folder between them starts with _; or it is in a copy.
    """
    target = storage.absolute(config.output.uri).rstrip("/")
    if _UPLOADED in target:
        raise ConfigError(
            f"output.uri {config.output.uri} lies in the copy of the working folder that `ray job "
            "submit` makes, and Ray deletes it after the job; give a bucket, or an absolute path "
            "that all nodes share."
        )
    for source in found.roots:
        if not f"{target}/".startswith(f"{source}/") or "/_" in target.removeprefix(source):
            continue
        if source in found.searched:
            raise ConfigError(
                f"output.uri {config.output.uri} lies inside input.uri {config.input.uri}: the "
                "next run would read it as input; put it beside, or below a folder that starts "
                "with _."
            )
        if target == source:
            raise ConfigError(
                f"output.uri {config.output.uri} is the folder of input.uri {config.input.uri}, "
                "which an output file could replace; give a folder of its own."
            )
        if source.endswith("/data") and storage.exists(f"{source.removesuffix('data')}run.json"):
            raise ConfigError(
                f"output.uri {config.output.uri} lies among the parts of the run at "
                f"{source.removesuffix('/data')}, and would count as that run's; give a folder "
                "outside of it."
            )


def describe(job: Job) -> Result:
    """What would run, and whether the cluster can hold it."""
    nodes, grows = _nodes()
    check_capacity(job, nodes, grows=grows)
    run = job.run
    rows_left = sum(shard.rows for shard in run.pending)
    log.info(
        "would run %d of %d rows in %d shards on %d x %s (%s) into %s",
        rows_left,
        run.plan.rows,
        len(run.pending),
        job.config.engine.most_replicas,
        job.config.engine.profile,
        run.manifest["model"]["name"],
        run.uri,
    )
    details: dict[str, Any] = {
        "pending_rows": rows_left,
        "pending_shards": len(run.pending),
        "left_out": [asdict(each) for each in job.found.left_out],
        "near_misses": list(job.found.near_misses),
    }
    images = _image_format(job.profile)
    if images is not None:
        details["image_tokens_max"] = images.tiling.most_tokens
        log.info(
            "an image takes at most %d prompt tokens (%d tiles; "
            "engine.overrides.mm_processor_kwargs.max_patches lowers that)",
            images.tiling.most_tokens,
            images.tiling.max_tiles,
        )
    _describe_concurrency(job.profile)
    _describe_lengths(job)
    return Result(
        status=RunStatus.DRY_RUN,
        run=run.uri,
        rows_total=run.plan.rows,
        totals=total([]),
        seconds=job.seconds,
        details=details,
    )


def _describe_concurrency(profile: EngineProfile) -> None:
    longest = profile.engine_args["max_model_len"]
    fitting = profile.sequences(longest)
    if fitting is not None:
        log.info(
            "an engine runs at most %d sequences at a time; of %d tokens (max_model_len) its KV "
            "cache holds %d%s",
            profile.engine_args["max_num_seqs"],
            longest,
            fitting,
            " per data-parallel rank" if profile.data_parallel_size > 1 else "",
        )


def _describe_lengths(job: Job) -> None:
    sampling = job.config.sampling
    limit = sampling.max_completion_tokens or sampling.max_tokens
    if job.run.defaults is DefaultsOf.SERVER and limit is None:
        log.info(
            "lines without max_tokens may go on to the end of the context (max_model_len, %d "
            "tokens); sampling.max_completion_tokens is a limit for them",
            job.profile.engine_args["max_model_len"],
        )


def _image_format(profile: EngineProfile) -> ImageFormat | None:
    """How images stand in the model's prompts; None: a text model, or not to be had here."""
    try:
        return load_prompt_format(model_spec(profile)).images
    except (ConfigError, OSError, ValueError) as error:  # the nodes may have what the driver lacks
        log.info("what an image costs is not known here: %s", error)
        return None


def model_spec(profile: EngineProfile) -> ModelSpec:
    return ModelSpec.from_engine_args(profile.model, profile.revision, profile.engine_args)


def prepare_spec(job: Job) -> PrepareSpec:
    """What the prepare step needs to know of the job."""
    config, profile = job.config, job.profile
    return PrepareSpec(
        model=model_spec(profile),
        columns=job.found.columns,
        sampling=config.sampling,
        run_seed=config.seed,
        max_image_pixels=config.limits.max_image_pixels,
        **_max_images(profile),
        fetcher=_fetcher(job),
        renderer=job.renderer,
        model_names=accepted_names(locate_model(profile.model), profile.engine_args),
        defaults=job.run.defaults,
    )


def flow_spec(job: Job) -> FlowSpec:
    from pipeline.actor import ReplicaSpec
    from pipeline.flow import FlowSpec

    config, profile = job.config, job.profile
    limits = config.limits
    replica = ReplicaSpec(
        to=job.to,
        engine=EngineSpec(profile.model, profile.revision, profile.engine_args, profile.env),
        start_engine=job.start_engine,
        limits=ReplicaLimits(
            row_timeout_s=limits.row_timeout_s,
            stall_s=limits.stall_s,
            start_s=limits.start_s,
            flush_s=limits.journal_s,
            flush_rows=limits.journal_rows,
        ),
        started=time.time() - job.seconds,
        run_name=config.name,
    )
    return FlowSpec(
        replica=replica,
        prepare=prepare_spec(job),
        columns=job.found.columns,
        files={file.uri: file for file in job.run.plan.files},
        duplicates=job.run.duplicates,
        replicas=config.engine.most_replicas,
        needs=profile.needs,
        stall_s=limits.stall_s,
        drain_s=limits.drain_s,
    )


def renderer_of(config: JobConfig) -> Renderer | None:
    """The template's, with the images of its examples, which are read here and now."""
    template = config.input.template
    if template is None:
        return None
    try:
        images = [
            [check_size(storage.read_bytes(uri), config.limits.max_image_bytes) for uri in uris]
            for uris in (example.images for example in template.examples)
        ]
    except (FileNotFoundError, StorageError, RowError) as error:
        raise ConfigError(f"an image of the template's examples cannot be read: {error}") from None
    return Renderer(template, images)


def _fetcher(job: Job) -> ImageFetcher:
    allowed, limits = job.config.images, job.config.limits
    size, at_a_time = limits.max_image_bytes, limits.image_fetch_concurrency
    web = WebReader(tuple(allowed.domains), allowed.timeout_s, size, at_a_time)
    return ImageFetcher(job.found.roots[0], size, at_a_time, tuple(allowed.roots), web)


def _max_images(profile: EngineProfile) -> dict[str, int]:
    """The engine's own limit, where its profile sets one: a number, or vLLM's object of options."""
    limit = (profile.engine_args.get("limit_mm_per_prompt") or {}).get("image")
    count = limit.get("count") if isinstance(limit, Mapping) else limit
    return {} if count is None else {"max_images": int(count)}


def local_cpus() -> int:
    """CPUs of a Ray started in this process: those it may use, and one more slot to prepare with,
    as a replica that takes all of them leaves them idle now and then."""
    return usable_cpus() + PREPARE_CPUS


def _nodes() -> tuple[list[NodeCapacity], bool]:
    """The nodes a run would have, with as little started as possible; whether more may come."""
    here = local_node()
    if here is not None:
        return [here], False
    from pipeline.flow import cluster, cluster_grows, cluster_nodes

    with cluster(local_cpus=local_cpus()):
        return cluster_nodes(), cluster_grows()


def local_node() -> NodeCapacity | None:
    """The one node of a Ray in this process; None where only Ray can tell what there is."""
    return None if os.environ.get("RAY_ADDRESS") else this_machine(cpus=local_cpus())


def check_capacity(job: Job, nodes: Sequence[NodeCapacity], *, grows: bool = False) -> None:
    """Whether ``nodes`` hold the fewest replicas the job asks for, and what prepares their rows.

    Args:
        job: the job.
        nodes: what the cluster has in total, free or not.
        grows: whether an autoscaler may add nodes: then what is missing is only told.

    Raises:
        CapacityError: they do not, and the cluster does not grow.
    """
    found = lacking(job.config, job.profile, nodes)
    if not found:
        return
    engine = job.config.engine
    told = (
        f"the cluster cannot hold {engine.fewest_replicas} x {engine.profile}: {'; '.join(found)}."
    )
    if not grows:
        raise CapacityError(told)
    log.info("%s %s.", told, _WILL_GROW.capitalize())


def waiting(lacks: Sequence[str]) -> list[str]:
    """What a cluster that grows lacks, with what becomes of it."""
    return [f"{lack}; {_WILL_GROW}" for lack in lacks]


def lacking(config: JobConfig, profile: EngineProfile, nodes: Sequence[NodeCapacity]) -> list[str]:
    """What ``nodes`` lack for the fewest replicas, and for preparing rows beside them."""
    replicas = config.engine.fewest_replicas
    found = missing(profile, replicas, nodes)
    taken = replicas * profile.needs.cpus_per_node * profile.needs.nodes
    if not found and sum(node.cpus for node in nodes) < taken + PREPARE_CPUS:
        found = [f"{PREPARE_CPUS} more CPU to prepare rows with, beside the replicas' {taken}"]
    return found
