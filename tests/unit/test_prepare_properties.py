"""Whatever a row holds, prepare makes one record of it, in its place, and never a defect of ours.

Rows, parameters and image headers are made up by hypothesis; the prepare step is the real one.
"""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.errors import ErrorCode
from pipeline.fetch import ImageFetcher
from pipeline.model import ModelSpec
from pipeline.plan import Shard
from pipeline.prepare import PrepareSpec, prepare_block
from pipeline.read import InputColumns
from pipeline.records import Prepared, input_block, read_prepared
from pipeline.sampling import SamplingDefaults

MAX_MODEL_LEN = 512
SPEC = PrepareSpec(
    model=ModelSpec("cluster/models/mini-maverick", None, max_model_len=MAX_MODEL_LEN),
    columns=InputColumns(
        {name: name for name in ("custom_id", "prompt", "messages", "images", "sampling")},
        pa.schema([]),
    ),
    sampling=SamplingDefaults(),
    run_seed=3,
    max_image_pixels=1_000_000,
    fetcher=ImageFetcher(f"file://{Path(__file__).parent}", 100_000, 2),
)
SCHEMA = pa.schema(
    [
        ("custom_id", pa.string()),
        ("prompt", pa.string()),
        ("messages", pa.string()),
        ("images", pa.list_(pa.binary())),
        ("sampling", pa.string()),
    ]
)
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
wild = st.text(st.characters(), max_size=30) | st.sampled_from(
    ["", " ", "\0", "\ud800", "<|image|>", "<|patch|>", "<|eot|>", "a" * 600]
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | wild,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)
"""Any JSON, with NaN, infinities and lone surrogates, which Python's JSON lets through."""
part = st.one_of(
    st.fixed_dictionaries({"type": st.just("text"), "text": wild | anything}),
    st.fixed_dictionaries({"type": st.just("image")}),
    st.fixed_dictionaries(
        {
            "type": st.just("image_url"),
            "image_url": st.sampled_from(
                ["data:image/png;base64,", "data:,", "nowhere.png", "../../etc/passwd", "\0", "//"]
            )
            | st.fixed_dictionaries({"url": text})
            | anything,
        }
    ),
    anything,
)
turn = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["system", "developer", "user", "assistant", "tool", "wizard"]),
        "content": wild | st.lists(part, max_size=3) | anything,
    },
    optional={"name": text, "x": anything},
)
schema = st.sampled_from([{"type": "object"}, {"enum": [None, 1]}, {"$ref": "#"}, {"type": "?"}])
KINDS: dict[str, st.SearchStrategy[Any]] = {
    "json": schema | anything,
    "regex": wild,
    "choice": st.lists(wild) | anything,
    "grammar": wild,
}
structured = st.one_of(
    *(st.fixed_dictionaries({kind: value}) for kind, value in KINDS.items()),
    st.fixed_dictionaries({}, optional=KINDS),
)
response_format = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "json_object", "json_schema"])},
    optional={"json_schema": st.fixed_dictionaries({"schema": schema | anything})},
)
number = st.floats(-3, 3) | st.sampled_from([0, 1, -1, 2, 2**31, 2**63, float("nan"), True])
PARAMETERS = {name: number | st.none() | anything for name in SamplingDefaults.model_fields} | {
    "stop": wild | st.lists(wild, max_size=5),
    "n": st.integers(0, 130),
    "logit_bias": st.dictionaries(st.integers(-1, 300).map(str) | text, st.floats(-101, 101)),
    "logprobs": st.booleans(),
    "response_format": response_format | response_format.map(json.dumps),
    "structured_outputs": structured | structured.map(json.dumps),
}
sampling = st.sampled_from(sorted(PARAMETERS)).flatmap(
    lambda name: st.tuples(st.just(name), PARAMETERS[name])
)
samplings = st.lists(sampling, max_size=3).map(dict) | anything


def _encoded(kind: str, mode: str, size: tuple[int, int]) -> bytes:
    sink = io.BytesIO()
    Image.new(mode, size, 1).save(sink, kind)
    return sink.getvalue()


IMAGES = [
    _encoded(kind, mode, size)
    for kind, mode in [("PNG", "P"), ("JPEG", "CMYK"), ("GIF", "P"), ("BMP", "1"), ("TIFF", "I;16")]
    for size in [(1, 1), (3, 40)]
] + [_encoded("WEBP", "RGBA", (5, 7))]


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """An image with a few bytes of its header changed, cut anywhere, or with a tail of its own."""
    data = bytearray(draw(st.sampled_from(IMAGES)))
    for place in draw(st.lists(st.integers(0, min(63, len(data) - 1)), max_size=4)):
        data[place] = draw(st.integers(0, 255))
    end = draw(st.just(len(data)) | st.integers(0, len(data)))
    return bytes(data[:end]) + draw(st.binary(max_size=8))


images = st.lists(damaged() | st.sampled_from(IMAGES), max_size=3)
messages = st.lists(turn, min_size=1, max_size=4) | anything


def check(*rows: dict[str, Any]) -> None:
    """One record per row, in its place, prepared within bounds or failed with a reason."""
    shard = Shard(0, "file:///in/a.parquet", 7, len(rows))
    block = input_block(shard, pa.Table.from_pylist(list(rows), schema=SCHEMA))
    items = read_prepared(prepare_block(block, spec=SPEC))
    assert [item.input_row for item in items] == list(range(7, 7 + len(rows)))
    for item in items:
        if isinstance(item, Prepared):
            assert 0 < item.prompt_tokens < MAX_MODEL_LEN
            assert len(item.seeds) == item.sampling.n
            assert all(0 <= seed < 2**63 for seed in item.seeds)
        else:
            assert item.code is not ErrorCode.INTERNAL_ERROR, item.message
            assert item.message


many = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@many
@given(samplings)
@example({"stop": ["\ud800"]})
@example({"structured_outputs": {"grammar": "\ud800"}})
@example({"structured_outputs": {"json": '{"const": "\ud800"}'}})
def test_any_parameters_make_one_record(asked: Any) -> None:
    check({"prompt": "a", "sampling": json.dumps(asked)})


@many
@given(messages)
def test_any_messages_make_one_record(turns: Any) -> None:
    check({"messages": json.dumps(turns)})


@many
@given(messages, images)
def test_any_messages_with_images_make_one_record(turns: Any, attached: list[bytes]) -> None:
    check({"messages": json.dumps(turns), "images": attached})


@many
@given(images)
def test_any_images_make_one_record(attached: list[bytes]) -> None:
    check({"prompt": "a", "images": attached})


@many
@given(
    st.lists(
        st.fixed_dictionaries(
            {},
            optional={
                "custom_id": text,
                "prompt": text,
                "messages": messages.map(json.dumps) | text,
                "images": images,
                "sampling": samplings.map(json.dumps) | text,
            },
        ),
        min_size=2,
        max_size=6,
    )
)
def test_any_rows_make_one_record_each_in_order(rows: list[dict[str, Any]]) -> None:
    check(*rows)


@pytest.mark.parametrize("given_row", [{}, {"prompt": ""}, {"prompt": "a", "messages": "[]"}])
def test_rows_that_ask_for_nothing_are_errors(given_row: dict[str, Any]) -> None:
    shard = Shard(0, "file:///in/a.parquet", 0, 1)
    block = input_block(shard, pa.Table.from_pylist([given_row], schema=SCHEMA))
    (item,) = read_prepared(prepare_block(block, spec=SPEC))
    assert not isinstance(item, Prepared)
    assert item.code is ErrorCode.INVALID_MESSAGES
