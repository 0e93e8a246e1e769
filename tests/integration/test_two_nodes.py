"""One engine over two Ray nodes: data-parallel attention, experts spread over both.

The real job and the real vLLM, with mini-Maverick on CPU. Not covered: GPUs, TP8 on each node.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cluster.sample import SAMPLE_FOLDER, judge, read_records

pytestmark = [pytest.mark.cluster, pytest.mark.engine, pytest.mark.timeout(1200)]


def groups_left() -> int:
    """Placement groups of the cluster in the environment that were not given back."""
    code = (
        "import ray; from ray.util.placement_group import placement_group_table;"
        "ray.init(log_to_driver=False, logging_level='ERROR');"
        "print(sum(g['state'] != 'REMOVED' for g in placement_group_table().values()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=200
    )
    return int(done.stdout.splitlines()[-1])


@pytest.mark.usefixtures("mini_cluster")
def test_an_engine_over_two_nodes_answers_right_and_leaves_nothing_behind(tmp_path: Path) -> None:
    config = {
        "input": {"uri": str(SAMPLE_FOLDER)},
        "output": {"uri": str(tmp_path / "out")},
        "sampling": {"temperature": 0.0},
        "engine": {"profile": "mini-maverick-dp2"},
        "limits": {"max_error_rate": 0.5},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "jobs.nightly", "--config", str(tmp_path / "job.yaml")]
    before = groups_left()
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["rows"]["succeeded"] == 592
    assert "[EP Rank 0/2]" in done.stderr
    for held in ("[0, 1, 2, 3]", "[4, 5, 6, 7]"):
        assert f"this EP rank holds 4 of 8 experts: {held}" in done.stderr
    verdict = judge(read_records(tmp_path / "out"))
    assert (verdict.rows, verdict.records) == (600, 600)
    assert verdict.digits_right >= 0.97 * verdict.digits
    assert groups_left() == before
