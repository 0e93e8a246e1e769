"""Tests that start real processes: Ray, vLLM, S3."""

from jobs import signals

signals.listen_if_started_as("tests.integration.nightly_with_fake_engine")
