"""A model's files as one node has them: which, how large, whole or not, and their checksums.

In: a model and its revision. Out: ``Weights``. Every safetensors file is held against the length
that its own header states, which finds a broken download in milliseconds; contents of small files
are always hashed, those of large ones when asked, as 430 GB take minutes. Expected checksums are
those of ``SHA256SUMS`` in the folder, else what the hub's client has noted beside its downloads.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError
from pipeline.profile import locate_model
from pipeline.redact import redacted_text

log = logging.getLogger(__name__)

SUMS = "SHA256SUMS"
_SMALL = 16 * 2**20
"""Bytes up to which a file is hashed without being asked: configs and tokenizers."""
_INDEX = "model.safetensors.index.json"
_MOST_HEADER = 100 * 2**20
"""Bytes; the limit of the safetensors library itself."""
_BLOCK = 8 * 2**20
_HASHED_AT_A_TIME = 4  # files; SHA-256 does 1-2 GB/s on a core, a disk array more
_LINE_INTERVAL_S = 10.0
_HUB_S = 10.0
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHA1 = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class ModelFile:
    """One file of a model."""

    name: str
    """Relative to the model's folder."""
    size: int
    sha256: str | None = None
    """None: large, and nobody asked for checksums."""


@dataclass(frozen=True, slots=True)
class Weights:
    """A model as one node has it."""

    folder: str
    """Where; empty: it is not there."""
    files: tuple[ModelFile, ...] = ()
    problems: tuple[str, ...] = ()
    """What is wrong with it by itself, each with its remedy."""
    vouched: int = 0
    """Files whose content was compared with an expected checksum."""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def unhashed(self) -> int:
        """Files whose content nobody looked at."""
        return sum(file.sha256 is None for file in self.files)


def look_at_weights(
    model: str, revision: str | None, *, needs_tensors: bool, checksums: bool
) -> Weights:
    """The model as this node has it.

    Args:
        model: as the profile names it.
        revision: of the hub.
        needs_tensors: whether the engine reads weights at all.
        checksums: whether to hash large files, too.
    """
    try:
        folder = _find(model, revision)
    except ConfigError as error:
        return Weights("", problems=(redacted_text(str(error).rstrip(".")),))
    found = tuple(_hashed(folder, list(_list(folder)), checksums=checksums))
    problems = [*_incomplete(folder, found, needs_tensors=needs_tensors)]
    expected = _expected(folder)
    problems += _unlike(folder, found, expected)
    vouched = sum(file.name in expected and file.sha256 is not None for file in found)
    return Weights(str(folder), found, tuple(map(redacted_text, problems)), vouched)


def _find(model: str, revision: str | None) -> Path:
    """The model's folder.

    Raises:
        ConfigError: it is not on this node; says where it could come from.
    """
    located = locate_model(model)
    folder = Path(located)
    if folder.is_dir():
        return folder
    if folder.is_absolute():
        raise ConfigError(f"model folder {folder} is not there; copy the model to it, or mount it")
    return _snapshot(located, revision)


def _snapshot(repo: str, revision: str | None) -> Path:
    """A hub model's folder in the cache of the hub's client."""
    from huggingface_hub import constants, snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except (OSError, ValueError):  # LocalEntryNotFoundError is both
        at = revision or "main"
        raise ConfigError(
            f"{repo} at revision {at} is not in the cache of the Hugging Face hub "
            f"({constants.HF_HUB_CACHE}), and {_reachable(repo, revision)}; fetch it there before "
            f"the night: `hf download {repo} --revision {at}`"
        ) from None


def _reachable(repo: str, revision: str | None) -> str:
    """Whether the hub would give it to this node now."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    from huggingface_hub.utils import httpx  # whichever its client is made of

    try:
        HfApi().model_info(repo, revision=revision, timeout=_HUB_S)
    except OfflineModeIsEnabled:
        return "HF_HUB_OFFLINE forbids asking the hub"
    except HfHubHTTPError as error:
        status = error.response.status_code
        return f"the hub refuses it (HTTP {status}; gated models want HF_TOKEN)"
    except (httpx.HTTPError, OSError, ValueError) as error:
        return f"the hub cannot be reached from there ({type(error).__name__})"
    return "the hub has it, so every engine start would wait for the download"


def _list(folder: Path) -> Iterator[Path]:
    """Files of the model; what starts with a dot is a client's own, and pages and sums are no part
    of it."""
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not hidden and path.is_file() and path.suffix != ".md" and path.name != SUMS:
            yield path


def _hashed(folder: Path, paths: Sequence[Path], *, checksums: bool) -> Iterator[ModelFile]:
    sizes = [path.stat().st_size for path in paths]
    wanted = [checksums or size <= _SMALL for size in sizes]
    total = sum(size for size, want in zip(sizes, wanted, strict=True) if want)
    progress = _Progress(total)
    with ThreadPoolExecutor(_HASHED_AT_A_TIME) as pool:
        digests = pool.map(
            lambda path, want: _sha256(path, progress) if want else None, paths, wanted
        )
        for path, size, digest in zip(paths, sizes, digests, strict=True):
            yield ModelFile(path.relative_to(folder).as_posix(), size, digest)


class _Progress:
    """A line every 10 s while files are hashed."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0
        self._next = time.monotonic() + _LINE_INTERVAL_S
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self._done += count
            if time.monotonic() < self._next:
                return
            self._next = time.monotonic() + _LINE_INTERVAL_S
            done, total = self._done / 1e9, self._total / 1e9
        log.info("checksums: %.1f of %.1f GB", done, total)


