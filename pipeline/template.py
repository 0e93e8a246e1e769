"""template: a row of any columns -> chat messages, by the config's Jinja templates.

In: ``input.template`` and a row's columns. Out: messages and images, as a row of the contract would
bring them, or ``RowError(template_error)``. Rendering is part of prepare, so that rows and images
are read once, by the tasks that need them, and nothing is copied.

Row values are foreign: the environment is Jinja's immutable sandbox, undefined names and nulls are
errors, nothing random or stateful is there. A template always ends: there is no macro, no recursion
and no unbounded loop in it (Jinja has no ``while``), all loops together make at most
``_MAX_STEPS`` steps in ``_MAX_CPU_S`` seconds, and the text has at most ``_MAX_CHARS`` characters.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

from jinja2 import (
    StrictUndefined,
    Template,
    TemplateError,
    TemplateSyntaxError,
    nodes,
    pass_context,
)
from jinja2.exceptions import SecurityError
from jinja2.meta import find_undeclared_variables
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.utils import htmlsafe_json_dumps
from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.errors import ErrorCode, RowError

ROW_PREFIX = "row."
"""Before a column's name where it stands beside our own request columns."""
_MAX_CHARS = 4_000_000
"""Of one rendered text: above any context."""
_MAX_STEPS = 100_000
"""Of all loops of one text together."""
_MAX_CPU_S = 2.0
"""Of one text's loops: each step may sort or search a list, which the steps do not tell."""
_MAX_BITS = 1024
"""Of the factors of a product: squares of squares grow without end."""
_MAX_INDENT = 16
_BUDGET = "\0steps"  # no name of a template, nor one that a column should have
_FORBIDDEN_NODES: tuple[type[nodes.Node], ...] = (
    *(nodes.Macro, nodes.CallBlock, nodes.Include, nodes.Import, nodes.FromImport),
    *(nodes.Extends, nodes.Block),
)
_LEFT_OUT_FILTERS = (
    *("batch", "center", "format", "indent", "pprint", "random", "slice", "xmlattr"),
)
"""They can make much of little, or something else each time."""
_LEFT_OUT_METHODS = frozenset(
    {"center", "expandtabs", "format", "format_map", "ljust", "rjust", "zfill"}
)


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Example(_Section):
    """One row whose answer is known, shown to the model before the question."""

    columns: dict[str, Any] = {}
    """Values of the columns that the prompt reads."""
    images: list[str] = []
    """Files or URIs of its images."""
    answer: Any
    """What the model should have said: a text, or any value, which is written as JSON."""


class TemplateParts(_Section):
    """The templates of a request, checked."""

    system: str | None = None
    """Template of the system turn; null = none."""
    prompt: Annotated[str, Field(min_length=1)]
    """Template of the user turn, over the row's columns: {{ title }} or {{ row['a title'] }}."""
    images: list[str] = []
    """Columns that hold images (bytes, URIs, structs, or lists of those), before the text."""
    examples: list[Example] = []
    """Rows with answers, each a user and an assistant turn before the question."""

    @model_validator(mode="after")
    def _check(self) -> TemplateParts:
        for key, source in (("system", self.system), ("prompt", self.prompt)):
            if source is not None:
                _read_names(key, source)
        _example_turns(_compile(self.prompt), self.examples)
        if not self.columns:
            raise ValueError("the templates read no column: every row would be asked the same")
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are read, sorted."""
        texts = (text for text in (self.system, self.prompt) if text is not None)
        names = {name for text in texts for name in _read_names("template", text)}
        return tuple(sorted({*names, *self.images}))


class RequestTemplate(TemplateParts):
    """How a row of any columns becomes a request."""

    requires_id: bool = False
    """Whether a row without a custom_id is an error rather than named by file and row."""


class Request(NamedTuple):
    """What a rendered row asks."""

    messages: list[dict[str, Any]]
    images: list[Any]
    """In the order of the image parts."""


class Renderer:
    """Renders rows by one template; picklable (it is compiled anew where it arrives)."""

    def __init__(
        self, template: RequestTemplate, example_images: Sequence[Sequence[bytes]] = ()
    ) -> None:
        """Compile the template and render its examples.

        Args:
            template: of the config.
            example_images: the content of each example's images.

        Raises:
            ValueError: an example cannot be rendered.
        """
        self.template = template
        self._example_images = example_images
        self._system = None if template.system is None else _compile(template.system)
        self._prompt = _compile(template.prompt)
        self._examples = _example_turns(self._prompt, template.examples)
        self._first_images = [image for images in example_images for image in images]

    def __reduce__(self) -> tuple[type[Renderer], tuple[Any, ...]]:
        return Renderer, (self.template, self._example_images)

    def request(self, row: Mapping[str, Any]) -> Request:
        """A row as messages.

        Args:
            row: its columns by name; those that the file lacks are absent.

        Raises:
            RowError: ``template_error``: a column is absent or null where it is printed, an image
                is missing, or the templates fail on it.
        """
        images = [image for column in self.template.images for image in _images(row, column)]
        system = [] if self._system is None else [_turn("system", _render(self._system, row))]
        question = _user_turn(_render(self._prompt, row), len(images))
        return Request([*system, *self._examples, question], [*self._first_images, *images])


def _example_turns(prompt: Template, examples: Sequence[Example]) -> list[dict[str, Any]]:
    turns = []
    for number, example in enumerate(examples):
        try:
            text = _render(prompt, example.columns)
        except RowError as error:
            raise ValueError(f"examples[{number}]: {error.message}") from None
        answer = example.answer
        said = answer if isinstance(answer, str) else compact_json(answer)
        turns += [_user_turn(text, len(example.images)), _turn("assistant", said)]
    return turns


def compact_json(value: Any) -> str:
    """JSON as a grammar without blanks writes it."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)


