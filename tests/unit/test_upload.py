"""What ``ray job submit --working-dir .`` uploads of a checkout that was worked in.

The package is made by Ray's own code, as its CLI calls it, from a copy of the files that git knows
and of what piles up beside them. Not covered: files of one's own that neither ``.gitignore`` nor
``.rayignore`` names.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
from ray._private.runtime_env.packaging import create_package
from ray._private.runtime_env.working_dir import upload_working_dir_if_needed

from pipeline.profile import REPO_ROOT, load_profile

MOST_BYTES = 2_500_000
TOP_LEVEL = [
    ".dockerignore",
    ".gitignore",
    ".rayignore",
    "CHANGELOG.md",
    "LICENSE",
    "Makefile",
    "README.md",
    "cluster",
    "jobs",
    "pipeline",
    "pyproject.toml",
]
FOLDERS = [
    "cluster/engines",
    "cluster/models",
    "cluster/preflight",
    "jobs/annotate",
    "jobs/configs",
    "jobs/evaluate",
    "jobs/sample",
    "jobs/verify",
    "pipeline/templates",
]
CLUTTER = [
    ".cluster/env",  # holds the mini-cluster's credentials
    ".cluster/state.json",
    ".env",
    ".git/config",
    ".hypothesis/examples/1",
    ".mypy_cache/3.11/cache.json",
    ".pytest_cache/README.md",
    ".ruff_cache/0.17.6/1",
    ".venv/bin/python",
    "build/lib/pipeline/flow.py",
    "key.pem",
    "maverick_batch.egg-info/PKG-INFO",
    "out/quickstart/data/part-000000.parquet",
    "pipeline/__pycache__/flow.cpython-311.pyc",
]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package that Ray would upload, and its content unpacked beside it, as on a node."""
    root = tmp_path_factory.mktemp("upload")
    checkout = root / "checkout"
    listing = subprocess.run(
        ["git", "ls-files", "-z"], cwd=REPO_ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, listing.stdout.split("\0")):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(REPO_ROOT / name, checkout / name)
    for name in CLUTTER:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text("AWS_SECRET_ACCESS_KEY=never-to-leave-this-machine\n")
    target = root / "package.zip"

    def take(working_dir: str, *, excludes: list[str], is_file: bool = False) -> None:
        assert not is_file
        create_package(working_dir, target, include_gitignore=True, excludes=excludes)

    environment: dict[str, Any] = {"working_dir": str(checkout)}
    upload_working_dir_if_needed(environment, include_gitignore=True, upload_fn=take)
    with ZipFile(target) as archive:
        archive.extractall(root / "node")
    return target


def names(package: Path) -> list[str]:
    with ZipFile(package) as archive:
        return archive.namelist()


def test_it_is_small(package: Path) -> None:
    assert package.stat().st_size < MOST_BYTES


def test_it_holds_these_files_and_folders_and_no_others(package: Path) -> None:
    found = [Path(name).parts for name in names(package)]
    assert sorted({parts[0] for parts in found}) == TOP_LEVEL
    assert sorted({"/".join(parts[:2]) for parts in found if len(parts) > 2}) == FOLDERS


def test_what_piles_up_in_a_checkout_stays_there(package: Path) -> None:
    assert not set(CLUTTER) & set(names(package))
    with ZipFile(package) as archive:
        assert not [name for name in names(package) if b"never-to-leave" in archive.read(name)]


def test_its_jobs_start_and_find_the_model_that_was_left_behind(package: Path) -> None:
    """From a folder without weights, as a driver and the replicas' processes are started."""
    node = package.parent / "node"
    model = load_profile("mini-maverick").model
    assert not (node / model).exists()
    code = (
        "import jobs.nightly, jobs.annotate, jobs.evaluate, jobs.verify, pipeline.profile as p; "
        f"print(p.__file__); print(p.locate_model({model!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=node,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=True,
    )
    used, found = done.stdout.split()
    assert Path(used) == node / "pipeline" / "profile.py"
    assert (Path(found) / "model.safetensors").is_file()
