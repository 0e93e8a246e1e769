"""The commands people run: ``python -m jobs.<name>``."""
