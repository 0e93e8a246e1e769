"""The rows that the benchmark runs, and on what.

In: a workload's name and a number of rows. Out: the same rows on every machine, as a table that
``jobs.nightly`` takes as its input and that every other contender reads, too. Lengths are exact:
rows bring their own ``max_completion_tokens`` and seed, and a bias keeps the model from ending
early, so that all contenders make the same tokens.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import pyarrow as pa
from PIL import Image

from cluster.models.digits import Split, digits
from cluster.models.tasks import WORDINGS, Task, single
from jobs.bench.contenders import Contender

Row = dict[str, Any]
"""``custom_id``, ``messages`` (JSON), ``images`` (encoded), ``sampling`` (JSON), ``prefix``."""

MEAN_TOKENS = 32
SIGMA = 0.6
"""Of the log-normal lengths: the longest of 1,024 rows is about eight times the median."""
MAX_TOKENS = 512
TAIL_EVERY = 50
"""2 % of the rows are ``TAIL_FACTOR`` times longer."""
TAIL_FACTOR = 30
PREFIXES = 16
PREFIX_WORDS = 800
"""Each is one token of SmolLM2's tokenizer."""
NO_END = -100.0
"""The bias on the ids that would end a completion."""

_SCHEMA = pa.schema(
    [
        ("custom_id", pa.string()),
        ("messages", pa.string()),
        ("images", pa.list_(pa.binary())),
        ("sampling", pa.string()),
        ("prefix", pa.int32()),
    ]
)
_TOPICS = (
    *("the sea", "a railway", "bread", "the moon", "a village", "winter", "glass", "a library"),
    *("rivers", "an orchestra", "salt", "bridges", "maps", "a garden", "clocks", "the desert"),
)
_FORMS = (
    *("a story about", "a long letter about", "an essay on", "a speech about"),
    *("an encyclopedia article on", "a diary entry about", "a guide to", "a dialogue about"),
)
_WORDS = (
    *("answer", "always", "with", "care", "and", "name", "the", "source", "before", "you"),
    *("judge", "keep", "each", "part", "short", "when", "reader", "asks", "for", "detail"),
    *("write", "plain", "words", "never", "repeat", "what", "was", "said", "above", "twice"),
)


@dataclass(frozen=True)
class Workload:
    """One kind of rows, the engine they run on, and who is measured on them."""

    name: str
    describes: str
    profile: str
    rows: int
    """How many a real measurement takes."""
    make: Callable[[int, Random], list[Row]]
    sampling: Mapping[str, Any]
    """Of all rows; lengths and seeds are theirs."""
    contenders: Sequence[Contender]
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Engine arguments that replace the profile's, for every contender."""
    targets: Mapping[Contender, float] = field(default_factory=dict)
    """Least ratio of this pipeline to that contender."""
    exact: bool = True
    """Whether rows end by their own length: then the bias is set."""
    needs_gpu: bool = False


def log_normal_lengths(count: int, rng: Random) -> list[int]:
    """``count`` lengths with mean ``MEAN_TOKENS``, from 4 to ``MAX_TOKENS`` tokens."""
    mu = math.log(MEAN_TOKENS) - SIGMA**2 / 2  # the mean of a log-normal is exp(mu + sigma^2/2)
    return [min(MAX_TOKENS, max(4, round(rng.lognormvariate(mu, SIGMA)))) for _ in range(count)]


def text_rows(count: int, rng: Random) -> list[Row]:
    """Short prompts, log-normal lengths, nothing shared beyond the chat template's start."""
    lengths = log_normal_lengths(count, rng)
    return [_text_row(f"text-{i:05d}", _ask(rng), length, rng) for i, length in enumerate(lengths)]


