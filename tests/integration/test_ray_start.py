"""A job's own Ray, where the first one that it starts does not come up within Ray's 30 s."""

import os
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.cluster]

SCRIPT = """
import logging
import threading
import time

import psutil
import ray

from pipeline.flow import cluster


def hold_the_first_raylet():
    while not (found := [p for p in psutil.Process().children(True) if p.name() == "raylet"]):
        time.sleep(0.01)
    found[0].suspend()
    gone, _ = psutil.wait_procs(found[:1], timeout=120)
    if not gone:  # it was up before
        found[0].resume()


logging.basicConfig()
threading.Thread(target=hold_the_first_raylet, daemon=True).start()
with cluster(local_cpus=1):
    print(ray.get(ray.remote(lambda: 7).remote()), len(ray.nodes()))
print([p.name() for p in psutil.Process().children(True) if p.name() in ("raylet", "gcs_server")])
"""


def test_a_jobs_own_ray_that_does_not_come_up_is_started_once_more() -> None:
    for _ in range(5):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env={**os.environ, "RAY_ENABLE_AUTO_CONNECT": "0"},  # as jobs do
            capture_output=True,
            text=True,
            timeout=400,
        )
        if "and is tried again" in done.stderr:  # else it was up before it was held
            break
    assert "and is tried again" in done.stderr
    assert (done.returncode, done.stdout.splitlines()) == (0, ["7 1", "[]"]), done.stderr
