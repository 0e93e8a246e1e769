"""Makes ``.venv``: one command from a fresh checkout to an environment that runs everything.

In: ``pyproject.toml``, ``cluster/constraints.txt``, and which engine this machine can run (``cpu``,
or ``gpu`` where an NVIDIA GPU is seen). Out: ``.venv`` with the project installed in place, looked
over by ``cluster.repair``, and ``.venv/.installed``: a hash of the inputs, so that the next call
with the same ones ends at once.

uv installs, in less than half of pip's time; pip, which every virtual environment has, brings it.
Mirrors, certificates and the like are told to it as pip is configured: uv reads no pip.conf.

The constraints were taken from a CPU environment. vLLM's GPU build pins parts of its own stack to
other versions, so for ``gpu`` only this project's direct dependencies are constrained.

Nodes of a cluster need neither tests nor mini-cluster: ``--node`` leaves out what only those use.

Standard library only. Use: ``python3.11 cluster/install.py [--extra cpu|gpu] [--node]``.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / ".installed"
LOG = VENV / "install.log"
PROJECT = ROOT / "pyproject.toml"
EGG_INFO = ROOT / "maverick_batch.egg-info"
CONSTRAINTS = ROOT / "cluster" / "constraints.txt"

NEEDED = (3, 11)
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PROBE_TIMEOUT_S = 3  # a dead index would be retried for every single package
LAST_LINES = 15

# what pip is configured to, as uv takes it: arguments, one per value, and variables
UV_ARGUMENTS = {
    "index-url": "--default-index",
    "extra-index-url": "--index",
    "find-links": "--find-links",
    "constraint": "--constraint",
    "trusted-host": "--allow-insecure-host",
}
UV_VARIABLES = {
    "cert": ("SSL_CERT_FILE",),
    "client-cert": ("SSL_CLIENT_CERT",),
    "proxy": ("HTTP_PROXY", "HTTPS_PROXY"),
    "timeout": ("UV_HTTP_TIMEOUT",),
    "default-timeout": ("UV_HTTP_TIMEOUT",),
}


class InstallError(Exception):
    """The environment cannot be made; the message says what to do."""


def check_python(version: tuple[int, ...], *, has_ensurepip: bool) -> None:
    """Raise ``InstallError`` unless this Python can make the environment."""
    if version[:2] != NEEDED:
        found, needed = ".".join(map(str, version[:2])), ".".join(map(str, NEEDED))
        raise InstallError(
            f"this is Python {found}, and the pinned packages need Python {needed}. "
            f"Run: python{needed} cluster/install.py, or make setup PYTHON=/path/to/python{needed}"
        )
    if not has_ensurepip:
        raise InstallError(
            "this Python cannot make virtual environments (no ensurepip). On Debian or Ubuntu: "
            "apt-get install python3.11-venv"
        )


def detect_extra() -> str:
    """``gpu`` where the NVIDIA driver shows a device, else ``cpu``."""
    return "gpu" if any(Path("/dev").glob("nvidia[0-9]*")) else "cpu"


def extras(engine: str, *, node: bool) -> str:
    """The project's extras to install, as pip takes them."""
    return f"{engine},eval" if node else f"{engine},eval,local,dev"


def fingerprint(wanted: str) -> str:
    """Hash of all that decides what is installed, and of where (the install is in place)."""
    digest = hashlib.sha256(f"{wanted}\0{ROOT}\0{sys.version}".encode())
    for path in (PROJECT, CONSTRAINTS):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def select_constraints(lines: list[str], direct: set[str] | None) -> list[str]:
    """Return the pins to apply: all of them, or only those of ``direct`` (normalised names)."""
    pins = [line for line in lines if line and not line.startswith("#")]
    if direct is None:
        return pins
    return [pin for pin in pins if normalise(pin.split("==")[0]) in direct]


def direct_dependencies(project_text: str) -> set[str]:
    """Names in every quoted requirement of pyproject.toml; vLLM's own builds are left out."""
    import tomllib  # deferred: not in the older Pythons that `check_python` sends away

    project = tomllib.loads(project_text)["project"]
    extras = project["optional-dependencies"]
    lists = [project["dependencies"], *(extras[name] for name in ("eval", "local", "dev"))]
    names = {re.split(r"[\[<>=!~ ]", item)[0] for group in lists for item in group}
    return {normalise(name) for name in names}


def normalise(name: str) -> str:
    """Package name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def index_answers(url: str) -> bool:
    """Whether the package index answers at all, within ``PROBE_TIMEOUT_S``."""
    request = urllib.request.Request(f"{url}/", method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=PROBE_TIMEOUT_S):
            return True
    except urllib.error.HTTPError as error:
        return error.code < 500  # a listing may be refused where packages are served
    except OSError:
        return False


def make_venv() -> None:
    """Create ``.venv`` unless one of the right Python is there, whose installation came to its end.

    One that was interrupted cannot be gone on with: uv takes what it finds for whole.
    """
    if STAMP.exists() and PYTHON.exists() and _version_of(PYTHON) == NEEDED:
        return
    print(f"making {VENV}")
    command = [sys.executable, "-m", "venv", "--clear", str(VENV)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise InstallError(f"python -m venv failed: {tail(done.stdout + done.stderr)}")


def _version_of(python: Path) -> tuple[int, ...] | None:
    code = "import sys, pip; print(*sys.version_info[:2])"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=False)
    return tuple(map(int, done.stdout.split())) if done.returncode == 0 else None


def pip_settings(listing: str) -> dict[str, str]:
    """Settings by name from the output of ``pip config list``.

    The environment's go first, and empty ones count for nothing, as for pip.
    """
    found: dict[str, dict[str, str]] = {"global": {}, "install": {}, ":env:": {}}
    for line in listing.splitlines():
        name, _, value = line.partition("=")
        section, _, key = name.partition(".")
        if section in found and (setting := ast.literal_eval(value).strip()):
            found[section][key] = setting
    return {**found["global"], **found["install"], **found[":env:"]}


def uv_arguments(settings: dict[str, str]) -> list[str]:
    """Return the arguments that make ``uv pip install`` look where pip does."""
    arguments = [
        part
        for key, argument in UV_ARGUMENTS.items()
        for value in map(os.path.expanduser, settings.get(key, "").split())
        if key != "find-links" or "://" in value or Path(value).exists()  # pip lets that pass
        for part in (argument, value)
    ]
    if settings.get("no-index", "").lower() in ("1", "y", "yes", "t", "true", "on"):
        arguments.append("--no-index")
    if "no-cache-dir" in settings:
        arguments.append("--no-cache")
    return arguments


def uv_environment(settings: dict[str, str], environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment with what pip is told of certificates, proxy and patience."""
    bundle = environment.get("REQUESTS_CA_BUNDLE") or environment.get("CURL_CA_BUNDLE")
    found = {"SSL_CERT_FILE": bundle} if bundle else {}
    found |= {
        name: settings[key]
        for key, names in UV_VARIABLES.items()
        if key in settings
        for name in names
    }
    return {**environment, **found}


