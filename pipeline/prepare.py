"""prepare: input rows -> Prepared | Failure, on CPU tasks, before any engine is involved.

In: one shard's input block. Out: its prepared block: parameters checked, images fetched and
sized, the chat rendered and tokenized, tokens counted, seeds derived. What is wrong with a row is
found here and costs that row only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline import storage
from pipeline.arrow_types import conformed
from pipeline.digests import digest_tokens
from pipeline.errors import ErrorCode, InputError, RowError
from pipeline.fetch import Fetched, ImageFetcher, check_size
from pipeline.images import image_size
from pipeline.messages import Chat, RawPrompt, parse_chat
from pipeline.model import ModelSpec, PromptFormat, load_prompt_format, server_defaults
from pipeline.openai_input import BatchLine, Endpoint, read_line
from pipeline.plan import FirstUse, Shard
from pipeline.read import REQUEST_COLUMNS, InputColumns
from pipeline.records import (
    Failure,
    Prepared,
    Status,
    block_shard,
    input_columns,
    prepared_block,
    read_first_uses,
)
from pipeline.sampling import (
    DefaultsOf,
    Sampling,
    SamplingDefaults,
    offered_tools,
    parse_json_sampling,
    parse_row_sampling,
    resolve,
    without_nulls,
)
from pipeline.seeds import derive_seed, sample_seed
from pipeline.template import ROW_PREFIX, Renderer
from pipeline.values import Unreadable, rows_of

log = logging.getLogger(__name__)

_MAX_IMAGES = 999  # vLLM's own default
_RAW_COMPLETION_TOKENS = 16  # OpenAI's and vLLM's default of /v1/completions
_NO_SEED = -1  # as in vLLM
_PARSED = frozenset(REQUEST_COLUMNS) - {"custom_id"}
"""Columns whose JSON is parsed; an id and a template's column keep the text, digit by digit."""


@dataclass(frozen=True, slots=True)
class PrepareSpec:
    """What prepare needs to know of the run; small and picklable."""

    model: ModelSpec
    columns: InputColumns
    sampling: SamplingDefaults
    run_seed: int
    max_image_pixels: int
    fetcher: ImageFetcher
    model_names: tuple[str, ...] = ()
    """What a batch line's ``body.model`` may be."""
    max_images: int = _MAX_IMAGES
    """Most images of one row, checked before any is fetched."""
    renderer: Renderer | None = None
    """Makes requests of rows; None: they are some."""
    defaults: DefaultsOf = DefaultsOf.PROGRAM
    """Whose defaults batch lines fall back to; rows of Parquet have the program's."""


@dataclass(frozen=True, slots=True)
class _Parsed:
    """A row whose request has been understood but not yet rendered."""

    row: int
    custom_id: str
    chat: Chat | RawPrompt
    sampling: Sampling
    seeds: tuple[int, ...]
    """One per sample."""
    tools: list[dict[str, Any]]
    """What the chat template tells the model of."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """The parameters of a row."""

    own: SamplingDefaults
    resolved: Sampling


class _Parameters:
    """Parameters of a block's rows, parsed and resolved once per distinct value."""

    def __init__(
        self, defaults: SamplingDefaults, bases: Mapping[Endpoint | None, SamplingDefaults]
    ) -> None:
        """``bases`` has what ``defaults`` fall back to, by the line's endpoint."""
        self._defaults = defaults
        self._bases = bases
        self._known: dict[tuple[Endpoint | None, str], _Asked] = {}

    def of(
        self,
        given: Any,
        parse: Callable[[Any], SamplingDefaults],
        endpoint: Endpoint | None = None,
    ) -> _Asked:
        """What ``given``, a row's own, comes to.

        Raises:
            RowError: ``invalid_parameter``.
        """
        # repr tells apart all that JSON and Arrow know, 1, 1.0, "1" and true too
        key = (endpoint, repr(given))
        if key not in self._known:
            own = parse(given)
            resolved = resolve(self._defaults, own, self._bases.get(endpoint))
            self._known[key] = _Asked(own, resolved)
        return self._known[key]


@dataclass(frozen=True, slots=True)
class _Rendered:
    """A row whose prompt is text, to be tokenized with those of the other rows."""

    parsed: _Parsed
    images: tuple[bytes, ...]
    text: str

    @property
    def is_raw(self) -> bool:
        """Whether the tokenizer's special tokens are added; a chat template writes its own."""
        return isinstance(self.parsed.chat, RawPrompt)

    @property
    def token_ids(self) -> list[int]:
        """The tokens of a row that brings them; empty: ``text`` is to be tokenized."""
        return list(self.parsed.chat.token_ids) if isinstance(self.parsed.chat, RawPrompt) else []


