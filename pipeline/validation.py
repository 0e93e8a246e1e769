"""pydantic's faults as one sentence people can act on; shared by configs and engine profiles."""

from __future__ import annotations

from difflib import get_close_matches
from typing import get_args

from pydantic import BaseModel, ValidationError

VARIANT = "="
"""How the tags of a union's members begin, which pydantic puts into paths."""


def describe(error: ValidationError, root: type[BaseModel]) -> str:
    """The first fault of ``error`` in one sentence; for an unknown key, the nearest valid one."""
    fault = error.errors(include_url=False)[0]
    path = [part for part in map(str, fault["loc"]) if not part.startswith(VARIANT)]
    where = ".".join(path)
    more = f" ({error.error_count() - 1} more after that)" if error.error_count() > 1 else ""
    if fault["type"] == "extra_forbidden":
        hint = _nearest(path, root)
        return f"unknown key '{where}'{hint}{more}" + ("" if hint.endswith("?") else ".")
    if fault["type"] == "missing":
        return f"key '{where}' is missing{more}."
    message = fault["msg"].removeprefix("Value error, ")
    if not path:
        return f"{message}{more}."
    return f"key '{where}' = {fault['input']!r}: {message}{more}."


def _nearest(path: list[str], root: type[BaseModel]) -> str:
    model: type[BaseModel] | None = root
    for part in path[:-1]:
        model = _submodel(model, part) if model else None
    if model is None:
        return ""
    known = sorted(model.model_fields)
    close = get_close_matches(path[-1], known, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else f"; valid keys are {', '.join(known)}"


def _submodel(model: type[BaseModel], field: str) -> type[BaseModel] | None:
    info = model.model_fields.get(field)
    if info is None:
        return None
    candidates = [info.annotation, *get_args(info.annotation)]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
