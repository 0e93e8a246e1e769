"""The input of a chaos run: good rows whose answers are known, and poison of eight kinds.

In: a number of rows and a seed. Out: a ``Corpus``: Parquet tables and image objects, the same for
the same arguments, to be put below one URI. Each row says in ``expected_error`` how it must end
(null: it succeeds), and in ``label`` the right answer; both are carried columns.

Half of the files hold images as bytes, the other half as URIs below ``_images/`` (which listings
of the input skip). Good rows bring no seed: theirs is derived from the ``custom_id``.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from random import Random
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from cluster.models.digits import Split, digits
from cluster.models.tasks import WORDINGS, Example, Task, count, random_example
from pipeline import storage

MARKER_TEXT: Final = "#!kill-the-engine!#"
"""In the prompt of a row that kills the engine."""
MARKER_TOKENS: Final = tuple(MARKER_TEXT.encode())
"""mini-Maverick's tokens are bytes."""
FILES: Final = 4
POISON_SHARE: Final = 0.01
_ROW_GROUP_ROWS: Final = 100
_IMAGE_POOL: Final = 40
"""Distinct images per task in files that refer to them: each is an object to upload."""
_COUNT_SHARE: Final = 0.9
"""Of the good rows; they are text, and long: 45 to 60 tokens. The others answer an image."""
_LONGEST: Final = 23
_SHORTEST: Final = 18
_TOO_LONG: Final = "Count to 3. " * 500
"""6,000 tokens, for a context of 4,096."""
_GARBAGE: Final = b"\x89PNG\r\n\x1a\n and then nothing of a picture"
_NONSENSE_SCHEMA: Final = {
    "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}
}
_SCHEMA: Final = [
    ("custom_id", pa.string()),
    ("prompt", pa.string()),
    ("sampling", pa.string()),
    ("task", pa.string()),
    ("label", pa.string()),
    ("expected_error", pa.string()),
]


class Poison(StrEnum):
    """What is wrong with a row."""

    CORRUPT_IMAGE = "corrupt image"
    MISSING_IMAGE = "missing image"
    TOO_LONG = "too long"
    WRONG_TYPE = "wrong type"
    INVALID_SCHEMA = "invalid JSON schema"
    DUPLICATE = "duplicate custom_id"
    EMPTY_PROMPT = "empty prompt"
    KILLS_ENGINE = "kills the engine"


EXPECTED: Final[Mapping[Poison, str]] = {
    Poison.CORRUPT_IMAGE: "image_invalid",
    Poison.MISSING_IMAGE: "image_not_found",
    Poison.TOO_LONG: "context_length_exceeded",
    Poison.WRONG_TYPE: "invalid_parameter",
    Poison.INVALID_SCHEMA: "invalid_parameter",
    Poison.DUPLICATE: "duplicate_custom_id",
    Poison.EMPTY_PROMPT: "invalid_messages",
    Poison.KILLS_ENGINE: "engine_fatal",
}


@dataclass(frozen=True)
class Row:
    """One input row; an image is bytes, or the key of an object of the corpus."""

    custom_id: str
    prompt: str
    task: str
    label: str | None = None
    images: tuple[bytes | str, ...] = ()
    sampling: str | None = None
    expected_error: str | None = None


@dataclass(frozen=True)
class Corpus:
    """Parquet files by name, and the image objects that some of their rows refer to."""

    files: Mapping[str, pa.Table]
    objects: Mapping[str, bytes]

    @property
    def rows(self) -> int:
        """Input rows."""
        return sum(table.num_rows for table in self.files.values())


def make_corpus(rows: int, *, seed: int, poison: Sequence[Poison] = tuple(Poison)) -> Corpus:
    """Good rows and, for 1 % of them but at least one of each kind, poison.

    Args:
        rows: input rows in all, poison included.
        seed: the same seed gives the same bytes.
        poison: kinds to use.

    Raises:
        ValueError: too few rows for the kinds, or none to duplicate.
    """
    rng = Random(seed)
    bad = max(len(poison), round(rows * POISON_SHARE)) if poison else 0
    if rows < 2 * bad + FILES:
        raise ValueError(f"{rows} rows are too few for {bad} poison rows; take {2 * bad + FILES}")
    objects: dict[str, bytes] = {}
    pool = _image_pool(rng, objects)
    kinds = _spread(poison, bad, rows, rng)
    made: list[list[Row]] = [[] for _ in range(FILES)]
    good: list[Row] = []
    for number in range(rows):
        file = number * FILES // rows
        row = _good(f"row-{number:05d}", file, pool, rng)
        kind = kinds.get(number)
        if kind is None:
            good.append(row)
        made[file].append(row if kind is None else _spoil(row, kind, file, rng.choice(good)))
    tables = {f"prompts-{file}.parquet": _table(made[file], file) for file in range(FILES)}
    return Corpus(tables, objects)