def prepare_block(block: pa.Table, *, spec: PrepareSpec) -> pa.Table:
    """One shard's prepared block; row order and count are kept.

    Raises:
        StorageError, ConfigError: the model's files cannot be read on this node.
    """
    prompts = load_prompt_format(spec.model)
    shard = block_shard(block)
    rows = _input_rows(block, spec.columns)
    parameters = _Parameters(spec.sampling, _bases(spec, server_defaults))
    parsed = [
        _parse(number, row, earlier, spec, shard.uri, parameters)
        for (number, row), earlier in zip(rows, read_first_uses(block), strict=True)
    ]
    images = spec.fetcher.fetch(
        source
        for item in parsed
        if isinstance(item, _Parsed)
        for source in item.chat.images
        if isinstance(source, str)
    )
    rendered = [
        item if isinstance(item, Failure) else _render(item, images, prompts, spec)
        for item in parsed
    ]
    items = _tokenized(rendered, prompts, spec)
    return prepared_block(shard, items, carried(block, spec.columns))


def _bases(
    spec: PrepareSpec, of_server: Callable[[ModelSpec], SamplingDefaults]
) -> Mapping[Endpoint | None, SamplingDefaults]:
    """What the run's defaults fall back to, by endpoint."""
    if spec.defaults is DefaultsOf.PROGRAM:
        return {}
    server = of_server(spec.model)
    short = server.model_copy(update={"max_completion_tokens": _RAW_COMPLETION_TOKENS})
    return {Endpoint.CHAT: server, Endpoint.COMPLETIONS: short}


def expired_rows(block: pa.Table, spec: PrepareSpec) -> list[Failure]:
    """An ``expired`` record for each sample of an input block; nothing is judged or fetched."""
    uri = block_shard(block).uri
    no_limit = SamplingDefaults(max_completion_tokens=spec.model.max_model_len)
    parameters = _Parameters(spec.sampling, _bases(spec, lambda _: no_limit))
    return [
        expired
        for number, row in _input_rows(block, spec.columns)
        for expired in _expired(_parse(number, row, None, spec, uri, parameters))
    ]


def _expired(item: _Parsed | Failure) -> list[Failure]:
    seeds: tuple[int, ...]
    if isinstance(item, Failure):
        row, custom_id, seeds = item.input_row, item.custom_id, (item.seed,)
    else:
        row, custom_id, seeds = item.row, item.custom_id, item.seeds
    message = "limits.deadline passed before it was generated; --retry expired reopens it"
    return [
        Failure(
            row, custom_id, ErrorCode.BATCH_EXPIRED, message, seed, index, status=Status.EXPIRED
        )
        for index, seed in enumerate(seeds)
    ]


def _input_rows(block: pa.Table, columns: InputColumns) -> list[tuple[int, dict[str, Any]]]:
    """(row number, {our name: value}) of each row; columns a file lacks are absent."""
    everything = input_columns(block)
    names = set(everything.column_names)
    present = {ours: theirs for ours, theirs in columns.request.items() if theirs in names}
    table = pa.table({ours: everything.column(theirs) for ours, theirs in present.items()})
    rows = rows_of(table, parsed=_PARSED) if present else [{}] * block.num_rows
    return list(zip(block.column("input_row").to_pylist(), rows, strict=True))


def carried(block: pa.Table, columns: InputColumns) -> pa.Table:
    """The columns to carry of an input block, in input order."""
    table = input_columns(block).select(columns.carried.names)
    shard = block_shard(block)
    arrays = [_conformed(table.column(field.name), field, shard) for field in columns.carried]
    return pa.table(arrays, schema=columns.carried)


def _conformed(column: pa.ChunkedArray, field: pa.Field, shard: Shard) -> pa.ChunkedArray:
    try:
        return conformed(column, field.type)
    except pa.ArrowInvalid as error:
        last = shard.first_row + shard.rows - 1
        raise InputError(
            f"{shard.uri}: rows {shard.first_row}-{last} of column {field.name!r} cannot be "
            f"carried as {field.type} ({error}); leave it out of output.carry, or lower "
            "limits.shard_rows if they are too large; either with --new-run, as a resume keeps its "
            "shards"
        ) from None


