"""The job's configuration: a YAML file plus ``--set key.path=value`` overrides, checked once.

In: a path and overrides. Out: a frozen ``JobConfig``, or a ``ConfigError`` of one sentence that
names the file, the key and the nearest valid key. Imports neither torch, ray nor vllm, so that a
wrong config is refused at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

from pipeline.dates import check_date, with_date
from pipeline.deadline import check_deadline
from pipeline.errors import ConfigError
from pipeline.sampling import SamplingDefaults
from pipeline.template import RequestTemplate
from pipeline.validation import VARIANT, describe

Columns = dict[str, str]


class Section(BaseModel):
    """What every part of a config is: frozen, without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def _check_uris(value: Any) -> Any:
    uris = value if isinstance(value, list) else [value]
    if not uris or not all(isinstance(uri, str) and uri for uri in uris):
        raise ValueError("must be a URI or a path, or a list of them")
    return value


class InputSection(Section):
    """Where the rows come from."""

    uri: Annotated[str | list[str], BeforeValidator(_check_uris)]
    """Parquet or OpenAI batch JSONL: a file, a folder (searched recursively), a glob, or a list of
    those; file://, s3://, gs://, a path."""
    columns: Columns = {}
    """Our column name -> the input's column name, where they differ; of Parquet."""
    template: RequestTemplate | None = None
    """How rows that are no requests become some; null: the rows bring prompt or messages."""


class OutputSection(Section):
    """Where the run folder goes."""

    uri: Annotated[str, Field(min_length=1)]
    """The run folder. One folder is one run: the same command on it resumes."""
    carry: list[str] | None = None
    """Input columns copied to the output; null = all but prompt, messages, images and sampling."""


class ReplicaRange(Section):
    """How many engines, where the cluster grows and shrinks."""

    min: Annotated[int, Field(ge=1)]
    """A cluster that does not grow, and cannot hold so many, is refused."""
    max: Annotated[int, Field(ge=1)]
    """So many are asked for, and come and go with the cluster's nodes."""

    @model_validator(mode="after")
    def _check(self) -> ReplicaRange:
        if self.max < self.min:
            raise ValueError(f"max = {self.max} is below min = {self.min}")
        return self


def _replicas_form(value: Any) -> str | None:
    if isinstance(value, Mapping | ReplicaRange):
        return f"{VARIANT}range"
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return f"{VARIANT}number" if is_number else None


class EngineSection(Section):
    """Which engine, and how many of it."""

    profile: Annotated[str, Field(min_length=1)]
    """Name of a file in cluster/engines/ (without .yaml), or a path to a profile."""
    replicas: Annotated[
        Annotated[int, Field(ge=1), Tag(f"{VARIANT}number")]
        | Annotated[ReplicaRange, Tag(f"{VARIANT}range")],
        Discriminator(
            _replicas_form,
            custom_error_type="replicas",
            custom_error_message="must be a number of engines, or a range such as {min: 1, max: 8}",
        ),
    ] = 1
    """Number of engines (model copies) that work side by side, or {min: 1, max: 8}. Each works as
    soon as it is up; one whose node is lost comes back once there is a node for it."""
    overrides: dict[str, Any] = {}
    """vLLM engine arguments that replace the profile's, checked against vLLM's own names."""

    @property
    def fewest_replicas(self) -> int:
        """So many the cluster must be able to hold."""
        return self.replicas.min if isinstance(self.replicas, ReplicaRange) else self.replicas

    @property
    def most_replicas(self) -> int:
        """So many are asked for."""
        return self.replicas.max if isinstance(self.replicas, ReplicaRange) else self.replicas


class LimitsSection(Section):
    """Bounds that keep one bad row, file or host from costing more than itself."""

    max_error_rate: Annotated[float, Field(ge=0.0, le=1.0)] = 0.01
    """Share of errored rows (0-1) above which the run exits with 3, early if it is plain to see."""
    error_rate_min_rows: Annotated[int, Field(ge=1)] = 500
    """Rows of this start before max_error_rate may stop the run early."""
    deadline: Annotated[str | None, BeforeValidator(check_deadline)] = None
    """When to stop, the rest becoming expired: a time with its zone (2026-11-23T06:00Z), or how
    long after the start (6h, 90m, 45s)."""
    row_timeout_s: Annotated[float | None, Field(gt=0)] = None
    """Seconds one request may take inside the engine; null = any."""
    stall_s: Annotated[float, Field(ge=1)] = 300
    """Seconds without progress of a busy engine, or a sign of its process, before a restart."""
    start_s: Annotated[float, Field(gt=0)] = 3600
    """Seconds an engine may take to start, a download of its model included, before its process is
    ended and another one tries."""
    drain_s: Annotated[float, Field(ge=10)] = 30
    """Seconds from SIGTERM to the exit: rows in the engine may finish, finished ones are kept."""
    journal_s: Annotated[float, Field(gt=0)] = 5
    """Seconds a finished row of an open shard may wait to be written: what a crash costs."""
    journal_rows: Annotated[int, Field(ge=1)] = 256
    """Finished rows of one shard that are written before their time."""
    shard_rows: Annotated[int, Field(ge=1, le=100_000)] = 512
    """Most rows in a shard, the unit of work, of commit and of resume."""
    shard_bytes: Annotated[int, Field(ge=1)] = 64 * 2**20
    """Most bytes in a shard (images make rows heavy); estimated from the footers of Parquet."""
    max_image_bytes: Annotated[int, Field(ge=1)] = 20 * 2**20
    """Largest encoded image, bytes."""
    max_image_pixels: Annotated[int, Field(ge=1)] = 64_000_000
    """Largest image, width x height in pixels, checked before it is decoded."""
    image_fetch_concurrency: Annotated[int, Field(ge=1, le=256)] = 16
    """Images fetched at a time by one prepare task."""


