"""Whether the node that this process is on is about to be taken away.

Ray calls such a node draining. It is told so, with a deadline, by a pod's ``preStop``
(``cluster.leave``), by ``ray start --block`` when it gets SIGTERM, or by an autoscaler.
"""

from __future__ import annotations

import time

import ray
from ray._private.state import state  # as Ray Data and Ray Train ask; there is no public way
from ray.exceptions import RayError

_NO_DEADLINE_S = 30.0
"""For a node that drains without a deadline: somebody waits for it to become idle."""


def seconds_left() -> float | None:
    """Seconds until this node goes, 0 if it should be gone; None: it stays, or nobody can tell."""
    try:
        deadline_ms = state.get_draining_nodes().get(ray.get_runtime_context().get_node_id())
    except RayError:
        return None
    if deadline_ms is None:
        return None
    return max(0.0, deadline_ms / 1000 - time.time()) if deadline_ms else _NO_DEADLINE_S
