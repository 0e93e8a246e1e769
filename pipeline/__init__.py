"""Batch inference: plan, read, prepare, generate, commit, report (see docs/architecture.md)."""

__version__ = "0.1.0"
