"""CPUs that a process may use, by files as the kernel shows them; its affinity is real."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.hardware import usable_cpus

FREE = len(os.sched_getaffinity(0))


def cpus(folder: Path, membership: str, files: dict[str, str]) -> int:
    groups = folder / "cgroup"
    for name, text in files.items():
        (groups / name).parent.mkdir(parents=True, exist_ok=True)
        (groups / name).write_text(text)
    (folder / "membership").write_text(membership)
    return usable_cpus(groups, folder / "membership")


@pytest.mark.parametrize(
    ("membership", "files"),
    [
        ("0::/\n", {"cpu.max": "100000 100000\n"}),
        ("0::/\n", {"cpu.max": "50000 100000\n"}),  # half a CPU is one thread's
        ("0::/pod/container\n", {"pod/cpu.max": "100000 100000", "pod/container/cpu.max": "max"}),
        (
            "4:memory:/\n3:cpu,cpuacct:/pod\n0::/\n",
            {
                "cpu,cpuacct/pod/cpu.cfs_quota_us": "100000\n",
                "cpu,cpuacct/pod/cpu.cfs_period_us": "100000\n",
            },
        ),
    ],
)
def test_a_quota_of_any_group_above_the_process_counts(
    tmp_path: Path, membership: str, files: dict[str, str]
) -> None:
    assert cpus(tmp_path, membership, files) == 1


@pytest.mark.parametrize(
    ("membership", "files"),
    [
        ("", {}),
        ("0::/\n", {}),
        ("0::/\n", {"cpu.max": "max 100000\n"}),
        ("0::/\n", {"cpu.max": f"{(FREE + 8) * 100000} 100000\n"}),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}),
        ("1:cpu:/\n", {"cpu.max": "100000 100000"}),
    ],
)
def test_without_a_lower_quota_it_is_the_affinity(
    tmp_path: Path, membership: str, files: dict[str, str]
) -> None:
    assert cpus(tmp_path, membership, files) == FREE
