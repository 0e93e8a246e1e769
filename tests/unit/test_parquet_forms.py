"""Parquet as people have it: each layout of a column that pyarrow can write gives the same rows."""

import io
import json
import uuid
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.commit import Destination, commit_outcomes, part_uri
from pipeline.duplicates import find_duplicates
from pipeline.errors import ErrorCode, InputError
from pipeline.fetch import ImageFetcher
from pipeline.model import ModelSpec
from pipeline.plan import Shard, make_plan
from pipeline.prepare import PrepareSpec, prepare_block
from pipeline.read import Input, open_input, read_shard
from pipeline.records import Failure, Prepared, carried_columns, input_block, read_prepared
from pipeline.sampling import SamplingDefaults
from pipeline.template import Renderer, RequestTemplate

MODEL = ModelSpec("cluster/models/mini-maverick", None, max_model_len=512)
MESSAGES = [[{"role": "user", "content": f"Count to {n}."}] for n in range(3)]
STRINGS = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]


def png() -> bytes:
    sink = io.BytesIO()
    Image.new("L", (56, 56), 200).save(sink, "PNG")
    return sink.getvalue()


def prepare(folder: Path, tmp_path: Path) -> list[Prepared | Failure]:
    """All rows of a folder of Parquet files, by way of shards of two rows and committed parts."""
    found = open_input(str(folder), renamed={}, carry=None)
    spec = spec_of(folder, found)
    items: list[Prepared | Failure] = []
    to = Destination(f"file://{tmp_path}/out", "run", "m")
    for shard in make_plan(found.files, shard_rows=2, shard_bytes=2**30).shards:
        table = read_shard(shard, found.columns)
        if table.num_rows:
            block = prepare_block(input_block(shard, table), spec=spec)
            items += read_prepared(block)
            commit(to, shard, carried_columns(block))
    return items


def spec_of(folder: Path, found: Input) -> PrepareSpec:
    return PrepareSpec(
        model=MODEL,
        columns=found.columns,
        sampling=SamplingDefaults(),
        run_seed=7,
        max_image_pixels=10**6,
        fetcher=ImageFetcher(f"file://{folder}", 10**6, 4),
    )


def commit(to: Destination, shard: Shard, carried: pa.Table) -> None:
    rows = range(shard.first_row, shard.first_row + shard.rows)
    failures = [Failure(row, "a", ErrorCode.TIMEOUT, "", 0) for row in rows]
    commit_outcomes(to, shard, failures, carried)


def store(folder: Path, name: str, table: pa.Table) -> None:
    folder.mkdir(exist_ok=True)
    pq.write_table(table, folder / name)


def good(items: list[Prepared | Failure]) -> list[Prepared]:
    assert all(isinstance(item, Prepared) for item in items), items
    return [item for item in items if isinstance(item, Prepared)]


def tokens(items: list[Prepared | Failure]) -> list[list[int]]:
    return [list(item.token_ids) for item in good(items)]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """Tokens of ``MESSAGES``."""
    folder = tmp_path_factory.mktemp("plain")
    store(folder / "in", "a.parquet", pa.table({"messages": MESSAGES}))
    return tokens(prepare(folder / "in", folder))


@pytest.mark.parametrize("kind", STRINGS, ids=str)
def test_strings_of_any_layout_are_the_same_rows(
    tmp_path: Path, kind: pa.DataType, expected: list[list[int]]
) -> None:
    columns = {
        "custom_id": ["a", "b", "c"],
        "messages": [json.dumps(messages) for messages in MESSAGES],
        "sampling": ['{"max_tokens": 7}', None, "{}"],
        "label": ["x", None, "x"],
    }
    plain = pa.table(columns)
    table = pa.table({name: plain[name].cast(kind) for name in plain.column_names})
    store(tmp_path / "in", "a.parquet", table)
    items = prepare(tmp_path / "in", tmp_path)
    assert tokens(items) == expected
    assert [item.custom_id for item in items] == ["a", "b", "c"]
    assert good(items)[0].sampling.max_completion_tokens == 7
    part = pq.read_table(part_uri(f"{tmp_path}/out", 0))
    assert part.column("label").to_pylist() == ["x", None]