def install_packages(extra: str, wanted: str) -> None:
    """Install the project with the extras ``wanted``; uv's words go to ``.venv/install.log``."""
    lines = CONSTRAINTS.read_text("utf-8").splitlines()
    (uv,) = (line for line in lines if line.startswith("uv=="))
    pip = [str(PYTHON), "-m", "pip"]
    _run([*pip, "install", "--quiet", uv], dict(os.environ), may_lack_torch=False)

    listed = subprocess.run(
        [*pip, "config", "list"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PIP_QUIET": "0"},  # else it may print nothing
    )
    settings = pip_settings(listed.stdout)
    direct = direct_dependencies(PROJECT.read_text("utf-8")) if extra == "gpu" else None
    pins = VENV / "constraints.txt"
    pins.write_text("\n".join(select_constraints(lines, direct)))
    command = [str(VENV / "bin" / "uv"), "pip", "install", "--python", str(PYTHON)]
    command += ["--compile-bytecode", "--no-progress", *uv_arguments(settings)]
    command += ["--index-strategy", "unsafe-best-match"]  # as pip: the best version of any index
    command += ["--constraint", str(pins), "--editable", f"{ROOT}[{wanted}]"]
    reachable = extra == "cpu" and index_answers(TORCH_CPU_INDEX)
    if reachable:
        command += ["--index", TORCH_CPU_INDEX]
    elif extra == "cpu":
        print(f"{TORCH_CPU_INDEX} does not answer: torch comes from pip's own settings")
    print(f"installing the project and its packages ({extra}); uv's words: {LOG}")
    environment = uv_environment(settings, os.environ)
    _run(command, environment, may_lack_torch=extra == "cpu" and not reachable)


def _run(command: list[str], environment: dict[str, str], *, may_lack_torch: bool) -> None:
    with LOG.open("w", encoding="utf-8") as log:
        done = subprocess.run(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False
        )
    if done.returncode != 0:
        raise InstallError(explain_failure(LOG.read_text("utf-8"), may_lack_torch=may_lack_torch))


def explain_failure(log: str, *, may_lack_torch: bool) -> str:
    """Return the last lines, and the remedy where the CPU build of torch may not have been found.

    Args:
        log: what the program printed.
        may_lack_torch: whether the index that has the CPU build was out of reach.
    """
    message = f"the packages could not be installed (all words: {LOG}):\n{tail(log)}"
    if may_lack_torch and re.search(r"no version of torch==|torch was not found", log):
        message += (
            f"\nvllm-cpu needs the CPU build of torch, which {TORCH_CPU_INDEX} has. Make it "
            "reachable, or set PIP_FIND_LINKS to a folder with the wheel."
        )
    return message


def tail(text: str) -> str:
    """Return the last lines of a program's output."""
    return "\n".join(text.strip().splitlines()[-LAST_LINES:])


def repair() -> None:
    """Mend what the CPU build cannot load; its own lines are shown."""
    command = [str(PYTHON), "-m", "cluster.repair"]
    if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
        raise InstallError("the environment was installed but cannot be used; see the line above")


def install(extra: str, *, node: bool) -> None:
    """Make the environment, or find that it is made."""
    wanted = extras(extra, node=node)
    stamp = fingerprint(wanted)
    if STAMP.exists() and PYTHON.exists() and STAMP.read_text().strip() == stamp:
        return
    started = time.monotonic()
    make_venv()
    STAMP.unlink(missing_ok=True)
    shutil.rmtree(EGG_INFO, ignore_errors=True)  # an old one hides new entry points
    install_packages(extra, wanted)
    repair()
    STAMP.write_text(stamp + "\n")
    print(f"installed into {VENV} in {time.monotonic() - started:.0f} s")


def main() -> int:
    """Parse the command line and install; return the exit code."""
    parser = argparse.ArgumentParser(prog="cluster.install", description="Make .venv.")
    parser.add_argument("--extra", choices=("cpu", "gpu"), help="default: gpu if one is visible")
    parser.add_argument("--node", action="store_true", help="for a node of a cluster: no dev tools")
    arguments = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # keeps order in pipes
    try:
        has_ensurepip = importlib.util.find_spec("ensurepip") is not None
        check_python(tuple(sys.version_info[:3]), has_ensurepip=has_ensurepip)
        install(arguments.extra or detect_extra(), node=arguments.node)
    except InstallError as error:
        print(f"install failed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
