"""Request parameters: OpenAI's names, checked in type and range before a GPU is touched.

In: the run's defaults and a row's own parameters (a mapping or a JSON string). Out: one resolved
``Sampling``, or ``RowError(invalid_parameter)`` that names parameter, value and range. A parameter
this version cannot honour is an error, never ignored.

Parquet has no good type for nested parameters (``response_format``, ``tools``, ...): inside a
struct, each of them may be a JSON string as well.

``SamplingDefaults`` is the table of what may be asked for, ``Sampling`` of what is recorded and
handed to the engine. A parameter that vLLM takes as it is stands in both by vLLM's name, and
nowhere else.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from enum import StrEnum
from functools import cached_property, lru_cache
from types import NoneType
from typing import Annotated, Any, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from pipeline.errors import ErrorCode, RowError
from pipeline.structured import ResponseFormat, Structure, StructuredOutputs
from pipeline.tools import ToolChoice, ToolUse, check_tools, tool_structure, tool_use

log = logging.getLogger(__name__)

_MAX_TOKENS = 2**31 - 1  # far above any context; engines count in 32 or 64 bits
_MAX_STOPS = 32  # OpenAI and vLLM's server stop at 4, vLLM itself nowhere
_MAX_BAD_WORDS = 128  # vLLM's limit
_MAX_STOP_TOKENS = 1_000
_MAX_QUOTED = 200  # characters of a value in an error
DEFAULT_COMPLETION_TOKENS = 256  # vLLM's own default, 16, surprises everyone


class DefaultsOf(StrEnum):
    """Whose defaults apply where neither the request nor the config says anything."""

    PROGRAM = "program"
    """Those of ``Sampling``: temperature 1, 256 tokens."""
    SERVER = "server"
    """Those of vLLM's server: the model's ``generation_config.json``, and completions up to the end
    of the context, or of 16 tokens for a raw prompt."""


def _own_tokens(value: Any) -> Any:
    """vLLM's number of likeliest tokens beside each of the prompt: 0 is what ``true`` asks for."""
    if type(value) is int:
        if value != 0:
            raise ValueError("give true (or 0): only the prompt's own tokens are returned")
        return True
    return value


TokenId = Annotated[int, Field(ge=0, le=_MAX_TOKENS)]


