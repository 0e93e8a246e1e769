"""Libraries' threads: a task of one CPU has one, whatever the machine."""

import json
import os
import subprocess
import sys

_COUNT = """
import json, os, sys
from pathlib import Path
import pyarrow as pa
from pipeline.model import ModelSpec, load_prompt_format
from pipeline.threads import bound_threads

def threads():
    return len(os.listdir("/proc/self/task"))

if sys.argv[1:] == ["bound"]:
    bound_threads(1)
before = threads()
prompts = load_prompt_format(ModelSpec("cluster/models/mini-maverick", None, max_model_len=512))
list(prompts.encode([f"Count to {n}." for n in range(500)]))
print(json.dumps([threads() - before, pa.cpu_count()]))
"""
CORES = 12
"""As both libraries believe that the machine has."""


def counted(*arguments: str) -> tuple[int, int]:
    environment = {**os.environ, "RAYON_NUM_THREADS": str(CORES), "OMP_NUM_THREADS": str(CORES)}
    done = subprocess.run(
        [sys.executable, "-c", _COUNT, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    started, arrow = json.loads(done.stdout)
    return started, arrow


def test_a_task_takes_the_cpus_it_was_given_and_not_the_machines() -> None:
    started, arrow = counted()
    assert (started >= CORES, arrow) == (True, CORES)
    started, arrow = counted("bound")
    assert (started <= 4, arrow) == (True, 1)
