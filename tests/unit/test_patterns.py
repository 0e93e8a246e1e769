"""Every regular expression of the source, on hostile texts: time grows with their length.

The patterns are read from the source, so that a new one is covered. Not covered: patterns of
libraries, and those a config's author writes.
"""

from __future__ import annotations

import ast
import re
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from pipeline import faults
from pipeline.profile import REPO_ROOT
from pipeline.redact import redacted_text, shown_uri

FOLDERS = ("pipeline", "jobs", "cluster")
FROM_CONFIGS = {"glob_translate(path)", "f'{re.escape(split)}([-_.]|$)'"}
"""Patterns made of what a config's author wrote, for the names of their own files."""
PIECES = (
    *("a", "0", " ", "\n", ".", ":", "-", "_", "@", "?a", "&a=", "a=", '"', "[", "[ 1", "[a", "a("),
    *("http:", "https://", "://", "://a@", "token", "x-amz-", "bearer ", "sk-", "AKIA", "{date"),
    *("0x0", "1.", "a.", "a-", "task: ", "task: a ", "\u00e9", "\x00"),
)
FIRST = ("", "https://", "[ ", "bearer ")
LENGTH = 25_000
SECONDS = 0.5
"""Of CPU, for one text: a hundred times what linear time takes, half of what quadratic does."""


class Use(NamedTuple):
    """One pattern, and what is done with it: fullmatch begins once, sub everywhere."""

    pattern: re.Pattern[Any]
    methods: tuple[str, ...]

    def on(self, text: str) -> None:
        assert self.methods
        subject: Any = text.encode() if isinstance(self.pattern.pattern, bytes) else text
        for method in self.methods:
            getattr(self.pattern, method)(*((subject[:0],) if method == "sub" else ()), subject)


def uses() -> Iterator[tuple[str, Use]]:
    """Place and use of each pattern."""
    for path in sorted(each for folder in FOLDERS for each in (REPO_ROOT / folder).rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        named = {
            target.id: statement.value
            for statement in tree.body
            if isinstance(statement, ast.Assign)
            for target in statement.targets
            if isinstance(target, ast.Name)
        }
        texts = {name: each.value for name, each in named.items() if isinstance(each, ast.Constant)}
        for call in ast.walk(tree):
            if not isinstance(call, ast.Call) or not _is_of_re(call.func):
                continue
            if ast.unparse(call.args[0]) in FROM_CONFIGS:
                continue
            expression = compile(ast.Expression(call.args[0]), str(path), "eval")
            flags = re.IGNORECASE if "re.I" in ast.unparse(call) else re.NOFLAG
            pattern = re.compile(eval(expression, dict(texts)), flags)
            name = next((name for name, value in named.items() if value is call), None)
            inline = ast.unparse(call.func).removeprefix("re.")
            methods = (inline,) if inline != "compile" else _methods(tree, name or "pattern")
            methods = methods or _methods(tree, "pattern")
            yield f"{path.relative_to(REPO_ROOT)}:{call.lineno}", Use(pattern, methods)


def _methods(tree: ast.Module, name: str) -> tuple[str, ...]:
    """Methods called on this name; one of several patterns is used as ``pattern``."""
    return tuple(
        {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and node.attr in ("fullmatch", "match", "search", "findall", "finditer", "sub", "split")
            and ast.unparse(node.value) == name
        }
    )


def _is_of_re(function: ast.expr) -> bool:
    return (
        isinstance(function, ast.Attribute)
        and isinstance(function.value, ast.Name)
        and function.value.id == "re"
        and function.attr != "escape"
    )


def texts() -> Iterator[str]:
    """Pieces over and over, after different beginnings, with an end that fits nothing."""
    for first in FIRST:
        for piece in PIECES:
            yield first + piece * (LENGTH // len(piece)) + "\x01"


@pytest.mark.parametrize("use", [pytest.param(use, id=place) for place, use in uses()])
def test_no_pattern_takes_long_on_a_hostile_text(use: Use) -> None:
    for text in texts():
        started = time.thread_time()
        use.on(text)
        assert time.thread_time() - started < SECONDS, text[:30]


@pytest.mark.parametrize("piece", ["http:", "://", ":", "?a", "token", "x-amz-", " "])
def test_a_megabyte_of_anything_is_redacted_in_seconds(piece: str) -> None:
    text = "https://" + piece * (1_000_000 // len(piece))
    for shown in (redacted_text, shown_uri, lambda text: faults.describe(OSError(text))):
        started = time.thread_time()
        shown(text)
        assert time.thread_time() - started < 10  # in quadratic time: an hour