def upload(corpus: Corpus, uri: str) -> None:
    """Put the corpus below ``uri``, images first."""
    for key, data in corpus.objects.items():
        storage.put_bytes(storage.join(uri, key), data)
    for name, table in corpus.files.items():
        sink = io.BytesIO()
        pq.write_table(table, sink, row_group_size=_ROW_GROUP_ROWS)
        storage.put_bytes(storage.join(uri, name), sink.getvalue())


def _spread(poison: Sequence[Poison], bad: int, rows: int, rng: Random) -> dict[int, Poison]:
    """Row number -> kind. A duplicate needs a good row before it, so the first rows stay good."""
    places = rng.sample(range(FILES, rows), k=bad)
    return {place: poison[number % len(poison)] for number, place in enumerate(places)}


def _image_pool(rng: Random, objects: dict[str, bytes]) -> Mapping[str, Sequence[Example]]:
    """Examples per image task; their images are added to ``objects``."""
    held_out = digits(Split.HELD_OUT)
    pool: dict[str, list[Example]] = {}
    for task in (Task.SINGLE, Task.WIDE):
        pool[task.value] = [random_example(task, held_out, rng) for _ in range(_IMAGE_POOL)]
        for number, example in enumerate(pool[task.value]):
            objects[_key(task.value, number)] = _png(example.images[0])
    objects[_key("corrupt", 0)] = _GARBAGE
    return pool


def _good(custom_id: str, file: int, pool: Mapping[str, Sequence[Example]], rng: Random) -> Row:
    if rng.random() < _COUNT_SHARE:
        text = count(rng.randint(_SHORTEST, _LONGEST), rng.choice(WORDINGS[Task.COUNT]))
        return Row(custom_id, text.prompt, text.task.value, text.answer)
    task = rng.choice(sorted(pool))
    number = rng.randrange(len(pool[task]))
    example = pool[task][number]
    image = _key(task, number) if _by_uri(file) else _png(example.images[0])
    return Row(custom_id, example.prompt, task, example.answer, (image,))


def _spoil(row: Row, kind: Poison, file: int, twin: Row) -> Row:
    """``row`` made wrong in one way; ``twin`` is a good row before it."""
    code = EXPECTED[kind]
    prompt, images, sampling, custom_id = row.prompt, row.images, row.sampling, row.custom_id
    match kind:
        case Poison.CORRUPT_IMAGE:
            images = (_key("corrupt", 0) if _by_uri(file) else _GARBAGE,)
        case Poison.MISSING_IMAGE:
            images = (_key("missing", 0),)
        case Poison.TOO_LONG:
            prompt = _TOO_LONG
        case Poison.WRONG_TYPE:
            sampling = json.dumps({"temperature": "hot"})
        case Poison.INVALID_SCHEMA:
            sampling = json.dumps(_NONSENSE_SCHEMA)
        case Poison.DUPLICATE:
            custom_id = twin.custom_id
        case Poison.EMPTY_PROMPT:
            prompt, images = "", ()
        case Poison.KILLS_ENGINE:
            prompt = f"{MARKER_TEXT} Count to {_LONGEST}."
    return Row(custom_id, prompt, kind.value, None, images, sampling, code)


def _table(rows: Sequence[Row], file: int) -> pa.Table:
    plain = {name: pa.array([getattr(row, name) for row in rows], t) for name, t in _SCHEMA}
    images = [[_image(image, file) for image in row.images] or None for row in rows]
    return pa.table({**plain, "images": pa.array(images, pa.list_(_image_type(file)))})


def _image_type(file: int) -> pa.DataType:
    """URIs, or HF's struct of bytes or a path, which takes the missing image too."""
    if _by_uri(file):
        return pa.string()
    return pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def _image(image: bytes | str, file: int) -> Any:
    if _by_uri(file):
        return image
    data, path = (image, None) if isinstance(image, bytes) else (None, image)
    return {"bytes": data, "path": path}


def _by_uri(file: int) -> bool:
    return file % 2 == 1


def _key(kind: str, number: int) -> str:
    return f"_images/{kind}-{number}.png"


def _png(image: Image.Image) -> bytes:
    sink = io.BytesIO()
    image.convert("L").save(sink, format="PNG")
    return sink.getvalue()
