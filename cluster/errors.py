"""What can go wrong with a mini-cluster.

ClusterError
├── NotInstalledError    a program it needs is not there
├── NoFreePortError      too few TCP ports are free
├── PartFailedError      a part ended, or did not answer in time
├── StateFileError       the file that says what runs cannot be read
└── LeftBehindError      processes that not even SIGKILL ended

Wrong arguments are a plain ``ValueError``.
"""


class ClusterError(Exception):
    """Base of all mini-cluster errors; the message says what, where and what to do."""


class NotInstalledError(ClusterError):
    """A program the mini-cluster needs is missing."""


class NoFreePortError(ClusterError):
    """Too few TCP ports are free on this machine."""


class PartFailedError(ClusterError):
    """A part of the mini-cluster ended while starting, or did not answer in time."""


class StateFileError(ClusterError):
    """The record of a running mini-cluster cannot be read."""


class LeftBehindError(ClusterError):
    """Processes outlived SIGKILL."""