class SamplingDefaults(BaseModel):
    """Request parameters as a config or a row may give them; absent ones take the next default."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )

    temperature: Annotated[float | None, Field(ge=0.0, le=2.0)] = None
    """Randomness: 0 is greedy. Default 1."""
    top_p: Annotated[float | None, Field(gt=0.0, le=1.0)] = None
    """Nucleus: the smallest set of tokens with this probability mass. Default 1."""
    top_k: Annotated[int | None, Field(ge=-1, le=_MAX_TOKENS)] = None
    """Most likely tokens considered; 0 or -1 = all. Default all."""
    min_p: Annotated[float | None, Field(ge=0.0, le=1.0)] = None
    """Least probability relative to the likeliest token. Default 0."""
    frequency_penalty: Annotated[float | None, Field(ge=-2.0, le=2.0)] = None
    """Penalty per earlier occurrence in the completion. Default 0."""
    presence_penalty: Annotated[float | None, Field(ge=-2.0, le=2.0)] = None
    """Penalty once a token occurred in the completion. Default 0."""
    repetition_penalty: Annotated[float | None, Field(gt=0.0, le=2.0)] = None
    """Divides the logits of tokens seen in prompt or completion. Default 1."""
    max_completion_tokens: Annotated[int | None, Field(ge=1, le=_MAX_TOKENS)] = None
    """Most tokens generated. Default 256."""
    max_tokens: Annotated[int | None, Field(ge=1, le=_MAX_TOKENS)] = None
    """Deprecated name of max_completion_tokens."""
    stop: str | list[str] | None = None
    """Up to 32 strings that end the completion; they are not part of it."""
    stop_token_ids: Annotated[list[TokenId] | None, Field(max_length=_MAX_STOP_TOKENS)] = None
    """Tokens that end the completion, beside the model's own."""
    include_stop_str_in_output: bool | None = None
    """Whether the text keeps what ended it. Default false."""
    ignore_eos: bool | None = None
    """Whether to go on after the model's end-of-turn tokens. Default false."""
    min_tokens: Annotated[int | None, Field(ge=0, le=_MAX_TOKENS)] = None
    """Fewest tokens generated. Default 0."""
    bad_words: (
        Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=_MAX_BAD_WORDS)]
        | None
    ) = None
    """Words that must not be generated."""
    skip_special_tokens: bool | None = None
    """Whether the text leaves special tokens out. Default true."""
    truncate_prompt_tokens: Annotated[int | None, Field(ge=-1, le=_MAX_TOKENS)] = None
    """Most tokens of the prompt, of which the last ones are kept; -1 = as many as fit. Default: a
    prompt that does not fit is an error."""
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63)] = None
    """The row's own seed, instead of a derived one; samples after the first add their index. -1 is
    none."""
    n: Annotated[int | None, Field(ge=1, le=128)] = None
    """Completions per row, one record each. Default 1."""
    logit_bias: dict[str, Annotated[float, Field(ge=-100.0, le=100.0)]] | None = None
    """Token id -> what is added to its logit, -100 (never) to 100 (always)."""
    logprobs: bool | None = None
    """Whether to return the log probability of each token of the completion. Default false."""
    top_logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    """Likeliest tokens returned beside each; wants logprobs: true. Default 0."""
    prompt_logprobs: Annotated[bool | None, BeforeValidator(_own_tokens)] = None
    """Whether to return the log probability and rank of each token of the prompt. Default false."""
    response_format: ResponseFormat | None = None
    """OpenAI's: any text, a JSON object, or JSON that fits a schema."""
    structured_outputs: StructuredOutputs | None = None
    """vLLM's: one of json (a schema), regex, choice, grammar; instead of response_format."""
    tools: Annotated[list[dict[str, Any]], AfterValidator(check_tools)] | None = None
    """OpenAI's: functions the model may call."""
    tool_choice: ToolChoice | None = None
    """OpenAI's: none, auto, required, or one tool. Default auto with tools."""
    parallel_tool_calls: bool | None = None
    """Whether a completion may call several tools. Default true."""

    @model_validator(mode="after")
    def _check(self) -> SamplingDefaults:
        if isinstance(self.stop, list) and len(self.stop) > _MAX_STOPS:
            raise ValueError(f"stop: at most {_MAX_STOPS} strings, got {len(self.stop)}")
        if self.stop is not None and not all(self.stop_list):
            raise ValueError("stop: an empty string is not allowed")
        if any(not is_utf8(text) for text in self.stop_list):
            raise ValueError("stop: a lone surrogate is not allowed")
        if self.truncate_prompt_tokens == 0:
            raise ValueError("truncate_prompt_tokens = 0: would leave nothing of the prompt")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("give max_completion_tokens or the deprecated max_tokens, not both")
        if self.top_logprobs and self.logprobs is False:
            raise ValueError("top_logprobs wants logprobs: true")
        if self.response_format is not None and self.structured_outputs is not None:
            raise ValueError("give response_format or structured_outputs, not both")
        strange = [key for key in self.logit_bias or () if not _TOKEN_ID.fullmatch(key)]
        if strange:
            raise ValueError(f"logit_bias: {_short(strange[0])} is no token id")
        return self

    @property
    def structure(self) -> Structure | None:
        """The shape asked for, in whichever way."""
        asked = self.response_format or self.structured_outputs
        return asked.structure if asked else None

    @property
    def stop_list(self) -> tuple[str, ...]:
        """``stop`` as a tuple, whichever way it was given."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


def _types(name: str) -> tuple[Any, ...]:
    """The alternatives that a parameter's type has."""
    return get_args(SamplingDefaults.model_fields[name].annotation)


