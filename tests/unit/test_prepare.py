"""Preparing: rows become token ids with exact counts, or errored records; order and count stay."""

import io
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image

from pipeline.fetch import ImageFetcher
from pipeline.model import ModelSpec
from pipeline.plan import FirstUse, Shard
from pipeline.prepare import PrepareSpec, prepare_block
from pipeline.read import InputColumns
from pipeline.records import Failure, Prepared, carried_columns, input_block, read_prepared
from pipeline.sampling import SamplingDefaults
from pipeline.seeds import derive_seed

MODEL = ModelSpec("cluster/models/mini-maverick", None, max_model_len=512)
REQUEST = {name: name for name in ("custom_id", "prompt", "messages", "images", "sampling")}


def png(width: int, height: int) -> bytes:
    sink = io.BytesIO()
    Image.new("L", (width, height), 200).save(sink, "PNG")
    return sink.getvalue()


def prepare(
    tmp_path: Path,
    rows: list[dict[str, Any]],
    *,
    max_image_pixels: int = 10**6,
    max_image_bytes: int = 10**6,
) -> list[Prepared | Failure]:
    return prepare_table(
        tmp_path,
        pa.Table.from_pylist(rows),
        max_image_pixels=max_image_pixels,
        max_image_bytes=max_image_bytes,
    )


def prepare_table(
    tmp_path: Path,
    table: pa.Table,
    *,
    max_image_pixels: int = 10**6,
    max_image_bytes: int = 10**6,
    first_uses: Mapping[int, FirstUse] | None = None,
    model: ModelSpec = MODEL,
) -> list[Prepared | Failure]:
    carried = pa.schema([table.schema.field(n) for n in table.schema.names if n == "label"])
    spec = PrepareSpec(
        model=model,
        columns=InputColumns(REQUEST, carried),
        sampling=SamplingDefaults(temperature=0.5),
        run_seed=7,
        max_image_pixels=max_image_pixels,
        fetcher=ImageFetcher(f"file://{tmp_path}", max_image_bytes, 4),
    )
    shard = Shard(0, f"file://{tmp_path}/rows.parquet", 100, table.num_rows)
    block = prepare_block(input_block(shard, table, first_uses), spec=spec)
    assert carried_columns(block).column_names == carried.names
    return read_prepared(block)


def good(item: Prepared | Failure) -> Prepared:
    assert isinstance(item, Prepared), item
    return item


def code(item: Prepared | Failure) -> str:
    assert isinstance(item, Failure), item
    return str(item.code)


def test_a_text_row_is_the_chat_template_in_tokens_with_one_bos(tmp_path: Path) -> None:
    (item,) = prepare(tmp_path, [{"prompt": "Count to 3."}])
    ids = list(good(item).token_ids)
    # bytes are tokens 0-255, <|begin_of_text|> is 256, and headers wrap the roles
    assert ids.count(256) == 1
    assert ids[0] == 256
    assert bytes(i for i in ids if i < 256) == b"user\n\nCount to 3.assistant\n\n"
    assert good(item).prompt_tokens == len(ids)


def test_the_tokens_are_those_of_transformers_own_chat_template(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    messages = [
        {"role": "system", "content": "Kürze! 日本語 हिन्दी"},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "مرحبا"},
    ]
    (item,) = prepare(tmp_path, [{"messages": messages}])
    tokenizer = AutoTokenizer.from_pretrained("cluster/models/mini-maverick")
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
    assert list(good(item).token_ids) == list(expected["input_ids"])


@pytest.mark.parametrize(("width", "image_tokens"), [(56, 7), (112, 17), (168, 22), (224, 27)])
def test_image_tokens_follow_the_tiles(tmp_path: Path, width: int, image_tokens: int) -> None:
    with_image, text = prepare(
        tmp_path, [{"prompt": "?", "images": [png(width, 56)]}, {"prompt": "?", "images": []}]
    )
    assert good(with_image).image_tokens == image_tokens
    assert good(with_image).prompt_tokens == good(text).prompt_tokens + image_tokens


