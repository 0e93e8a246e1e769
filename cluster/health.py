"""How a mini-cluster does: whether each part's process runs and does its work."""

from dataclasses import dataclass

from cluster import parts, processes
from cluster.state import ClusterState


@dataclass(frozen=True)
class PartStatus:
    """How one part does."""

    name: str
    pid: int
    port: int
    alive: bool
    """Its process runs."""
    answers: bool
    """It does its work: serves the bucket, takes jobs, or is a live node to the head."""
    log: str


@dataclass(frozen=True)
class ClusterStatus:
    """How a mini-cluster does; without credentials."""

    healthy: bool
    parts: tuple[PartStatus, ...]
    s3: str
    dashboard: str
    ray: str


def look(state: ClusterState) -> ClusterStatus:
    """Asks every part."""
    nodes = parts.alive_nodes(state) or set()
    answers = dict.fromkeys(nodes, True) | {
        parts.S3: parts.s3_answers(state),
        parts.HEAD: parts.HEAD in nodes and parts.jobs_api_answers(state),
    }
    listed = tuple(
        PartStatus(
            name=part.name,
            pid=part.record.pid,
            port=part.ports[0],
            alive=processes.is_alive(part.record),
            answers=answers.get(part.name, False),
            log=str(part.log),
        )
        for part in state.parts
    )
    started = {parts.S3, parts.HEAD} <= {part.name for part in listed}
    return ClusterStatus(
        healthy=started and all(part.alive and part.answers for part in listed),
        parts=listed,
        s3=state.s3_url,
        dashboard=state.dashboard_url,
        ray=state.gcs_address or "",
    )