def _parse(
    number: int,
    row: Mapping[str, Any],
    earlier: FirstUse | None,
    spec: PrepareSpec,
    input_file: str,
    parameters: _Parameters,
) -> _Parsed | Failure:
    line = read_line(row["line"]) if spec.columns.is_jsonl else None
    given = line.custom_id if line else row.get("custom_id")
    usable = given is not None and not isinstance(given, Unreadable)
    custom_id = str(given) if usable else f"{storage.name(input_file)}:{number}"
    try:
        if earlier is not None:
            raise _duplicate(custom_id, earlier)
        chat, asked = _request(row, line, spec, parameters)
        own, sampling = asked.own, asked.resolved
        if len(chat.images) > spec.max_images:
            raise RowError(
                ErrorCode.INVALID_MESSAGES,
                f"{len(chat.images)} images; the engine's limit_mm_per_prompt allows "
                f"{spec.max_images}",
            )
        if isinstance(chat, RawPrompt) and sampling.tool_use:
            raise RowError(ErrorCode.INVALID_PARAMETER, "tools want a chat, not a raw prompt")
    except Exception as error:  # noqa: BLE001 - told apart in _row_error
        failed = _row_error(error, custom_id)
        seed = derive_seed(spec.run_seed, custom_id, 0)
        return Failure(number, custom_id, failed.code, failed.message, seed)
    seeds = _seeds(custom_id, own.seed, sampling.n, spec)
    return _Parsed(number, custom_id, chat, sampling, seeds, offered_tools(spec.sampling, own))


def _request(
    row: Mapping[str, Any], line: BatchLine | None, spec: PrepareSpec, parameters: _Parameters
) -> tuple[Chat | RawPrompt, _Asked]:
    """What a row, or a line of JSONL, asks for, and its parameters."""
    if line:
        request = line.request(spec.model_names)
        asked = parameters.of(request.parameters, parse_json_sampling, line.endpoint)
        return request.chat, asked
    for name, value in row.items():
        if isinstance(value, Unreadable):
            shown = name.removeprefix(ROW_PREFIX)
            raise RowError(ErrorCode.INVALID_MESSAGES, f"{shown} {value.reason}")
    if spec.renderer is not None:
        return _rendered_request(row, spec.renderer), parameters.of(None, parse_row_sampling)
    asked = parameters.of(row.get("sampling"), parse_row_sampling)
    messages = without_nulls(row.get("messages"))
    return parse_chat(row.get("prompt"), messages, row.get("images")), asked


def _rendered_request(row: Mapping[str, Any], renderer: Renderer) -> Chat:
    """What the run's template makes of a row."""
    if renderer.template.requires_id and row.get("custom_id") is None:
        raise RowError(ErrorCode.TEMPLATE_ERROR, "the key column is null; give each row a key")
    prefixed = ((name, value) for name, value in row.items() if name.startswith(ROW_PREFIX))
    request = renderer.request({name.removeprefix(ROW_PREFIX): value for name, value in prefixed})
    return parse_chat(None, request.messages, request.images)


def _duplicate(custom_id: str, earlier: FirstUse) -> RowError:
    return RowError(
        ErrorCode.DUPLICATE_CUSTOM_ID,
        f"custom_id {custom_id!r} was used before, by row {earlier.row} of {earlier.uri}; "
        "give each row its own",
    )


def _row_error(error: Exception, custom_id: str) -> RowError:
    """The one place where any fault of one row becomes that row's record."""
    if isinstance(error, RowError):
        return error
    log.error("row %r could not be prepared", custom_id, exc_info=error)
    message = f"{type(error).__name__}: {error}"
    return RowError(ErrorCode.INTERNAL_ERROR, message)


def _render(
    item: _Parsed, fetched: Mapping[str, Fetched], prompts: PromptFormat, spec: PrepareSpec
) -> _Rendered | Failure:
    try:
        prompts.check_token_ids(item.sampling.logit_bias, "logit_bias")
        prompts.check_token_ids(item.sampling.stop_token_ids, "stop_token_ids")
        images = tuple(_image(source, fetched, spec) for source in item.chat.images)
        if isinstance(item.chat, RawPrompt):
            prompts.check_size(item.chat.text)
            prompts.check_prompt_ids(item.chat.token_ids)
            return _Rendered(item, images, item.chat.text)
        return _Rendered(item, images, prompts.render(item.chat.messages, item.tools))
    except Exception as error:  # noqa: BLE001 - told apart in _row_error
        return _failure(item, error)


