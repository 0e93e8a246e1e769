"""Finished run folders, made by the code that makes them, without an engine or Ray."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from jobs.batch import run_batch
from jobs.settle import Options, settle
from pipeline.commit import commit_outcomes, part_uri
from pipeline.config import load_config
from pipeline.digests import digest_tokens
from pipeline.engine import VLLMEngine
from pipeline.errors import ErrorCode
from pipeline.plan import Shard
from pipeline.records import Completion, Failure, Outcome
from pipeline.sampling import Sampling
from pipeline.seeds import derive_seed

RUN_SEED = 7
FILE_ROWS = 12
SHARD_ROWS = 6
OWN_SEED = 1_000
REPLICA = {"process": "p", "hardware": "2 x CPU", "engine": "e", "version": "v"}


def make_run(
    folder: Path,
    *,
    finish: bool = True,
    jsonl: bool = False,
    image: bytes | None = None,
    template: str | None = None,
) -> Path:
    """A run of two files and four shards in ``folder``; its output folder.

    Of each file row 2 asks for two samples, row 3 brings its own seed, row 4 is refused by prepare;
    row 5 of the second file repeats an id: the first file's row 5's, in JSONL its own row 3's.
    ``image`` is row 1's. With a ``template``, requests are made of the column ``label`` by it.
    """
    (folder / "in").mkdir(parents=True)
    for number in range(2):
        if jsonl:
            lines = [json.dumps(_line(number, row)) for row in range(FILE_ROWS)]
            (folder / "in" / f"{number}.jsonl").write_text("\n".join(lines))
        else:
            pq.write_table(_table(number, image), folder / "in" / f"{number}.parquet")
    document = {
        "input": {
            "uri": str(folder / "in"),
            **({} if template is None else {"template": {"prompt": template}}),
        },
        "output": {"uri": str(folder / "out")},
        "seed": RUN_SEED,
        "engine": {"profile": "mini-maverick-tp1"},
        "limits": {"shard_rows": SHARD_ROWS, "max_error_rate": 1.0},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(document))
    config = load_config(folder / "job.yaml")
    job = settle(config, Options(), VLLMEngine)
    job.run.start()
    for shard in job.run.plan.shards:
        outcomes = [each for row in _rows(shard) for each in _outcomes(shard, row)]
        completed = [each for each in outcomes if isinstance(each, Completion)]
        tokens = {
            "prompt": sum(each.prompt_tokens for each in completed),
            "completion": sum(each.completion_tokens for each in completed),
        }
        carried = _carried(shard, jsonl=jsonl)
        commit_outcomes(job.to, shard, outcomes, carried, engine_tokens=tokens, replica=REPLICA)
    if finish:
        run_batch(config, Options())
    return folder / "out"


def rewrite(out: Path, shard: int, change: Callable[[pa.Table], pa.Table]) -> None:
    """Write a part anew as any other program would, keeping what Arrow keeps of its footer."""
    path = Path(part_uri(str(out), shard))
    pq.write_table(change(pq.read_table(path)), path, compression="zstd")


def with_value(table: pa.Table, column: str, position: int, value: Any) -> pa.Table:
    """A copy of ``table`` with one value replaced."""
    values = table.column(column).to_pylist()
    values[position] = value
    index = table.schema.get_field_index(column)
    return table.set_column(index, table.field(index), pa.array(values, table.field(index).type))


def _table(number: int, image: bytes | None) -> pa.Table:
    rows = range(FILE_ROWS)
    return pa.table(
        {
            "custom_id": [custom_id(number, row) for row in rows],
            "prompt": [None if row == 4 else f"Say {row}." for row in rows],
            "sampling": [_own_sampling(row) for row in rows],
            "images": pa.array(
                [[image] if image and row == 1 else None for row in rows], pa.list_(pa.binary())
            ),
            "label": pa.array(rows, pa.int16()),
        }
    )


def _line(number: int, row: int) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": f"Say {row}."}]}
    if row == 4:
        body = {}
    return {
        "custom_id": custom_id(number, row, jsonl=True),
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {**body, **json.loads(_own_sampling(row) or "{}")},
    }


def custom_id(number: int, row: int, *, jsonl: bool = False) -> str:
    """The id of a row of a file. Ids of JSONL need only differ within their file."""
    if jsonl:
        return f"f{number}-{3 if (number, row) == (1, 5) else row}"
    return f"f{0 if row == 5 else number}-{row}"


def _own_sampling(row: int) -> str | None:
    if row == 2:
        return json.dumps({"n": 2})
    return json.dumps({"seed": OWN_SEED}) if row == 3 else None


def _carried(shard: Shard, *, jsonl: bool) -> pa.Table:
    if jsonl:
        return pa.table({"url": ["/v1/chat/completions"] * shard.rows})
    return pa.table({"label": pa.array(_rows(shard), pa.int16())})


def _rows(shard: Shard) -> range:
    return range(shard.first_row, shard.first_row + shard.rows)


def _outcomes(shard: Shard, row: int) -> list[Outcome]:
    number = int(Path(shard.uri).stem)
    key = custom_id(number, row, jsonl=shard.uri.endswith(".jsonl"))
    if row == 4:
        seed = derive_seed(RUN_SEED, key, 0)
        return [Failure(row, key, ErrorCode.INVALID_MESSAGES, "no prompt", seed)]
    if (number, row) == (1, 5):
        seed = derive_seed(RUN_SEED, key, 0)
        return [Failure(row, key, ErrorCode.DUPLICATE_CUSTOM_ID, "used before", seed)]
    samples = 2 if row == 2 else 1
    sampling = Sampling(n=samples).as_json
    return [
        Completion(
            row,
            key,
            index,
            f"text {number} {row} {index}",
            "stop",
            prompt_tokens=10 + row,
            completion_tokens=3 + index,
            cached_tokens=0,
            image_tokens=0,
            seed=OWN_SEED if row == 3 else derive_seed(RUN_SEED, key, index),
            latency_s=0.1,
            sampling=sampling,
            prompt_digest=digest_tokens([row]),
            completion_digest=digest_tokens([row, index]),
        )
        for index in range(samples)
    ]