def _turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def _user_turn(text: str, images: int) -> dict[str, Any]:
    parts = [{"type": "image"}] * images
    return _turn("user", [*parts, {"type": "text", "text": text}] if images else text)


def _images(row: Mapping[str, Any], column: str) -> list[Any]:
    value = row.get(column)
    if value is None:
        what = "is null" if column in row else "is not in its file"
        raise RowError(ErrorCode.TEMPLATE_ERROR, f"image column {column!r} {what}")
    return value if isinstance(value, list) else [value]


class _Budget:
    """What one text may still take."""

    def __init__(self) -> None:
        self.steps = _MAX_STEPS
        self.until = time.thread_time() + _MAX_CPU_S


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja without what could make a small template expensive, or its text differ each time."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            undefined=StrictUndefined, finalize=_printable, trim_blocks=True, lstrip_blocks=True
        )
        self.globals = {"range": safe_range}
        for name in _LEFT_OUT_FILTERS:
            del self.filters[name]
        self.filters["tojson"] = _json
        self.filters[_BUDGET] = _counted

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" or not all(isinstance(each, int | float) for each in (left, right)):
            raise SecurityError(f"{operator} of {left!r:.50} and {right!r:.50} is not allowed")
        if sum(each.bit_length() for each in (left, right) if isinstance(each, int)) > _MAX_BITS:
            raise SecurityError(f"{operator}: its whole numbers have more than {_MAX_BITS} bits")
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> None:
        """Not wrapped: then ``is_safe_attribute`` is asked, which refuses it."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in _LEFT_OUT_METHODS and super().is_safe_attribute(obj, attr, value)


def _json(value: Any, indent: int | None = None) -> Any:
    """Jinja's ``tojson``, whose indent could make much of little."""
    if indent is not None and (not isinstance(indent, int) or indent > _MAX_INDENT):
        raise SecurityError(f"tojson: indent must be a number up to {_MAX_INDENT}")
    return htmlsafe_json_dumps(value, sort_keys=True, indent=indent)


def _printable(value: Any) -> Any:
    if value is None:
        raise TemplateError("it prints a value that is null; write {{ x or '' }} or ask with if")
    if isinstance(value, bytes):
        raise TemplateError("it prints bytes; images go into the template's images")
    return value


@pass_context
def _counted(context: Context, items: Iterable[Any]) -> Iterator[Any]:
    """The items of a loop, as long as the text's steps and time last."""
    budget: _Budget = context[_BUDGET]
    for item in items:
        budget.steps -= 1
        if budget.steps < 0:
            raise SecurityError(f"its loops make more than {_MAX_STEPS} steps")
        if time.thread_time() > budget.until:
            raise SecurityError(f"its loops take more than {_MAX_CPU_S:g} s; do less in each step")
        yield item


_environment = _Environment()


def _parse(source: str) -> nodes.Template:
    """The template's tree, with every loop counted.

    Raises:
        ValueError: no template, or one that holds what is not allowed.
    """
    try:
        tree = _environment.parse(source)
    except TemplateSyntaxError as error:
        raise ValueError(f"line {error.lineno}: {error.message}") from None
    for banned in tree.find_all(_FORBIDDEN_NODES):
        kind = type(banned).__name__.lower()
        raise ValueError(f"line {banned.lineno}: {kind} is not allowed in a template here")
    for loop in tree.find_all(nodes.For):
        if loop.recursive:
            raise ValueError(f"line {loop.lineno}: recursive loops are not allowed here")
        loop.iter = nodes.Filter(loop.iter, _BUDGET, [], [], None, None, lineno=loop.lineno)
    tree.set_environment(_environment)
    return tree


def _compile(source: str) -> Template:
    return _environment.from_string(_parse(source))


def _read_names(key: str, source: str) -> set[str]:
    """Columns that a template reads.

    Raises:
        ValueError: no template, or ``row`` is used otherwise than as ``row['name']``.
    """
    try:
        tree = _parse(source)
        _compile(source)
    except (ValueError, TemplateError) as error:  # compiling finds unknown filters and tests
        raise ValueError(f"{key}: {error}") from None
    names: set[str] = set(find_undeclared_variables(tree))
    if "row" not in names:
        return names
    by_name = [
        item.arg.value
        for item in tree.find_all(nodes.Getitem)
        if isinstance(item.node, nodes.Name)
        and item.node.name == "row"
        and isinstance(item.arg, nodes.Const)
    ]
    if len(by_name) != sum(name.name == "row" for name in tree.find_all(nodes.Name)):
        raise ValueError(f"{key}: row is for row['name of a column'] only")
    return names - {"row"} | set(by_name)


def _render(template: Template, row: Mapping[str, Any]) -> str:
    pieces: list[str] = []
    size = 0
    try:
        for piece in template.generate({**row, "row": row, _BUDGET: _Budget()}):
            size += len(piece)
            if size > _MAX_CHARS:
                raise SecurityError(f"its text has more than {_MAX_CHARS} characters")
            pieces.append(piece)
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise _failed(error) from None
    except (AttributeError, RecursionError, MemoryError) as error:
        raise _failed(error) from None
    return "".join(pieces)


def _failed(error: Exception) -> RowError:
    return RowError(ErrorCode.TEMPLATE_ERROR, f"the template fails: {error}")
