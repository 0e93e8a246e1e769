"""JSONL as bytes: which lines are rows, and where each starts, however a file is cut and ended."""

import io
import random

import pytest

from pipeline.jsonl import iterate_rows, read_rows, row_offsets


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        (b"", []),
        (b"\n", []),
        (b" \r\n\t\n", []),
        (b"{}", [b"{}"]),
        (b"{}\n", [b"{}"]),
        (b"{}\n[]", [b"{}", b"[]"]),
        (b"{}\r\n[]\r\n", [b"{}\r", b"[]\r"]),
        (b"\n{}\n\n \n[]\n\n", [b"{}", b"[]"]),
        (b"\xef\xbb\xbf{}\n[]", [b"{}", b"[]"]),
        (b"\xef\xbb\xbf", []),
        (b"{}\n\xef\xbb\xbf[]", [b"{}", b"\xef\xbb\xbf[]"]),
        (b"\0\n\0\0", [b"\0", b"\0\0"]),
        ("{}\u2028{}\x85\n[]".encode(), ["{}\u2028{}\x85".encode(), b"[]"]),
        (b"a\rb\n", [b"a\rb"]),
    ],
)
def test_a_row_is_a_line_with_more_than_blanks(content: bytes, rows: list[bytes]) -> None:
    found = list(iterate_rows(io.BytesIO(content)))
    assert [row for _, row in found] == rows
    for offset, row in found:
        assert content[offset : offset + len(row)] == row


@pytest.mark.parametrize("seed", range(20))
def test_any_range_of_rows_is_read_by_its_bytes(seed: int) -> None:
    dice = random.Random(seed)
    lines = [
        dice.choice([b"", b" ", b"\r", b"x" * dice.randrange(1, 9)])
        for _ in range(dice.randrange(40))
    ]
    start = dice.choice([b"", b"\xef\xbb\xbf"])
    content = start + b"\n".join(lines)
    rows = [row for _, row in iterate_rows(io.BytesIO(content))]
    bounds = [*row_offsets(io.BytesIO(content)).tolist(), len(content)]
    assert rows == [line for line in lines if line.strip()]
    for first in range(len(rows)):
        last = dice.randint(first, len(rows))
        found = read_rows(io.BytesIO(content), bounds[first], bounds[last])
        assert found == rows[first:last]


def test_a_line_of_100_mb_and_its_neighbours_are_found() -> None:
    long = b"x" * 100_000_001
    content = b"{}\n" + long + b"\n[]\n"
    assert row_offsets(io.BytesIO(content)).tolist() == [0, 3, 3 + len(long) + 1]
    assert [len(row) for _, row in iterate_rows(io.BytesIO(content))] == [2, len(long), 2]