def _tokenized(
    items: Sequence[_Rendered | Failure], prompts: PromptFormat, spec: PrepareSpec
) -> list[Prepared | Failure]:
    """``items`` with their texts tokenized together, apart by whether special tokens are added."""
    texts = [item for item in items if isinstance(item, _Rendered) and not item.token_ids]
    ids = {
        kind: iter(_encode([r.text for r in texts if r.is_raw is kind], prompts, special=kind))
        for kind in (False, True)
    }
    return [
        item
        if isinstance(item, Failure)
        else _prepare(item, item.token_ids or next(ids[item.is_raw]), prompts, spec)
        for item in items
    ]


def _encode(
    texts: list[str], prompts: PromptFormat, *, special: bool
) -> list[list[int] | Exception]:
    """Each text's token ids, or why it has none: one that cannot be tokenized fails alone."""
    try:
        return list(prompts.encode(texts, special_tokens=special))
    except Exception as error:  # noqa: BLE001 - told apart in _row_error
        if len(texts) == 1:
            return [error]
        return [ids for text in texts for ids in _encode([text], prompts, special=special)]


def _prepare(
    rendered: _Rendered, ids: list[int] | Exception, prompts: PromptFormat, spec: PrepareSpec
) -> Prepared | Failure:
    item, images = rendered.parsed, rendered.images
    image_tokens = prompt_tokens = 0  # a failure tells what was counted until then
    try:
        token_ids = _truncated(_checked_ids(ids), item, prompts.max_model_len)
        image_tokens = _count_image_tokens(images, token_ids, prompts, spec)
        prompt_tokens = len(token_ids) - len(images) + image_tokens
        _check_length(prompt_tokens, prompts.max_model_len)
    except Exception as error:  # noqa: BLE001 - told apart in _row_error
        return _failure(item, error, prompt_tokens=prompt_tokens, image_tokens=image_tokens)
    return Prepared(
        input_row=item.row,
        custom_id=item.custom_id,
        token_ids=token_ids,
        images=images,
        image_tokens=image_tokens,
        prompt_tokens=prompt_tokens,
        sampling=item.sampling,
        seeds=item.seeds,
        digest=digest_tokens(token_ids, images),
    )


def _checked_ids(ids: list[int] | Exception) -> list[int]:
    if isinstance(ids, Exception):
        raise ids
    return ids


def _truncated(token_ids: list[int], item: _Parsed, max_model_len: int) -> list[int]:
    """The last tokens of the prompt, as many as the row asks for."""
    most = item.sampling.truncate_prompt_tokens
    if most is None:
        return token_ids
    if item.chat.images:
        raise RowError(
            ErrorCode.INVALID_PARAMETER,
            "truncate_prompt_tokens: is for prompts without images, which it could cut in two",
        )
    return token_ids[-(max_model_len - 1 if most == -1 else most) :]


def _failure(
    item: _Parsed, error: Exception, *, prompt_tokens: int = 0, image_tokens: int = 0
) -> Failure:
    failed = _row_error(error, item.custom_id)
    return Failure(
        item.row,
        item.custom_id,
        failed.code,
        failed.message,
        item.seeds[0],
        prompt_tokens=prompt_tokens,
        image_tokens=image_tokens,
        sampling=item.sampling.as_json,
    )


def _seeds(custom_id: str, own: int | None, samples: int, spec: PrepareSpec) -> tuple[int, ...]:
    """One seed per sample: the row's ``own`` plus the sample's index, else derived."""
    own = spec.sampling.seed if own is None else own
    if own is None or own == _NO_SEED:
        return tuple(derive_seed(spec.run_seed, custom_id, i) for i in range(samples))
    return tuple(sample_seed(own, i) for i in range(samples))


def _image(source: bytes | str, fetched: Mapping[str, Fetched], spec: PrepareSpec) -> bytes:
    found = fetched[source] if isinstance(source, str) else source
    if isinstance(found, RowError):
        raise found
    return check_size(found, spec.fetcher.max_bytes)


def _count_image_tokens(
    images: tuple[bytes, ...], token_ids: list[int], prompts: PromptFormat, spec: PrepareSpec
) -> int:
    prompts.check_images(token_ids, len(images))
    sizes = [image_size(data, max_pixels=spec.max_image_pixels) for data in images]
    return sum(prompts.images.tiling.tokens(*size) for size in sizes) if prompts.images else 0


def _check_length(prompt_tokens: int, max_model_len: int) -> None:
    if prompt_tokens >= max_model_len:
        raise RowError(
            ErrorCode.CONTEXT_LENGTH_EXCEEDED,
            f"the prompt has {prompt_tokens} tokens; the engine's max_model_len is "
            f"{max_model_len}, and one must be left for the completion",
        )