class ImagesSection(Section):
    """Which images rows may name by URI, beside those in the input's own bucket or folder."""

    roots: list[str] = []
    """Further folders or buckets that may be read, e.g. s3://photos/public."""
    domains: list[str] = []
    """Web hosts that may be read: name, *.name (hosts below it) or name:port; empty = none."""
    timeout_s: Annotated[float, Field(gt=0)] = 30
    """Seconds one image may take from a web host, with redirects and attempts."""


class PricesSection(Section):
    """What plan and report count money with. It changes no completion, so a run may go on with
    other prices."""

    file: Annotated[str | None, Field(min_length=1)] = None
    """A price list like cluster/prices.yaml, which is the default."""
    gpu_hour: Annotated[float | None, Field(ge=0)] = None
    """What one GPU costs for an hour, in the list's currency; null = the list's price of its
    kind."""


class JobConfig(Section):
    """One batch-inference run."""

    DATED: ClassVar[tuple[str, ...]] = ("input.uri", "output.uri", "images.roots")
    """Keys in whose values ``{date}`` is replaced."""

    name: Annotated[str, Field(min_length=1)] = "nightly"
    """A name for people: logs and the report show it."""
    date: Annotated[str | None, BeforeValidator(check_date)] = None
    """What {date} in input.uri, output.uri and images.roots stands for, YYYY-MM-DD; null = the UTC
    date when the config is loaded. The one that was used is saved with the run."""
    input: InputSection
    """Where the rows come from."""
    output: OutputSection
    """Where the run folder goes."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seeds of rows that bring none are derived from it."""
    sampling: SamplingDefaults = SamplingDefaults()
    """Request parameters of rows that say nothing."""
    engine: EngineSection
    """Which engine, and how many of it."""
    images: ImagesSection = ImagesSection()
    """Which images rows may name by URI."""
    limits: LimitsSection = LimitsSection()
    """Bounds on rows, images and errors."""
    prices: PricesSection = PricesSection()
    """What plan and report count money with."""

    @model_validator(mode="before")
    @classmethod
    def _put_date(cls, document: Any) -> Any:
        return with_date(document, cls.DATED) if isinstance(document, Mapping) else document


Config = TypeVar("Config", bound=BaseModel)


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> JobConfig:
    """Read ``path``, apply ``key.path=value`` overrides (values are YAML), and check the whole.

    Raises:
        ConfigError: no such file, no YAML, an unknown key, or a value out of its range.
    """
    return load_config_as(JobConfig, path, overrides)


def load_config_as(kind: type[Config], path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """As ``load_config``, of a job whose config has other sections.

    Raises:
        ConfigError: no such file, no YAML, an unknown key, or a value out of its range.
    """
    return _checked(kind, read_document(path, overrides), str(path))


def read_document(path: str | Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """What ``load_config`` checks: the YAML with its overrides, as written.

    Raises:
        ConfigError: no such file, no YAML mapping, or an override of another form.
    """
    document = _read_yaml(Path(path))
    for override in overrides:
        document = _apply_override(document, override)
    return document


def parse_config(document: Mapping[str, Any], *, source: str) -> JobConfig:
    """Check a config that is already parsed; ``source`` names it in errors."""
    return _checked(JobConfig, document, source)


def _checked(kind: type[Config], document: Mapping[str, Any], source: str) -> Config:
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        raise ConfigError(f"{source}: {describe(error, kind)}") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file; pass one with --config.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text ({error}).") from None
    try:
        document = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a day that there is not
        detail = " ".join(str(error).split())
        raise ConfigError(f"{path}: is not valid YAML: {detail}.") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: must be a YAML mapping with input, output and engine.")
    return document


def _apply_override(document: Mapping[str, Any], override: str) -> dict[str, Any]:
    """A copy of ``document`` with one ``key.path=value`` set."""
    keys, separator, text = override.partition("=")
    path = keys.strip().split(".")
    if not separator or not all(path):
        raise ConfigError(f"--set {override}: write it as key.path=value, e.g. engine.replicas=2.")
    try:
        value = text if " #" in text else yaml.safe_load(text)  # YAML would drop it as a comment
    except (yaml.YAMLError, ValueError):  # ValueError: a day that there is not
        raise ConfigError(f"--set {override}: the value {text!r} is not valid YAML.") from None
    return _with_value(document, path, value, override)


def _with_value(
    node: Mapping[str, Any], path: list[str], value: Any, override: str
) -> dict[str, Any]:
    head, *rest = path
    if not rest:
        return {**node, head: value}
    child = node.get(head)
    if child is not None and not isinstance(child, Mapping):
        raise ConfigError(f"--set {override}: {head} is a single value, it has no keys below it.")
    return {**node, head: _with_value(child or {}, rest, value, override)}
