"""The job's configuration: a YAML file plus ``--set key.path=value`` overrides, checked once.

In: a path and overrides. Out: a frozen ``JobConfig``, or a ``ConfigError`` of one sentence that
names the file, the key and the nearest valid key. Imports neither torch, ray nor vllm, so that a
wrong config is refused at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from pipeline.deadline import check_deadline
from pipeline.errors import ConfigError
from pipeline.sampling import SamplingDefaults
from pipeline.validation import describe

Columns = dict[str, str]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def _check_uris(value: Any) -> Any:
    uris = value if isinstance(value, list) else [value]
    if not uris or not all(isinstance(uri, str) and uri for uri in uris):
        raise ValueError("must be a URI or a path, or a list of them")
    return value


class InputSection(_Section):
    """Where the rows come from."""

    uri: Annotated[str | list[str], BeforeValidator(_check_uris)]
    """Parquet or OpenAI batch JSONL: a file, a folder (searched recursively), a glob, or a list of
    those; file://, s3://, gs://, a path."""
    columns: Columns = {}
    """Our column name -> the input's column name, where they differ; of Parquet."""


class OutputSection(_Section):
    """Where the run folder goes."""

    uri: Annotated[str, Field(min_length=1)]
    """The run folder. One folder is one run: the same command on it resumes."""
    carry: list[str] | None = None
    """Input columns copied to the output; null = all but prompt, messages, images and sampling."""


class EngineSection(_Section):
    """Which engine, and how many of it."""

    profile: Annotated[str, Field(min_length=1)]
    """Name of a file in cluster/engines/ (without .yaml), or a path to a profile."""
    replicas: Annotated[int, Field(ge=1)] = 1
    """Number of engines (model copies) that work side by side."""
    overrides: dict[str, Any] = {}
    """vLLM engine arguments that replace the profile's, checked against vLLM's own names."""


class LimitsSection(_Section):
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


class ImagesSection(_Section):
    """Which images rows may name by URI, beside those in the input's own bucket or folder."""

    roots: list[str] = []
    """Further folders or buckets that may be read, e.g. s3://photos/public."""
    domains: list[str] = []
    """Web hosts that may be read: name, *.name (hosts below it) or name:port; empty = none."""
    timeout_s: Annotated[float, Field(gt=0)] = 30
    """Seconds one image may take from a web host, with redirects and attempts."""


class JobConfig(_Section):
    """One batch-inference run."""

    name: Annotated[str, Field(min_length=1)] = "nightly"
    """A name for people: logs and the report show it."""
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


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> JobConfig:
    """Read ``path``, apply ``key.path=value`` overrides (values are YAML), and check the whole.

    Raises:
        ConfigError: no such file, no YAML, an unknown key, or a value out of its range.
    """
    source = Path(path)
    document = _read_yaml(source)
    for override in overrides:
        document = _apply_override(document, override)
    return parse_config(document, source=str(source))


def parse_config(document: Mapping[str, Any], *, source: str) -> JobConfig:
    """Check a config that is already parsed; ``source`` names it in errors."""
    try:
        return JobConfig.model_validate(document)
    except ValidationError as error:
        raise ConfigError(f"{source}: {describe(error, JobConfig)}") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file; pass one with --config.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text ({error}).") from None
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
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
    except yaml.YAMLError:
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