def message_types() -> list[pa.DataType]:
    def struct(text: pa.DataType) -> pa.DataType:
        return pa.struct([("role", text), ("content", text)])

    lists = [pa.list_, pa.large_list, pa.list_view, pa.large_list_view, lambda of: pa.list_(of, 1)]
    return [
        *(make(struct(pa.string())) for make in lists),
        pa.list_(struct(pa.large_string())),
    ]


@pytest.mark.parametrize("kind", message_types(), ids=str)
def test_messages_of_any_layout_are_the_same_prompts(
    tmp_path: Path, kind: pa.DataType, expected: list[list[int]]
) -> None:
    store(tmp_path / "in", "a.parquet", pa.table({"messages": pa.array(MESSAGES, kind)}))
    assert tokens(prepare(tmp_path / "in", tmp_path)) == expected


def image_types() -> list[pa.DataType]:
    encoded = [pa.binary(), pa.large_binary(), pa.binary_view()]
    structs = [pa.struct([("bytes", kind), ("path", pa.string())]) for kind in encoded]
    return [
        *encoded,
        *structs,
        *(pa.list_(kind) for kind in [*encoded, *structs[:2]]),  # pyarrow writes no list of views
        pa.large_list(structs[0]),
        pa.list_view(structs[0]),
        pa.list_(structs[0], 1),
        pa.list_(pa.binary(len(png()))),
    ]


@pytest.mark.parametrize("kind", image_types(), ids=str)
def test_images_of_any_layout_are_the_same_bytes(tmp_path: Path, kind: pa.DataType) -> None:
    many = not (pa.types.is_struct(kind) or kind in (pa.binary(), pa.large_binary()))
    many = many and kind != pa.binary_view()
    item: Any = {"bytes": png(), "path": None} if "struct" in str(kind) else png()
    column = pa.array([[item]] * 3 if many else [item] * 3, kind)
    store(tmp_path / "in", "a.parquet", pa.table({"prompt": ["?"] * 3, "images": column}))
    items = good(prepare(tmp_path / "in", tmp_path))
    assert [each.images for each in items] == [(png(),)] * 3
    assert [each.image_tokens for each in items] == [7] * 3


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.int8()),
        pa.large_list(pa.string()),
        pa.list_view(pa.int8()),
        pa.large_list_view(pa.int8()),
        pa.list_(pa.int8(), 2),
        pa.list_(pa.string_view()),
        pa.list_view(pa.string_view()),
        pa.large_list_view(pa.string()),
        pa.list_(pa.string_view(), 2),
        pa.map_(pa.string(), pa.string_view()),
        pa.struct(
            [("a", pa.string_view()), ("b", pa.list_(pa.dictionary(pa.int8(), pa.string())))]
        ),
        pa.map_(pa.string(), pa.int8()),
        pa.dictionary(pa.int32(), pa.large_string()),
        pa.null(),
        pa.bool_(),
        pa.decimal128(5, 2),
        pa.timestamp("us", tz="UTC"),
    ],
    ids=str,
)
def test_columns_of_any_type_are_carried(tmp_path: Path, kind: pa.DataType) -> None:
    column = pa.array([None] * 3, kind)
    if pa.types.is_nested(kind) and "int8" in str(kind) and not pa.types.is_struct(kind):
        value: Any = [("k", 1)] if pa.types.is_map(kind) else [1, 2]
        column = pa.array([value, None, value], kind)
    store(tmp_path / "in", "a.parquet", pa.table({"prompt": ["?"] * 3, "label": column}))
    good(prepare(tmp_path / "in", tmp_path))
    parts = [pq.read_table(part_uri(f"{tmp_path}/out", index)) for index in range(2)]
    assert [row for part in parts for row in part.column("label").to_pylist()] == column.to_pylist()