def _sha256(path: Path, progress: _Progress) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            progress.add(len(block))
    return digest.hexdigest()


def _incomplete(folder: Path, files: Sequence[ModelFile], *, needs_tensors: bool) -> Iterator[str]:
    names = {file.name for file in files}
    if "config.json" not in names:
        yield f"{folder}/config.json is missing, so it is no model's folder; copy the model again"
    if not needs_tensors:
        return
    tensors = [file for file in files if file.name.endswith(".safetensors")]
    if not tensors:
        yield f"{folder} holds no .safetensors file; copy the weights there"
    headers = {}
    for file in tensors:
        header, problem = _header(folder / file.name, file.size)
        headers[file.name] = header
        if problem:
            yield problem
    if _INDEX in names:
        yield from _against_index(folder, headers)


def _header(path: Path, size: int) -> tuple[dict[str, Any] | None, str]:
    """A safetensors file's header, and what is wrong with the file if anything is.

    The format: 8 bytes, little-endian, with the header's length; the header as JSON, with each
    tensor's place; the tensors, the last of which ends the file.
    """
    remedy = "fetch or copy the file again"
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        text = file.read(length) if 0 < length <= min(_MOST_HEADER, size) else b""
    try:
        header = {k: v for k, v in json.loads(text).items() if k != "__metadata__"}
        end = 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        return None, f"{path} has no readable safetensors header; {remedy}"
    if size != end:
        return header, f"{path} has {size} bytes, and by its own header {end}; {remedy}"
    return header, ""


def _against_index(folder: Path, headers: dict[str, dict[str, Any] | None]) -> Iterator[str]:
    """Files that the index names and the folder lacks, and tensors that are not where it says."""
    path = folder / _INDEX
    try:
        places: dict[str, str] = dict(json.loads(path.read_bytes())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        yield f"{path} cannot be read ({type(error).__name__}); fetch or copy it again"
        return
    for name in sorted(set(places.values()) - headers.keys()):
        yield f"{folder / name} is missing, and {_INDEX} names it; fetch or copy the file"
    for name, header in headers.items():
        wanted = {tensor for tensor, place in places.items() if place == name}
        lost = sorted(wanted - header.keys()) if header is not None else []
        if lost:
            yield (
                f"{folder / name} lacks {len(lost)} tensors that {_INDEX} puts there ({lost[0]}): "
                "they are of different versions of the model; fetch or copy both again"
            )


def _expected(folder: Path) -> dict[str, str]:
    """Expected checksums by file name: SHA-256, or Git's SHA-1 of small files of the hub."""
    if (folder / SUMS).is_file():
        return _read_sums(folder / SUMS)
    return _noted_by_hub(folder)


def _read_sums(path: Path) -> dict[str, str]:
    """Of ``sha256sum``'s output: a digest, two characters, a name."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        digest, _, name = line.partition(" ")
        if _SHA256.fullmatch(digest):
            found[name.lstrip(" *").removeprefix("./")] = digest
    return found


def _noted_by_hub(folder: Path) -> dict[str, str]:
    """What the hub's client left: in its cache, files are links to blobs named by their digest;
    beside a download to a folder, ``.cache/huggingface/download/<name>.metadata`` has it."""
    found = {}
    for path in _list(folder):
        name = path.relative_to(folder).as_posix()
        note = folder / ".cache" / "huggingface" / "download" / f"{name}.metadata"
        if path.is_symlink() and path.resolve().parent.name == "blobs":
            digest = path.resolve().name
        elif note.is_file():
            digest = [*note.read_text(encoding="utf-8").splitlines(), "", ""][1].strip()
        else:
            continue
        if _SHA256.fullmatch(digest) or _SHA1.fullmatch(digest):
            found[name] = digest
    return found


def _unlike(folder: Path, files: Sequence[ModelFile], expected: dict[str, str]) -> Iterator[str]:
    listed = {file.name for file in files}
    for name in sorted(expected.keys() - listed):
        if not (folder / name).exists():
            yield f"{folder / name} is missing, and {SUMS} lists it; fetch or copy the file"
    for file in files:
        wanted = expected.get(file.name)
        if wanted is None or file.sha256 is None:
            continue
        path = folder / file.name
        if wanted != (file.sha256 if len(wanted) == 64 else _git_sha1(path)):
            yield f"{path} has another checksum than the one noted for it; fetch or copy it again"


def _git_sha1(path: Path) -> str:
    """How Git, and so the hub, names small files."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
