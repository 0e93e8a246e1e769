"""The mini-cluster with its real S3 server and Ray nodes: up, use, break, down.

Not covered: a machine without network, macOS, other users' processes.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pyarrow.fs
import pytest
import s3fs
from botocore.exceptions import ClientError, EndpointConnectionError
from botocore.session import Session

from cluster import processes
from cluster import state as states
from cluster.local import ClusterOptions, LocalCluster
from cluster.state import MARKER, ClusterState
from tests.waiting import wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]

ESCAPES = """
import multiprocessing, os, pathlib, signal, subprocess, sys, time
import ray

NOTE = pathlib.Path(sys.argv[1])
RUN_AND_LEAVE = "import subprocess, sys; subprocess.Popen({words}, start_new_session=True{more})"

@ray.remote(num_cpus=2)
class Escaping:
    def spawn(self):
        child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))
        child.start()
        for more in ("", ", env={}", ", cwd='/'"):
            code = RUN_AND_LEAVE.format(words=["sleep", "600"], more=more)
            subprocess.run([sys.executable, "-c", code])
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return child.pid

ray.init()
actors = [Escaping.remote() for _ in range(2)]
pids = ray.get([actor.spawn.remote() for actor in actors])
NOTE.write_text(" ".join(map(str, pids)))
time.sleep(600)
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    folder = tmp_path_factory.mktemp("cluster") / "state"
    with LocalCluster(folder, ClusterOptions(nodes=1, object_store_mb=100)) as running:
        assert running.add_node() == "node-2"
        yield running


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A state folder; whatever a failed test leaves in it is stopped."""
    path = tmp_path / "state"
    yield path
    LocalCluster(path).down()


@pytest.fixture
def use(cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> ClusterState:
    """Sets the variables of the cluster for this process."""
    for key, value in cluster.state.environment().items():
        monkeypatch.setenv(key, value)
    return cluster.state


def command(name: str, folder: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "cluster.local", name, "--state-dir", str(folder), *more]


def run(name: str, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(name, folder, *more), cwd=ROOT, capture_output=True, text=True, check=False
    )


def healthy(cluster: LocalCluster, *more: str) -> str:
    """What `status` prints once all answer: a busy machine may keep one look waiting."""
    found = []

    def answered() -> bool:
        found.append(run("status", cluster.folder, *more))
        return found[-1].returncode == 0

    wait_until(answered, 200)
    return found[-1].stdout


def submit(state: ClusterState, *words: str) -> subprocess.CompletedProcess[str]:
    """`ray job submit`, as people would from a shell that has sourced `env`."""
    return subprocess.run(
        [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", *words],
        env=os.environ | state.environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )


def runs(pid: int) -> bool:
    """Whether that process is there, and not just a zombie."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def marked(cluster_id: str) -> list[psutil.Process]:
    """A look at all processes that shares no code with what is tested."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARKER) == cluster_id and runs(process.pid):
                found.append(process)
    return found


def still(seen: list[psutil.Process]) -> list[psutil.Process]:
    """Those that run yet (`is_running` knows a recycled pid)."""
    return [process for process in seen if process.is_running() and runs(process.pid)]


def leaves_nothing(state: ClusterState, seen: list[psutil.Process]) -> None:
    """Fails if a process, file or socket of the cluster is left."""
    wait_until(lambda: not marked(state.cluster_id) and not still(seen))
    assert not state.directory.exists()
    ports = {port for part in state.parts for port in part.ports}
    assert not [port for port in ports if list(Path("/tmp").glob(f"seaweedfs-*-{port}.sock"))]


def client(state: ClusterState, **changed: str) -> Any:
    return Session().create_client(
        "s3",
        endpoint_url=state.s3_url,
        region_name=states.REGION,
        **{
            "aws_access_key_id": state.access_key,
            "aws_secret_access_key": state.secret_key,
            **changed,
        },
    )


def test_status_says_that_all_parts_are_alive_and_answer(cluster: LocalCluster) -> None:
    wait_until(lambda: cluster.status().healthy, 200)
    status = json.loads(healthy(cluster, "--json"))
    assert status["healthy"] is True
    assert [part["name"] for part in status["parts"]] == ["s3", "head", "node-1", "node-2"]
    assert all(part["alive"] and part["answers"] for part in status["parts"])
    table = healthy(cluster)
    assert all(str(part["pid"]) in table for part in status["parts"])
    assert status["dashboard"] in table


def test_no_output_shows_credentials(cluster: LocalCluster) -> None:
    state = cluster.state
    shown = [run("up", cluster.folder), run("status", cluster.folder, "--json")]
    logs = [path.read_text(errors="replace") for path in state.logs.iterdir()]
    text = "".join([*logs, *(one.stdout + one.stderr for one in shown)])
    assert not any(secret in text for secret in (state.secret_key, state.token))


def test_the_s3_server_refuses_wrong_keys(cluster: LocalCluster) -> None:
    for changed in ({"aws_secret_access_key": "wrong"}, {"aws_access_key_id": "WRONG"}):
        with pytest.raises(ClientError) as refused:
            client(cluster.state, **changed).list_objects_v2(Bucket="batch")
        assert refused.value.response["ResponseMetadata"]["HTTPStatusCode"] == 403


def test_s3fs_and_pyarrow_reach_the_bucket_by_the_environment_alone(use: ClusterState) -> None:
    files = s3fs.S3FileSystem(skip_instance_cache=True)
    files.pipe_file("batch/folder/object", b"content")
    assert files.cat_file("batch/folder/object") == b"content"
    assert files.ls("batch/folder") == ["batch/folder/object"]
    arrow, path = pyarrow.fs.FileSystem.from_uri("s3://batch/folder/object")
    with arrow.open_input_stream(path) as stream:
        assert stream.read() == b"content"


def test_a_conditional_put_is_refused_where_an_object_is(cluster: LocalCluster) -> None:
    s3 = client(cluster.state)
    s3.put_object(Bucket="batch", Key="once", Body=b"first", IfNoneMatch="*")
    with pytest.raises(ClientError) as refused:
        s3.put_object(Bucket="batch", Key="once", Body=b"second", IfNoneMatch="*")
    assert refused.value.response["ResponseMetadata"]["HTTPStatusCode"] == 412
    assert s3.get_object(Bucket="batch", Key="once")["Body"].read() == b"first"


def test_all_ports_of_the_s3_server_are_on_loopback(cluster: LocalCluster) -> None:
    server = psutil.Process(cluster.state.part("s3").record.pid)
    listening = [one.laddr for one in server.net_connections() if one.status == "LISTEN"]
    assert {address.ip for address in listening} == {"127.0.0.1"}
    assert {address.port for address in listening} == set(cluster.state.part("s3").ports)


def test_a_killed_s3_server_comes_back_at_the_same_place_with_its_objects(
    cluster: LocalCluster,
) -> None:
    before = cluster.state
    s3 = client(before)
    for number in range(50):
        s3.put_object(Bucket="batch", Key=f"kept/{number}", Body=bytes([number]) * 10_000)
    cluster.stop_s3()
    assert not cluster.status().healthy
    with pytest.raises(EndpointConnectionError):
        s3.list_objects_v2(Bucket="batch")
    cluster.start_s3()
    wait_until(lambda: cluster.status().healthy, 200)
    after = cluster.state
    assert after.part("s3").ports == before.part("s3").ports
    assert after.part("s3").record.pid != before.part("s3").record.pid
    assert [part.name for part in after.parts] == [part.name for part in before.parts]
    for number in range(50):
        body = client(after).get_object(Bucket="batch", Key=f"kept/{number}")["Body"]
        assert body.read() == bytes([number]) * 10_000


def test_a_submitted_job_sees_all_nodes_and_the_bucket(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    job = tmp_path / "job.py"
    job.write_text(
        "import ray, s3fs\n"
        "ray.init()\n"
        "s3fs.S3FileSystem().pipe_file('batch/by-job', b'x')\n"
        "print('nodes', len({node['NodeName'] for node in ray.nodes() if node['Alive']}))\n"
    )
    done = submit(cluster.state, "--", "python", str(job))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nodes 3" in done.stdout
    assert client(cluster.state).get_object(Bucket="batch", Key="by-job")["Body"].read() == b"x"


def test_the_jobs_api_refuses_a_wrong_token(cluster: LocalCluster) -> None:
    wrong = cluster.state.model_copy(update={"token": "0" * 64})
    assert submit(wrong, "--", "echo", "hello").returncode != 0


def test_a_node_that_ray_has_no_more_patience_with_is_started_once_more(
    cluster: LocalCluster,
) -> None:
    while True:
        number = len(cluster.state.parts) - 1
        with ThreadPoolExecutor(1) as pool:
            adding = pool.submit(cluster.add_node)
            while not (found := raylets(cluster, f"node-{number}")):
                assert not adding.done()
                time.sleep(0.01)
            found[0].suspend()
            assert adding.result() == f"node-{number}"
        if not runs(found[0].pid):
            break
        found[0].resume()  # it was up before it was suspended: another
    wait_until(lambda: cluster.status().healthy, 200)
    names = [part.name for part in cluster.state.parts]
    assert names == ["s3", "head", *(f"node-{one}" for one in range(1, number + 1))]


def raylets(cluster: LocalCluster, node: str) -> list[psutil.Process]:
    records = [part.record for part in cluster.state.parts if part.name == node]
    with contextlib.suppress(psutil.Error):
        below = [psutil.Process(one.pid).children(recursive=True) for one in records]
        return [process for found in below for process in found if process.name() == "raylet"]
    return []


def test_up_again_keeps_every_process(cluster: LocalCluster) -> None:
    before = cluster.state
    again = run("up", cluster.folder)
    assert again.returncode == 0
    assert "already up" in again.stderr
    assert cluster.state == before


def test_a_broken_cluster_is_replaced_and_down_ends_what_jobs_started(
    folder: Path, tmp_path: Path
) -> None:
    cluster = LocalCluster(folder, ClusterOptions(nodes=1, object_store_mb=100))
    first = cluster.up()
    job, note = tmp_path / "job.py", tmp_path / "pids"
    job.write_text(textwrap.dedent(ESCAPES))
    assert submit(first, "--no-wait", "--", "python", str(job), str(note)).returncode == 0
    wait_until(lambda: note.exists() and note.read_text(), 200)
    seen = processes.find(cluster.state.group)
    assert {int(pid) for pid in note.read_text().split()} <= {one.pid for one in seen}

    on_node = processes.find(cluster.state.part_group("node-1"))
    cluster.kill_node(1)
    wait_until(lambda: not still(on_node))
    assert processes.is_alive(first.part("head").record)
    assert run("status", folder).returncode == 1

    os.kill(first.part("head").record.pid, signal.SIGKILL)  # what it leaves are orphans
    second = cluster.up()
    assert second.cluster_id != first.cluster_id
    wait_until(lambda: cluster.status().healthy, 200)
    leaves_nothing(first, seen)

    seen = processes.find(second.group)
    assert run("down", folder).returncode == 0
    leaves_nothing(second, seen)
    assert not folder.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_up_leaves_nothing(folder: Path, number: signal.Signals) -> None:
    starting = subprocess.Popen(command("up", folder), cwd=ROOT, stderr=subprocess.PIPE)

    def parts() -> int:
        state = states.load(folder)
        return len(state.parts) if state else 0

    wait_until(lambda: parts() == 2, 200)
    time.sleep(0.5)  # into the head's own start
    state = states.load(folder)
    assert state is not None
    seen = marked(state.cluster_id)
    assert seen

    starting.send_signal(number)
    starting.communicate(timeout=120)

    assert starting.returncode == {2: 130, 15: 143, 9: -9}[number]
    if number == signal.SIGKILL:
        assert run("down", folder).returncode == 0
        assert not folder.exists()
    leaves_nothing(state, seen)
    assert states.load(folder) is None


def test_a_failed_up_shows_the_log_and_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "weed"
    note, place = tmp_path / "pid", tmp_path / "folder"
    broken.write_text(
        "#!/bin/sh\n"
        f"sleep 600 & echo $! > {note}; pwd > {place}\n"
        'echo "no luck with $AWS_SECRET_ACCESS_KEY"\n'
        "exit 1\n"
    )
    broken.chmod(0o755)
    failed = run("up", folder, "--weed", str(broken))

    assert failed.returncode == 1
    assert "no luck with ***" in failed.stderr
    assert str(folder / "logs" / "s3.log") in failed.stderr
    assert "Traceback" not in failed.stderr
    assert not runs(int(note.read_text())), "its child was left"
    (directory,) = (
        one for one in Path(place.read_text().strip()).parents if one.parent == Path("/tmp")
    )
    assert directory.name.startswith("mv-")
    assert not directory.exists()
    assert states.load(folder) is None
    assert not (folder / "env").exists()


def test_down_without_a_cluster_is_no_error(tmp_path: Path) -> None:
    done = run("down", tmp_path / "nothing")
    assert done.returncode == 0
    assert "no cluster" in done.stdout
    assert run("status", tmp_path / "nothing").returncode == 1
    assert not (tmp_path / "nothing").exists()
