"""The images' Dockerfiles: linted, pinned, without secrets and without root.

They are not built here: that takes a Docker engine. The steps that install are those of
``make setup``.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.install import NEEDED, extras
from pipeline.profile import REPO_ROOT

PATHS = [REPO_ROOT / "cluster" / "Dockerfile", REPO_ROOT / "cluster" / "Dockerfile.cpu"]
dockerfile = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)


def instructions(path: Path) -> list[tuple[str, str]]:
    """Keyword and rest of each instruction, continued lines joined, comments left out."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    pairs = [line.split(maxsplit=1) for line in joined.splitlines() if line.strip()]
    return [(keyword, rest) for keyword, rest in pairs]


def of(path: Path, keyword: str) -> list[str]:
    return [rest for found, rest in instructions(path) if found == keyword]


def test_hadolint_has_no_objection() -> None:
    hadolint = shutil.which(Path(sys.executable).with_name("hadolint")) or shutil.which("hadolint")
    assert hadolint is not None, "make setup installs it"
    done = subprocess.run(
        [hadolint, "--no-color", *map(str, PATHS)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


@dockerfile
def test_the_base_is_one_release_of_the_python_that_everything_was_run_with(path: Path) -> None:
    (base,) = of(path, "FROM")
    version = re.fullmatch(r"python:(\d+)\.(\d+)\.\d+-slim-\w+", base)
    assert version is not None
    assert tuple(map(int, version.groups())) == NEEDED


def test_packages_are_the_projects_own_choice_of_versions() -> None:
    """No version stands in a Dockerfile: the installer takes those of pyproject and constraints."""
    for path, engine in zip(PATHS, ("gpu", "cpu"), strict=True):
        (_, install) = of(path, "RUN")
        assert install.startswith(f"python cluster/install.py --extra {engine} --node")
        assert "pip install" not in path.read_text()
        assert extras(engine, node=True).split(",")[0] == engine


def test_both_images_are_made_in_the_same_way() -> None:
    gpu, cpu = (
        [line for line in instructions(path) if line[0] not in ("RUN", "ENV")] for path in PATHS
    )
    assert gpu == cpu


@dockerfile
def test_it_runs_as_a_user_that_kubernetes_sees_is_not_root(path: Path) -> None:
    (user,) = of(path, "USER")
    assert re.fullmatch(r"[1-9]\d*:\d+", user)


@dockerfile
def test_what_it_copies_is_there_and_let_through(path: Path) -> None:
    ignore = (REPO_ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignore
    for copied in of(path, "COPY"):
        _, *sources, _ = copied.split()
        for source in sources:
            assert (REPO_ROOT / source).exists(), source
            assert f"!{source.split('/')[0]}" in ignore


@dockerfile
def test_no_secret_goes_in(path: Path) -> None:
    assert not of(path, "ARG")
    assert not re.search(r"(?i)secret|token|password|access_key", path.read_text())
    assert {"**/.env", "**/*.pem"} <= set((REPO_ROOT / ".dockerignore").read_text().splitlines())
