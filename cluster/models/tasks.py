"""What mini-Maverick can do: four small tasks with answers that can be checked exactly.

In: digits of one split and a random generator. Out: `Example`s, each a prompt, its images and
the one right answer.

    single   one digit on one tile                 "Which digit do you see?"    -> "7"
    wide     two to four digits on as many tiles   "Read the digits."           -> "3105"
    larger   two images                            "Which digit is larger?"     -> "8"
    count    text only                             "Count to 5."                -> "1 2 3 4 5"

The wordings are fixed lists: so small a model learns sentences, not language.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from random import Random
from typing import Final

from PIL import Image

from cluster.models.digits import Digit, render, row

Render = Callable[[Digit], Image.Image]
"""How a digit becomes a tile; training passes one that distorts."""


class Task(Enum):
    """The four tasks, named as in the sample input's `task` column."""

    SINGLE = "single"
    WIDE = "wide"
    LARGER = "larger"
    COUNT = "count"


WORDINGS: Final[Mapping[Task, tuple[str, ...]]] = {
    Task.SINGLE: (
        "Which digit do you see?",
        "Which digit is this?",
        "What digit is this?",
        "What digit do you see?",
        "Which digit is shown?",
        "What is this digit?",
        "What number is this?",
        "Read the digit.",
        "Name the digit.",
        "Name the handwritten digit.",
        "Classify the handwritten digit.",
        "Which digit is written here? Answer with the digit only.",
    ),
    Task.WIDE: (
        "Read the digits from left to right.",
        "Read the digits.",
        "Which digits do you see?",
        "What number is written here?",
        "Read the number.",
        "Write down all digits, left to right.",
    ),
    Task.LARGER: (
        "Which is larger?",
        "Which digit is larger?",
        "Name the larger digit.",
        "Which of the two digits is larger?",
    ),
    Task.COUNT: (
        "Count to {n}.",
        "Count up to {n}.",
        "Count from 1 to {n}.",
        "Please count to {n}.",
        "Write the numbers from 1 to {n}.",
        "List the numbers from 1 to {n}.",
    ),
}

WIDE_LENGTHS: Final = (2, 3, 4)
COUNT_MAX: Final = 23
"""The answer to 23 is 59 bytes: with the end of turn, 60 tokens."""


@dataclass(frozen=True)
class Example:
    """One question and its only right answer; images stand before the text."""

    task: Task
    prompt: str
    images: tuple[Image.Image, ...]
    answer: str


def counted(n: int) -> str:
    """`1 2 3 ... n`: the answer to "Count to n."."""
    return " ".join(str(i) for i in range(1, n + 1))


def single(digit: Digit, wording: str, *, draw: Render = render) -> Example:
    """One digit on one tile."""
    return Example(Task.SINGLE, wording, (draw(digit),), str(digit.value))


def wide(digits: Sequence[Digit], wording: str, *, draw: Render = render) -> Example:
    """A row of digits on as many tiles."""
    image = row([draw(digit) for digit in digits])
    return Example(Task.WIDE, wording, (image,), "".join(str(d.value) for d in digits))


def larger(first: Digit, second: Digit, wording: str, *, draw: Render = render) -> Example:
    """Two images of one digit each; the answer is the greater value."""
    answer = str(max(first.value, second.value))
    return Example(Task.LARGER, wording, (draw(first), draw(second)), answer)


def count(n: int, wording: str) -> Example:
    """Text only: count from one to `n`."""
    return Example(Task.COUNT, wording.format(n=n), (), counted(n))


def random_example(
    task: Task, pool: Sequence[Digit], rng: Random, *, draw: Render = render
) -> Example:
    """One example of a task, its digits drawn from `pool` and its wording from `WORDINGS`."""
    wording = rng.choice(WORDINGS[task])
    match task:
        case Task.SINGLE:
            return single(rng.choice(pool), wording, draw=draw)
        case Task.WIDE:
            return wide(rng.choices(pool, k=rng.choice(WIDE_LENGTHS)), wording, draw=draw)
        case Task.LARGER:
            return larger(*distinct_pair(pool, rng), wording, draw=draw)
        case Task.COUNT:
            return count(rng.randint(1, COUNT_MAX), wording)


def distinct_pair(pool: Sequence[Digit], rng: Random) -> tuple[Digit, Digit]:
    """Two digits of different value, so that "larger" has an answer."""
    first = rng.choice(pool)
    second = rng.choice(pool)
    while second.value == first.value:
        second = rng.choice(pool)
    return first, second
