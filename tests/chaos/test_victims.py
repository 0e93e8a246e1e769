"""Finding a run's processes on a real cluster, by the titles that Ray and vLLM give them.

The engine's processes are stand-ins with vLLM's titles; the real ones are in the long form.
"""

import contextlib
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from cluster import parts, processes
from cluster.local import ClusterOptions, LocalCluster
from tests.chaos import victims

pytestmark = [pytest.mark.cluster, pytest.mark.chaos]

JOB = """
import subprocess, sys, time
import ray, setproctitle

CORE = '''
import subprocess, sys, time
import setproctitle
setproctitle.setproctitle("VLLM" "::EngineCore")  # not yet a title in the command line
code = "import setproctitle as s, time; s.setproctitle('VLLM' '::Worker_TP0'); time.sleep(600)"
worker = subprocess.Popen([sys.executable, "-c", code])
time.sleep(600)
'''

@ray.remote(num_cpus=1)
class ReplicaActor:
    def start(self):
        self.core = subprocess.Popen([sys.executable, "-c", CORE])

ray.init()
replica = ReplicaActor.remote()
ray.get(replica.start.remote())
time.sleep(600)
"""


def until(condition: Callable[[], bool], seconds: float = 90) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    options = ClusterOptions(nodes=1, head_cpus=0, object_store_mb=100)
    with LocalCluster(tmp_path_factory.mktemp("cluster") / "state", options) as running:
        yield running


@pytest.fixture
def driver(cluster: LocalCluster, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    (tmp_path / "job.py").write_text(textwrap.dedent(JOB))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "job.py")],
        env=environment | cluster.state.environment(),
    )
    found = until(lambda: bool(victims.engine_processes(cluster.state, victims.WORKER)), 200)
    yield process
    process.kill()
    process.wait()
    for one in victims.engine_processes(cluster.state, victims.ENGINE):
        victims.kill(one.process)
    assert found


def test_each_kind_is_found_and_killed_alone(
    cluster: LocalCluster, driver: subprocess.Popen[bytes]
) -> None:
    state = cluster.state
    (replica,) = victims.replicas(state)
    (core,) = victims.owned_engines(state, victims.ENGINE_CORE)
    (worker,) = victims.owned_engines(state, victims.WORKER)
    (raylet,) = victims.raylets(state)
    assert core.process.ppid() == replica.process.pid
    assert worker.process.ppid() == core.process.pid
    assert {one.node for one in (replica, core, worker, raylet)} == {"node-1"}
    assert victims.with_replica(state, [raylet]) == [raylet]
    assert raylet.process in replica.process.parents()

    victims.kill(worker.process)
    assert until(lambda: not victims.engine_processes(state, victims.WORKER))
    assert [one.process for one in victims.replicas(state)] == [replica.process]

    victims.kill(replica.process)
    assert until(lambda: not victims.replicas(state))
    assert driver.poll() is None
    assert [one.process for one in victims.raylets(state)] == [raylet.process]
    with contextlib.suppress(psutil.NoSuchProcess):  # Ray may have ended it with its parent
        assert victims.owned_engines(state, victims.ENGINE_CORE) == []


def test_the_head_holds_no_replica_and_its_raylet_is_no_victim(
    cluster: LocalCluster, driver: subprocess.Popen[bytes]
) -> None:
    heads = processes.find(cluster.state.part_group(parts.HEAD))
    (raylet,) = victims.raylets(cluster.state)
    assert [process.name() for process in heads].count("raylet") == 1
    assert raylet.process not in heads
    assert {one.node for one in victims.replicas(cluster.state)} == {"node-1"}


def test_a_killed_process_that_is_gone_is_no_error() -> None:
    process = subprocess.Popen(["sleep", "60"])
    found = psutil.Process(process.pid)
    victims.kill(found)
    process.wait()
    victims.kill(found)
