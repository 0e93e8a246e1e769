"""Benchmarks of our own making in published layouts: 200 questions each, the same in every run.

``write_arc`` lays out multiple-choice questions as ``allenai/ai2_arc`` does (ARC-Easy), and
``write_gsm8k`` word problems as ``openai/gsm8k``. What is asked is true; what a model makes of it
was recorded once (``tests/data/evaluate``), so a change here makes those records useless.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

ITEMS = 200
_CAPITALS = (
    "France Paris, Japan Tokyo, Italy Rome, Spain Madrid, Germany Berlin, Egypt Cairo, Peru Lima, "
    "Norway Oslo, Sweden Stockholm, Poland Warsaw, Greece Athens, Portugal Lisbon, Russia Moscow, "
    "China Beijing, Canada Ottawa, Kenya Nairobi, Cuba Havana, Austria Vienna, Hungary Budapest, "
    "Ireland Dublin, Finland Helsinki, Denmark Copenhagen, Turkey Ankara, Iran Tehran, "
    "Iraq Baghdad, Thailand Bangkok, Vietnam Hanoi, Chile Santiago, Ghana Accra, Belgium Brussels"
)
_OPPOSITES = (
    "hot cold, big small, tall short, fast slow, up down, left right, day night, wet dry, "
    "hard soft, old young, rich poor, full empty, open closed, early late, light dark, "
    "strong weak, happy sad, clean dirty, near far, loud quiet, high low, thick thin, true false, "
    "first last, buy sell"
)
_KINDS = {
    "mammal": "dog, whale, horse, bat, elephant, mouse, lion, cow, dolphin",
    "bird": "eagle, penguin, owl, parrot, sparrow, duck, ostrich, crow, swan",
    "fruit": "apple, banana, cherry, mango, pear, plum, grape, lemon, fig",
    "metal": "iron, copper, gold, silver, zinc, lead, tin, nickel, aluminium",
    "planet": "Mars, Venus, Saturn, Jupiter, Neptune, Mercury, Uranus, Earth",
}
_NAMES = ("Ann", "Ben", "Cara", "Dan", "Eva", "Finn", "Gina", "Hugo", "Iris", "Jack", "Kim", "Leo")
_THINGS = ("apples", "books", "coins", "pencils", "stickers", "marbles", "cards", "shells")


def write_arc(folder: Path) -> None:
    """``ARC-Easy/test-*.parquet`` below ``folder``."""
    rng = Random(1)
    drawn = chain(_capitals(rng), _opposites(rng), _kinds(rng), _sums(rng))
    rows = []
    for number, (question, answer, others) in enumerate(islice(drawn, ITEMS)):
        texts = [answer, *others]
        rng.shuffle(texts)
        rows.append(
            {
                "id": f"own-{number}",
                "question": question,
                "choices": {"text": texts, "label": ["A", "B", "C", "D"]},
                "answerKey": "ABCD"[texts.index(answer)],
            }
        )
    _write(folder / "ARC-Easy" / "test-00000-of-00001.parquet", rows)


def write_gsm8k(folder: Path) -> None:
    """``main/test-*.parquet`` and ``main/train-*.parquet`` below ``folder``."""
    rng = Random(2)
    _write(folder / "main" / "train-00000-of-00001.parquet", [_problem(rng) for _ in range(8)])
    _write(folder / "main" / "test-00000-of-00001.parquet", [_problem(rng) for _ in range(ITEMS)])


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path)


Drawn = tuple[str, str, Sequence[str]]
"""A question, its answer, three wrong ones."""


def _pairs(text: str) -> list[tuple[str, str]]:
    return [(first, second) for first, second in (pair.split() for pair in text.split(", "))]


def _capitals(rng: Random) -> Iterator[Drawn]:
    pairs = _pairs(_CAPITALS)
    cities = [city for _, city in pairs]
    for country, city in pairs:
        others = rng.sample([c for c in cities if c != city], 3)
        yield f"What is the capital of {country}?", city, others


def _opposites(rng: Random) -> Iterator[Drawn]:
    pairs = _pairs(_OPPOSITES)
    words = [word for pair in pairs for word in pair]
    for pair in (*pairs, *((second, first) for first, second in pairs)):
        others = rng.sample([word for word in words if word not in pair], 3)
        yield f"Which word is the opposite of {pair[0]}?", pair[1], others


def _kinds(rng: Random) -> Iterator[Drawn]:
    kinds = {kind: text.split(", ") for kind, text in _KINDS.items()}
    for kind, members in kinds.items():
        strangers = [word for other, words in kinds.items() if other != kind for word in words]
        for member in members:
            yield f"Which of these is a {kind}?", member, rng.sample(strangers, 3)


def _sums(rng: Random) -> Iterator[Drawn]:
    """Endless."""
    while True:
        first, second = rng.randint(2, 40), rng.randint(2, 40)
        total = first + second
        others = [str(total + off) for off in rng.sample([-10, -3, -2, -1, 1, 2, 3, 10], 3)]
        yield f"What is {first} plus {second}?", str(total), others


def _problem(rng: Random) -> dict[str, str]:
    name, thing = rng.choice(_NAMES), rng.choice(_THINGS)
    first, second, third = rng.randint(3, 30), rng.randint(2, 20), rng.randint(2, 5)
    if rng.random() < 0.5:
        total = (first + second) * third
        question = (
            f"{name} has {first} {thing} and gets {second} more. A friend has {third} times as "
            f"many as {name} has then. How many {thing} does the friend have?"
        )
        both = first + second
        steps = (
            f"{name} has {first} + {second} = <<{first}+{second}={both}>>{both} {thing}.\n"
            f"The friend has {both} * {third} = <<{both}*{third}={total}>>{total} {thing}."
        )
    else:
        bought = first * third
        total = bought - second
        question = (
            f"{name} buys {third} boxes with {first} {thing} each and gives {second} {thing} away. "
            f"How many {thing} are left?"
        )
        steps = (
            f"{name} buys {third} * {first} = <<{third}*{first}={bought}>>{bought} {thing}.\n"
            f"{bought} - {second} = <<{bought}-{second}={total}>>{total} {thing} are left."
        )
    return {"question": question, "answer": f"{steps}\n#### {total}"}
