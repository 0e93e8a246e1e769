"""The object store, tried from a node as a run uses it: read the input, write a run folder.

In: what to read and where to write. Out: what is wrong, and how far the store's clock is off. One
small object is created, created again (which must be refused, or two drivers could both take a
run's lease), replaced under its version and under an old one (which must be refused, too), read
back and deleted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from cluster.preflight.clocks import Offset, offset
from cluster.preflight.findings import Check, Fault, shared
from pipeline import storage
from pipeline.errors import InputError, StorageError
from pipeline.input_files import list_input
from pipeline.redact import redacted_text

_PATIENCE_S = 10.0
"""For each request: a store that is down must be told of, not waited for."""
_ON_DISK = "file://"
_REQUESTS = 12
"""Of a trial, beside those to the input."""
_CLOCK_RESOLUTION_S = 1.0
"""Stores tell times in whole seconds."""
_ROWS_BEGIN = 4
"""Bytes read of each input file: enough to see that they come."""
_CREDENTIALS = "check the credentials in that node's environment, and what they may do there"
_CONDITIONAL = (
    "two drivers could both take a run's lease: use a store with conditional writes (AWS S3 has "
    "them, MinIO and SeaweedFS in current versions)"
)


@dataclass(frozen=True, slots=True)
class Trial:
    """What to try; picklable."""

    files: tuple[str, ...]
    """Input files to read from."""
    roots: tuple[str, ...]
    """Folders or buckets with images, to be reached."""
    output: str
    """The run folder."""
    probe: str
    """Name of the object to write there, of this node alone."""
    marker: str | None = None
    """URI of an object that the driver wrote, to be found; None: it could write none."""

    @property
    def most_s(self) -> float:
        """What a trial may take, if every request of it is waited for."""
        return _PATIENCE_S * (len(self.files) + len(self.roots) + _REQUESTS)


@dataclass(frozen=True, slots=True)
class BucketFacts:
    """What came of it on one node."""

    problems: tuple[str, ...] = ()
    clock: Offset | None = None
    """The store's, against the node's; None: nothing could be written."""


def try_bucket(trial: Trial) -> BucketFacts:
    """Read and write from this node."""
    problems: list[str] = []
    with storage.patience(_PATIENCE_S):
        for uri in trial.files:
            problems += _problem(uri, partial(_read, uri))
        for root in trial.roots:
            problems += _problem(root, partial(storage.check_reachable, root))
        if trial.marker is not None:
            problems += _problem(trial.marker, partial(_see, trial.marker))
        writer = _Writer(trial)
        problems += _problem(writer.uri, writer.write)
        problems += writer.problems
        problems += _problem(writer.uri, writer.clean)
    return BucketFacts(tuple(map(redacted_text, problems)), writer.clock)


def judge_bucket(found: Mapping[str, BucketFacts]) -> list[Fault]:
    """Faults by node name."""
    told = ((node, problem) for node, facts in found.items() for problem in facts.problems)
    return shared(Check.BUCKET, told)


def first_files(uris: Sequence[str]) -> tuple[list[str], list[str]]:
    """One input file of each URI, and what is wrong with those that have none."""
    files: list[str] = []
    problems: list[str] = []
    with storage.patience(_PATIENCE_S):
        for uri in uris:
            problems += _problem(uri, partial(_find_first, uri, files))
    return files, [redacted_text(problem) for problem in problems]


def put_marker(uri: str) -> bool:
    """Write the object that all nodes must see; whether that went well."""

    def put() -> None:
        storage.check_reachable(uri)  # some servers make a bucket for whoever writes to it
        storage.put_bytes(uri, uri.encode())

    with storage.patience(_PATIENCE_S):
        return not _problem(uri, put)


def new_folder(output: str) -> str | None:
    """The topmost folder that writing to ``output`` would make; None in a bucket, or if none."""
    place: str | None = storage.absolute(output).rstrip("/")
    found = None
    while place is not None and place.startswith(_ON_DISK) and not storage.exists(place):
        found, place = place, storage.parent(place)
    return found


def clean_up(uris: Sequence[str], made: str | None) -> None:
    """Delete what a preflight may have left: objects, and the folder it made, if it is empty."""
    with storage.patience(_PATIENCE_S):
        storage.delete_all(uris)
        if made is not None:
            storage.remove_empty_folders(made)


def _problem(uri: str, action: Callable[[], object]) -> list[str]:
    """What ``action``, which is about ``uri``, fails with, as a message; none if it does not."""
    try:
        action()
    except FileNotFoundError:
        return [f"{uri} came and went while it was looked at; see who else works there"]
    except InputError as error:
        return [str(error).rstrip(".")]
    except StorageError as error:
        return [f"{error}; {_CREDENTIALS}"]
    return []


def _find_first(uri: str, files: list[str]) -> None:
    files.append(list_input([uri]).by_uri[uri][0].uri)


def _read(uri: str) -> None:
    try:
        storage.read_bytes(uri, limit=_ROWS_BEGIN)
    except FileNotFoundError:
        raise InputError(
            f"{uri} is not there, though the driver sees it; give all nodes the same store, or a "
            "disk that they share"
        ) from None


def _see(marker: str) -> None:
    try:
        same = storage.read_bytes(marker) == marker.encode()
    except FileNotFoundError:
        same = False
    if not same:
        raise InputError(
            f"{storage.parent(marker)}: what the driver writes there is not seen; give all nodes "
            "the same store (AWS_ENDPOINT_URL), or a disk that they share"
        )


class _Writer:
    """Writes one object as lease, journal and parts are written."""

    def __init__(self, trial: Trial) -> None:
        self._output = trial.output
        self._tried = False
        self._made: str | None = None
        self.uri = storage.join(storage.absolute(trial.output), trial.probe)
        self.problems: list[str] = []
        self.clock: Offset | None = None

    def write(self) -> None:
        storage.check_reachable(self._output)
        self._made = new_folder(self._output)
        self._tried = True
        before = time.time()
        storage.create_bytes(self.uri, b"first")
        written = storage.written_at(self.uri).timestamp()
        self.clock = offset(before, written, time.time(), resolution_s=_CLOCK_RESOLUTION_S)
        if storage.create_bytes(self.uri, b"second"):
            self._tell(f"a PUT with If-None-Match replaced an object; {_CONDITIONAL}")
        elif storage.read_bytes(self.uri) != b"first":
            self._tell("an object is read back with another content than it has; mend the store")
        self._replace()

    def _replace(self) -> None:
        _, old = storage.read_version(self.uri)
        if storage.replace_bytes(self.uri, b"third", old) is None:
            self._tell(f"a PUT with If-Match and the right version is refused; {_CONDITIONAL}")
        elif storage.replace_bytes(self.uri, b"fourth", old) is not None:
            self._tell(f"a PUT with If-Match replaced an object of another version; {_CONDITIONAL}")

    def clean(self) -> None:
        """What was written, or may have been."""
        if self._tried:
            clean_up([self.uri], self._made)

    def _tell(self, problem: str) -> None:
        self.problems.append(f"{self._output}: {problem}")
