"""The run folder: its manifest, its saved plan, its end marker, and whether a config may resume it.

    run.json      what runs: resolved config, versions, model revision, input fingerprint
    _plan.json    the shards
    data/         the parts                                   (commit)
    report.*      what came of it                             (report)
    _SUCCESS      last, only when rows in = rows out

In: a config, an input and a profile. Out: a ``Run``: what is planned and which shards are left.
Nothing is written until ``start``.
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pipeline import __version__, storage
from pipeline.commit import committed_shards
from pipeline.config import JobConfig
from pipeline.engine import engine_version
from pipeline.errors import RunMismatchError, StorageError
from pipeline.model import model_name, model_revision
from pipeline.plan import Plan, Shard, make_plan
from pipeline.profile import EngineProfile, locate_model
from pipeline.read import Input

_RECORDED_PACKAGES = ("ray", "torch", "transformers", "tokenizers", "pyarrow", "pillow")
_SECRET_NAME = re.compile(r"token$|secret|password|passwd|credential|api_?key|access_?key", re.I)
_REDACTED = "***"


@dataclass(frozen=True)
class Run:
    """One run folder as found, and what is left to do in it."""

    uri: str
    manifest: Mapping[str, Any]
    plan: Plan
    done: frozenset[int]
    """Shards whose part is committed."""
    exists: bool
    """Whether the folder already holds this run."""
    finished: bool
    """Whether ``_SUCCESS`` is there."""

    @property
    def pending(self) -> tuple[Shard, ...]:
        """Shards without a part, in plan order."""
        return tuple(shard for shard in self.plan.shards if shard.index not in self.done)

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do, the marker included."""
        return self.finished and not self.pending

    def start(self) -> None:
        """Write plan and manifest if the run is new; take an outdated marker away."""
        if self.finished:
            storage.delete(self._file("_SUCCESS"))
        if not self.exists:
            storage.put_bytes(self._file("_plan.json"), self.plan.to_json().encode())
            storage.put_bytes(self._file("run.json"), _to_bytes(self.manifest))

    def mark_success(self) -> None:
        """Write ``_SUCCESS``, the last object of the run."""
        storage.put_bytes(self._file("_SUCCESS"), b"")

    def _file(self, name: str) -> str:
        return storage.join(self.uri, name)


def open_run(config: JobConfig, profile: EngineProfile, found: Input) -> Run:
    """Look at the output folder and decide: a new run, or the continuation of the one there.

    Raises:
        InputError: the output's bucket cannot be reached.
        RunMismatchError: the folder holds a run of other input, model, seed or sampling.
        StorageError: the folder cannot be read.
    """
    storage.check_reachable(config.output.uri)
    uri = storage.absolute(config.output.uri).rstrip("/")
    storage.check_folder(uri)
    limits = config.limits
    plan = make_plan(found.files, shard_rows=limits.shard_rows, shard_bytes=limits.shard_bytes)
    manifest = _manifest(config, profile, plan)
    saved = _load(uri)
    if saved is None:
        if storage.list_files(storage.join(uri, "data"), suffixes=(".parquet",)):
            raise RunMismatchError(f"{uri} holds data/ but no run.json; give another output.uri.")
        return Run(uri, manifest, plan, frozenset(), exists=False, finished=False)
    _check_same(uri, saved, manifest)
    plan = _load_plan(uri)
    return Run(
        uri,
        saved,
        plan,
        frozenset(committed_shards(uri, plan)),
        exists=True,
        finished=storage.exists(storage.join(uri, "_SUCCESS")),
    )


def redacted(value: Any, name: str = "") -> Any:
    """A copy of ``value`` without what is stored under secret-sounding names."""
    if isinstance(value, Mapping):
        return {key: redacted(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(item) for item in value]
    if isinstance(value, str) and value and _SECRET_NAME.search(name):
        return _REDACTED
    return value


def _manifest(config: JobConfig, profile: EngineProfile, plan: Plan) -> dict[str, Any]:
    model = locate_model(profile.model)
    return {
        "config": redacted(config.model_dump(mode="json")),
        "engine": redacted(profile.model_dump(mode="json")),
        "model": {
            "name": model_name(model),
            "revision": model_revision(model, profile.revision),
        },
        "input": {
            "uri": config.input.uri,
            "files": len(plan.files),
            "rows": plan.rows,
            "fingerprint": plan.fingerprint(),
        },
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    found = {"maverick-batch": __version__, "python": platform.python_version()}
    found["engine"] = engine_version()
    for package in _RECORDED_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _identity(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What must not change under a run; the cluster's side (replicas, memory) may."""
    config = manifest["config"]
    return {
        "input files": manifest["input"]["fingerprint"],
        "input.columns": config["input"]["columns"],
        "output.carry": config["output"]["carry"],
        "seed": config["seed"],
        "sampling": config["sampling"],
        "model": manifest["model"],
    }


def _check_same(uri: str, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    ours = _identity(wanted)
    try:
        theirs = _identity(saved)
    except (KeyError, TypeError):
        raise RunMismatchError(
            f"{uri}/run.json is not this program's; use another folder."
        ) from None
    for key, value in ours.items():
        if theirs[key] != value:
            raise RunMismatchError(
                f"{uri} holds a run with another {key}: {_brief(theirs[key])} there, "
                f"{_brief(value)} here; restore it or give another output.uri."
            )


def _brief(value: Any) -> str:
    if isinstance(value, dict):
        value = {key: item for key, item in value.items() if item not in (None, "", [])}
    return json.dumps(value)


def _load(uri: str) -> dict[str, Any] | None:
    manifest_uri = storage.join(uri, "run.json")
    try:
        document = json.loads(storage.read_bytes(manifest_uri))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise StorageError(f"{manifest_uri} is not valid JSON: {error}") from None
    if not isinstance(document, dict):
        raise StorageError(f"{manifest_uri} is not a run manifest")
    return document


def _load_plan(uri: str) -> Plan:
    plan_uri = storage.join(uri, "_plan.json")
    try:
        return Plan.from_json(storage.read_bytes(plan_uri))
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{plan_uri} is missing or damaged ({error}); start anew") from None


def _to_bytes(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=2) + "\n").encode()
