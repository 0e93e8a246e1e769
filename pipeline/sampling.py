"""Request parameters: OpenAI's names, checked in type and range before a GPU is touched.

In: the run's defaults and a row's own parameters (a mapping or a JSON string). Out: one resolved
``Sampling``, or ``RowError(invalid_parameter)`` that names parameter, value and range. A parameter
this version cannot honour is an error, never ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.errors import ErrorCode, RowError

_MAX_TOKENS = 2**31 - 1  # far above any context; engines count in 32 or 64 bits
_MAX_STOPS = 4  # OpenAI's limit
DEFAULT_COMPLETION_TOKENS = 256  # vLLM's own default, 16, surprises everyone


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
    """Up to 4 strings that end the completion; they are not part of it."""
    seed: Annotated[int | None, Field(ge=0, lt=2**63)] = None
    """The row's own seed, instead of a derived one; samples after the first add their index."""
    n: Annotated[int | None, Field(ge=1, le=128)] = None
    """Completions per row, one record each. Default 1."""

    @model_validator(mode="after")
    def _check(self) -> SamplingDefaults:
        if isinstance(self.stop, list) and len(self.stop) > _MAX_STOPS:
            raise ValueError(f"stop: at most {_MAX_STOPS} strings, got {len(self.stop)}")
        if self.stop is not None and not all(self.stop_list):
            raise ValueError("stop: an empty string is not allowed")
        if any(not is_utf8(text) for text in self.stop_list):
            raise ValueError("stop: a lone surrogate is not allowed")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("give max_completion_tokens or the deprecated max_tokens, not both")
        return self

    @property
    def stop_list(self) -> tuple[str, ...]:
        """``stop`` as a tuple, whichever way it was given."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


_WHOLE_NUMBERS = frozenset({"top_k", "max_completion_tokens", "max_tokens", "seed", "n"})


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
    n: int = 1


def parse_row_sampling(value: Any) -> SamplingDefaults:
    """A row's ``sampling`` value (null, a mapping, or a JSON string) checked in type and range.

    Raises:
        RowError: ``invalid_parameter``, naming the parameter, its value and its range.
    """
    if value is None:
        return SamplingDefaults()
    if isinstance(value, str):
        value = _from_json(value)
    if not isinstance(value, Mapping):
        raise RowError(
            ErrorCode.INVALID_PARAMETER,
            f"sampling must be a struct or a JSON object, not {type(value).__name__}",
        )
    given = {key: _whole(key, item) for key, item in value.items() if item is not None}
    try:
        return SamplingDefaults.model_validate(given)
    except ValidationError as error:
        raise RowError(ErrorCode.INVALID_PARAMETER, _describe(error)) from None


def resolve(defaults: SamplingDefaults, row: SamplingDefaults) -> Sampling:
    """``row`` over ``defaults`` over OpenAI's own defaults. ``seed`` is resolved elsewhere."""
    merged: dict[str, Any] = {}
    for source in (defaults, row):
        given = source.model_dump(exclude_none=True, exclude={"seed", "stop", "max_tokens"})
        if source.max_tokens is not None:
            given["max_completion_tokens"] = source.max_tokens
        if source.stop is not None:
            given["stop"] = source.stop_list
        merged.update(given)
    return Sampling(**merged)


def is_utf8(text: str) -> bool:
    """Whether ``text`` can be encoded: JSON may bring lone surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _whole(name: str, value: Any) -> Any:
    """5.0 as 5 where a whole number is meant: pandas writes integers with nulls as floats."""
    whole = name in _WHOLE_NUMBERS and isinstance(value, float) and value.is_integer()
    return int(value) if whole else value


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowError(
            ErrorCode.INVALID_PARAMETER, f"sampling is not valid JSON: {error}"
        ) from None


def _describe(error: ValidationError) -> str:
    fault = error.errors(include_url=False)[0]
    name = ".".join(str(part) for part in fault["loc"][:1])
    if fault["type"] == "extra_forbidden":
        known = ", ".join(SamplingDefaults.model_fields)
        return f"unknown parameter {name!r}; known are {known}"
    message = fault["msg"].removeprefix("Value error, ")
    return f"{name} = {fault['input']!r}: {message}" if name else message
