"""Fixtures that more than one module uses: a mini-cluster shared by the whole session."""

import os
from collections.abc import Iterator

import pytest

from cluster.lifecycle import LocalCluster
from cluster.state import ClusterState


@pytest.fixture(scope="session")
def mini_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterState]:
    """A head, two nodes and an S3 server; its credentials are in ``os.environ`` meanwhile."""
    with LocalCluster(tmp_path_factory.mktemp("cluster") / "state") as cluster:
        before = dict(os.environ)
        os.environ.update(cluster.state.environment())
        try:
            yield cluster.state
        finally:
            os.environ.clear()
            os.environ.update(before)