def test_images_by_uri_come_from_the_inputs_folder(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a #1.png").write_bytes(png(56, 56))
    rows = [
        {"prompt": "?", "images": ["images/a #1.png"]},
        {"prompt": "?", "images": [f"file://{tmp_path}/images/a #1.png"]},
        {"prompt": "?", "images": ["images/none.png"]},
        {"prompt": "?", "images": ["../secret.png"]},
        {"prompt": "?", "images": ["/etc/passwd"]},
        {"prompt": "?", "images": ["http://169.254.169.254/x.png"]},
    ]
    items = prepare(tmp_path, rows)
    assert good(items[0]).images == good(items[1]).images == (png(56, 56),)
    assert [code(item) for item in items[2:]] == ["image_not_found"] + ["image_forbidden"] * 3


def test_a_link_out_of_the_inputs_folder_is_not_followed(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    (outside / "a.png").write_bytes(png(56, 56))
    (inside / "a.png").symlink_to(outside / "a.png")
    (item,) = prepare(inside, [{"prompt": "?", "images": ["a.png"]}])
    assert code(item) == "image_forbidden"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "x" * 600}, "context_length_exceeded"),
        ({"prompt": "?", "images": [b"garbage"]}, "image_invalid"),
        ({"prompt": "?", "images": [png(2000, 2000)]}, "image_too_large"),
        ({"prompt": "?", "images": [b"\0" * 1_000_001]}, "image_too_large"),
        ({"prompt": "say <|image|>"}, "invalid_messages"),
        ({"prompt": "say <|patch|>"}, "invalid_messages"),
        ({"prompt": "?", "sampling": '{"temperature": "hot"}'}, "invalid_parameter"),
        ({"prompt": None}, "invalid_messages"),
        ({"prompt": ""}, "invalid_messages"),
        ({"messages": '[{"role": "user", "content": ""}]'}, "invalid_messages"),
        ({"prompt": "?", "images": "not/there.png"}, "image_not_found"),
        ({"prompt": "?", "images": "with\0nul.png"}, "image_forbidden"),
        ({"prompt": "?", "images": "x" * 5000}, "image_fetch_failed"),
        ({"prompt": "?", "images": 7}, "image_invalid"),
        ({"prompt": "?", "sampling": '{"top_k": 1' + "0" * 30 + "}"}, "invalid_parameter"),
        ({"prompt": "?", "sampling": '{"stop": ["\\ud800"]}'}, "invalid_parameter"),
        ({"prompt": "?", "sampling": "[" * 100_000}, "invalid_parameter"),
        ({"messages": "[" * 100_000}, "invalid_messages"),
        ({"messages": '[{"role": "user", "content": "a", "\\ud800": 1}]'}, "invalid_messages"),
        ({"messages": '[{"role": "user", "content": "\\ud800"}]'}, "invalid_messages"),
    ],
)
def test_a_bad_row_is_a_failure_and_its_neighbours_are_not(
    tmp_path: Path, row: dict[str, Any], expected: str
) -> None:
    columns = dict.fromkeys(row) | {"prompt": "Hello"}
    before, bad, after = prepare(tmp_path, [columns, dict.fromkeys(columns) | row, columns])
    assert code(bad) == expected
    assert (good(before).input_row, bad.input_row, good(after).input_row) == (100, 101, 102)


def test_a_value_that_is_not_utf8_costs_its_row_only(tmp_path: Path) -> None:
    raw = pa.array([b"Hello", b"\xff\xfe", b"Hello"], pa.binary())
    broken = pa.StringArray.from_buffers(3, raw.buffers()[1], raw.buffers()[2])
    before, bad, after = prepare_table(tmp_path, pa.table({"prompt": broken}))
    assert code(bad) == "invalid_messages"
    assert list(good(before).token_ids) == list(good(after).token_ids)


def test_what_was_counted_before_a_row_failed_is_kept(tmp_path: Path) -> None:
    (item,) = prepare(tmp_path, [{"prompt": "x" * 600, "images": [png(112, 56)]}])
    assert isinstance(item, Failure)
    assert item.image_tokens == 17
    assert item.prompt_tokens > 600


def test_seeds_come_from_the_row_or_from_its_identity(tmp_path: Path) -> None:
    items = prepare(
        tmp_path,
        [
            {"custom_id": "a", "prompt": "?", "sampling": '{"seed": 5, "n": 2}'},
            {"custom_id": "b", "prompt": "?", "sampling": '{"n": 2}'},
            {"custom_id": None, "prompt": "?", "sampling": None},
        ],
    )
    assert good(items[0]).seeds == (5, 6)
    assert good(items[1]).seeds == (derive_seed(7, "b", 0), derive_seed(7, "b", 1))
    assert good(items[2]).custom_id == "rows.parquet:102"
    assert good(items[2]).seeds == (derive_seed(7, "rows.parquet:102", 0),)


def test_a_rows_sampling_wins_over_the_runs(tmp_path: Path) -> None:
    items = prepare(tmp_path, [{"prompt": "?", "sampling": {"temperature": 0.0}}])
    assert good(items[0]).sampling.temperature == 0.0
    items = prepare(tmp_path, [{"prompt": "?", "sampling": None}])
    assert good(items[0]).sampling.temperature == 0.5


def test_a_repeated_custom_id_is_a_failure_that_names_its_first_use(tmp_path: Path) -> None:
    rows = [
        {"custom_id": "a", "prompt": "Hello", "images": []},
        {"custom_id": "a", "prompt": "x" * 600, "images": ["not/there.png"]},
    ]
    uses = {101: FirstUse("s3://b/first.parquet", 7)}
    first, repeated = prepare_table(tmp_path, pa.Table.from_pylist(rows), first_uses=uses)
    assert good(first).custom_id == "a"
    assert isinstance(repeated, Failure)
    assert (repeated.input_row, repeated.custom_id) == (101, "a")
    assert repeated.code == "duplicate_custom_id"
    assert "custom_id 'a' was used before, by row 7 of s3://b/first.parquet" in repeated.message
    assert (repeated.attempts, repeated.prompt_tokens, repeated.image_tokens) == (0, 0, 0)
    assert repeated.seed == derive_seed(7, "a", 0)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(messages[0]) }}",
        "{{ messages[0].update(role='system') }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    ],
)
def test_a_chat_template_that_reaches_beyond_its_messages_is_the_rows_error(
    tmp_path: Path, template: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(MODEL.model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "chat_template.jinja").write_text(template)
    (item,) = prepare_table(
        tmp_path,
        pa.Table.from_pylist([{"prompt": "a"}]),
        model=ModelSpec(str(folder), None, max_model_len=512),
    )
    assert code(item) == "invalid_messages"
    assert isinstance(item, Failure)
    assert "the chat template refuses the messages" in item.message
    assert "unsafe" in item.message or "not safe" in item.message