def tail_rows(count: int, rng: Random) -> list[Row]:
    """As ``text_rows``, one row in ``TAIL_EVERY`` ``TAIL_FACTOR`` times as long as the mean."""
    lengths = [min(length, 4 * MEAN_TOKENS) for length in log_normal_lengths(count, rng)]
    for place in rng.sample(range(count), k=max(1, count // TAIL_EVERY)):
        lengths[place] = TAIL_FACTOR * MEAN_TOKENS
    return [_text_row(f"tail-{i:05d}", _ask(rng), length, rng) for i, length in enumerate(lengths)]


def prefix_rows(count: int, rng: Random) -> list[Row]:
    """``PREFIXES`` system prompts in equal shares, in random order."""
    systems = [" ".join(rng.choices(_WORDS, k=PREFIX_WORDS)) for _ in range(PREFIXES)]
    lengths = log_normal_lengths(count, rng)
    rows = [
        _text_row(f"prefix-{i:05d}", _ask(rng), length, rng, i % PREFIXES, systems[i % PREFIXES])
        for i, length in enumerate(lengths)
    ]
    rng.shuffle(rows)
    return rows


def image_rows(count: int, rng: Random) -> list[Row]:
    """One handwritten digit each, as PNG, and a question; answers end by themselves."""
    pool = digits(Split.HELD_OUT)
    return [_image_row(f"image-{i:05d}", pool[i % len(pool)], rng) for i in range(count)]


def by_prefix(rows: Sequence[Row]) -> list[Row]:
    """The same rows, those of one prefix next to each other."""
    return sorted(rows, key=lambda row: row["prefix"])


def to_table(rows: Sequence[Row]) -> pa.Table:
    """The rows as ``jobs.nightly`` reads them."""
    return pa.Table.from_pylist(list(rows), schema=_SCHEMA)


def generate(workload: Workload, count: int) -> list[Row]:
    """The workload's first rows; which ones depends on its name and ``count`` alone."""
    return workload.make(count, Random(f"{workload.name}-{count}"))


def _ask(rng: Random) -> str:
    form, topic, other = rng.choice(_FORMS), *rng.sample(_TOPICS, k=2)
    return f"Write {form} {topic} and {other}, in {rng.randint(300, 900)} words."


def _text_row(
    custom_id: str, ask: str, length: int, rng: Random, prefix: int | None = None, system: str = ""
) -> Row:
    head = [{"role": "system", "content": system}] if system else []
    return _row(custom_id, [*head, {"role": "user", "content": ask}], length, rng, prefix=prefix)


def _image_row(custom_id: str, digit: Any, rng: Random) -> Row:
    example = single(digit, rng.choice(WORDINGS[Task.SINGLE]))
    content = [{"type": "image"}, {"type": "text", "text": example.prompt}]
    image = _png(example.images[0])
    return _row(custom_id, [{"role": "user", "content": content}], 8, rng, images=[image])


def _row(
    custom_id: str,
    messages: Sequence[Mapping[str, Any]],
    length: int,
    rng: Random,
    *,
    images: list[bytes] | None = None,
    prefix: int | None = None,
) -> Row:
    sampling = {"max_completion_tokens": length, "seed": rng.getrandbits(31)}
    return {
        "custom_id": custom_id,
        "messages": json.dumps(messages),
        "images": images,
        "sampling": json.dumps(sampling),
        "prefix": prefix,
    }


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.convert("L").save(buffer, format="PNG")
    return buffer.getvalue()


_TALK = {"temperature": 1.0}
_ALL = tuple(c for c in Contender if c is not Contender.PIPELINE_SORTED)

WORKLOADS: Mapping[str, Workload] = {
    workload.name: workload
    for workload in (
        Workload(
            name="text",
            describes="SmolLM2-135M, short prompts, log-normal lengths (mean 32 tokens)",
            profile="smollm2",
            rows=1024,
            make=text_rows,
            sampling=_TALK,
            contenders=_ALL,
            targets={
                Contender.LLM: 0.98,
                Contender.LLM_ONE_PROCESS: 0.98,
                Contender.RAY_LLM_TUNED: 1.0,
                Contender.RUN_BATCH: 1.0,
            },
        ),
        Workload(
            name="images",
            describes="mini-Maverick, one 56 x 56 image and a question a row, short answers",
            profile="mini-maverick-tp1",
            rows=3000,
            make=image_rows,
            sampling={"temperature": 0.0},
            contenders=_ALL,
            targets={
                Contender.LLM: 0.95,
                Contender.LLM_ONE_PROCESS: 0.95,
                Contender.RAY_LLM_TUNED: 1.25,
                Contender.RUN_BATCH: 1.0,
            },
            exact=False,
        ),
        Workload(
            name="tail",
            describes="SmolLM2-135M, 2 % of the rows 30 times longer than the mean",
            profile="smollm2",
            rows=1024,
            make=tail_rows,
            sampling=_TALK,
            contenders=_ALL,
            targets={
                Contender.LLM: 0.98,
                Contender.LLM_ONE_PROCESS: 0.98,
                Contender.RAY_LLM_TUNED: 1.25,
                Contender.RUN_BATCH: 1.0,
            },
        ),
        Workload(
            name="prefixes",
            describes="SmolLM2-135M, 16 system prompts of 800 tokens, rows shuffled, "
            "a KV cache of 96 blocks of 128 tokens",
            profile="smollm2",
            rows=1024,
            make=prefix_rows,
            sampling=_TALK,
            contenders=(*_ALL, Contender.PIPELINE_SORTED),
            overrides={"num_gpu_blocks_override": 96},
        ),
        Workload(
            name="llama4-slice",
            describes="Llama 4 Maverick's dimensions, few layers, random weights, one GPU",
            profile="llama4-slice",
            rows=2048,
            make=text_rows,
            sampling=_TALK,
            contenders=(Contender.LLM, Contender.PIPELINE),
            targets={Contender.LLM: 0.98},
            needs_gpu=True,
        ),
    )
}
