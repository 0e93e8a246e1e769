"""Simulate the cluster and write docs/simulation.md with its pictures.

``python -m cluster.simulation [--validate] [--quick] [--seed N] [--out FOLDER]``
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cluster.simulation.driver import measure
from cluster.simulation.memory import measure_memory
from cluster.simulation.page import page
from cluster.simulation.scenarios import BOUND_REPLICAS, study
from cluster.simulation.validation import measure_driver, validate
from pipeline.hardware import usable_cpus
from pipeline.profile import REPO_ROOT

_VALIDATED_REPLICAS = (1, 2)
_PROCESSES = usable_cpus()
_DRIVER_ROWS = 1_000_000
_QUICK_DRIVER_ROWS = 50_000
_SHARDS_HELD = 1_000_000
_QUICK_SHARDS_HELD = 100_000


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, run everything, write the page."""
    arguments = _parser().parse_args(argv)
    from cluster.simulation.plots import draw  # matplotlib takes a second to import

    arguments.out.mkdir(parents=True, exist_ok=True)
    found = study(arguments.seed, quick=arguments.quick, say=_say, processes=_PROCESSES)
    driver = measure(_QUICK_DRIVER_ROWS if arguments.quick else _DRIVER_ROWS, BOUND_REPLICAS)
    counts = _VALIDATED_REPLICAS if arguments.validate else ()
    validations = [validate(count, arguments.seed) for count in counts]
    text = page(
        found,
        driver,
        measure_memory(_QUICK_SHARDS_HELD if arguments.quick else _SHARDS_HELD),
        validations,
        measure_driver(seed=arguments.seed) if arguments.validate else None,
        command=_command(arguments),
        pictures=draw(found, arguments.out),
    )
    (arguments.out / "simulation.md").write_text(text)
    _say(f"wrote {arguments.out / 'simulation.md'}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cluster.simulation", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="of lengths, latencies and losses")
    parser.add_argument("--quick", action="store_true", help="the same on a few rows: seconds")
    parser.add_argument(
        "--validate",
        action="store_true",
        help="also run the real pipeline on a local Ray with a paced engine: some minutes",
    )
    parser.add_argument(
        "--out", type=Path, default=REPO_ROOT / "docs", metavar="FOLDER", help="docs by default"
    )
    return parser


def _command(arguments: argparse.Namespace) -> str:
    flags = [f"--{name}" for name in ("quick", "validate") if getattr(arguments, name)]
    return " ".join(["python -m cluster.simulation", *flags, f"--seed {arguments.seed}"])


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


if __name__ == "__main__":
    sys.exit(main())
