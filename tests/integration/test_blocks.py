"""No thread of Ray Data's is left when Ray is shut down: Ray ends the process, whatever its job had
to say, with exit code 1 if one asks for something just then. A dataset with nothing to do rests.
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

from pipeline.blocks import Blocks, Window, end_datasets, rest_when_idle


def slow(block):
    time.sleep(0.3)
    return block


ray.init(address="local", num_cpus=2, include_dashboard=False)
others = set(threading.enumerate())
rest_when_idle(ray.data.DataContext.get_current())
made = ray.data.range(8, override_num_blocks=8)
with Blocks([Window(lambda: made, 8)], ahead=1) as blocks:
    next(iter(blocks))
    time.sleep(1)  # the others are there by now, and nobody takes them
    before = time.process_time()
    time.sleep(3)
    spent = time.process_time() - before
dataset = ray.data.range(500, override_num_blocks=500).map_batches(slow, batch_size=None)
with Blocks([Window(lambda: dataset, 2), Window(lambda: dataset, 500)], ahead=2) as blocks:
    taken = [next(iter(blocks)) for _ in range(4)]  # of two windows, both are at work now
end_datasets(120)
left = [each.name for each in set(threading.enumerate()) - others]
ray.shutdown()
print(*(name for name in left if "Executor" in name or name == "blocks"), "last line", spent < 1)
"""


def test_an_idle_dataset_rests_and_no_thread_of_one_outlives_ray() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "RAY_ENABLE_AUTO_CONNECT": "0"},  # as jobs do
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert (done.returncode, done.stdout) == (0, "last line True\n"), done.stderr
