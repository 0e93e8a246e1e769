"""Start, record, find and stop groups of processes on this machine.

A group is started in a session of its own and recorded by pid and start time. Stopping it
ends everything that came from it and nothing else. One rule alone does not find it all, so
four are used together, until they find no more:

- session: members of a recorded session (a re-parented child keeps its session);
- descent: children of what was found (a child with ``setsid`` keeps its parent);
- marker: environment variables that every child inherits (``setsid`` and re-parented);
- place: a process whose environment is wiped (``setproctitle`` writes over it) and whose
  working directory lies in the group's own directory.

A recycled pid never counts: its start time differs. Needs /proc or its like (Linux, macOS).
"""

import os
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from cluster.errors import LeftBehindError

GRACE_S = 3.0
"""Between SIGTERM and SIGKILL; a Ray node ends in 1-2 s when it need not drain."""
TRACKER_GRACE_S = 10.0
"""What multiprocessing's resource trackers get to unlink the shared memory of the killed."""
KILL_TIMEOUT_S = 60.0
"""SIGKILL acts at once; more is a process stuck in the kernel, or a machine that stood still."""
_POLL_S = 0.1
_SAME_START_S = 0.05
"""Start times count in clock ticks of 10 ms."""


@dataclass(frozen=True)
class ProcessRecord:
    """One process that was started here, and led a new session."""

    name: str
    pid: int
    started: float
    """Seconds from the machine's boot: unlike wall-clock time, it survives a clock change."""


@dataclass(frozen=True)
class Group:
    """What tells the processes of one group from all others."""

    records: Sequence[ProcessRecord]
    marker: Mapping[str, str]
    """A process with all of these in its environment belongs to the group."""
    directory: Path
    """The group's own directory, in which its processes start."""

    def __post_init__(self) -> None:
        if not self.marker:
            raise ValueError("a group needs a marker: an empty one would match every process")


class _Detached(subprocess.Popen[bytes]):
    """A child that outlives its starter on purpose: no warning when the handle goes."""

    def __del__(self) -> None:
        return


def start(
    name: str,
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    directory: Path,
    log: Path,
) -> ProcessRecord:
    """Starts `command` in a new session, working in `directory`, all output going to `log`.

    Raises:
        OSError: the command cannot be run.
    """
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        process = _Detached(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=dict(environment),
            cwd=directory,
            start_new_session=True,
        )
    finally:
        os.close(output)
    return ProcessRecord(name, process.pid, _started(psutil.Process(process.pid)))


def is_alive(record: ProcessRecord) -> bool:
    """Whether that very process still runs (a zombie does not)."""
    try:
        process = psutil.Process(record.pid)
        return _is_same(process, record) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def find(group: Group) -> list[psutil.Process]:
    """All running processes of the group, never the calling one."""
    seen = _look(group)
    sessions = {record.pid for record in group.records if _leads_still(record)}
    orphaned = {record.pid for record in group.records if not psutil.pid_exists(record.pid)}
    found: dict[int, _Seen] = {}
    grew = True
    while grew:
        fresh = [
            one
            for one in seen
            if one.pid not in found
            and (
                one.marked
                or one.session in sessions
                or one.parent in found
                or (one.wiped and (one.session in orphaned or one.inside))
            )
        ]
        found.update((one.pid, one) for one in fresh)
        sessions.update(one.pid for one in fresh if one.session == one.pid)
        grew = bool(fresh)
    return [one.process for one in found.values()]


def stop(group: Group, *, grace_s: float = GRACE_S) -> None:
    """Ends the whole group: SIGTERM, and SIGKILL for what is left after `grace_s` (0: at once).

    Resource trackers go last, so that they can unlink what the killed leave in shared memory.

    Raises:
        LeftBehindError: processes still run `KILL_TIMEOUT_S` after SIGKILL.
    """
    if grace_s > 0 and _signal_until_gone(group, signal.SIGTERM, grace_s):
        return
    if _signal_until_gone(group, signal.SIGKILL, TRACKER_GRACE_S, spare_trackers=True):
        return
    if not _signal_until_gone(group, signal.SIGKILL, KILL_TIMEOUT_S):
        left = ", ".join(f"{one.pid} ({_name(one)})" for one in find(group))
        raise LeftBehindError(f"processes outlived SIGKILL: {left}; look at them with `ps -fp PID`")


def _signal_until_gone(
    group: Group, number: signal.Signals, patience_s: float, *, spare_trackers: bool = False
) -> bool:
    """Sends the signal once to each, late-comers too; whether none is left in time."""
    deadline = time.monotonic() + patience_s
    told: set[psutil.Process] = set()
    while True:
        _reap(group.records)
        running = find(group)
        if not running:
            return True
        for process in running:
            if process not in told and not (spare_trackers and _is_tracker(process)):
                _send(process, number)
                told.add(process)
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_S)


def _send(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)  # psutil compares start times first: safe from recycled pids
    except psutil.NoSuchProcess:
        return


def _reap(records: Iterable[ProcessRecord]) -> None:
    """Takes the exit status of those that are children of this process, so no zombie stays."""
    for record in records:
        try:
            os.waitpid(record.pid, os.WNOHANG)
        except ChildProcessError:
            continue


@dataclass(frozen=True)
class _Seen:
    """One process as a search saw it."""

    process: psutil.Process = field(repr=False)
    pid: int
    parent: int
    session: int
    marked: bool
    wiped: bool
    """Its environment is not readable as one: `setproctitle` wrote over it."""
    inside: bool
    """It works in the group's directory."""


def _look(group: Group) -> list[_Seen]:
    own = os.getpid()
    candidates = (_see(one, group) for one in psutil.process_iter() if one.pid != own)
    return [one for one in candidates if one is not None]


def _see(process: psutil.Process, group: Group) -> _Seen | None:
    """None for a process that is gone, or another user's."""
    try:
        with process.oneshot():
            if process.status() == psutil.STATUS_ZOMBIE:
                return None
            environment = process.environ()
            return _Seen(
                process=process,
                pid=process.pid,
                parent=process.ppid(),
                session=os.getsid(process.pid),
                marked=all(environment.get(key) == value for key, value in group.marker.items()),
                wiped="PATH" not in environment,
                inside=Path(process.cwd()).is_relative_to(group.directory),
            )
    except (psutil.NoSuchProcess, psutil.AccessDenied, ProcessLookupError, PermissionError):
        return None


def _started(process: psutil.Process) -> float:
    return float(process.create_time() - psutil.boot_time())


def _is_same(process: psutil.Process, record: ProcessRecord) -> bool:
    return abs(_started(process) - record.started) < _SAME_START_S


def _leads_still(record: ProcessRecord) -> bool:
    """Whether the recorded process exists, be it as a zombie: then its session is ours."""
    try:
        return _is_same(psutil.Process(record.pid), record)
    except psutil.NoSuchProcess:
        return False


def _is_tracker(process: psutil.Process) -> bool:
    try:
        return any("multiprocessing.resource_tracker" in word for word in process.cmdline())
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def _name(process: psutil.Process) -> str:
    try:
        return str(process.name())
    except psutil.NoSuchProcess:
        return "gone"