def test_carried_categories_may_be_of_any_number_in_each_file(tmp_path: Path) -> None:
    for name, kind in (("a", pa.int8()), ("b", pa.int16())):
        column = pa.array([name], pa.dictionary(kind, pa.string()))
        store(tmp_path / "in", f"{name}.parquet", pa.table({"prompt": ["?"], "label": column}))
    good(prepare(tmp_path / "in", tmp_path))
    parts = [pq.read_table(part_uri(f"{tmp_path}/out", index)) for index in range(2)]
    assert [part.column("label").to_pylist() for part in parts] == [["a"], ["b"]]
    assert len({part.schema.field("label").type for part in parts}) == 1


UNREADABLE = [
    pa.array([10_000_000, 1, None], pa.date32()),
    pa.array([-719_529, 1, None], pa.date32()),
    pa.array([-62_135_596_800_000_000, 1, None], pa.timestamp("us", "America/New_York")),
    pa.array([1, 1, None], pa.timestamp("us", "Mars/Phobos")),
    pa.array([2**62, 1, None], pa.duration("s")),
    pa.array([[10_000_000], [1], None], pa.list_view(pa.date32())),
]


@pytest.mark.parametrize("column", UNREADABLE, ids=lambda column: str(column.type))
def test_an_id_that_python_cannot_hold_is_its_rows_error(tmp_path: Path, column: pa.Array) -> None:
    table = pa.table({"prompt": ["?"] * 3, "custom_id": column, "label": column})
    store(tmp_path / "in", "a.parquet", table)
    first, _, third = prepare(tmp_path / "in", tmp_path)
    assert isinstance(first, Failure)
    assert (first.custom_id, first.code) == ("a.parquet:0", ErrorCode.INVALID_MESSAGES)
    assert first.message.startswith("custom_id is a ")
    assert "that cannot be read: " in first.message
    assert isinstance(third, Prepared)
    found = open_input(str(tmp_path / "in"), renamed={}, carry=None)
    assert len(find_duplicates(found.files, "custom_id")) == 0
    parts = [pq.read_table(part_uri(f"{tmp_path}/out", index)) for index in range(2)]
    labels = pa.concat_arrays(c for part in parts for c in part.column("label").chunks)
    assert labels == column.cast(labels.type)


def templated(
    folder: Path, table: pa.Table, prompt: str, *, renamed: dict[str, str]
) -> list[Prepared | Failure]:
    store(folder, "a.parquet", table)
    template = RequestTemplate(prompt=prompt)
    found = open_input(str(folder), renamed=renamed, carry=[], template=template.columns)
    spec = replace(spec_of(folder, found), renderer=Renderer(template))
    shard = Shard(0, found.files[0].uri, 0, table.num_rows)
    block = input_block(shard, read_shard(shard, found.columns))
    return list(read_prepared(prepare_block(block, spec=spec)))


def test_a_template_column_that_python_cannot_hold_is_its_rows_error(tmp_path: Path) -> None:
    table = pa.table({"day": pa.array([10_000_000, 1], pa.date32())})
    failure, other = templated(tmp_path / "in", table, "{{ day }}", renamed={})
    assert isinstance(failure, Failure)
    assert failure.message.startswith("day is a date32[day] that cannot be read: ")
    assert isinstance(other, Prepared)


def test_json_in_an_id_or_a_template_column_is_its_text(tmp_path: Path) -> None:
    key, meta, deep = ['"k"', "1.10"], ['{"b": 1.10, "a": null}', "not JSON"], ["1.10", "[ ]"]
    folders = []
    for name, kind in (("texts", pa.string()), ("typed", pa.json_())):
        inner = pa.StructArray.from_arrays([typed(deep, kind)], ["x"])
        columns = {"key": typed(key, kind), "meta": typed(meta, kind), "deep": inner}
        folders.append(
            templated(
                tmp_path / name,
                pa.table(columns),
                "{{ meta }}{{ deep.x }}",
                renamed={"custom_id": "key"},
            )
        )
    assert [each.custom_id for each in folders[0]] == key
    assert folders[1] == good(folders[0])


