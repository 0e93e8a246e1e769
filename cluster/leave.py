"""Takes this node out of its Ray cluster in order; a pod's ``preStop`` runs it within the grace.

In: how many seconds there are. On the head, running jobs are stopped: they get SIGTERM, keep what
is finished, and exit with 75. On any other node Ray is told that the node drains: it schedules
nothing more there, and replicas finish what is in their engines and go on elsewhere
(``pipeline.leaving``). Out: exit code 0 once the jobs, or the node's actors, have ended, 1 if they
had not when the time was up.

Use: ``python -m cluster.leave --within SECONDS``, where ``RAY_ADDRESS`` or a running node says
which cluster it is.
"""

from __future__ import annotations

import argparse
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable

import ray
from ray.job_submission import JobSubmissionClient
from ray.util.state import list_actors
from ray.util.state.exception import RayStateApiException

_HEAD = "node:__internal_head__"
"""A resource that Ray gives to the head node alone."""
_POLL_S = 0.5
_CONNECT_S = 3.0


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and leave; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m cluster.leave", description="Leave in order.")
    parser.add_argument("--within", type=int, required=True, metavar="SECONDS")
    within_s: int = parser.parse_args(arguments).within
    try:
        return 0 if leave(within_s) else 1
    except (OSError, RayStateApiException, subprocess.CalledProcessError) as error:
        sys.stderr.write(f"the cluster does not answer, there is nothing to leave: {error}\n")
        return 1


def leave(within_s: float) -> bool:
    """Stop the jobs if this is the head, else drain this node; whether all ended in time.

    Raises:
        OSError, RayStateApiException, CalledProcessError: the cluster does not answer.
    """
    until = time.monotonic() + within_s
    _check_answers(os.environ.get("RAY_ADDRESS", ""))
    with ray.init(logging_level=logging.ERROR, log_to_driver=False) as context:
        dashboard = f"http://{context.dashboard_url}"
        node_id = ray.get_runtime_context().get_node_id()
        is_head = any(n["NodeID"] == node_id and _HEAD in n["Resources"] for n in ray.nodes())
    left_s = max(1, int(until - time.monotonic()))
    return stop_jobs(dashboard, left_s) if is_head else drain_node(dashboard, node_id, left_s)


def _check_answers(address: str) -> None:
    """Ray would try a dead address for minutes, as when the head of a whole cluster went first."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()


def stop_jobs(dashboard: str, within_s: float) -> bool:
    """Stop every job of the cluster; whether all have ended ``within_s`` seconds later."""
    client = JobSubmissionClient(dashboard)
    running = [
        job.submission_id
        for job in client.list_jobs()
        if job.submission_id is not None and not job.status.is_terminal()
    ]
    for job in running:
        client.stop_job(job)
    return _wait(within_s, lambda: all(client.get_job_status(j).is_terminal() for j in running))


def drain_node(dashboard: str, node_id: str, within_s: int) -> bool:
    """Drain a node; whether no actor is left there ``within_s`` seconds later.

    Blocks of Ray Data may be left: what waits there to be generated is read and prepared anew.
    """
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", f"--node-id={node_id}"]
    command += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=the node is leaving"]
    command += [f"--deadline-remaining-seconds={within_s}"]
    subprocess.run(command, check=True)
    alive = [("node_id", "=", node_id), ("state", "=", "ALIVE")]

    def is_left() -> bool:
        return not list_actors(dashboard, filters=alive, raise_on_missing_output=False)

    return _wait(within_s, is_left)


def _wait(within_s: float, done: Callable[[], bool]) -> bool:
    until = time.monotonic() + within_s
    while not done():
        if time.monotonic() > until:
            return False
        time.sleep(_POLL_S)
    return True


if __name__ == "__main__":
    sys.exit(main())
