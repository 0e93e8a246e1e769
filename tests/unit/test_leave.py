"""``cluster.leave`` where nothing answers any more (else: ``tests/integration/test_leave.py``)."""

import os
import subprocess
import sys

from pipeline.profile import REPO_ROOT


def test_a_node_of_a_cluster_that_is_gone_does_not_wait_for_it() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cluster.leave", "--within", "600"],
        cwd=REPO_ROOT,
        env={**os.environ, "RAY_ADDRESS": "127.0.0.1:9"},
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 1
    assert "the cluster does not answer, there is nothing to leave" in done.stderr