def test_ids_in_json_are_the_same_if_their_texts_are(tmp_path: Path) -> None:
    ids = typed(["1.10", "1.1", "1.1"], pa.json_())
    store(tmp_path / "in", "a.parquet", pa.table({"prompt": ["?"] * 3, "custom_id": ids}))
    found = open_input(str(tmp_path / "in"), renamed={}, carry=None)
    assert list(find_duplicates(found.files, "custom_id").rows) == [2]


def typed(texts: list[str], kind: pa.DataType) -> pa.Array:
    stored = pa.array(texts)
    return stored if kind == stored.type else pa.ExtensionArray.from_storage(kind, stored)


def as_json(values: list[Any]) -> pa.Array:
    texts = pa.array([None if value is None else json.dumps(value) for value in values])
    return pa.ExtensionArray.from_storage(pa.json_(), texts)


def json_messages() -> list[pa.Array]:
    contents = as_json([turn["content"] for (turn,) in MESSAGES])
    roles = pa.array(["user"] * 3)
    turns = pa.StructArray.from_arrays([roles, contents], ["role", "content"])
    lists = pa.ListArray.from_arrays([0, 1, 2, 3], turns)
    each_turn = pa.ListArray.from_arrays([0, 1, 2, 3], as_json([turn for (turn,) in MESSAGES]))
    return [as_json(MESSAGES), lists, each_turn]


@pytest.mark.parametrize("messages", json_messages(), ids=lambda column: str(column.type))
def test_json_columns_are_read_as_the_values_they_hold(
    tmp_path: Path, messages: pa.Array, expected: list[list[int]]
) -> None:
    columns = {
        "custom_id": as_json(["a", 2, None]),
        "messages": messages,
        "sampling": as_json([{"max_tokens": 7}, None, {}]),
        "label": as_json([{"b": 1}, None, "x"]),
    }
    store(tmp_path / "in", "a.parquet", pa.table(columns))
    items = good(prepare(tmp_path / "in", tmp_path))
    assert tokens(list(items)) == expected
    assert [item.custom_id for item in items] == ['"a"', "2", "a.parquet:2"]
    assert items[0].sampling.max_completion_tokens == 7


