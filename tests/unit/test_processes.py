"""Which processes belong to a group, and that stopping it ends those and no others.

Each rule by which a group's processes are found is tested on a process that no other rule finds.
Not covered: a pid that the system really gave out again (its record is faked), macOS.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from cluster import processes
from cluster.processes import Group, ProcessRecord
from tests.waiting import wait_until

MARKER = {"TEST_GROUP": f"group-{os.getpid()}"}
SLEEP = "import time; time.sleep(600)"
UNMARKED = {"PATH": os.defpath}
"""A readable environment without the marker."""

SPAWN = """
import os, pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {child!r}], **{options!r})
pathlib.Path({note!r}).write_text(str(child.pid))
time.sleep({linger})
os._exit(0)
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "group"
    path.mkdir()
    return path


@pytest.fixture
def start(directory: Path, tmp_path: Path) -> Iterator[Callable[..., ProcessRecord]]:
    """Starts Python code as a marked process; ends what a failed test leaves."""
    started: list[ProcessRecord] = []

    def begin(code: str, *, environment: dict[str, str] | None = None) -> ProcessRecord:
        record = processes.start(
            "sleeper",
            [sys.executable, "-c", code],
            environment=os.environ | MARKER if environment is None else environment,
            directory=directory,
            log=tmp_path / "log",
        )
        started.append(record)
        return record

    yield begin
    for record in started:
        kill(record.pid)


@pytest.fixture
def bystander(tmp_path: Path) -> Iterator[Callable[..., int]]:
    """Starts a process that belongs to no group; ends it after the test."""
    started: list[subprocess.Popen[bytes]] = []

    def begin(*, directory: Path = tmp_path, marker: dict[str, str] | None = None) -> int:
        child = subprocess.Popen(
            [sys.executable, "-c", SLEEP],
            cwd=directory,
            env=os.environ | (marker or {}),
            start_new_session=True,
        )
        started.append(child)
        return child.pid

    yield begin
    for child in started:
        child.kill()
        child.wait()


def kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        return


