"""Bringing a mini-cluster up and down.

The record in the state folder is written before the first start and after each one, so that
`down` can end whatever an interrupted or failed `up` began. Nothing of the cluster's is kept in
memory: any process may go on where another stopped.
"""

import contextlib
import logging
import secrets
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

from cluster import parts, processes
from cluster import state as states
from cluster.errors import ClusterError, PartFailedError
from cluster.health import ClusterStatus, look
from cluster.ports import free_ports, is_taken
from cluster.signals import uninterrupted
from cluster.state import ClusterState, Part

DEFAULT_STATE_DIR = Path(__file__).resolve().parent.parent / ".cluster"
_TEMPORARY_ROOT = Path("/tmp")  # not the system's choice: paths of Ray's sockets must be short
_TEMPORARY_PREFIX = "mv-"
_ATTEMPTS = 2
_POLL_S = 0.1
_BUSY_S = 60.0
"""How long the parts of a cluster that runs may keep `up` waiting for an answer."""
_RESTARTS = 3
"""Of a part that Ray had no more patience with."""
_FORGOTTEN_S = 60.0
"""Within which the head notices that a killed node is gone: by Ray's defaults some 20 s."""
_LOG_LINES = 15

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClusterOptions:
    """How large a mini-cluster is to be."""

    nodes: int = 2
    """Ray nodes besides the head."""
    cpus_per_node: int = 2
    """CPUs each node offers to Ray: logical ones, shared with the others."""
    head_cpus: int | None = None
    """CPUs the head offers; None: as a node. 0 keeps replicas off it."""
    object_store_mb: int = 300
    """Memory (MiB) of each node's object store."""
    bucket: str = "batch"
    s3_front: Callable[[str], str] | None = None
    """Puts something before the S3 server, whose URL it is given; nodes and clients get the URL
    that it returns. Probes of the server's health go past it."""
    weed: str | None = None
    """The SeaweedFS program; None looks beside Python, then on PATH."""
    start_timeout_s: float = 180.0
    """For each part, to answer. A part takes 1-8 s on an idle machine."""

    def __post_init__(self) -> None:
        if self.nodes < 0:
            raise ValueError(f"nodes must be 0 or more, not {self.nodes}")
        if self.cpus_per_node < 1:
            raise ValueError(f"cpus_per_node must be 1 or more, not {self.cpus_per_node}")
        if self.head_cpus is not None and self.head_cpus < 0:
            raise ValueError(f"head_cpus must be 0 or more, not {self.head_cpus}")
        if self.object_store_mb < 80:
            raise ValueError(
                f"object_store_mb must be 80 or more (Ray's minimum), not {self.object_store_mb}"
            )


