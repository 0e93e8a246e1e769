"""One row as the engine saw it, found by id or by place."""

import hashlib
import io
from pathlib import Path

import pytest
from PIL import Image

from jobs.verify.recorded import open_recorded
from jobs.verify.row import describe_row, find_row
from pipeline.commit import part_uri
from pipeline.errors import InputError
from pipeline.seeds import derive_seed
from tests.recorded_runs import OWN_SEED, RUN_SEED, make_run


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


def where(out: Path, row_id: str) -> tuple[int, int]:
    place = find_row(open_recorded(str(out)), row_id)
    return place.shard.index, place.row


def test_a_row_is_found_by_id_by_file_name_and_by_uri(out: Path) -> None:
    uri = open_recorded(str(out)).run.plan.files[1].uri
    assert where(out, "f1-9") == (3, 9)
    assert where(out, "1.parquet:9") == (3, 9)
    assert where(out, f"{uri}:9") == (3, 9)


def test_of_rows_that_share_an_id_the_first_is_shown(out: Path) -> None:
    assert where(out, "f0-5") == (0, 5)


@pytest.mark.parametrize(
    ("row_id", "words"),
    [
        ("f9-9", "no record has this custom_id. A row can also be named as 0.parquet:0"),
        ("1.parquet:12", "the file has 12 rows"),
        ("9.parquet:1", "no record has this custom_id"),
    ],
)
def test_a_row_that_is_not_there_is_refused(out: Path, row_id: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        where(out, row_id)


def test_an_id_that_no_part_has_yet_is_told_so(tmp_path: Path) -> None:
    out = make_run(tmp_path, finish=False)
    Path(part_uri(str(out), 2)).unlink()
    with pytest.raises(InputError, match="1 shards have no part yet"):
        where(out, "f1-1")
    assert where(out, "1.parquet:1") == (2, 1)
    assert describe_row(open_recorded(str(out)), "1.parquet:1")["records"] == []


def test_the_request_is_shown_with_its_prompt_tokens_seeds_and_records(out: Path) -> None:
    shown = describe_row(open_recorded(str(out)), "f1-2")
    request = shown["request"]
    assert request["prompt"].endswith("assistant<|header_end|>\n\n")
    assert "Say 2." in request["prompt"]
    assert len(request["token_ids"]) == request["prompt_tokens"]
    assert request["seeds"] == [derive_seed(RUN_SEED, "f1-2", index) for index in range(2)]
    assert request["sampling"]["n"] == 2
    assert request["stop_token_ids"] == [257, 260, 261]
    assert [record["text"] for record in shown["records"]] == ["text 1 2 0", "text 1 2 1"]
    assert shown["records"][0]["label"] == 2
    assert shown["engine"]["engine_args"]["max_num_seqs"] == 64
    assert shown["differs"] == [
        "sample 0: another prompt: tokens or images",  # the fixture's digest is made up
        "sample 1: another prompt: tokens or images",
    ]


def test_a_row_whose_file_changed_is_not_shown_as_it_never_was(tmp_path: Path) -> None:
    out = make_run(tmp_path)
    (tmp_path / "in" / "0.parquet").unlink()
    with pytest.raises(InputError, match=r"0\.parquet: is gone; the row cannot be shown as it was"):
        describe_row(open_recorded(str(out)), "f0-1")


def test_a_rows_own_seed_and_a_refusal_are_shown(out: Path) -> None:
    recorded = open_recorded(str(out))
    assert describe_row(recorded, "f0-3")["request"]["seeds"] == [OWN_SEED]
    refused = describe_row(recorded, "f0-4")
    assert refused["request"]["error_code"] == "invalid_messages"
    assert refused["differs"] == []


def test_a_row_of_a_run_with_a_template_is_shown_as_the_template_renders_it(tmp_path: Path) -> None:
    out = make_run(tmp_path, template="Label {{ label }}, please.")
    shown = describe_row(open_recorded(str(out)), "f1-2")
    assert "Label 2, please." in shown["request"]["prompt"]
    assert "Say 2." not in shown["request"]["prompt"]
    assert shown["records"][0]["label"] == 2


def test_images_are_told_by_size_tokens_and_digest(tmp_path: Path) -> None:
    sink = io.BytesIO()
    Image.new("L", (112, 56), 200).save(sink, "PNG")
    out = make_run(tmp_path, image=sink.getvalue())
    request = describe_row(open_recorded(str(out)), "f0-1")["request"]
    assert request["images"] == [
        {
            "bytes": len(sink.getvalue()),
            "width": 112,
            "height": 56,
            "tokens": request["image_tokens"],
            "sha256": hashlib.sha256(sink.getvalue()).hexdigest(),
        }
    ]
    assert request["prompt_tokens"] == len(request["token_ids"]) - 1 + request["image_tokens"]
