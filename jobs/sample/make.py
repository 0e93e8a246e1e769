"""Write the sample input: 600 rows that mini-Maverick can answer, eight of which must fail.

    python -m jobs.sample.make [--out DIR]

In: the held-out digits, never seen in training. Out: three Parquet files of several row groups,
and the PNG files that the third one refers to. The same environment writes the same bytes.

The files show the ways a row may carry its images and messages:

    prompts-1.parquet   images list<binary>                      messages list<struct>
    prompts-2.parquet   images list<struct<bytes, path>> (HF)    messages JSON string
    prompts-3.parquet   images list<string>, URIs                messages JSON string

Each row has a `label`: the right answer, or for `task` = "bad" the error code it must end with.
"""

import argparse
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count as counter
from pathlib import Path
from random import Random
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from cluster.models.digits import Split, digits
from cluster.models.tasks import (
    COUNT_MAX,
    WIDE_LENGTHS,
    WORDINGS,
    Example,
    Task,
    count,
    distinct_pair,
    larger,
    single,
    wide,
)

OUT: Final = Path(__file__).parent / "input"
SEED: Final = 7
ROW_GROUP_ROWS: Final = 40
"""Small, so that each file has several row groups and a shard may begin inside one."""
QUOTA: Final = {Task.SINGLE: 300, Task.WIDE: 120, Task.LARGER: 22, Task.COUNT: 150}
SHARES: Final = (
    {Task.SINGLE: 140, Task.WIDE: 40, Task.LARGER: 0, Task.COUNT: 60},
    {Task.SINGLE: 130, Task.WIDE: 70, Task.LARGER: 22, Task.COUNT: 50},
    {Task.SINGLE: 30, Task.WIDE: 10, Task.LARGER: 0, Task.COUNT: 40},
)
"""Examples of each task in each file; the third file's images are files of their own."""
MESSAGES_SHARE: Final = 0.4
"""Of the rows that may be chat messages instead of a prompt."""
SAMPLING_SHARE: Final = 0.15
"""Of the good rows that bring their own request parameters."""
SAMPLINGS: Final = (
    {"temperature": 0},
    {"temperature": 0, "max_completion_tokens": 64},
    {"temperature": 0.7, "top_p": 0.9, "seed": 11},
    {"temperature": 0.3, "top_k": 5},
)
SYSTEM: Final = {"role": "system", "content": "Answer briefly."}
LONG_PROMPT: Final = "Count to 3. " * 500
"""6,000 bytes, one token each, for a context of 4,096."""
GARBAGE: Final = b"this is not an image"

Message = dict[str, Any]

LISTED_MESSAGES: Final = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
IMAGE_TYPES: Final = (
    pa.list_(pa.binary()),
    pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
    pa.list_(pa.string()),
)
MESSAGE_TYPES: Final = (LISTED_MESSAGES, pa.string(), pa.string())


@dataclass(frozen=True)
class SampleRow:
    """One input row; `images` and `messages` are of the types of its file."""

    custom_id: str
    task: str
    label: str
    prompt: str | None = None
    messages: str | list[Message] | None = None
    images: list[Any] | None = None
    sampling: str | None = None


@dataclass(frozen=True)
class SampleFile:
    """The rows of one Parquet file, with the types of its two polymorphic columns."""

    name: str
    rows: tuple[SampleRow, ...]
    images: pa.DataType
    messages: pa.DataType


def png(image: Image.Image) -> bytes:
    """The image as a grey PNG: a third of the size of RGB, the same pixels once decoded."""
    buffer = io.BytesIO()
    image.convert("L").save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def examples(task: Task, rng: Random) -> list[Example]:
    """The task's share of the sample, drawn from the held-out digits."""
    pool = digits(Split.HELD_OUT)
    wordings = [rng.choice(WORDINGS[task]) for _ in range(QUOTA[task])]
    match task:
        case Task.SINGLE:
            drawn = rng.sample(pool, k=QUOTA[task])
            return [single(digit, text) for digit, text in zip(drawn, wordings, strict=True)]
        case Task.WIDE:
            return [
                wide(rng.sample(pool, k=WIDE_LENGTHS[i % len(WIDE_LENGTHS)]), text)
                for i, text in enumerate(wordings)
            ]
        case Task.LARGER:
            return [larger(*distinct_pair(pool, rng), text) for text in wordings]
        case Task.COUNT:
            return [count(1 + i % COUNT_MAX, text) for i, text in enumerate(wordings)]


def file_images(file: int, custom_id: str, images: Sequence[bytes]) -> list[Any]:
    """A row's images in the form of file 0, 1 or 2."""
    names = [f"{custom_id}.png" for _ in images]
    if file == 0:
        return list(images)
    if file == 1:
        return [{"bytes": data, "path": name} for data, name in zip(images, names, strict=True)]
    return [f"images/{name}" for name in names]