class LocalCluster:
    """The mini-cluster of one state folder.

    As a context manager it is up inside, and down after:

        with LocalCluster(folder) as cluster:
            subprocess.run([...], env=os.environ | cluster.state.environment())
    """

    def __init__(
        self,
        state_dir: Path = DEFAULT_STATE_DIR,
        options: ClusterOptions | None = None,
        *,
        report: Callable[[str], None] = logger.info,
    ) -> None:
        self.folder = state_dir.absolute()
        self._options = options or ClusterOptions()
        self._report = report

    def __enter__(self) -> Self:
        self.up()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.down()

    @property
    def state(self) -> ClusterState:
        """The running cluster.

        Raises:
            ClusterError: nothing is recorded in the folder.
        """
        state = states.load(self.folder)
        if state is None:
            raise ClusterError(
                f"no cluster is recorded in {self.folder}; start one with "
                "`python -m cluster.local up`"
            )
        return state

    def up(self) -> ClusterState:
        """Brings the cluster up, or finds it so; what is left of a broken one goes first.

        More nodes than a healthy cluster has are added; fewer are not taken away.

        Raises:
            ClusterError: a program is missing, or a part does not start; nothing is left
                running then, and the logs stay in the folder.
        """
        with states.locked(self.folder):
            found = states.load(self.folder)
            if found is not None and _is_healthy(found):
                self._report(f"already up with {len(found.nodes)} nodes")
            else:
                if found is not None:
                    self._report("cleaning what is left of a cluster that is not healthy")
                self._clean()
                self._start_all()
            while len(self.state.nodes) < self._options.nodes:
                self._add_node()
            self._report(f"variables for your shell: . {states.save_env(self.folder, self.state)}")
            return self.state

    def down(self) -> bool:
        """Ends all that belongs to the cluster; whether there was one.

        Raises:
            LeftBehindError: processes outlived SIGKILL.
        """
        if not self.folder.exists():
            return False
        with states.locked(self.folder):
            found = states.load(self.folder) is not None
            self._clean()
            shutil.rmtree(self.folder / "logs", ignore_errors=True)
            self._drop_folder()
            return found

    def status(self) -> ClusterStatus:
        """How each part does."""
        return look(self.state)

    def add_node(self) -> str:
        """Starts one more Ray node; returns its name once it is alive.

        Raises:
            ClusterError: it does not start; the cluster is as before then.
        """
        with states.locked(self.folder):
            return self._add_node()

    def kill_node(self, number: int) -> None:
        """Ends all processes of node-`number` by SIGKILL, as if its machine had lost power.

        It stays on record, so the cluster is not healthy from then on.

        Raises:
            ValueError: there is no such node.
        """
        with states.locked(self.folder):
            part = self.state.part(f"node-{number}")
            processes.stop(self.state.part_group(part.name), grace_s=0)

    def stop_s3(self) -> None:
        """Ends the S3 server by SIGKILL; what it has stored stays for `start_s3`."""
        with states.locked(self.folder):
            processes.stop(self.state.part_group(parts.S3), grace_s=0)

    def start_s3(self) -> None:
        """Starts the S3 server anew, on the same ports and data, and waits until it takes objects.

        Raises:
            ClusterError: it does not start; it can be tried again then.
            ValueError: it was never started.
        """
        weed = parts.find_weed(self._options.weed)
        with states.locked(self.folder):
            ports = self.state.part(parts.S3).ports
            processes.stop(self.state.part_group(parts.S3))
            _unlink_sockets(ports)
            self._run_s3(weed, ports)

    def _start_all(self) -> None:
        """Starts every part; leaves nothing running if one fails."""
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                self._start_new()
                return
            except PartFailedError:
                failed = self.state
                self._clean()
                if attempt == _ATTEMPTS or not any(map(is_taken, _all_ports(failed))):
                    raise
                self._report("somebody took a port meanwhile; once more with others")
            except BaseException:
                self._clean()
                self._drop_folder()
                raise

    def _start_new(self) -> None:
        weed = parts.find_weed(self._options.weed)
        parts.require_ray()
        with uninterrupted():  # or a folder without record could stay
            self._save(self._new_state())
        self._start_s3(weed)
        self._start_head()
        if self._options.nodes == 0:
            self._wait_for_nodes([])
        for _ in range(self._options.nodes):  # in turns: together they outlast Ray's patience
            self._wait_for_nodes([self._start_node()])
        self._report(f"  dashboard and jobs API: {self.state.dashboard_url}")

    def _new_state(self) -> ClusterState:
        logs = self.folder / "logs"
        shutil.rmtree(logs, ignore_errors=True)
        logs.mkdir(mode=0o700)
        return ClusterState(
            cluster_id=str(uuid.uuid4()),
            directory=Path(tempfile.mkdtemp(prefix=_TEMPORARY_PREFIX, dir=_TEMPORARY_ROOT)),
            logs=logs,
            bucket=self._options.bucket,
            cpus_per_node=self._options.cpus_per_node,
            object_store_mb=self._options.object_store_mb,
            access_key=secrets.token_hex(10).upper(),
            secret_key=secrets.token_hex(20),
            token=secrets.token_hex(32),
        )

    def _start_s3(self, weed: str) -> None:
        ports = parts.weed_ports()
        state = self._save(self.state.model_copy(update={"s3_port": ports[0]}))
        self._run_s3(weed, ports)
        self._report(f"  {state.s3_url}, bucket {state.bucket}")
        if self._options.s3_front is not None:
            front = self._options.s3_front(state.s3_url)
            self._save(self.state.model_copy(update={"s3_front": front}))
            self._report(f"  behind {front}")

    def _run_s3(self, weed: str, ports: tuple[int, ...]) -> None:
        state = self.state
        directory = state.part_directory(parts.S3)
        command = parts.weed_command(weed, directory=directory, bucket=state.bucket, ports=ports)
        self._start(parts.S3, command, state.storage_environment(), ports)
        self._wait([parts.S3], "S3 server", lambda: parts.s3_takes_objects(self.state))

    def _start_head(self) -> None:
        self._run_head()
        self._wait(
            [parts.HEAD],
            "Ray head",
            lambda: parts.gcs_address(self.state) is not None,
            again={parts.HEAD: self._run_head},
        )
        address = parts.gcs_address(self.state)
        self._save(self.state.model_copy(update={"gcs_address": address}))

    def _run_head(self) -> None:
        ports = tuple(free_ports(6))
        dashboard, agent, environments, client, dashboard_metrics, autoscaler_metrics = ports
        state = self._save(self.state.model_copy(update={"dashboard_port": dashboard}))
        command = parts.head_command(
            state,
            cpus=self._head_cpus(),
            dashboard=dashboard,
            agent=agent,
            environments=environments,
            client=client,
        )
        environment = parts.head_environment(
            state, dashboard_metrics=dashboard_metrics, autoscaler_metrics=autoscaler_metrics
        )
        self._start(parts.HEAD, command, environment, ports)

    def _head_cpus(self) -> int:
        given = self._options.head_cpus
        return self._options.cpus_per_node if given is None else given

    def _start_node(self) -> str:
        name = _next_node(self.state)
        self._run_node(name)
        return name

    def _run_node(self, name: str) -> None:
        state = self.state
        ports = tuple(free_ports(1))
        command = parts.node_command(state, name, agent=ports[0])
        self._start(name, command, parts.ray_environment(state), ports)

    def _run_node_again(self, name: str) -> None:
        """Once the head knows that its predecessor is gone, which it would take for it."""
        deadline = time.monotonic() + _FORGOTTEN_S
        while time.monotonic() < deadline:
            alive = parts.alive_nodes(self.state)
            if alive is not None and name not in alive:
                break
            time.sleep(_POLL_S)
        self._run_node(name)

    def _wait_for_nodes(self, names: Sequence[str]) -> None:
        """Until the head, which must take jobs, sees all of these nodes alive."""
        wanted = {parts.HEAD, *names}
        self._wait(
            [parts.HEAD, *names],
            f"Ray nodes ({', '.join(names)})" if names else "jobs API",
            lambda: (
                parts.jobs_api_answers(self.state)
                and wanted <= (parts.alive_nodes(self.state) or set())
                and all(processes.is_alive(self.state.part(name).record) for name in wanted)
            ),
            again={name: partial(self._run_node_again, name) for name in names},
        )

    def _add_node(self) -> str:
        before = self.state
        name = _next_node(before)
        try:
            self._wait_for_nodes([self._start_node()])
        except BaseException:
            with uninterrupted():
                processes.stop(self.state.part_group(name))
                shutil.rmtree(before.part_directory(name), ignore_errors=True)
                self._save(before)
            raise
        return name

    def _start(
        self, name: str, command: Sequence[str], own: dict[str, str], ports: tuple[int, ...]
    ) -> None:
        """Starts one part in a folder of its own, and records it in place of an earlier start."""
        state = self.state
        directory = state.part_directory(name)
        (directory / "data").mkdir(parents=True, exist_ok=True)
        log = state.logs / f"{name}.log"
        environment = parts.part_environment(state, name, own)
        record = processes.start(
            name, command, environment=environment, directory=directory, log=log
        )
        part = Part(record=record, ports=ports, log=log)
        recorded = {other.name: other for other in state.parts} | {name: part}  # keeps its place
        self._save(state.model_copy(update={"parts": tuple(recorded.values())}))

    def _wait(
        self,
        names: Sequence[str],
        title: str,
        ready: Callable[[], bool],
        *,
        again: Mapping[str, Callable[[], None]] | None = None,
    ) -> None:
        """Until `ready()`; fails if one of the parts ends before, or at the timeout.

        A part that Ray had no more patience with is started as `again` says, `_RESTARTS` times.
        """
        begun = time.monotonic()
        restarts = again or {}
        left = dict.fromkeys(restarts, _RESTARTS)
        while not ready():
            for part in map(self.state.part, names):
                if processes.is_alive(part.record):
                    continue
                if not left.get(part.name) or not parts.ray_gave_up(part.log):
                    raise self._failure(part, "ended while starting")
                left[part.name] -= 1
                self._report(f"{part.name} was not up when Ray's patience ended; once more")
                processes.stop(self.state.part_group(part.name), grace_s=0)
                shutil.rmtree(self.state.part_directory(part.name), ignore_errors=True)
                part.log.rename(part.log.with_suffix(f".{left[part.name]}.log"))
                restarts[part.name]()
                begun = time.monotonic()
            if time.monotonic() - begun > self._options.start_timeout_s:
                last = self.state.part(names[-1])
                raise self._failure(
                    last, f"does not answer after {self._options.start_timeout_s:g} s"
                )
            time.sleep(_POLL_S)
        self._report(f"{title} ready in {time.monotonic() - begun:.1f} s")

    def _failure(self, part: Part, what: str) -> PartFailedError:
        lines = part.log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
        tail = self.state.mask("\n".join(f"  {line}" for line in lines)) or "  (empty)"
        return PartFailedError(
            f"{part.name} (pid {part.record.pid}) {what}; the last lines of its log, {part.log}:\n"
            f"{tail}\nMend what they say, then run `up` again."
        )

    def _save(self, state: ClusterState) -> ClusterState:
        states.save(self.folder, state)
        return state

    def _clean(self) -> None:
        """Ends and removes everything on record but the logs; cannot be interrupted."""
        with uninterrupted():
            state = states.load(self.folder)
            if state is None:
                return
            processes.stop(state.group)
            _unlink_sockets(_all_ports(state))
            shutil.rmtree(state.directory, ignore_errors=True)
            states.forget(self.folder)

    def _drop_folder(self) -> None:
        with contextlib.suppress(OSError):  # not empty: the logs of a failed start, other files
            self.folder.rmdir()


def _is_healthy(state: ClusterState) -> bool:
    """Whether all is well, given time: a busy cluster answers late, and must not be replaced."""
    begun = time.monotonic()
    while True:
        looked = time.monotonic()
        status = look(state)
        if status.healthy or not all(part.alive for part in status.parts):
            return status.healthy
        if looked - begun > _BUSY_S:
            return False
        time.sleep(_POLL_S)


def _next_node(state: ClusterState) -> str:
    return f"node-{len(state.nodes) + 1}"


def _unlink_sockets(ports: Iterable[int]) -> None:
    for port in ports:
        for socket in parts.weed_sockets(port):
            socket.unlink(missing_ok=True)


def _all_ports(state: ClusterState) -> list[int]:
    return [port for part in state.parts for port in part.ports]
