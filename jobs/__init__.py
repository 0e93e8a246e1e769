"""The commands people run: ``python -m jobs.<name>``."""

from jobs import signals

signals.listen_if_started_as(
    *(f"jobs.{name}" for name in ("annotate", "evaluate", "nightly", "plan", "status", "verify"))
)
