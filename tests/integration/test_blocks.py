"""No thread of Ray Data's is left when Ray is shut down: Ray ends the process, whatever its job had
to say, with exit code 1 if one asks for something just then.
"""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.cluster

SCRIPT = """
import threading
import time

import ray
import ray.data

from pipeline.blocks import Blocks, Window, end_datasets


def slow(block):
    time.sleep(0.3)
    return block


ray.init(address="local", num_cpus=2, include_dashboard=False)
others = set(threading.enumerate())
dataset = ray.data.range(500, override_num_blocks=500).map_batches(slow, batch_size=None)
with Blocks([Window(lambda: dataset, 2), Window(lambda: dataset, 500)], ahead=2) as blocks:
    taken = [next(iter(blocks)) for _ in range(4)]  # of two windows, both are at work now
end_datasets(120)
left = [each.name for each in set(threading.enumerate()) - others]
ray.shutdown()
print(*(name for name in left if "Executor" in name or name == "blocks"), "last line")
"""


def test_no_thread_of_a_dataset_outlives_ray() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "RAY_ENABLE_AUTO_CONNECT": "0"},  # as jobs do
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert (done.returncode, done.stdout) == (0, "last line\n"), done.stderr
