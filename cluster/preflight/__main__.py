"""``python -m cluster.preflight --config FILE [--set key.path=value ...] [--checksums]``

Looks at every node of the cluster in RAY_ADDRESS, else at this machine, before a run is started on
it, and tells what would spoil that run.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from cluster.preflight.inspection import inspect
from cluster.preflight.report import Report
from jobs import signals
from jobs.cli import add_config_arguments, plain_parser, run_job
from jobs.settle import local_cpus
from pipeline.config import load_config
from pipeline.profile import load_profile

_CLEAN_UP_S = 10.0
"""What an interrupted look gets to stop asking, and to delete its objects."""
_EPILOG = """\
Takes the config of jobs.nightly and looks, on all nodes at once, at

  capacity       whether the nodes can hold engine.replicas, and prepare rows beside them
  gpus           as many as Ray counts, large enough, free, without memory errors, usable by torch
  memory         what a replica takes is available; /dev/shm is large enough (shared_memory)
  versions       Python, Ray, vLLM, torch, transformers, pyarrow, this project's code, driver, CUDA
                 and NCCL are the same everywhere
  clocks         each node's against this process's (1 s), the store's against each node's (60 s)
  weights        the model is there, complete by its own headers and index, and the same everywhere
  bucket         input readable, output writable, with conditional PUTs, from every node
  all_reduce     the workers of a replica reach each other, sum right, and fast (NCCL, or gloo on
                 CPUs); bus bandwidth as in nccl-tests

All checks are carried out, whatever one of them finds. Nothing is left behind: the one small object
that each node writes to output.uri is deleted. GPUs that a job holds are told, not taken: their
all-reduce is then a fault, as nobody knows its speed. An engine is not started.

--checksums reads every byte of the model on every node (430 GB take some minutes) and compares them
with SHA256SUMS in the model's folder, else with what the hub's client noted, and between nodes.
Without it only small files are hashed; large ones are held against the length in their headers.

exit codes: 0 no fault, 1 faults (each is one sentence on stderr, with its remedy), 2 bad config or
            no cluster at RAY_ADDRESS, 75 interrupted

examples:
  RAY_ADDRESS=10.0.0.1:6379 python -m cluster.preflight --config nightly.yaml
  ray job submit --working-dir . -- python -m cluster.preflight --config nightly.yaml --checksums
  python -m cluster.preflight --config nightly.yaml --set engine.profile=maverick-fp8-2x8xh100
"""


def preflight_parser(module: str) -> argparse.ArgumentParser:
    """The command line."""
    parser = plain_parser(module, "Look at a cluster before a run is started on it.", _EPILOG)
    add_config_arguments(parser, required=True)
    parser.add_argument(
        "--checksums", action="store_true", help="hash all of the model's files on every node"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and look; returns the exit code."""
    remedy = "the same command starts anew"
    return run_job(preflight, preflight_parser("cluster.preflight"), argv, remedy=remedy)


def preflight(arguments: argparse.Namespace) -> Report:
    """Look at the cluster that the command line means.

    Raises:
        UsageError: the config is wrong, or no cluster answers.
    """
    config = load_config(arguments.config, arguments.overrides)
    profile = load_profile(config.engine.profile, overrides=config.engine.overrides)
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # what is left of a stopped one starts no other Ray
    from cluster.preflight.ray_crew import ray_crew  # imports ray: 1-2 s that --help does without

    with ray_crew(local_cpus()) as crew:
        signals.insist()
        with signals.deferred(_CLEAN_UP_S):
            report = inspect(config, profile, crew, checksums=arguments.checksums)
    report.show()
    return report


if __name__ == "__main__":
    sys.exit(main())
