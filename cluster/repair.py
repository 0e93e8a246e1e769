"""Mends a Python environment whose torchvision, torchaudio or torchcodec cannot be imported.

In: an environment (its ``python``). Out: the same environment in which ``import vllm`` can work,
and one line per package looked at: ``ok``, ``mended``, ``removed`` or ``absent``.

Why it is needed: PyPI carries these three as CUDA builds. Where PyTorch's own CPU index cannot be
reached they land beside a CPU torch and fail to load. torchvision is then mended by an import hook
(see ``cluster.torchvision_hook``); torchaudio and torchcodec, which nothing here uses, are
uninstalled. A package that imports is never touched, and a failure of any other kind is reported,
not guessed at.

``decide`` is pure; ``SubprocessProber`` and ``VenvMender`` touch the environment.
Standard library only: it runs before anything else is known to work.
Use: ``python -m cluster.repair [--python PATH]``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

HOOK_SOURCE = Path(__file__).with_name("torchvision_hook.py")
HOOK_MODULE = "maverick_batch_torchvision"
HOOK_PTH = "maverick-batch-torchvision.pth"
PTH_LINE = f"import {HOOK_MODULE}; {HOOK_MODULE}.install()\n"

PACKAGES = ("torchvision", "torchaudio", "torchcodec")
MISSING_OPERATOR = "operator torchvision::nms does not exist"
LOAD_ERRORS = ("ImportError", "OSError", "RuntimeError", "ModuleNotFoundError", "AttributeError")

PROBE_TIMEOUT_S = 300  # a cold disk can take over a minute to read torch
PIP_TIMEOUT_S = 300


class RepairError(RuntimeError):
    """The environment cannot be mended here; the message says what to do."""


class State(StrEnum):
    """What became of one ``import`` in a fresh process."""

    OK = "ok"
    ABSENT = "absent"
    BROKEN = "broken"


class Action(StrEnum):
    """What to do about one package."""

    KEEP = "keep"
    HOOK = "hook"
    UNINSTALL = "uninstall"
    GIVE_UP = "give up"


@dataclass(frozen=True)
class Probe:
    """Result of importing ``package``; ``reason`` is the last line of the traceback."""

    package: str
    state: State
    reason: str = ""


class Prober(Protocol):
    """Imports one package in a fresh process."""

    def __call__(self, package: str) -> Probe: ...


class Mender(Protocol):
    """Changes the environment."""

    def install_hook(self) -> None: ...

    def uninstall(self, package: str) -> None: ...


def decide(probe: Probe) -> Action:
    """Return what to do about one package; pure.

    torchvision is needed, so only the one known failure is mended. torchaudio and torchcodec are
    not needed, so any failure to load removes them; a crash or timeout (which names no Python
    error) removes nothing.
    """
    needed = probe.package == "torchvision"
    if probe.state is State.OK:
        return Action.KEEP
    if probe.state is State.ABSENT:
        return Action.GIVE_UP if needed else Action.KEEP
    if needed:
        return Action.HOOK if MISSING_OPERATOR in probe.reason else Action.GIVE_UP
    return Action.UNINSTALL if probe.reason.startswith(LOAD_ERRORS) else Action.GIVE_UP


def repair(prober: Prober, mender: Mender, say: Callable[[str], None]) -> None:
    """Look at torch and the three packages, mend what is broken, look again at what was mended.

    Raises ``RepairError`` where a package is still broken afterwards, or was broken in a way that
    this module does not know.
    """
    torch = prober("torch")
    if torch.state is not State.OK:
        raise RepairError(
            f"torch cannot be imported ({torch.reason or torch.state}): nothing was changed; "
            "install it first (python3.11 -m cluster.install)"
        )
    for package in PACKAGES:
        say(_mend(prober(package), prober, mender))


def _mend(probe: Probe, prober: Prober, mender: Mender) -> str:
    package = probe.package
    match decide(probe):
        case Action.KEEP:
            return f"{package}: {probe.state}"
        case Action.UNINSTALL:
            mender.uninstall(package)
            return f"{package}: removed (it could not load, and nothing needs it: {probe.reason})"
        case Action.HOOK:
            mender.install_hook()
            _check_mended(prober(package))
            return f"{package}: mended by an import hook ({probe.reason})"
        case Action.GIVE_UP:
            raise RepairError(
                f"{package} cannot be imported ({probe.reason or probe.state}), which this "
                f"repair does not know how to mend; `import vllm` needs torchvision and fails "
                f"when torchaudio or torchcodec are broken. Try: pip install --force-reinstall "
                f"--no-deps {package}"
            )


def _check_mended(probe: Probe) -> None:
    if probe.state is not State.OK:
        raise RepairError(
            f"{probe.package} still cannot be imported with the import hook in place "
            f"({probe.reason or probe.state}), so `import vllm` would fail; install the build of "
            f"{probe.package} that belongs to this torch"
        )


@dataclass(frozen=True)
class SubprocessProber:
    """Imports a package with ``python`` in a fresh process, as a user's program would."""

    python: Path

    def __call__(self, package: str) -> Probe:
        code = (
            "import importlib.util, sys\n"
            f"importlib.util.find_spec({package!r}) or sys.exit(3)\n"
            f"import {package}\n"
        )
        try:
            done = _run([str(self.python), "-c", code], PROBE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return Probe(package, State.BROKEN, f"no answer within {PROBE_TIMEOUT_S} s")
        if done.returncode == 0:
            return Probe(package, State.OK)
        if done.returncode == 3:
            return Probe(package, State.ABSENT, "not installed")
        return Probe(package, State.BROKEN, last_error(done.stderr, done.returncode))


def last_error(stderr: str, returncode: int) -> str:
    """Return the exception line of a traceback (its first line where the message has several)."""
    lines = [line for line in stderr.splitlines() if line.strip()]
    raised = [line for line in lines if line.split(":")[0].endswith(("Error", "Exception"))]
    if raised and not raised[-1].startswith(" "):
        return raised[-1]
    return f"python ended with code {returncode}"


@dataclass(frozen=True)
class VenvMender:
    """Changes the environment that ``python`` belongs to."""

    python: Path

    def install_hook(self) -> None:
        """Write the hook module, then the ``.pth`` line that starts it."""
        folder = self._site_packages()
        source = HOOK_SOURCE.read_text(encoding="utf-8")
        (folder / f"{HOOK_MODULE}.py").write_text(source, encoding="utf-8")
        (folder / HOOK_PTH).write_text(PTH_LINE, encoding="utf-8")

    def uninstall(self, package: str) -> None:
        """``pip uninstall`` one package; raises ``RepairError`` with pip's words."""
        command = [str(self.python), "-m", "pip", "uninstall", "--yes", package]
        done = _run(command, PIP_TIMEOUT_S)
        if done.returncode != 0:
            raise RepairError(f"pip could not uninstall {package}: {done.stderr.strip()[-500:]}")

    def _site_packages(self) -> Path:
        code = "import sysconfig; print(sysconfig.get_path('purelib'))"
        done = _run([str(self.python), "-c", code], PROBE_TIMEOUT_S)
        if done.returncode != 0:
            raise RepairError(f"{self.python} does not run: {done.stderr.strip()[-500:]}")
        return Path(done.stdout.strip())


def _run(command: list[str], timeout_s: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)


def main(arguments: list[str] | None = None) -> int:
    """Mend the environment of ``--python``; return the process exit code."""
    parser = argparse.ArgumentParser(prog="python -m cluster.repair", description="Mend the venv.")
    parser.add_argument("--python", type=Path, default=Path(sys.executable))
    python: Path = parser.parse_args(arguments).python
    try:
        repair(SubprocessProber(python), VenvMender(python), print)
    except RepairError as error:
        print(f"repair failed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
