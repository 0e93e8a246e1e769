"""Fixtures that more than one module uses: a mini-cluster shared by the whole session."""

from collections.abc import Iterator

import pytest

from cluster.lifecycle import LocalCluster
from cluster.state import ClusterState
from tests.integration import fake_job
from tests.variables import variables


@pytest.fixture(scope="session")
def mini_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterState]:
    """A head, two nodes and an S3 server; its credentials are in ``os.environ`` meanwhile."""
    with (
        LocalCluster(tmp_path_factory.mktemp("cluster") / "state") as cluster,
        variables(cluster.state.environment()),
    ):
        yield cluster.state


@pytest.fixture(scope="module")
def one_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """One Ray node, for all fake jobs of a module."""
    with fake_job.one_ray(tmp_path_factory.mktemp("ray") / "state") as cluster:
        yield cluster