def test_a_json_list_of_images_is_one(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(png())
    table = pa.table({"prompt": ["?"] * 2, "images": as_json([["a.png"], [{"path": "a.png"}]])})
    store(tmp_path / "in", "a.parquet", table)
    assert [item.images for item in good(prepare(tmp_path / "in", tmp_path))] == [(png(),)] * 2


def test_an_id_of_an_extension_type_is_its_value_as_text(tmp_path: Path) -> None:
    ids = [uuid.UUID(int=7), None, uuid.UUID(int=7)]
    stored = pa.array([each and each.bytes for each in ids], pa.binary(16))
    column = pa.ExtensionArray.from_storage(pa.uuid(), stored)
    store(tmp_path / "in", "a.parquet", pa.table({"prompt": ["?"] * 3, "custom_id": column}))
    items = prepare(tmp_path / "in", tmp_path)
    assert [item.custom_id for item in items[:2]] == [str(ids[0]), "a.parquet:1"]
    found = open_input(str(tmp_path / "in"), renamed={}, carry=None)
    assert list(find_duplicates(found.files, "custom_id").rows) == [2]


def test_a_json_prompt_is_its_text(tmp_path: Path) -> None:
    store(tmp_path / "in", "a.parquet", pa.table({"prompt": as_json(["Ä?", "Ä?"])}))
    store(tmp_path / "plain", "a.parquet", pa.table({"prompt": ["Ä?", "Ä?"]}))
    found, plain = (tokens(prepare(tmp_path / name, tmp_path / name)) for name in ("in", "plain"))
    assert found == plain


def test_columns_that_are_null_throughout_say_nothing(
    tmp_path: Path, expected: list[list[int]]
) -> None:
    nulls = pa.nulls(3)
    table = pa.table(
        {
            "messages": MESSAGES,
            **dict.fromkeys(("custom_id", "prompt", "images", "sampling"), nulls),
        }
    )
    store(tmp_path / "in", "a.parquet", table)
    items = prepare(tmp_path / "in", tmp_path)
    assert tokens(items) == expected
    assert [item.custom_id for item in items] == [f"a.parquet:{row}" for row in range(3)]


def test_a_prompt_that_is_null_throughout_is_one_error_per_row(tmp_path: Path) -> None:
    store(tmp_path / "in", "a.parquet", pa.table({"prompt": pa.nulls(2)}))
    assert [
        item.code for item in prepare(tmp_path / "in", tmp_path) if isinstance(item, Failure)
    ] == [ErrorCode.INVALID_MESSAGES] * 2


def test_request_columns_may_differ_in_layout_from_file_to_file(
    tmp_path: Path, expected: list[list[int]]
) -> None:
    texts = [json.dumps(messages) for messages in MESSAGES]
    store(tmp_path / "in", "a.parquet", pa.table({"messages": MESSAGES}))
    store(tmp_path / "in", "b.parquet", pa.table({"messages": texts}))
    store(
        tmp_path / "in",
        "c.parquet",
        pa.table({"messages": pa.array(texts).dictionary_encode(), "custom_id": [1, 2, 3]}),
    )
    assert tokens(prepare(tmp_path / "in", tmp_path)) == expected * 3


@pytest.mark.parametrize("groups", [0, 1])
def test_a_file_without_rows_or_row_groups_is_read_as_empty(tmp_path: Path, groups: int) -> None:
    schema = pa.schema([("prompt", pa.string()), ("label", pa.int8())])
    (tmp_path / "in").mkdir()
    with pq.ParquetWriter(tmp_path / "in" / "a.parquet", schema) as writer:
        for _ in range(groups):
            writer.write_table(schema.empty_table())
    store(
        tmp_path / "in", "b.parquet", pa.table({"prompt": ["?"], "label": pa.array([1], pa.int8())})
    )
    assert len(good(prepare(tmp_path / "in", tmp_path))) == 1
    (tmp_path / "in" / "b.parquet").unlink()
    assert prepare(tmp_path / "in", tmp_path) == []


def test_a_file_without_rows_may_have_columns_of_any_type(tmp_path: Path) -> None:
    store(tmp_path / "in", "a.parquet", pa.table({"prompt": ["?"], "label": ["x"]}))
    empty = pa.table({"prompt": pa.array([], pa.float64()), "more": pa.nulls(0)})
    store(tmp_path / "in", "b.parquet", empty)  # as pandas writes a frame without rows
    assert len(good(prepare(tmp_path / "in", tmp_path))) == 1


def test_old_times_of_spark_are_those_that_were_written(tmp_path: Path) -> None:
    moments = [datetime(1, 1, 1), datetime(1500, 1, 1), datetime(9999, 12, 31), None]
    table = pa.table({"prompt": ["?"] * 4, "label": pa.array(moments, pa.timestamp("us"))})
    (tmp_path / "in").mkdir()
    pq.write_table(table, tmp_path / "in" / "a.parquet", use_deprecated_int96_timestamps=True)
    good(prepare(tmp_path / "in", tmp_path))
    parts = [pq.read_table(part_uri(f"{tmp_path}/out", index)) for index in range(2)]
    assert [each for part in parts for each in part.column("label").to_pylist()] == moments


@pytest.mark.parametrize(
    ("column", "kind", "words"),
    [
        ("prompt", pa.int64(), "int64"),
        ("prompt", pa.binary(), "binary"),
        ("messages", pa.list_(pa.int8()), "list<element: int8>"),
        ("images", pa.list_(pa.float32()), "list<element: float>"),
        ("sampling", pa.list_(pa.string()), "list<element: string>"),
    ],
)
def test_a_request_column_of_a_type_that_no_row_can_have_is_refused(
    tmp_path: Path, column: str, kind: pa.DataType, words: str
) -> None:
    columns = {"prompt": pa.array(["?"]), column: pa.array([None], kind)}
    store(tmp_path / "in", "a.parquet", pa.table({"prompt": ["?"]}))
    store(tmp_path / "in", "b.parquet", pa.table(columns))
    with pytest.raises(
        InputError, match=rf"b\.parquet: column '{column}' is {words}; {column} must"
    ):
        open_input(str(tmp_path / "in"), renamed={}, carry=None)
