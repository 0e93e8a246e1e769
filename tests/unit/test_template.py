"""Rows become messages by the config's templates, and no template runs for ever."""

import pickle
import time
from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.errors import ErrorCode, RowError
from pipeline.template import Renderer, RequestTemplate

READS = "{% if any is defined %}{% endif %}"
"""Nothing, but a template that reads no column is refused."""


def renderer(prompt: str, **template: Any) -> Renderer:
    return Renderer(RequestTemplate(prompt=READS + prompt, **template))


def ask(row: dict[str, Any], **template: Any) -> str:
    """The text of the last turn."""
    content = renderer(**template).request(row).messages[-1]["content"]
    assert isinstance(content, str)
    return content


def fault(row: dict[str, Any], **template: Any) -> str:
    with pytest.raises(RowError) as raised:
        renderer(**template).request(row)
    assert raised.value.code is ErrorCode.TEMPLATE_ERROR
    return raised.value.message


def test_system_examples_and_question_are_turns_with_images_before_the_text() -> None:
    template = RequestTemplate(
        system="Be brief.",
        prompt="What is {{ name }}?",
        images=["front", "more"],
        examples=[{"columns": {"name": "this"}, "images": ["a.png"], "answer": {"kind": "ä"}}],
    )
    renderer = pickle.loads(pickle.dumps(Renderer(template, [[b"A"]])))
    request = renderer.request({"name": "that", "front": b"F", "more": ["m.png", b"M"]})
    image = {"type": "image"}
    assert request.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [image, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": '{"kind":"ä"}'},
        {"role": "user", "content": [image] * 3 + [{"type": "text", "text": "What is that?"}]},
    ]
    assert request.images == [b"A", b"F", "m.png", b"M"]


def test_the_columns_that_are_read_are_known_before_any_row() -> None:
    template = RequestTemplate(
        system="{% set x = lang %}{{ x }}",
        prompt="{% for tag in tags %}{{ tag }} {{ loop.index }}{% endfor %}{{ row['a b'] }}",
        images=["photo"],
    )
    assert template.columns == ("a b", "lang", "photo", "tags")


def test_rows_are_values_and_never_templates() -> None:
    assert ask({"text": "{{ 7 * 7 }} {% raw %}"}, prompt="{{ text }}") == "{{ 7 * 7 }} {% raw %}"


def test_conditions_see_nulls_and_absent_columns() -> None:
    prompt = "{% if title is defined and title %}{{ title }}{% else %}untitled{% endif %}"
    assert ask({}, prompt=prompt) == "untitled"
    assert ask({"title": None}, prompt=prompt) == "untitled"
    assert ask({"title": "T"}, prompt=prompt) == "T"


@pytest.mark.parametrize(
    ("prompt", "row", "words"),
    [
        ("{{ text }}", {}, "'text' is undefined"),
        ("{{ text }}", {"text": None}, "null"),
        ("{{ text }}", {"text": b"\0"}, "bytes"),
        ("{{ a.b.c }}", {"a": {"b": {}}}, "no attribute 'c'"),
        ("{{ 1 / n }}", {"n": 0}, "division by zero"),
        ("{{ text.__class__.__mro__ }}", {"text": "x"}, "unsafe"),
        ("{{ tags.append(1) }}", {"tags": []}, "unsafe"),
        ("{{ 'a' * 1000000000 }}", {}, "not allowed"),
        ("{{ '%1000000000d' % 1 }}", {}, "not allowed"),
        ("{{ 9 ** 9 ** 9 }}", {}, "not allowed"),
        ("{{ text.ljust(1000000000) }}", {"text": "x"}, "unsafe"),
        ("{{ '{:1000000000}'.format(1) }}", {}, "unsafe"),
        ("{% for x in range(90000) %}{{ text }}{% endfor %}", {"text": "x" * 100}, "characters"),
    ],
)
def test_what_cannot_be_rendered_is_an_error_of_its_row(
    prompt: str, row: dict[str, Any], words: str
) -> None:
    assert words in fault(row, prompt=prompt)


def test_loops_within_loops_end() -> None:
    loop = "{% for i in range(99999) %}"
    prompt = f"{loop}{loop}{loop}{'{% endfor %}' * 3}"
    assert "steps" in fault({}, prompt=prompt)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("{{ [a] | tojson(indent=99999999) }}", "indent"),
        ("{% set b = a * a %}" + "{% set b = b * b %}" * 40 + "{{ b > 1 }}", "bits"),
    ],
)
def test_nothing_makes_much_of_little(prompt: str, words: str) -> None:
    assert words in fault({"a": 9}, prompt=prompt)
    for name in ("batch", "slice"):  # both count to whatever number they are given
        with pytest.raises(ValueError, match=name):
            RequestTemplate(prompt=f"{{{{ [a] | {name}(999999999) | list | length }}}}")


def test_json_in_a_prompt_may_be_indented() -> None:
    assert ask({"a": {"b": 1}}, prompt="{{ a | tojson(indent=2) }}") == '{\n  "b": 1\n}'


def test_an_image_column_that_is_null_or_absent_is_an_error_of_its_row() -> None:
    assert "'photo' is null" in fault({"photo": None}, prompt="?", images=["photo"])
    assert "'photo' is not in its file" in fault({}, prompt="?", images=["photo"])
    assert ask({"photo": []}, prompt="?", images=["photo"]) == "?"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ({"prompt": "{{ text "}, "prompt: line 1"),
        ({"prompt": "x", "system": "{{ a | nothing }}"}, "system: "),
        ({"prompt": "{% macro f() %}{% endmacro %}"}, "macro is not allowed"),
        ({"prompt": "{% include 'x' %}"}, "include is not allowed"),
        ({"prompt": "{% for x in a recursive %}{{ loop(x) }}{% endfor %}"}, "recursive"),
        ({"prompt": "Hello"}, "read no column"),
        ({"prompt": "{{ row }}"}, "row is for row['name of a column']"),
        ({"prompt": "{{ a | random }}"}, "random"),
        ({"prompt": "{{ a }}", "examples": [{"columns": {}, "answer": 1}]}, "examples[0]"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_with_its_place(
    template: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValidationError) as raised:
        RequestTemplate.model_validate(template)
    assert words in str(raised.value)


@pytest.mark.parametrize("work", ["tags|sort|length", "tags|unique|list|length", "9 in tags"])
def test_a_loop_whose_steps_are_dear_ends_in_time(work: str) -> None:
    tags = [f"tag {number}" for number in range(30_000)]
    text = f"{{% for tag in tags %}}{{% if {work} %}}.{{% endif %}}{{% endfor %}}"
    started = time.thread_time()
    with pytest.raises(RowError, match=r"more than 2 s; do less in each step"):
        renderer(text).request({"tags": tags, "x": 1})
    assert time.thread_time() - started < 20  # without an end: minutes
