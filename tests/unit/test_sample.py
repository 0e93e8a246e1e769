"""The sample input and the model that ships with it: what they promise, read from the files."""

import json
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
from transformers import AutoTokenizer

from cluster.models.digits import Split, digits
from cluster.sample import MEANT_TO_FAIL, SAMPLE_FOLDER, judge
from jobs.sample import make
from pipeline.errors import ErrorCode

MODEL = Path("cluster/models/mini-maverick")


def test_the_sample_has_600_rows_in_three_files_of_several_row_groups() -> None:
    footers = [pq.read_metadata(path) for path in sorted(SAMPLE_FOLDER.glob("*.parquet"))]
    assert len(footers) == 3
    assert all(footer.num_row_groups > 1 for footer in footers)
    assert sum(footer.num_rows for footer in footers) == 600


def test_the_sample_covers_every_task_and_its_bad_rows_name_their_error() -> None:
    tables = [pq.read_table(path) for path in sorted(SAMPLE_FOLDER.glob("*.parquet"))]
    rows = [row for table in tables for row in table.select(["task", "label"]).to_pylist()]
    tasks = Counter(row["task"] for row in rows)
    assert tasks == {"single": 300, "wide": 120, "count": 150, "larger": 22, MEANT_TO_FAIL: 8}
    labels = {row["label"] for row in rows if row["task"] == MEANT_TO_FAIL}
    assert labels <= {str(code) for code in ErrorCode}
    kinds = {str(table.schema.field("images").type) for table in tables}
    assert len(kinds) == 3


def test_the_script_in_the_repo_makes_the_sample_in_the_repo(tmp_path: Path) -> None:
    make.write(tmp_path)
    shipped = {p.relative_to(SAMPLE_FOLDER): p for p in SAMPLE_FOLDER.rglob("*") if p.is_file()}
    made = {p.relative_to(tmp_path): p for p in tmp_path.rglob("*") if p.is_file()}
    assert set(made) == set(shipped)
    for name, path in made.items():
        if path.suffix == ".parquet":
            assert pq.read_table(path) == pq.read_table(shipped[name])


def test_held_out_digits_are_not_trained_on() -> None:
    trained, held_out = digits(Split.TRAIN), digits(Split.HELD_OUT)
    assert (len(trained), len(held_out)) == (1400, 397)
    assert not {digit.index for digit in trained} & {digit.index for digit in held_out}


def test_a_record_that_ended_wrongly_is_named() -> None:
    good = {
        "task": "single",
        "label": "7",
        "text": "7",
        "status": "succeeded",
        "seed": 1,
        "prompt_tokens": 5,
        "completion_tokens": 2,
        "finish_reason": "stop",
        "custom_id": "a",
        "error_code": None,
    }
    bad = {**good, "custom_id": "b", "task": MEANT_TO_FAIL, "label": "image_invalid"}
    verdict = judge([good, {**good, "custom_id": "c", "completion_tokens": 0}, bad])
    assert verdict.wrongly_failed == ("c",)
    assert verdict.wrongly_passed == ("b",)
    assert not verdict.accounted
    assert (verdict.digits, verdict.digits_right) == (2, 2)


def test_the_checkpoint_is_small_and_is_a_llama_4_with_experts_and_tiles() -> None:
    assert sum(path.stat().st_size for path in MODEL.iterdir()) < 6_000_000
    config = json.loads((MODEL / "config.json").read_text())
    assert config["architectures"] == ["Llama4ForConditionalGeneration"]
    assert config["text_config"]["num_local_experts"] == 8
    assert config["text_config"]["num_experts_per_tok"] == 1
    assert config["vision_config"]["image_size"] == 56


def test_any_text_survives_the_tokenizer_byte_for_byte() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    for text in ("Grüße  \n\t", "日本語 हिन्दी العربية", "\x00\x7f", "👩‍🚀", " lead and trail "):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert bytes(ids) == text.encode()
        assert tokenizer.decode(ids) == text
