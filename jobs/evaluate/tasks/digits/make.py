"""Write the digits task's data: every held-out digit, a question and the answer.

python -m jobs.evaluate.tasks.digits.make [--out FILE]

The same environment writes the same rows.
"""

import argparse
from pathlib import Path
from random import Random
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, Image, Value

from cluster.models.digits import Split, digits
from cluster.models.tasks import WORDINGS, Task, single
from jobs.sample.make import png

OUT: Final = Path(__file__).with_name("test.parquet")
SEED: Final = 11


def table() -> pa.Table:
    """The rows; ``image`` is marked as the hub's data sets mark theirs."""
    rng = Random(SEED)
    rows = []
    for digit in digits(Split.HELD_OUT):
        example = single(digit, rng.choice(WORDINGS[Task.SINGLE]))
        rows.append(
            {
                "image": {"bytes": png(example.images[0]), "path": f"{digit.index}.png"},
                "question": example.prompt,
                "answer": example.answer,
            }
        )
    features = Features({"image": Image(), "question": Value("string"), "answer": Value("string")})
    return pa.Table.from_pylist(rows, schema=features.arrow_schema)


def main() -> None:
    """Command line: write the file and say where."""
    parser = argparse.ArgumentParser(description="Write the digits task's data.")
    parser.add_argument("--out", type=Path, default=OUT, help="file to write")
    args = parser.parse_args()
    pq.write_table(table(), args.out, compression="zstd")
    print(args.out)


if __name__ == "__main__":
    main()