_WHOLE_NUMBERS = frozenset(name for name in SamplingDefaults.model_fields if int in _types(name))
_NESTED = frozenset(
    name
    for name in SamplingDefaults.model_fields
    if str not in _types(name) and set(_types(name)) - {bool, int, float, NoneType}
)
"""Parameters that may be a JSON string instead: their type has more than one value inside."""
_TOKEN_ID = re.compile(r"\d{1,9}", re.ASCII)
REMEDIES = {
    **dict.fromkeys(
        ("continue_final_message", "add_generation_prompt", "chat_template_kwargs"),
        "render the chat yourself, and give the text as a raw prompt to /v1/completions",
    ),
    "chat_template": "put it into the model's folder",
    "reasoning_effort": "say it in the system message, if the model's template reads it there",
    "functions": "give tools",
    "function_call": "give tool_choice",
    "max_new_tokens": "give max_completion_tokens",
    "stop_sequences": "give stop",
    "do_sample": "give temperature: 0 for greedy",
    **{
        f"guided_{kind}": f"give structured_outputs: {{{kind}: ...}}"
        for kind in ("json", "regex", "choice", "grammar")
    },
    "structural_tag": "give a JSON schema, a regex or a grammar",
}
"""What to do about parameters that other programs have."""


class Sampling(BaseModel):
    """Resolved parameters of one row: nothing left to default."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    max_completion_tokens: int = DEFAULT_COMPLETION_TOKENS
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    bad_words: tuple[str, ...] = ()
    skip_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None
    n: int = 1
    logit_bias: dict[int, float] = {}
    logprobs: int | None = None
    """Likeliest tokens returned beside each token of the completion; None: no log probabilities."""
    prompt_logprobs: bool = False
    structure: Structure | None = None
    """The shape the completion must have."""
    tool_use: ToolUse | None = None
    """How tool calls are read from the completion; None: it is text."""

    @cached_property
    def for_engine(self) -> dict[str, Any]:
        """The parameters that vLLM takes by their names here."""
        return {name: getattr(self, name) for name in _SAME_FOR_ENGINE}

    @cached_property
    def as_json(self) -> str:
        """As records carry it; many rows share one object, and so this text."""
        return self.model_dump_json()


_SAME_FOR_ENGINE = tuple(
    name
    for name in Sampling.model_fields
    if name
    not in {
        *("max_completion_tokens", "n", "stop", "logit_bias", "prompt_logprobs"),
        *("truncate_prompt_tokens", "structure", "tool_use"),
    }
)
_MERGED = set(SamplingDefaults.model_fields) & set(Sampling.model_fields) - {"stop", "logprobs"}
"""Parameters whose resolved value is simply the one that was given last."""


def parse_row_sampling(value: Any) -> SamplingDefaults:
    """A row's ``sampling`` value (a mapping, a JSON string, or null or an empty string for none)
    checked in type and range.

    Raises:
        RowError: ``invalid_parameter``, naming the parameter, its value and its range.
    """
    if isinstance(value, str):
        value = _from_json(value) if value.strip() else None
        return SamplingDefaults() if value is None else parse_json_sampling(value)
    if value is None:
        return SamplingDefaults()
    return parse_json_sampling(without_nulls(value))


def parse_json_sampling(value: Any) -> SamplingDefaults:
    """As ``parse_row_sampling``, of a value that was JSON: what is null inside of it is meant so.

    Raises:
        RowError: ``invalid_parameter``.
    """
    if not isinstance(value, Mapping):
        raise RowError(
            ErrorCode.INVALID_PARAMETER,
            f"sampling must be a struct or a JSON object, not {type(value).__name__}",
        )
    given = {key: _plain(key, item) for key, item in value.items() if item is not None}
    try:
        return SamplingDefaults.model_validate(given)
    except ValidationError as error:
        raise RowError(ErrorCode.INVALID_PARAMETER, _describe(error)) from None


def resolve(
    defaults: SamplingDefaults, row: SamplingDefaults, base: SamplingDefaults | None = None
) -> Sampling:
    """``row`` over ``defaults`` over ``base`` over OpenAI's own defaults. ``seed`` is resolved
    elsewhere.

    Raises:
        RowError: ``invalid_parameter``: they do not go together.
    """
    merged: dict[str, Any] = {}
    for source in (base or SamplingDefaults(), defaults, row):
        given = source.model_dump(exclude_none=True, include=_MERGED)
        if source.max_tokens is not None:
            _warn_of_max_tokens()
            given["max_completion_tokens"] = source.max_tokens
        if source.stop is not None:
            given["stop"] = source.stop_list
        if source.response_format is not None or source.structured_outputs is not None:
            given["structure"] = source.structure
        merged.update(given)
    try:
        merged["logprobs"] = _resolve_logprobs(defaults, row)
        merged.update(_resolve_tools(defaults, row, merged.get("structure")))
        resolved = Sampling(**merged)
        if resolved.min_tokens > (most := resolved.max_completion_tokens):
            raise ValueError(
                f"min_tokens = {resolved.min_tokens}: is above max_completion_tokens = {most}"
            )
    except ValueError as error:
        raise RowError(ErrorCode.INVALID_PARAMETER, str(error)) from None
    return resolved


def _resolve_logprobs(defaults: SamplingDefaults, row: SamplingDefaults) -> int | None:
    wanted = defaults.logprobs if row.logprobs is None else row.logprobs
    top = defaults.top_logprobs if row.top_logprobs is None else row.top_logprobs
    if top and wanted is None:
        raise ValueError("top_logprobs wants logprobs: true")
    return (top or 0) if wanted else None


def offered_tools(defaults: SamplingDefaults, row: SamplingDefaults) -> list[dict[str, Any]]:
    """The tools of a request: the row's, else the run's."""
    return (defaults.tools if row.tools is None else row.tools) or []


def _resolve_tools(
    defaults: SamplingDefaults, row: SamplingDefaults, structure: Structure | None
) -> dict[str, Any]:
    tools = offered_tools(defaults, row)
    choice = defaults.tool_choice if row.tool_choice is None else row.tool_choice
    parallel = row.parallel_tool_calls
    use = tool_use(tools, choice, defaults.parallel_tool_calls if parallel is None else parallel)
    if use is None:
        return {}
    if structure is not None:
        raise ValueError("give tools or a structure (response_format, structured_outputs)")
    return {"tool_use": use, "structure": tool_structure(tools, use)}


@lru_cache(maxsize=1)
def _warn_of_max_tokens() -> None:
    """Once per process."""
    log.warning("max_tokens is deprecated; say max_completion_tokens")


def is_utf8(text: str) -> bool:
    """Whether ``text`` can be encoded: JSON may bring lone surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _plain(name: str, value: Any) -> Any:
    """5.0 as 5 where a whole number is meant: pandas writes integers with nulls as floats. A nested
    parameter that is a JSON string, parsed."""
    if name in _WHOLE_NUMBERS and isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, str):
        return value
    is_json = name in _NESTED and not (name == "tool_choice" and value.isalpha())
    return _from_json(value, name) if is_json else value


def without_nulls(value: Any) -> Any:
    """A struct as Arrow gives it: fields that a row lacks are null there."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _from_json(text: str, name: str = "sampling") -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowError(ErrorCode.INVALID_PARAMETER, f"{name} is not valid JSON: {error}") from None


def _describe(error: ValidationError) -> str:
    fault = error.errors(include_url=False)[0]
    name = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        where, _, last = name.rpartition(".")
        if where:
            remedy = f"; {REMEDIES[last]}" if last in REMEDIES else ""
            return f"{where} has no key {_short(last)}{remedy}"
        if last in REMEDIES:
            return f"{last} is not supported; {REMEDIES[last]}"
        known = ", ".join(SamplingDefaults.model_fields)
        return f"unknown parameter {_short(last)}; known are {known}"
    message = fault["msg"].removeprefix("Value error, ")
    return f"{name} = {_short(fault['input'])}: {message}" if name else message


def _short(value: Any) -> str:
    """``value`` as an error quotes it."""
    text = repr(value)
    return text if len(text) <= _MAX_QUOTED else f"{text[:_MAX_QUOTED]}..."
