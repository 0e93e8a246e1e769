"""Carried columns: of every Arrow type, out of the part as they went in, or refused by name."""

import decimal
import io
import uuid
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipeline.arrow_types import conformed, large_type, plain_type, united
from pipeline.commit import Destination, commit_outcomes, part_uri
from pipeline.errors import ErrorCode, InputError
from pipeline.plan import make_plan
from pipeline.prepare import carried
from pipeline.read import open_input, read_shard
from pipeline.records import Failure, carried_columns, input_block, prepared_block

NAIVE = st.datetimes(datetime(1700, 1, 1), datetime(2200, 1, 1))
MOMENTS = st.datetimes(datetime(1700, 1, 1), datetime(2200, 1, 1), timezones=st.just(UTC))
SECONDS = NAIVE.map(lambda each: each.replace(microsecond=0))
MILLIS = NAIVE.map(lambda each: each.replace(microsecond=each.microsecond // 1000 * 1000))
CLOCK = st.times().map(lambda each: time(each.hour, each.minute, each.second))
SPANS = st.timedeltas(timedelta(days=-(10**5)), timedelta(days=10**5))
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
HALVES = st.floats(width=16, allow_nan=False)


def decimals(digits: int, scale: int) -> st.SearchStrategy[decimal.Decimal]:
    limit = 10**digits - 1
    context = decimal.Context(prec=100)
    return st.integers(-limit, limit).map(
        lambda number: decimal.Decimal(number).scaleb(-scale, context)
    )


def integers(kind: pa.DataType) -> st.SearchStrategy[int]:
    bits = kind.bit_width
    if pa.types.is_signed_integer(kind):
        return st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return st.integers(0, 2**bits - 1)


INTEGERS = [
    *(pa.int8(), pa.int16(), pa.int32(), pa.int64()),
    *(pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()),
]
LEAVES: list[tuple[pa.DataType, st.SearchStrategy[Any]]] = [
    (pa.null(), st.none()),
    (pa.bool_(), st.booleans()),
    *((kind, integers(kind)) for kind in INTEGERS),
    (pa.float16(), HALVES),
    (pa.float32(), st.floats(width=32)),
    (pa.float64(), st.floats()),
    *((kind, TEXTS) for kind in (pa.string(), pa.large_string(), pa.string_view())),
    *((kind, st.binary(max_size=6)) for kind in (pa.binary(), pa.large_binary(), pa.binary_view())),
    (pa.binary(3), st.binary(min_size=3, max_size=3)),
    (pa.date32(), st.dates()),
    (pa.date64(), st.dates()),
    *(
        (kind, CLOCK)
        for kind in (pa.time32("s"), pa.time32("ms"), pa.time64("us"), pa.time64("ns"))
    ),
    (pa.timestamp("s"), SECONDS),
    (pa.timestamp("ms"), MILLIS),
    (pa.timestamp("us", "America/New_York"), MOMENTS),
    (pa.timestamp("ns", "UTC"), MOMENTS),
    *((pa.duration(unit), SPANS) for unit in ("us", "ns")),
    (pa.decimal32(7, 2), decimals(7, 2)),
    (pa.decimal64(15, 0), decimals(15, 0)),
    (pa.decimal128(38, 10), decimals(38, 10)),
    (pa.decimal256(76, 70), decimals(76, 70)),
    (pa.month_day_nano_interval(), st.tuples(st.integers(0, 9), st.integers(0, 9), st.just(5))),
    (pa.run_end_encoded(pa.int32(), pa.string()), TEXTS),
    (pa.uuid(), st.uuids()),
    (pa.json_(), st.sampled_from(["1", '{"a": [null]}', '"ä"'])),
    (pa.bool8(), st.booleans()),
    (pa.opaque(pa.binary(), "geometry", "somebody"), st.binary(max_size=5)),
    *(
        (pa.dictionary(index, values, ordered), TEXTS)
        for index in (pa.int8(), pa.uint16())
        for values, ordered in ((pa.string(), True), (pa.large_string(), False))
    ),
]


def nullable(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | values


def nested(
    inner: st.SearchStrategy[tuple[pa.DataType, st.SearchStrategy[Any]]],
) -> st.SearchStrategy[tuple[pa.DataType, st.SearchStrategy[Any]]]:
    def lists(each: tuple[pa.DataType, st.SearchStrategy[Any]]) -> st.SearchStrategy[Any]:
        kind, values = each
        many = st.lists(nullable(values), max_size=3)
        makes = (pa.list_, pa.large_list, pa.list_view, pa.large_list_view)
        two = st.lists(nullable(values), min_size=2, max_size=2)
        plain = st.sampled_from(makes).map(lambda make: (make(kind), many))
        return plain | st.just((pa.list_(kind, 2), two))

    def structs(each: list[tuple[pa.DataType, st.SearchStrategy[Any]]]) -> Any:
        kinds = {f"f {n}": kind for n, (kind, _) in enumerate(each)}
        values = {f"f {n}": nullable(values) for n, (_, values) in enumerate(each)}
        return pa.struct(list(kinds.items())), st.fixed_dictionaries(values)

    def maps(each: tuple[pa.DataType, st.SearchStrategy[Any]]) -> Any:
        kind, values = each
        items = st.lists(st.tuples(TEXTS, nullable(values)), max_size=3)
        return pa.map_(pa.string(), kind), items

    return (
        inner.flatmap(lists)
        | st.lists(inner, min_size=1, max_size=3).map(structs)
        | inner.map(maps)
    )


TYPES = st.recursive(st.sampled_from(LEAVES), nested, max_leaves=3)


def make(values: list[Any], kind: pa.DataType) -> pa.Array:
    """Arrow makes neither dictionaries nor some extensions of Python's values."""
    if pa.types.is_dictionary(kind):
        plain = pa.array(values, kind.value_type).dictionary_encode()
        indices = plain.indices.cast(kind.index_type)
        return pa.DictionaryArray.from_arrays(indices, plain.dictionary, ordered=kind.ordered)
    if isinstance(kind, pa.BaseExtensionType):
        stored = [each.bytes if isinstance(each, uuid.UUID) else each for each in values]
        return pa.ExtensionArray.from_storage(
            kind,
            pa.array(stored, pa.large_binary()).cast(kind.storage_type)
            if kind == pa.uuid()
            else pa.array(stored, kind.storage_type),
        )
    return pa.array(values, kind)


def carry(folder: Path, names: list[str]) -> pa.Table:
    """Columns of all files, by way of shards of three rows, blocks on a wire, and parts."""
    found = open_input(f"{folder}/in", renamed={}, carry=names)
    to = Destination(f"file://{folder}/out", "run", "m")
    plan = make_plan(found.files, shard_rows=3, shard_bytes=2**30)
    for shard in plan.shards:
        block = travelled(input_block(shard, read_shard(shard, found.columns)))
        rows = range(shard.first_row, shard.first_row + shard.rows)
        failures = [Failure(row, "a", ErrorCode.TIMEOUT, "", 0) for row in rows]
        prepared = travelled(prepared_block(shard, failures, carried(block, found.columns)))
        commit_outcomes(to, shard, failures, carried_columns(prepared))
    parts = [pq.read_table(part_uri(f"{folder}/out", shard.index)) for shard in plan.shards]
    return pa.concat_tables([part.select(names) for part in parts])


def travelled(block: pa.Table) -> pa.Table:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, block.schema) as writer:
        writer.write_table(block)
    return pa.ipc.open_stream(sink.getvalue()).read_all()


def store(folder: Path, *columns: pa.Array | pa.ChunkedArray) -> None:
    (folder / "in").mkdir(exist_ok=True)
    for number, column in enumerate(columns):
        table = pa.table({"prompt": ["?"] * len(column), "x": column})
        pq.write_table(table, folder / "in" / f"{number}.parquet")


@st.composite
def storable(draw: st.DrawFn) -> pa.Array:
    """Four values of a type that Arrow makes of Python's values, and that Parquet holds."""
    kind, values = draw(TYPES)
    drawn = draw(st.lists(nullable(values), min_size=4, max_size=4))
    try:
        column = make(drawn, kind)
        pq.write_table(pa.table({"x": column}), io.BytesIO())
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid, TypeError):
        assume(False)
    return column


@settings(max_examples=12, deadline=None)
@given(columns=st.lists(storable(), min_size=8, max_size=8))
def test_columns_of_any_type_come_out_as_they_went_in(columns: list[pa.Array]) -> None:
    named = {f"c{number}": column for number, column in enumerate(columns)}
    with TemporaryDirectory() as name:
        (Path(name) / "in").mkdir()
        pq.write_table(pa.table({"prompt": ["?"] * 4, **named}), f"{name}/in/a.parquet")
        stored = pq.read_table(f"{name}/in/a.parquet")
        found = carry(Path(name), list(named))
    for each in named:
        before, after = stored.column(each), found.column(each)
        assert after.type == plain_type(before.type)
        assert repr(after.to_pylist()) == repr(before.to_pylist())
        if after.type == before.type and "nan" not in repr(before.to_pylist()):
            assert after.equals(before)


DAY = date(2026, 12, 1)
NOON = datetime(2026, 12, 1, 12)
LIST = [[1, 2], None, [3, 4]]
STRUCT = [{"a": 1, "b": "x"}, None, {"a": None, "b": "y"}]


@pytest.mark.parametrize(
    ("one", "other", "kind"),
    [
        (pa.nulls(2), pa.array([1.5, None]), pa.float64()),
        (pa.nulls(2), pa.array([[1], None]), pa.list_(pa.int64())),
        (pa.array(["a"]), pa.array(["b"], pa.large_string()), pa.large_string()),
        (pa.array(["a"]), pa.array(["b"], pa.string_view()), pa.string()),
        (pa.array([b"a"]), pa.array([b"bc"], pa.binary(2)), pa.binary()),
        (pa.array(["a"]), pa.array(["b", None]).dictionary_encode(), pa.string()),
        (pa.array([1], pa.int8()), pa.array([2**40]), pa.int64()),
        (pa.array([1], pa.uint32()), pa.array([-1], pa.int8()), pa.int64()),
        (pa.array([2**31 - 1], pa.int32()), pa.array([0.1]), pa.float64()),
        (pa.array([0.1], pa.float32()), pa.array([0.1]), pa.float64()),
        (
            pa.array([decimal.Decimal("1.50")], pa.decimal128(5, 2)),
            pa.array([decimal.Decimal(10**37)], pa.decimal128(38, 0)),
            pa.decimal256(40, 2),
        ),
        (
            pa.array([NOON], pa.timestamp("us")),
            pa.array([NOON], pa.timestamp("ns")),
            pa.timestamp("ns"),
        ),
        (
            pa.array([NOON, None], pa.timestamp("ms", "+00:00")),
            pa.array([NOON], pa.timestamp("us", "UTC")),
            pa.timestamp("us", "UTC"),
        ),
        (
            pa.array([None, None], pa.timestamp("us")),
            pa.array([NOON], pa.timestamp("ns")),
            pa.timestamp("ns"),
        ),
        (pa.array([time(1)], pa.time32("ms")), pa.array([time(2)]), pa.time64("us")),
        (pa.array([LIST[0]]), pa.array(LIST, pa.list_(pa.int8(), 2)), pa.list_(pa.int64())),
        (pa.array(LIST, pa.large_list(pa.int8())), pa.array(LIST), pa.large_list(pa.int64())),
        (pa.array(LIST, pa.list_view(pa.int8())), pa.array(LIST), pa.list_(pa.int64())),
        (
            pa.array(STRUCT),
            pa.array(STRUCT, pa.struct([("b", pa.large_string()), ("a", pa.int8())])),
            pa.struct([("a", pa.int64()), ("b", pa.large_string())]),
        ),
        (
            pa.array([{"a": 1}], pa.struct([pa.field("a", pa.int64(), nullable=False)])),
            pa.array([{"a": None}], pa.struct([("a", pa.int64())])),
            pa.struct([("a", pa.int64())]),
        ),
        (
            make([uuid.UUID(int=5)], pa.uuid()),
            pa.array([b"0123456789abcdef"], pa.binary(16)),
            pa.binary(16),
        ),
        (make(["1"], pa.json_()), pa.array(["x"]), pa.string()),
        (
            pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int8())),
            pa.array([None, [("b", None)]], pa.map_(pa.large_string(), pa.int64())),
            pa.map_(pa.large_string(), pa.int64()),
        ),
    ],
    ids=lambda each: str(each.type if isinstance(each, pa.Array) else each),
)
def test_files_that_differ_in_layout_alone_are_one_input(
    tmp_path: Path, one: pa.Array, other: pa.Array, kind: pa.DataType
) -> None:
    for number, columns in enumerate(((one, other), (other, one))):
        folder = tmp_path / str(number)
        folder.mkdir()
        store(folder, *columns)
        found = carry(folder, ["x"]).column("x")
        expected = [value for column in columns for value in python(column)]
        assert found.to_pylist() == expected
        assert united(columns[0].type, columns[1].type) == found.type
        if number == 0:
            assert found.type == kind


