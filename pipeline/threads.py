"""threads: what libraries start in a task's process, held to the task's CPUs.

Arrow and the tokenizers' Rayon take every core of the machine unless told otherwise: on a node of
192 cores each task of one CPU would bring 192 threads, and all tasks together a node of its own.
"""

from __future__ import annotations

import os

import pyarrow as pa


def bound_threads(cpus: int) -> None:
    """Let Arrow and Rayon use ``cpus`` threads in this process; Rayon only if it has none yet."""
    os.environ["RAYON_NUM_THREADS"] = str(cpus)
    pa.set_cpu_count(cpus)
