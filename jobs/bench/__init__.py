"""Benchmarks of the pipeline, run by hand."""
