"""What runs of a mini-cluster, kept in its state folder, and what clients need to use it.

`state.json` says which processes, ports and folders belong to the cluster; it is written
after each start, so that whatever was started can be stopped. `env` is for shells. Both hold
credentials: only their owner may read them.
"""

import fcntl
import os
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.errors import StateFileError
from cluster.processes import Group, ProcessRecord

MARKER = "MAVERICK_CLUSTER_ID"
"""In the environment of every process of a cluster, whatever started it."""
PART_MARKER = "MAVERICK_CLUSTER_PART"
"""The part a process came from, as a machine of its own would be known."""
REGION = "us-east-1"
STALE_VARIABLES = (
    "AWS_PROFILE",
    "AWS_SESSION_TOKEN",
    "AWS_SECURITY_TOKEN",
    "AWS_ENDPOINT_URL_S3",
    "RAY_AUTH_TOKEN_PATH",
    "RAY_NAMESPACE",
)
"""Variables that would lead clients past those of `environment()`."""


class Part(BaseModel):
    """A process that was started for the cluster: the S3 server or a Ray node."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    record: ProcessRecord
    ports: tuple[int, ...]
    """The ports picked for it; the first is the one to show."""
    log: Path

    @property
    def name(self) -> str:
        return self.record.name


class ClusterState(BaseModel):
    """One mini-cluster: where it is, what it consists of, how to reach it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cluster_id: str
    directory: Path
    """Everything the parts write, but their logs."""
    logs: Path
    bucket: str
    cpus_per_node: int
    object_store_mb: int
    access_key: str = Field(repr=False)
    secret_key: str = Field(repr=False)
    token: str = Field(repr=False)
    parts: tuple[Part, ...] = ()
    s3_port: int | None = None
    s3_front: str | None = None
    """URL of what stands before the S3 server, such as a proxy; clients get it instead."""
    dashboard_port: int | None = None
    gcs_address: str | None = None

    @property
    def s3_url(self) -> str:
        return f"http://127.0.0.1:{self.s3_port}"

    @property
    def dashboard_url(self) -> str:
        """Dashboard and jobs API."""
        return f"http://127.0.0.1:{self.dashboard_port}"

    @property
    def nodes(self) -> tuple[Part, ...]:
        """The Ray nodes besides the head, in order of their start."""
        return tuple(part for part in self.parts if part.name.startswith("node-"))

    @property
    def group(self) -> Group:
        """All processes of the cluster."""
        records = tuple(part.record for part in self.parts)
        return Group(records, {MARKER: self.cluster_id}, self.directory)

    def part(self, name: str) -> Part:
        """The part of that name.

        Raises:
            ValueError: there is none.
        """
        for part in self.parts:
            if part.name == name:
                return part
        names = ", ".join(part.name for part in self.parts)
        raise ValueError(f"the cluster has no part {name!r}; its parts: {names}")

    def part_directory(self, name: str) -> Path:
        """Where that part works and writes."""
        return self.directory / name

    def part_group(self, name: str) -> Group:
        """The processes of one part, on record or not."""
        records = tuple(part.record for part in self.parts if part.name == name)
        marker = {MARKER: self.cluster_id, PART_MARKER: name}
        return Group(records, marker, self.part_directory(name))

    def environment(self) -> dict[str, str]:
        """The variables with which clients reach this cluster.

        `ray.init()` reads RAY_ADDRESS (the cluster's own address); `ray job` and
        `JobSubmissionClient` read RAY_API_SERVER_ADDRESS (http) first, so both can stand.
        """
        return {
            **self.storage_environment(),
            **self.token_environment(),
            "RAY_ADDRESS": self.gcs_address or "",
            "RAY_API_SERVER_ADDRESS": self.dashboard_url,
            **_past_proxies((self.gcs_address or "").rpartition(":")[0]),
        }

    def storage_environment(self) -> dict[str, str]:
        """What botocore, s3fs and pyarrow read."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_ENDPOINT_URL": self.s3_front or self.s3_url,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def token_environment(self) -> dict[str, str]:
        """What makes Ray's servers ask for the token, and its clients send it."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}

    def mask(self, text: str) -> str:
        """`text` without the cluster's credentials."""
        for secret in (self.secret_key, self.access_key, self.token):
            text = text.replace(secret, "***")
        return text


def _past_proxies(address: str) -> dict[str, str]:
    """Keeps calls to this machine away from an HTTP proxy, if one is set."""
    present = {name.lower() for name in os.environ}
    if not present & {"http_proxy", "https_proxy", "all_proxy"}:
        return {}
    given = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    hosts = ",".join(filter(None, (given, "127.0.0.1", "localhost", address)))
    return {"NO_PROXY": hosts, "no_proxy": hosts}


def load(folder: Path) -> ClusterState | None:
    """The cluster recorded in a state folder, if one is.

    Raises:
        StateFileError: the file is there, and cannot be read.
    """
    path = folder / "state.json"
    try:
        return ClusterState.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValidationError) as error:
        raise StateFileError(
            f"cannot read {path}: {type(error).__name__}; end the processes that have {MARKER} "
            "in their environment by hand, then delete that file"
        ) from error


def save(folder: Path, state: ClusterState) -> None:
    """Replaces the record in one step."""
    _write_private(folder / "state.json", state.model_dump_json(indent=1) + "\n")


def save_env(folder: Path, state: ClusterState) -> Path:
    """Writes the file that shells source; returns its path."""
    path = folder / "env"
    exports = [f"export {key}={shlex.quote(value)}" for key, value in state.environment().items()]
    lines = [f"unset {' '.join(STALE_VARIABLES)}", *exports]
    _write_private(path, "\n".join(lines) + "\n")
    return path


def forget(folder: Path) -> None:
    """Removes the record and the file for shells, the record last."""
    for name in ("env", "state.json"):
        (folder / name).unlink(missing_ok=True)


def _write_private(path: Path, text: str) -> None:
    temporary = path.with_suffix(".new")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    temporary.replace(path)


def without_stale(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment without the variables of another Ray cluster or another S3 account."""
    stale = {*STALE_VARIABLES, "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"}
    return {key: value for key, value in environment.items() if key not in stale}


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Only one start or stop at a time per state folder; waits for the other one.

    The folder itself is locked, as a lock file would stay behind. The folder may have been
    removed while waiting: then it is made again.
    """
    while True:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_still(folder, descriptor):
                yield
                return
        finally:
            os.close(descriptor)


def _is_still(folder: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(folder.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
