"""Earlier runs: which one is found, and what is learnt from its parts."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.commit import Destination, commit_outcomes
from pipeline.errors import ConfigError, ErrorCode
from pipeline.lengths import Kind
from pipeline.plan import Shard
from pipeline.previous import find_previous, learn_lengths, open_previous
from pipeline.records import Completion, Failure, Outcome
from pipeline.sampling import Sampling

NOTHING = pa.table({"x": pa.array([], pa.int8())}).drop_columns(["x"])
CAP = Sampling(max_completion_tokens=100).as_json


def completion(row: int, tokens: int, **changes: object) -> Completion:
    shown = {"finish_reason": "stop", "image_tokens": 0, "sampling": CAP, **changes}
    return Completion(
        input_row=row,
        custom_id=f"r{row}",
        sample_index=0,
        text="x",
        prompt_tokens=20,
        completion_tokens=tokens,
        cached_tokens=0,
        seed=1,
        latency_s=0.1,
        **shown,  # type: ignore[arg-type]
    )


def put_run(
    folder: Path,
    outcomes: Sequence[Outcome],
    *,
    model: str = "m",
    finished_at: str = "2026-11-24T01:00:00+00:00",
    rows_a_part: int = 50,
) -> None:
    to = Destination(f"file://{folder}", "id", model)
    for index, first in enumerate(range(0, len(outcomes), rows_a_part)):
        rows = outcomes[first : first + rows_a_part]
        commit_outcomes(to, Shard(index, "f", first, len(rows)), rows, NOTHING)
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(json.dumps({"model": {"name": model}}))
    report = {"finished_at": finished_at, "records": len(outcomes)}
    (folder / "report.json").write_text(json.dumps(report))
    (folder / "_SUCCESS").touch()


def test_the_newest_finished_run_of_the_model_is_found(tmp_path: Path) -> None:
    put_run(tmp_path / "a", [], finished_at="2026-11-23T01:00:00+00:00")
    put_run(tmp_path / "b", [], finished_at="2026-11-21T01:00:00+00:00")
    put_run(tmp_path / "c", [], finished_at="2026-11-24T01:00:00+00:00", model="other")
    put_run(tmp_path / "d", [], finished_at="2026-11-24T02:00:00+00:00")
    (tmp_path / "d" / "_SUCCESS").unlink()
    put_run(tmp_path / "e", [], finished_at="2026-11-24T03:00:00+00:00")
    (tmp_path / "e" / "report.json").write_text("{")
    (tmp_path / "prompts").mkdir()
    (tmp_path / "file").touch()
    found = find_previous(f"file://{tmp_path}/next", "m")
    assert found is not None
    assert found.uri == f"file://{tmp_path}/a"


def test_where_nothing_lies_beside_the_output_nothing_is_found(tmp_path: Path) -> None:
    assert find_previous(f"file://{tmp_path}/not/there/yet", "m") is None
    assert find_previous("s3://bucket", "m") is None


def test_a_folder_without_a_finished_run_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"--previous {tmp_path}: is no finished run"):
        open_previous(str(tmp_path))


def test_lengths_are_those_of_records_that_an_engine_made(tmp_path: Path) -> None:
    of_text = [completion(i, 10) for i in range(60)]
    of_images = [completion(100 + i, 30, image_tokens=7) for i in range(60)]
    refused = [Failure(200, "x", ErrorCode.INVALID_MESSAGES, "no", 1)]
    died = [
        Failure(
            201, "y", ErrorCode.ENGINE_FATAL, "died", 1, attempts=3, prompt_tokens=20, sampling=CAP
        )
    ]
    put_run(tmp_path, [])
    to = Destination(f"file://{tmp_path}", "id", "m")
    parts: list[Sequence[Outcome]] = [of_text, of_images, [*refused, *died]]
    for index, outcomes in enumerate(parts):
        first = outcomes[0].input_row
        commit_outcomes(to, Shard(index, "f", first, len(outcomes)), outcomes, NOTHING)
    model = learn_lengths(open_previous(str(tmp_path)))
    assert model is not None
    assert model.describe()["completions"] == 121
    assert model.mean(Kind(False, 7, 5), 100) == pytest.approx(10 * 60 / 61), "one died: 0 tokens"
    assert model.mean(Kind(True, 7, 5), 100) == pytest.approx(30)


def test_completions_that_were_cut_tell_of_longer_ones(tmp_path: Path) -> None:
    cut = [completion(i, 100, finish_reason="length") for i in range(50)]
    put_run(tmp_path, [*cut, *(completion(50 + i, 50) for i in range(50))])
    model = learn_lengths(open_previous(str(tmp_path)))
    assert model is not None
    assert model.mean(Kind(False, 7, 5), 100) == pytest.approx(75)
    assert model.mean(Kind(False, 8, 5), 200) > 90


def test_a_run_without_completions_tells_nothing(tmp_path: Path) -> None:
    put_run(tmp_path, [Failure(0, "x", ErrorCode.INVALID_MESSAGES, "no", 1)])
    assert learn_lengths(open_previous(str(tmp_path))) is None
    put_run(tmp_path / "empty", [])
    assert learn_lengths(open_previous(f"{tmp_path}/empty")) is None


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    put_run(tmp_path, [completion(0, 1)])
    (tmp_path / "data" / "part-000000.parquet").write_bytes(b"PAR1 not")
    with pytest.raises(ConfigError, match=r"part-000000\.parquet: cannot be read as a part"):
        learn_lengths(open_previous(str(tmp_path)))


def test_of_a_large_run_a_bounded_and_even_part_is_read(tmp_path: Path) -> None:
    lengths = np.arange(3000) % 97
    rows = [completion(i, int(tokens)) for i, tokens in enumerate(lengths)]
    put_run(tmp_path, rows, rows_a_part=10)
    model = learn_lengths(open_previous(str(tmp_path)))
    assert model is not None
    assert model.describe()["completions"] == 2560, "256 parts of 10"
    assert model.describe()["records"] == 3000
    assert model.mean(Kind(False, 7, 5), 100) == pytest.approx(lengths.mean(), rel=0.03)
