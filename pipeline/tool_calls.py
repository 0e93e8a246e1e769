"""Tool calls, read back from a completion's text.

In: how the request uses tools, and the text. Out: the calls in it; none if the text is no call. A
call of a tool that was not offered, or whose arguments do not fit, is still the call that the model
made: whoever runs it has to look anyway.

Where the model chose, its call has one of Llama 4's two forms: JSON objects with name and
parameters, whatever stands around them, or a Python list of calls, ``[f(a=1), g(b="x")]``, of which
only literals are read. What counts as a call is what counts for vLLM's parsers of these forms.
"""

from __future__ import annotations

import ast
import json
import re
from typing import Any, NamedTuple

from pipeline.tools import Choice, ToolUse

_START, _END = "<|python_start|>", "<|python_end|>"
_PYTHONIC = re.compile(r"\[[a-zA-Z]\w*\(")
_DECODER = json.JSONDecoder()
_NAMES = {"null": None, "true": True, "false": False}  # models mix JSON's names in


class Call(NamedTuple):
    """One call."""

    name: str
    arguments: str
    """JSON; an object, unless the model wrote something else."""


def read_calls(use: ToolUse, text: str) -> list[Call]:
    """The calls in a completion, in order."""
    try:
        calls = _read(use, text)
    except (ValueError, KeyError, TypeError, SyntaxError, RecursionError, MemoryError):
        return []  # text that json or ast cannot read, in all the ways they say so
    return calls if use.parallel else calls[:1]


def _read(use: ToolUse, text: str) -> list[Call]:
    if use.name is not None:
        return [Call(use.name, text)]
    if use.choice is Choice.REQUIRED:
        return [_call(item["name"], item["parameters"]) for item in json.loads(text)]
    if text.startswith(_START):
        text = text.removeprefix(_START).replace(_END, "")
    return _from_python(text) if _PYTHONIC.match(text) else _from_json(text)


def _from_json(text: str) -> list[Call]:
    calls: list[Call] = []
    start = text.find("{")
    while start >= 0:
        found, end = _DECODER.raw_decode(text, start)
        arguments = found["arguments"] if "arguments" in found else found["parameters"]
        calls.append(_call(found["name"], arguments))
        start = text.find("{", end)
    return calls


def _from_python(text: str) -> list[Call]:
    match ast.parse(text).body[0]:
        case ast.Expr(value=ast.List(elts=elements)):
            return [_from_node(element) for element in elements]
        case _:
            return []


def _from_node(node: ast.expr) -> Call:
    match node:
        case ast.Call(func=function, args=[], keywords=keywords):
            arguments = {_keyword(word): _literal(word.value) for word in keywords}
            return _call(_dotted(function), arguments)
        case _:
            raise ValueError("not a call with arguments by name")


def _keyword(word: ast.keyword) -> str:
    if word.arg is None:
        raise ValueError("** in a call")
    return word.arg


def _dotted(node: ast.expr) -> str:
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=owner, attr=name):
            return f"{_dotted(owner)}.{name}"
        case _:
            raise ValueError("not a name")


def _literal(node: ast.expr | None) -> Any:
    """A node's value; what JSON lacks becomes a list (tuples, sets) or is refused."""
    match node:
        case ast.Constant(value=value):
            return value
        case ast.List(elts=items) | ast.Tuple(elts=items) | ast.Set(elts=items):
            return [_literal(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            return {_key(key): _literal(value) for key, value in zip(keys, values, strict=True)}
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=ast.Constant(value=number)):
            if isinstance(number, int | float) and not isinstance(number, bool):
                return -number if isinstance(sign, ast.USub) else number
        case ast.JoinedStr(values=parts) if all(isinstance(part, ast.Constant) for part in parts):
            return "".join(_literal(part) for part in parts)
        case ast.Name(id=name) if name in _NAMES:
            return _NAMES[name]
    raise ValueError("not a literal")


def _key(node: ast.expr | None) -> Any:
    if not isinstance(node, ast.Constant):
        raise ValueError("not a literal key")
    return node.value


def _call(name: Any, arguments: Any) -> Call:
    if not isinstance(name, str):
        raise TypeError("not a name")
    name.encode()  # raises at a lone surrogate, which a \u escape may bring
    written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    try:
        written.encode()
    except UnicodeEncodeError:
        written = json.dumps(arguments)
    return Call(name, written)