def python(column: pa.Array) -> list[Any]:
    """An extension's values as its storage has them, which is what two files have in common."""
    plain: list[Any] = getattr(column, "storage", column).to_pylist()
    return plain


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (pa.array([1]), pa.array(["1"])),
        (pa.array([1]), pa.array([0.5])),  # whole numbers above 2**53 are no doubles
        (pa.array([1], pa.uint64()), pa.array([-1])),
        (pa.array(["a"]), pa.array([b"a"])),
        (pa.array([NOON], pa.timestamp("us")), pa.array([NOON], pa.timestamp("us", "UTC"))),
        (
            pa.array([NOON], pa.timestamp("us", "Asia/Tokyo")),
            pa.array([NOON], pa.timestamp("us", "UTC")),
        ),
        (pa.array([DAY]), pa.array([NOON])),
        (pa.array([{"a": 1}]), pa.array([{"a": 1, "b": 2}])),
        (
            pa.array([[NOON]], pa.list_(pa.timestamp("us"))),
            pa.array([[NOON]], pa.list_(pa.timestamp("ns"))),
        ),
        (pa.array([datetime(1, 1, 1)], pa.timestamp("us")), pa.array([NOON], pa.timestamp("ns"))),
        (
            pa.array([decimal.Decimal(1)], pa.decimal256(76, 0)),
            pa.array([decimal.Decimal("0.1")], pa.decimal128(5, 2)),
        ),
    ],
    ids=lambda array: str(array.type),
)
def test_files_that_no_type_holds_both_of_are_refused_by_name(
    tmp_path: Path, one: pa.Array, other: pa.Array
) -> None:
    store(tmp_path, one, other)
    with pytest.raises(InputError, match=r"/in/[01]\.parquet: column 'x' is .*output\.carry"):
        open_input(f"{tmp_path}/in", renamed={}, carry=None)


