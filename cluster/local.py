"""A mini-cluster on one machine: an S3 server, a Ray head and further Ray nodes.

    python -m cluster.local up|status|down [--state-dir DIR] [--nodes N] [--json]

`up` starts what `make quickstart` and the tests run on, and `down` ends exactly that, however
the start went: every process is recorded and marked (see `cluster.processes`), all files lie in
one temporary folder, and the record is written before and after each start. Real servers rather
than mocks, at the price of about 2 GB of memory and 20 seconds.

`up` writes `<state-dir>/env` for shells: `. .cluster/env` and then `ray job submit ...`.
Credentials are new on each `up`. Clusters in different state folders do not disturb each other.
"""

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cluster import state as states
from cluster.errors import ClusterError
from cluster.health import ClusterStatus
from cluster.lifecycle import DEFAULT_STATE_DIR, ClusterOptions, LocalCluster
from cluster.signals import unwind_on_termination

__all__ = ["ClusterOptions", "LocalCluster", "main"]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m cluster.local", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("command", choices=("up", "status", "down"))
    parser.add_argument("--state-dir", type=Path, default=DEFAULT_STATE_DIR, metavar="DIR")
    parser.add_argument("--nodes", type=int, default=2, help="Ray nodes besides the head")
    parser.add_argument("--cpus-per-node", type=int, default=2, help="logical CPUs for Ray")
    parser.add_argument("--object-store-mb", type=int, default=300, help="per node")
    parser.add_argument("--bucket", default="batch")
    parser.add_argument("--weed", help="the SeaweedFS program")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0: done, or healthy; 1: it failed, or is not healthy; 2: wrong arguments."""
    given = _parse(arguments)
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    unwind_on_termination()
    try:
        options = ClusterOptions(
            nodes=given.nodes,
            cpus_per_node=given.cpus_per_node,
            object_store_mb=given.object_store_mb,
            bucket=given.bucket,
            weed=given.weed,
        )
        cluster = LocalCluster(
            given.state_dir, options, report=lambda line: errors.print(line, markup=False)
        )
        return _run(given.command, cluster, as_json=given.json)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except ValueError as error:
        errors.print(f"{error}", markup=False)
        return 2
    except (ClusterError, OSError) as error:
        errors.print(f"{error}", markup=False)
        return 1


def _run(command: str, cluster: LocalCluster, *, as_json: bool) -> int:
    if command == "down":
        found = cluster.down()
        text = "the cluster is down" if found else f"no cluster in {cluster.folder}"
        print(json.dumps({"stopped": found}) if as_json else text)
        return 0
    if command == "up":
        cluster.up()
    elif states.load(cluster.folder) is None and as_json:
        print(json.dumps({"healthy": False, "parts": []}))
        return 1
    status = cluster.status()
    if as_json:
        print(json.dumps(asdict(status)))
    else:
        _print_status(status)
    is_up = command == "up" and all(part.alive for part in status.parts)  # one may answer late
    return 0 if status.healthy or is_up else 1


def _print_status(status: ClusterStatus) -> None:
    table = Table("part", "pid", "port", "alive", "answers")
    for part in status.parts:
        marks = ("yes" if part.alive else "NO", "yes" if part.answers else "NO")
        table.add_row(part.name, str(part.pid), str(part.port), *marks)
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    console.print(f"S3         {status.s3}")
    console.print(f"dashboard  {status.dashboard}")
    console.print(f"Ray        {status.ray}")


if __name__ == "__main__":
    sys.exit(main())
