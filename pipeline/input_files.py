"""input_files: which files at the input's URIs are read, in which form, and which are left out.

In: URIs. Out: ``Listing``. In folders the suffix tells a file's form, in any case; a file that is
named, and the visible files of a glob of which none has a known suffix, are told by their content.
Nothing is dropped without a word: what is not read is counted, with the reason. Tables that consist
of more than their Parquet files (Delta, Hudi, Iceberg, Lance, Paimon) are refused: read as loose
files they would give deleted rows back.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby

from pipeline import storage
from pipeline.errors import InputError, StorageError
from pipeline.fetch import input_root

_THREADS = 16  # small requests, far away
_HEAD = 4096
_EXAMPLES = 3
_SUFFIXES = (".parquet", ".pq", ".jsonl")
_PACKED_SUFFIXES = (".gz", ".gzip", ".zst", ".zstd", ".bz2", ".xz", ".lz4", ".zip", ".tar", ".tgz")
_PACKED = "they are compressed; unpack them, as rows of a compressed file cannot be found"
HIDDEN = "their names, or their folders', start with _ or ., which readers skip"
_STRANGE = (
    f"their names end in none of {', '.join(_SUFFIXES)}; rename them, or name them by a file or "
    "glob in input.uri: then their content tells what they are"
)
_MAGIC = (
    (b"\x1f\x8b", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ", "xz"),
    (b"\x04\x22\x4d\x18", "lz4"),
    (b"PK\x03\x04", "zip"),
)
_TABLES = (
    ("a Delta table", re.compile(r"(.*)/_delta_log/")),
    ("a Hudi table", re.compile(r"(.*)/\.hoodie/")),
    ("an Iceberg table", re.compile(r"(.*)/metadata/[^/]*\.metadata\.json$")),
    ("a Lance dataset", re.compile(r"(.*)/_versions/[^/]*\.manifest$")),
    ("a Paimon table", re.compile(r"(.*)/snapshot/snapshot-\d+$")),
)
_TABLE_FOLDERS = {"_delta_log": "a Delta table", ".hoodie": "a Hudi table"}


class Form(StrEnum):
    """How rows are stored."""

    PARQUET = "parquet"
    JSONL = "jsonl"


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Files of the input that are not read, for one reason."""

    reason: str
    files: int
    examples: tuple[str, ...]
    """URIs of some of them."""

    def __str__(self) -> str:
        more = ", ..." if self.files > len(self.examples) else ""
        files = "1 file" if self.files == 1 else f"{self.files} files"
        return f"{files} left out ({', '.join(self.examples)}{more}): {self.reason}"


@dataclass(frozen=True)
class Listing:
    """The input's files."""

    by_uri: Mapping[str, Sequence[storage.FileEntry]]
    """For each URI that was given, the files that are read."""
    form: Form
    left_out: tuple[LeftOut, ...]


def list_input(uris: Sequence[str]) -> Listing:
    """Find the files to read at ``uris``.

    Raises:
        InputError: nothing to read at one of them, files of both forms, or a table that is more
            than its files.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        found = dict(zip(uris, pool.map(_list, uris), strict=True))
    by_uri = {uri: [entry for entry, form in files if form] for uri, files in found.items()}
    forms = {entry.uri: form for files in found.values() for entry, form in files if form}
    _check_one_form(forms)
    roots = {uri: input_root(uri, files[0][0].uri) for uri, files in found.items()}
    _check_no_table_around(set(roots.values()))
    rest = {
        entry.uri: roots[uri]  # the deepest, which hides the fewest
        for uri, files in sorted(found.items(), key=lambda each: len(roots[each[0]]))
        for entry, form in files
        if not form and entry.uri not in forms
    }
    return Listing(by_uri, next(iter(forms.values())), _left_out(rest))


def form_by_suffix(uri: str) -> Form | None:
    """The form that a file's name says; None if it says none."""
    lowered = uri.lower()
    if not lowered.endswith(_SUFFIXES):
        return None
    return Form.JSONL if lowered.endswith(".jsonl") else Form.PARQUET


def strange_content(head: bytes) -> str | None:
    """What a file that begins with ``head`` is, and what to do; None if it may hold rows.

    Every form has its own reader, whose error would tell less.
    """
    for magic, name in _MAGIC:
        if head.startswith(magic):
            return f"is compressed ({name}); unpack it"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "is UTF-16 text; store it as UTF-8"
    return None


def form_by_content(head: bytes) -> Form | None:
    """The form of a file that begins with ``head``; None if it has none."""
    if head.startswith(b"PAR1"):
        return Form.PARQUET
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    return Form.JSONL if text.startswith(b"{") else None


_Told = list[tuple[storage.FileEntry, Form | None]]
"""Files, each with its form; None if it is left out."""