def test_types_that_only_parquet_names_are_carried_as_arrows(tmp_path: Path) -> None:
    """DuckDB writes no Arrow schema: UUID and JSON are Parquet's own logical types."""
    (tmp_path / "in").mkdir()
    rows = "SELECT '?' AS prompt, '00000000-0000-0000-0000-000000000007'::UUID u, '[1]'::JSON j"
    duckdb.sql(f"COPY ({rows}) TO '{tmp_path}/in/a.parquet' (FORMAT parquet)")
    found = carry(tmp_path, ["u", "j"])
    assert found.schema.types == [pa.uuid(), pa.json_()]
    assert found.to_pylist() == [{"u": uuid.UUID(int=7), "j": "[1]"}]


def test_an_extension_that_nobody_here_knows_keeps_its_name(tmp_path: Path) -> None:
    name = {"ARROW:extension:name": "geoarrow.wkb", "ARROW:extension:metadata": "{}"}
    field = pa.field("x", pa.binary(), metadata={**name, "other": "dropped"})
    table = pa.table([["?"], [b"1"]], schema=pa.schema([("prompt", pa.string()), field]))
    (tmp_path / "in").mkdir()
    pq.write_table(table, tmp_path / "in" / "a.parquet")
    carry(tmp_path, ["x"])
    found = pq.read_schema(part_uri(f"{tmp_path}/out", 0)).field("x").metadata
    assert {key.decode(): value.decode() for key, value in found.items()}.items() >= name.items()
    assert b"other" not in found


def test_a_type_for_more_than_two_gibibytes_holds_the_same_values() -> None:
    kind = pa.struct([("a", pa.list_(pa.struct([("b", pa.string())]))), ("c", pa.binary())])
    column = pa.chunked_array([pa.array([{"a": [{"b": "x"}, None], "c": b"1"}, None], kind)])
    large = conformed(column, large_type(kind))
    assert large.to_pylist() == column.to_pylist()
    assert str(large.type) == (
        "struct<a: large_list<item: struct<b: large_string>>, c: large_binary>"
    )


@given(kinds=st.tuples(TYPES, TYPES).map(lambda each: (each[0][0], each[1][0])))
@settings(max_examples=50, deadline=None)
def test_what_types_unite_to_does_not_depend_on_their_order(
    kinds: tuple[pa.DataType, pa.DataType],
) -> None:
    one, other = united(*kinds), united(*reversed(kinds))
    assert (one is None) == (other is None)
    assert united(kinds[0], kinds[0]) == plain_type(kinds[0])
    if one is not None:
        assert united(one, kinds[0]) == one
