"""The fault proxy before a real S3 server: what passes is whole, and faults are what they say."""

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import s3fs
from botocore.config import Config
from botocore.exceptions import ClientError, ConnectionClosedError
from botocore.exceptions import ConnectionError as NoConnectionError
from botocore.session import Session

from cluster import parts
from cluster.state import REGION, ClusterState
from tests.chaos.proxy import Fault, FaultProxy

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterState]:
    """An S3 server alone, without a Ray cluster."""
    folder = tmp_path_factory.mktemp("s3")
    (folder / "data").mkdir()
    ports = parts.weed_ports()
    state = ClusterState(
        cluster_id="s3-alone",
        directory=folder,
        logs=folder,
        bucket="batch",
        cpus_per_node=1,
        object_store_mb=100,
        access_key="KEY",
        secret_key="secret",
        token="",
        s3_port=ports[0],
    )
    command = parts.weed_command(
        parts.find_weed(None), directory=folder, bucket="batch", ports=ports
    )
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            env={"PATH": "/usr/bin:/bin", **state.storage_environment()},
        )
    try:
        deadline = time.monotonic() + 60
        while not parts.s3_takes_objects(state):
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield state
    finally:
        process.kill()
        process.wait()
        for port in ports:
            for left in parts.weed_sockets(port):
                left.unlink(missing_ok=True)


def client(state: ClusterState, url: str, *, attempts: int = 1) -> Any:
    return Session().create_client(
        "s3",
        region_name=REGION,
        endpoint_url=url,
        aws_access_key_id=state.access_key,
        aws_secret_access_key=state.secret_key,
        config=Config(retries={"total_max_attempts": attempts, "mode": "standard"}),
    )


def stored(state: ClusterState, key: str) -> bytes | None:
    """What the server has, asked past the proxy."""
    try:
        body: bytes = client(state, state.s3_url).get_object(Bucket="batch", Key=key)["Body"].read()
    except ClientError:
        return None
    return body


def test_without_faults_everything_passes_unchanged(server: ClusterState) -> None:
    with FaultProxy(share=0, seed=0) as proxy:
        s3 = client(server, proxy.front(server.s3_url))
        data = bytes(range(256)) * 5000
        key = "folder/a name with ünïcode + & spaces.bin"
        s3.put_object(Bucket="batch", Key=key, Body=data)
        assert stored(server, key) == data
        assert s3.get_object(Bucket="batch", Key=key)["Body"].read() == data
        assert s3.head_object(Bucket="batch", Key=key)["ContentLength"] == len(data)
        part = s3.get_object(Bucket="batch", Key=key, Range="bytes=3-9")
        assert (part["Body"].read(), part["ResponseMetadata"]["HTTPStatusCode"]) == (
            data[3:10],
            206,
        )
        assert [o["Key"] for o in s3.list_objects_v2(Bucket="batch", Prefix="folder/")["Contents"]]
        s3.delete_object(Bucket="batch", Key=key)
        assert stored(server, key) is None
        assert proxy.counts == {"passed": 6}


def test_conditional_puts_and_s3fs_work_through_it(server: ClusterState) -> None:
    with FaultProxy(share=0, seed=0) as proxy:
        url = proxy.front(server.s3_url)
        s3 = client(server, url)
        s3.put_object(Bucket="batch", Key="once", Body=b"1", IfNoneMatch="*")
        with pytest.raises(ClientError, match="PreconditionFailed"):
            s3.put_object(Bucket="batch", Key="once", Body=b"2", IfNoneMatch="*")
        files = s3fs.S3FileSystem(
            endpoint_url=url,
            key=server.access_key,
            secret=server.secret_key,
            skip_instance_cache=True,
        )
        large = b"x" * (12 * 2**20)  # more than one part of a multipart upload
        with files.open("batch/large", "wb", block_size=5 * 2**20) as file:
            file.write(large)
        assert files.cat("batch/large") == large == stored(server, "large")


def test_wrong_keys_stay_wrong(server: ClusterState) -> None:
    with FaultProxy(share=0, seed=0) as proxy:
        wrong = server.model_copy(update={"secret_key": "other"})
        with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
            client(wrong, proxy.front(server.s3_url)).list_objects_v2(Bucket="batch")


@pytest.mark.parametrize(
    ("fault", "error", "words", "performed"),
    [
        (Fault.INTERNAL_ERROR, ClientError, "InternalError", False),
        (Fault.SLOW_DOWN, ClientError, "SlowDown", False),
        (Fault.RESET, NoConnectionError, None, False),
        (Fault.ANSWER_LOST, NoConnectionError, None, True),
    ],
)
def test_a_fault_is_what_it_says(
    server: ClusterState, fault: Fault, error: type[Exception], words: str | None, performed: bool
) -> None:
    key = f"fault-{fault}"
    with FaultProxy(share=1, seed=0, faults=(fault,)) as proxy:
        s3 = client(server, proxy.front(server.s3_url))
        with pytest.raises((error, ConnectionClosedError), match=words):
            s3.put_object(Bucket="batch", Key=key, Body=b"data")
        assert proxy.counts == {fault: 1}
    assert stored(server, key) == (b"data" if performed else None)


def test_a_slow_answer_is_late_and_right(server: ClusterState) -> None:
    with FaultProxy(share=1, seed=0, faults=(Fault.SLOW,)) as proxy:
        begun = time.monotonic()
        client(server, proxy.front(server.s3_url)).put_object(Bucket="batch", Key="slow", Body=b"1")
        assert 2 <= time.monotonic() - begun < 8
    assert stored(server, "slow") == b"1"


def test_a_share_of_the_requests_fails_and_a_patient_client_gets_through(
    server: ClusterState,
) -> None:
    faults = (Fault.INTERNAL_ERROR, Fault.SLOW_DOWN, Fault.RESET, Fault.ANSWER_LOST)
    with FaultProxy(share=0.05, seed=1, faults=faults) as proxy:
        s3 = client(server, proxy.front(server.s3_url), attempts=6)
        for number in range(300):
            s3.put_object(Bucket="batch", Key=f"many/{number}", Body=str(number).encode())
        failed = sum(proxy.counts.get(fault, 0) for fault in faults)
        assert 5 <= failed <= 35
        assert set(faults) <= set(proxy.counts)
    listed = client(server, server.s3_url).list_objects_v2(Bucket="batch", Prefix="many/")
    assert listed["KeyCount"] == 300


def test_a_server_that_is_away_is_a_broken_connection(server: ClusterState) -> None:
    with FaultProxy(share=0, seed=0) as proxy:
        s3 = client(server, proxy.front("http://127.0.0.1:1"))
        with pytest.raises((NoConnectionError, ConnectionClosedError)):
            s3.head_bucket(Bucket="batch")
        assert proxy.counts["unreachable"] == 1


def test_a_share_is_a_share(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="share"):
        FaultProxy(share=5, seed=0)