def chat(example: Example, rng: Random) -> list[Message]:
    """The example as chat messages, its images as parts before the text."""
    text = example.prompt
    parts = [*({"type": "image"} for _ in example.images), {"type": "text", "text": text}]
    user = {"role": "user", "content": parts if example.images else text}
    return [SYSTEM, user] if rng.random() < 0.5 else [user]


def good_row(file: int, custom_id: str, example: Example, rng: Random) -> SampleRow:
    """One answerable row: a prompt, or chat messages where the file's type can hold them."""
    images = [png(image) for image in example.images]
    sampling = rng.choice(SAMPLINGS) if rng.random() < SAMPLING_SHARE else None
    # A list of structs with string content has no place for an image part.
    as_messages = rng.random() < MESSAGES_SHARE and not (file == 0 and images)
    messages = chat(example, rng) if as_messages else None
    return SampleRow(
        custom_id=custom_id,
        task=example.task.value,
        label=example.answer,
        prompt=None if as_messages else example.prompt,
        messages=messages if file == 0 or messages is None else json.dumps(messages),
        images=file_images(file, custom_id, images) or None,
        sampling=None if sampling is None else json.dumps(sampling),
    )


def bad_rows() -> tuple[list[SampleRow], ...]:
    """Eight rows that must fail, each for its own reason, by file."""
    ask = WORDINGS[Task.SINGLE][0]
    truncated = png(single(digits(Split.HELD_OUT)[0], ask).images[0])[:200]
    number = counter(1)

    def bad(code: str, **fields: Any) -> SampleRow:
        return SampleRow(f"bad-{next(number):04d}", task="bad", label=code, **fields)

    half = {"bytes": truncated, "path": "truncated.png"}
    hot, wild = json.dumps({"temperature": "hot"}), json.dumps({"top_p": 3})
    return (
        [
            bad("image_invalid", prompt=ask, images=[GARBAGE]),
            bad("invalid_messages"),
            bad("invalid_parameter", prompt="Count to 4.", sampling=hot),
        ],
        [
            bad("image_invalid", prompt=ask, images=[half]),
            bad("invalid_messages", messages="Count to 5, please"),
        ],
        [
            bad("image_not_found", prompt=ask, images=["images/missing.png"]),
            bad("context_length_exceeded", prompt=LONG_PROMPT),
            bad("invalid_parameter", prompt="Count to 6.", sampling=wild),
        ],
    )


def sample_files(seed: int = SEED) -> tuple[list[SampleFile], dict[str, bytes]]:
    """All rows by file, and the PNG files by their path below the input folder."""
    rng = Random(seed)
    waiting: dict[Task, Iterator[tuple[int, Example]]] = {
        task: iter(enumerate(examples(task, rng), start=1)) for task in QUOTA
    }
    files, linked = [], {}
    for file, (share, bad) in enumerate(zip(SHARES, bad_rows(), strict=True)):
        rows = list(bad)
        for task, size in share.items():
            for _ in range(size):
                number, example = next(waiting[task])
                custom_id = f"{task.value}-{number:04d}"
                rows.append(good_row(file, custom_id, example, rng))
                if file == 2:
                    linked.update({f"images/{custom_id}.png": png(i) for i in example.images})
        rng.shuffle(rows)
        name = f"prompts-{file + 1}.parquet"
        files.append(SampleFile(name, tuple(rows), IMAGE_TYPES[file], MESSAGE_TYPES[file]))
    return files, linked


def to_table(file: SampleFile) -> pa.Table:
    """The Arrow table of one file."""
    schema = pa.schema(
        [
            ("custom_id", pa.string()),
            ("prompt", pa.string()),
            ("messages", file.messages),
            ("images", file.images),
            ("sampling", pa.string()),
            ("label", pa.string()),
            ("task", pa.string()),
        ]
    )
    return pa.Table.from_pylist([vars(row) for row in file.rows], schema=schema)


def write(out: Path) -> None:
    """Write the Parquet files and the images below `out`."""
    files, linked = sample_files()
    (out / "images").mkdir(parents=True, exist_ok=True)
    for path, data in linked.items():
        (out / path).write_bytes(data)
    for file in files:
        pq.write_table(
            to_table(file), out / file.name, row_group_size=ROW_GROUP_ROWS, compression="zstd"
        )


def main() -> None:
    """Command line: write the sample and say where."""
    parser = argparse.ArgumentParser(description="Write the sample input.")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the input")
    args = parser.parse_args()
    write(args.out)
    print(args.out)


if __name__ == "__main__":
    main()