def _list(uri: str) -> _Told:
    storage.check_reachable(uri)
    try:
        by_pattern = storage.is_pattern(uri)
        entries = storage.match_files(uri, hidden=True)
    except (FileNotFoundError, StorageError) as error:
        raise InputError(f"input.uri {uri} cannot be listed: {error}.") from None
    if not entries:
        raise InputError(f"input.uri {uri}: there is no file.")
    root = input_root(uri, entries[0].uri)
    is_file = entries[0].uri == storage.absolute(uri).rstrip("/")
    by_name = is_file or by_pattern
    told = [
        (entry, form_by_suffix(entry.uri) if by_name or _is_visible(entry.uri, root) else None)
        for entry in entries
    ]
    _check_no_table_inside(told)
    if any(form for _, form in told):
        return told
    if by_name:
        return _told_by_content(entries, root)
    raise InputError(
        f"input.uri {uri}: found {len(entries)} files, none of which can be read: "
        f"{'; '.join(map(str, _left_out({entry.uri: root for entry in entries})))}."
    )


def _told_by_content(entries: Sequence[storage.FileEntry], root: str) -> _Told:
    """The visible files with the forms inside; all of them if none is visible."""
    chosen = [entry for entry in entries if _is_visible(entry.uri, root)] or entries
    with ThreadPoolExecutor(_THREADS) as pool:
        forms = dict(zip((e.uri for e in chosen), pool.map(_form_inside, chosen), strict=True))
    return [(entry, forms.get(entry.uri)) for entry in entries]


def _form_inside(entry: storage.FileEntry) -> Form:
    try:
        head = storage.read_bytes(entry.uri, limit=_HEAD)
    except (FileNotFoundError, StorageError) as error:
        raise InputError(f"{entry.uri}: cannot be read: {error}.") from None
    form = form_by_content(head)
    if form is None:
        what = strange_content(head) or "holds neither Parquet nor JSON lines"
        raise InputError(f"{entry.uri}: {what}; its first bytes are {head[:8]!r}.")
    return form


def _is_visible(uri: str, root: str) -> bool:
    return not re.search(r"/[_.]", uri.removeprefix(root))


def _check_one_form(forms: Mapping[str, Form]) -> None:
    lines = [uri for uri, form in forms.items() if form is Form.JSONL]
    tables = [uri for uri, form in forms.items() if form is Form.PARQUET]
    if lines and tables:
        raise InputError(
            f"input.uri: {lines[0]} is JSONL, but {tables[0]} is Parquet; a run reads one form: "
            "give a glob, or a list of files."
        )


def _left_out(roots: Mapping[str, str]) -> tuple[LeftOut, ...]:
    """The files by reason; ``roots`` has each one's input root, below which names may hide it."""
    reasons = sorted((_reason(uri, root), uri) for uri, root in roots.items())
    groups = ((reason, [uri for _, uri in of]) for reason, of in groupby(reasons, lambda r: r[0]))
    return tuple(LeftOut(reason, len(of), tuple(of[:_EXAMPLES])) for reason, of in groups)


def _reason(uri: str, root: str) -> str:
    if uri.lower().endswith(_PACKED_SUFFIXES):
        return _PACKED
    return _STRANGE if form_by_suffix(uri) is None and _is_visible(uri, root) else HIDDEN


def _check_no_table_inside(told: _Told) -> None:
    """Refuse a table whose files would be read, or one without any file of a known form."""
    read = [entry.uri for entry, form in told if form]
    for entry, _ in told:
        for name, pattern in _TABLES:
            found = pattern.match(entry.uri)
            if found and (not read or any(uri.startswith(f"{found[1]}/") for uri in read)):
                raise _is_table(found[1], name)


def _check_no_table_around(roots: set[str]) -> None:
    """Refuse files and partitions of a table whose other folders lie above them, or beside."""
    folders = sorted({folder for root in roots for folder in _folders_above(root)})
    with ThreadPoolExecutor(_THREADS) as pool:
        for folder, name in zip(folders, pool.map(_table_at, folders), strict=True):
            if name:
                raise _is_table(folder, name)


def _folders_above(root: str) -> Iterator[str]:
    """``root``, the folders above its partitions' (``date=1/``), and above Iceberg's ``data/``."""
    folder: str | None = root
    while folder is not None:
        yield folder
        name = posixpath.basename(folder)
        if "=" not in name and name != "data":
            return
        folder = storage.parent(folder)


def _table_at(folder: str) -> str | None:
    try:
        for name, table in _TABLE_FOLDERS.items():
            if storage.exists(storage.join(folder, name)):
                return table
        metadata = storage.list_files(
            storage.join(folder, "metadata"), suffixes=(".metadata.json",)
        )
        return "an Iceberg table" if metadata else None
    except StorageError:  # no right to look there
        return None


def _is_table(folder: str, name: str) -> InputError:
    return InputError(
        f"input.uri: {folder} is {name}; its files also hold rows that were deleted or replaced, "
        "and only its own readers can tell. Export the rows to plain Parquet (DuckDB: COPY (FROM "
        "delta_scan('...')) TO 'folder' (FORMAT parquet, PER_THREAD_OUTPUT), or Spark's "
        "df.write.parquet), and give that folder."
    )