def runs(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def pids(group: Group) -> set[int]:
    return {process.pid for process in processes.find(group)}


def spawner(note: Path, *, linger: float = 60, child: str = SLEEP, **options: object) -> str:
    """Code that starts one child, notes its pid and stays for `linger` seconds."""
    return SPAWN.format(child=child, options=options, note=str(note), linger=linger)


def noted(note: Path) -> int:
    wait_until(lambda: note.exists() and note.read_text() != "")
    return int(note.read_text())


def test_a_started_process_leads_a_session_and_is_alive_until_stopped(
    start: Callable[..., ProcessRecord], directory: Path
) -> None:
    record = start(SLEEP)
    assert os.getsid(record.pid) == record.pid
    assert processes.is_alive(record)

    processes.stop(Group([record], MARKER, directory))

    assert not processes.is_alive(record)
    assert not psutil.pid_exists(record.pid), "a zombie was left"


def test_a_recycled_pid_is_neither_alive_nor_stopped(
    bystander: Callable[..., int], directory: Path
) -> None:
    pid = bystander()
    started = psutil.Process(pid).create_time() - psutil.boot_time()
    recycled = ProcessRecord("recycled", pid, started - 3.0)

    assert not processes.is_alive(recycled)
    processes.stop(Group([recycled], MARKER, directory), grace_s=0)
    assert runs(pid)


def test_a_reparented_child_is_found_by_its_session(
    start: Callable[..., ProcessRecord], directory: Path, tmp_path: Path
) -> None:
    note = tmp_path / "pid"
    grandchild = spawner(note, linger=0, env=UNMARKED)
    leader = start(
        "import subprocess, sys, time\n"
        f"subprocess.run([sys.executable, '-c', {grandchild!r}])\n"
        "time.sleep(600)",
        environment=UNMARKED,
    )
    orphan = noted(note)
    group = Group([leader], MARKER, directory)
    wait_until(lambda: pids(group) == {leader.pid, orphan})

    processes.stop(group)
    assert not runs(orphan)


def test_a_child_in_a_session_of_its_own_is_found_by_descent(
    start: Callable[..., ProcessRecord], directory: Path, tmp_path: Path
) -> None:
    note = tmp_path / "pid"
    leader = start(
        spawner(note, env=UNMARKED, start_new_session=True, cwd="/"), environment=UNMARKED
    )
    child = noted(note)
    group = Group([leader], MARKER, directory)

    assert pids(group) == {leader.pid, child}
    processes.stop(group)
    assert not runs(child)


def test_a_reparented_child_in_a_session_of_its_own_is_found_by_the_marker(
    start: Callable[..., ProcessRecord], directory: Path, tmp_path: Path
) -> None:
    note = tmp_path / "pid"
    leader = start(spawner(note, linger=0, start_new_session=True, cwd="/"))
    orphan = noted(note)
    wait_until(lambda: not processes.is_alive(leader))
    group = Group([leader], MARKER, directory)

    assert pids(group) == {orphan}
    processes.stop(group)
    assert not runs(orphan)


def test_a_process_without_environment_is_found_by_its_place(
    start: Callable[..., ProcessRecord], directory: Path, tmp_path: Path
) -> None:
    note = tmp_path / "pid"
    leader = start(spawner(note, linger=0, start_new_session=True, env={}))
    orphan = noted(note)
    wait_until(lambda: not processes.is_alive(leader))
    group = Group([leader], MARKER, directory)

    assert pids(group) == {orphan}
    processes.stop(group)
    assert not runs(orphan)


@pytest.mark.parametrize(("environment", "belongs"), [({}, True), (UNMARKED, False)])
def test_of_a_session_without_its_leader_only_what_has_no_environment_is_found(
    start: Callable[..., ProcessRecord],
    directory: Path,
    tmp_path: Path,
    environment: dict[str, str],
    belongs: bool,
) -> None:
    note = tmp_path / "pid"
    leader = start(spawner(note, linger=0, env=environment, cwd="/"))
    member = noted(note)
    wait_until(lambda: not processes.is_alive(leader))
    os.waitpid(leader.pid, 0)

    assert pids(Group([leader], MARKER, directory)) == ({member} if belongs else set())
    os.kill(member, signal.SIGKILL)


def test_others_are_left_alone(
    start: Callable[..., ProcessRecord], bystander: Callable[..., int], directory: Path
) -> None:
    in_directory = bystander(directory=directory)
    other_group = bystander(marker={"TEST_GROUP": "another"})
    group = Group([start(SLEEP)], MARKER, directory)

    processes.stop(group)

    assert pids(group) == set()
    assert runs(in_directory)
    assert runs(other_group)


def test_the_searching_process_is_never_found(directory: Path) -> None:
    code = """
import os, sys
from pathlib import Path
from cluster.processes import Group, find
found = find(Group([], {"PATH": os.environ["PATH"]}, Path(sys.argv[1])))
print(os.getpid() in {one.pid for one in found})
"""  # in a process of its own: a runner that sets its title wipes its environment
    searched = [sys.executable, "-c", code, str(directory)]
    assert subprocess.run(searched, capture_output=True, text=True, check=True).stdout == "False\n"


def test_a_group_without_marker_is_refused(directory: Path) -> None:
    with pytest.raises(ValueError, match="marker"):
        Group([], {}, directory)


def test_what_ignores_sigterm_is_killed_after_the_grace(
    start: Callable[..., ProcessRecord], directory: Path, tmp_path: Path
) -> None:
    ready = tmp_path / "ready"
    record = start(
        "import pathlib, signal\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"pathlib.Path({str(ready)!r}).touch()\n" + SLEEP
    )
    wait_until(ready.exists)

    begun = time.monotonic()
    processes.stop(Group([record], MARKER, directory), grace_s=0.5)

    assert not processes.is_alive(record)
    assert 0.5 <= time.monotonic() - begun < 30


def test_the_killed_leave_no_shared_memory(
    start: Callable[..., ProcessRecord], directory: Path, tmp_path: Path
) -> None:
    note = tmp_path / "name"
    record = start(
        "import pathlib\n"
        "from multiprocessing.shared_memory import SharedMemory\n"
        "memory = SharedMemory(create=True, size=1024)\n"
        f"pathlib.Path({str(note)!r}).write_text(memory.name)\n" + SLEEP
    )
    wait_until(lambda: note.exists() and note.read_text() != "")
    memory = Path("/dev/shm") / note.read_text()
    if not memory.exists():
        pytest.skip("shared memory has no path on this system")

    processes.stop(Group([record], MARKER, directory), grace_s=0)

    assert not memory.exists()
