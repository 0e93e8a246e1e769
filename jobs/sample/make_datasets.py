"""Write the data sets that the shipped annotation tasks are run on.

    python -m jobs.sample.make_datasets [--out DIR]

    digits/date=<day>/scans.parquet   120 digits as PNG, in three partitions, with their label
    feedback/messages.parquet         48 short messages of customers, written for this project,
                                      with what each is: praise or complaint

In: the held-out digits (never seen in training), and the lists below. Out: Parquet files; the same
environment writes the same bytes.
"""

import argparse
from pathlib import Path
from random import Random
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.models.digits import Split, digits, render
from jobs.sample.make import ROW_GROUP_ROWS, png

OUT: Final = Path(__file__).parent
SEED: Final = 11
DAYS: Final = ("2026-11-19", "2026-11-20", "2026-11-21")
SCANS_A_DAY: Final = 40
PRAISE: Final = (
    "The kettle boils in a minute and looks great on the counter. I love it.",
    "Best headphones I have ever owned, the sound is wonderful.",
    "Delivery came a day early and everything was packed with care.",
    "The support team solved my problem in five minutes. Excellent service!",
    "These shoes are so comfortable that I bought a second pair.",
    "A beautiful lamp, and it was very easy to put together.",
    "My daughter is delighted with the bicycle. Thank you so much!",
    "The new app is fast, clear and a joy to use.",
    "Great value for the price, I would buy it again.",
    "The coffee tastes fantastic and smells even better.",
    "Friendly staff, quick check-in and a very clean room.",
    "I am impressed: the battery lasts for three full days.",
    "The blanket is soft and warm, perfect for the winter.",
    "The course was well explained and I learned a lot.",
    "Superb quality, the jacket kept me dry in heavy rain.",
    "The cake arrived fresh and everyone at the party loved it.",
    "What a lovely little camera, the pictures are amazing.",
    "The repair was cheap, quick and perfect. Highly recommended.",
    "I am very happy with this desk, it is solid and pretty.",
    "The children laughed all evening. A wonderful game!",
    "Thank you for the kind answer and the free replacement.",
    "The garden chairs are sturdy and look better than in the photo.",
    "Setup took two minutes and it has worked perfectly since.",
    "The book was a delight from the first page to the last.",
)
COMPLAINTS: Final = (
    "The toaster stopped working after two days. What a waste of money.",
    "The parcel came a week late and the box was crushed.",
    "Nobody answers my emails. This is the worst service I have seen.",
    "The shirt shrank in the first wash and the colour ran.",
    "The screen was cracked when I opened the package.",
    "I was charged twice and still wait for my refund.",
    "The mattress is hard and smells terrible.",
    "The app crashes every time I try to log in. Useless.",
    "The soup was cold and the waiter was rude.",
    "Two screws were missing and the manual is impossible to read.",
    "The battery is dead after an hour. Very disappointing.",
    "The vacuum cleaner is loud, weak and already broken.",
    "I ordered black and got pink, and returning it costs extra.",
    "The room was dirty and the shower did not work.",
    "The headphones hurt my ears and the left side is silent.",
    "Terrible quality, the handle came off on the first day.",
    "The driver left my parcel in the rain and it is ruined.",
    "I waited on the phone for an hour and then the line went dead.",
    "The pictures are blurry and the zoom does not work at all.",
    "The milk was sour. I threw everything away.",
    "The pump leaks and the seller refuses to help.",
    "The seat is uncomfortable and the paint peels off.",
    "Half of the puzzle is missing, my son was in tears.",
    "The update deleted all of my photos. I am furious.",
)


def write_digits(folder: Path) -> None:
    """The scans, by day."""
    pool = Random(SEED).sample(digits(Split.HELD_OUT), k=len(DAYS) * SCANS_A_DAY)
    for number, day in enumerate(DAYS):
        scans = pool[number * SCANS_A_DAY : (number + 1) * SCANS_A_DAY]
        table = pa.table(
            {
                "scan_id": [f"scan-{scan.index:04d}" for scan in scans],
                "image": pa.array([png(render(scan)) for scan in scans], pa.binary()),
                "label": pa.array([scan.value for scan in scans], pa.int8()),
            }
        )
        path = folder / f"date={day}" / "scans.parquet"
        _write(table, path)


def write_feedback(folder: Path) -> None:
    """The messages, praise and complaints mixed."""
    rows = [("praise", text) for text in PRAISE] + [("complaint", text) for text in COMPLAINTS]
    Random(SEED).shuffle(rows)
    table = pa.table(
        {
            "message_id": pa.array(range(1, len(rows) + 1), pa.int32()),
            "text": [text for _, text in rows],
            "label": [label for label, _ in rows],
        }
    )
    _write(table, folder / "messages.parquet")


def _write(table: pa.Table, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=ROW_GROUP_ROWS, compression="zstd")


def main() -> None:
    """Command line: write the data sets and say where."""
    parser = argparse.ArgumentParser(description="Write the annotation tasks' data sets.")
    parser.add_argument("--out", type=Path, default=OUT, help="folder above digits/ and feedback/")
    out = parser.parse_args().out
    write_digits(out / "digits")
    write_feedback(out / "feedback")
    print(out)


if __name__ == "__main__":
    main()
