"""The run folder: its manifest, its saved plan, its end marker, and whether a config may resume it.

    run.json              what runs: id, resolved config, versions, model revision, input
    _plan.json            the input files and the shards
    _duplicates.parquet   rows that repeat a custom_id, if there are any
    data/                 the parts                           (commit)
    output.jsonl          what the parts hold, as OpenAI's batch output; if the input is JSONL
    errors.jsonl          rows that failed, likewise          (openai_output)
    _journal/             finished rows of open shards        (journal)
    _progress.json        how far it is, by its driver        (live)
    report.*              what came of it                     (report)
    _SUCCESS              last, only when rows in = rows out

In: a config, an input and a profile. Out: a ``Run``: what is planned and which shards are left.
Nothing is written, and nothing discarded, until ``start``.
"""

from __future__ import annotations

import json
import logging
import platform
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pyarrow as pa
from pydantic import BaseModel

from pipeline import __version__, storage
from pipeline.commit import Destination, committed_shards, part_number
from pipeline.config import JobConfig
from pipeline.duplicates import Duplicates, find_duplicates
from pipeline.engine_spec import engine_version
from pipeline.errors import ConfigError, RunMismatchError, StorageError
from pipeline.model import ModelSpec, model_name, model_revision
from pipeline.openai_output import OPENAI_FILES
from pipeline.plan import InputFile, Plan, Shard, fingerprint, make_plan
from pipeline.profile import EngineProfile, is_commit, locate_model
from pipeline.read import Input
from pipeline.redact import redacted
from pipeline.sampling import DefaultsOf, SamplingDefaults
from pipeline.template import RequestTemplate

log = logging.getLogger(__name__)

ACCEPTABLE_CHANGES = ("model", "sampling", "seed")
"""What a resumed run may be told to go on with: rows already done stay as they are."""
_DELETED_AT_A_TIME = 100
"""Objects of a discarded run between two looks at the lease, where one request deletes them all."""
_FOLDER_FORMAT = 2
"""In manifests since journal entries say whose they are. Older ones have none."""
_SHOWN_CHARACTERS = 80  # of a manifest that is none
_NAMED_FILES = 3  # of each kind of change; the rest is counted
_RECORDED_PACKAGES = ("ray", "torch", "transformers", "tokenizers", "pyarrow", "pillow")


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
    accepted: bool = False
    """Whether the manifest holds accepted changes that the folder's does not yet."""
    replaces: bool = False
    """Whether what the folder holds is discarded at the start."""

    @property
    def id(self) -> str:
        """What tells this run from others in the same folder; empty if an old version made it."""
        return str(self.manifest.get("id", ""))

    @property
    def to(self) -> Destination:
        """Where its records go."""
        return Destination(
            self.uri,
            self.id,
            self.manifest["model"]["name"],
            tuple(frozenset(each["what"]) for each in self.manifest.get("retries", ())),
            unsigned_journals="format" not in self.manifest,
        )

    @property
    def defaults(self) -> DefaultsOf:
        """Whose sampling defaults apply; a run keeps those it began with."""
        return DefaultsOf(self.manifest.get("defaults", DefaultsOf.PROGRAM))

    @property
    def pending(self) -> tuple[Shard, ...]:
        """Shards without a part, in plan order."""
        return tuple(shard for shard in self.plan.shards if shard.index not in self.done)

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do, the marker included."""
        return self.finished and not self.pending

    @cached_property
    def duplicates(self) -> Duplicates:
        """Rows that repeat a ``custom_id``: a new run reads that column, a resumed one its list.

        Raises:
            StorageError: an input file, or the saved list, cannot be read.
        """
        if self.exists:
            return self._saved_duplicates()
        column = self.manifest["config"]["input"]["columns"].get("custom_id", "custom_id")
        return find_duplicates(self.plan.files, column)

    def start(self, confirm: Callable[[], None] = lambda: None) -> None:
        """Discard what the run replaces; write plan, duplicates and manifest of a new run.

        An outdated end marker goes first, the manifest comes last: a start that is cut short
        leaves a folder that says so. ``confirm`` is called before each change and raises if the
        run is another driver's by then: this one may have been paused at any moment.

        Raises:
            StorageError: an object cannot be read, written or deleted.
        """
        confirm()
        if self.finished or not self.exists:
            storage.delete(self._file("_SUCCESS"))
        if self.replaces:
            _discard(self.uri, confirm)
        if not self.exists:
            self._write_new(confirm)
        elif self.accepted:
            storage.put_bytes(self._file("run.json"), _to_bytes(self.manifest))

    def retry(self, what: Collection[str], reopened: Collection[int]) -> Run:
        """Write down that records with these statuses and codes do not count any more.

        Raises:
            StorageError: the manifest cannot be written.
        """
        at = datetime.now(UTC).isoformat(timespec="seconds")
        retries = [*self.manifest.get("retries", []), {"what": sorted(what), "at": at}]
        manifest = {**self.manifest, "retries": retries}
        storage.put_bytes(self._file("run.json"), _to_bytes(manifest))
        left = self.done.difference(reopened)
        return replace(self, manifest=manifest, done=left, finished=False)

    def mark_success(self) -> None:
        """Write ``_SUCCESS``, the last object of the run."""
        storage.put_bytes(self._file("_SUCCESS"), b"")

    def _write_new(self, confirm: Callable[[], None]) -> None:
        repeating = len(self.duplicates)
        confirm()
        storage.put_bytes(self._file("_plan.json"), self.plan.to_json().encode())
        if repeating:
            log.warning("%d rows repeat a custom_id; they end as errored", repeating)
            storage.put_bytes(self._file("_duplicates.parquet"), self.duplicates.to_parquet())
        confirm()
        counted = {**self.manifest["input"], "duplicates": repeating}
        storage.put_bytes(self._file("run.json"), _to_bytes({**self.manifest, "input": counted}))

    def _saved_duplicates(self) -> Duplicates:
        if not self.manifest["input"].get("duplicates"):
            return Duplicates.none(self.plan.files)
        uri = self._file("_duplicates.parquet")
        try:
            return Duplicates.from_parquet(storage.read_bytes(uri), self.plan.files)
        except (FileNotFoundError, ValueError, KeyError, pa.ArrowException) as error:
            raise StorageError(_damaged(uri, error)) from None

    def _file(self, name: str) -> str:
        return storage.join(self.uri, name)


def open_run(
    config: JobConfig,
    profile: EngineProfile,
    found: Input,
    *,
    new_run: bool = False,
    accept_changed: Collection[str] = (),
) -> Run:
    """Look at the output folder and decide: a new run, or the continuation of the one there.

    Args:
        config: the job.
        profile: its engine.
        found: its input.
        new_run: whether to discard, at the start, what the folder holds.
        accept_changed: of ``ACCEPTABLE_CHANGES``, those that a continued run may go on with.

    Raises:
        ConfigError: ``accept_changed`` names another key.
        InputError: the output's bucket cannot be reached.
        RunMismatchError: the folder holds a run of other input, model, seed or sampling, or a
            damaged one, or what is left of one.
        StorageError: the folder cannot be read.
    """
    _check_acceptable(accept_changed)
    storage.check_reachable(config.output.uri)
    uri = storage.absolute(config.output.uri).rstrip("/")
    storage.check_folder(uri)
    wanted = _manifest(config, profile, found.files)
    saved = _load(uri, new_run=new_run)
    if saved is not None:
        return _resume(uri, saved, wanted, found.files, accept_changed)
    _check_leftovers(uri, new_run=new_run)
    limits = config.limits
    plan = make_plan(
        found.files,
        shard_rows=limits.shard_rows,
        shard_bytes=limits.shard_bytes,
        replicas=config.engine.most_replicas,
        offsets=found.row_offsets(),
        extents=found.extents,
    )
    manifest = {"id": uuid.uuid4().hex, "format": _FOLDER_FORMAT, **wanted}
    return Run(uri, manifest, plan, frozenset(), exists=False, finished=False, replaces=new_run)


def read_manifest(uri: str) -> Mapping[str, Any] | None:
    """The manifest of the run in the folder ``uri``; None if there is none.

    Raises:
        RunMismatchError: it is damaged, another program's, or of an annotated dataset.
        StorageError: it cannot be read.
    """
    manifest = _load(uri, new_run=False)
    if manifest is not None and manifest.get("job") == "annotate":
        raise RunMismatchError(  # it has no plan, which is no damage
            f"{uri} is an annotated dataset, not a run; the runs that made it are in {uri}/_runs/, "
            "the first is attempt-0."
        )
    return manifest


def read_plan(uri: str) -> Plan:
    """The plan of the run in the folder ``uri``.

    Raises:
        RunMismatchError: it is not there, or damaged.
        StorageError: it cannot be read.
    """
    return _load_plan(uri)


def find_run(output_uri: str) -> Run:
    """The run that a folder holds, as it was planned; nothing is asked of its input.

    Raises:
        InputError: the folder's bucket cannot be reached.
        RunMismatchError: there is no run, or a damaged one.
        StorageError: the folder cannot be read, or holds a part that is none of the run's.
    """
    storage.check_reachable(output_uri)
    uri = storage.absolute(output_uri).rstrip("/")
    manifest = read_manifest(uri)
    if manifest is None:
        raise RunMismatchError(f"{uri} holds no run: there is no run.json.")
    plan = _load_plan(uri)
    finished = storage.exists(storage.join(uri, "_SUCCESS"))
    return Run(uri, manifest, plan, frozenset(committed_shards(uri, plan)), True, finished)


def check_not_emptied(config: JobConfig) -> None:
    """Refuse an input of which no file is left, if the output folder holds a run of it.

    Without files there is no input to compare with the run's; this names what it was planned for.

    Raises:
        InputError: input or output cannot be reached.
        RunMismatchError: nothing is left of the run's input, or the run is damaged.
        StorageError: a folder cannot be listed or read.
    """
    given = config.input.uri
    inputs = [given] if isinstance(given, str) else given
    for each in (*inputs, config.output.uri):
        storage.check_reachable(each)
    uri = storage.absolute(config.output.uri).rstrip("/")
    if _load(uri, new_run=False) is None:
        return
    there = {name for each in inputs for name in _file_names(each)}
    planned = _load_plan(uri).files
    if not any(file.uri in there for file in planned):
        _check_same_files(uri, planned, ())


def _file_names(uri: str) -> list[str]:
    try:
        return [entry.uri for entry in storage.match_files(uri)]
    except FileNotFoundError:
        return []


def planned_files(output_uri: str) -> tuple[InputFile, ...]:
    """The input files as the run in a folder has planned them; none if there is no sound run.

    Raises:
        InputError: the output's bucket cannot be reached.
    """
    storage.check_reachable(output_uri)
    uri = storage.absolute(output_uri).rstrip("/")
    try:
        return _load_plan(uri).files if storage.exists(storage.join(uri, "run.json")) else ()
    except (RunMismatchError, StorageError):  # open_run tells what is wrong with the folder
        return ()


def _resume(
    uri: str,
    saved: Mapping[str, Any],
    wanted: Mapping[str, Any],
    files: Sequence[InputFile],
    accept_changed: Collection[str],
) -> Run:
    changed = _changed_keys(saved, wanted)
    _check_same(uri, saved, wanted, [key for key in changed if key not in accept_changed])
    plan = _load_plan(uri)
    _check_same_files(uri, plan.files, files)
    return Run(
        uri,
        _with_accepted(saved, wanted, changed) if changed else saved,
        plan,
        frozenset(committed_shards(uri, plan)),
        exists=True,
        finished=storage.exists(storage.join(uri, "_SUCCESS")),
        accepted=bool(changed),
    )


def _manifest(
    config: JobConfig, profile: EngineProfile, files: Sequence[InputFile]
) -> dict[str, Any]:
    model = locate_model(profile.model)
    spec = ModelSpec.from_engine_args(profile.model, profile.revision, profile.engine_args)
    revision = model_revision(model, profile.revision)
    branch = {"branch": profile.revision or "main"} if is_commit(revision) else {}
    document = {
        "config": config.model_dump(mode="json"),
        "engine": profile.at(revision).model_dump(mode="json"),
        "model": {
            "name": model_name(model),
            "revision": revision,
            "max_patches": spec.max_tiles,
            **branch,
        },
        "input": {
            "uri": config.input.uri,
            "files": len(files),
            "rows": sum(file.rows for file in files),
            "fingerprint": fingerprint(files),
        },
        "defaults": _defaults(files),
        "versions": versions(),
    }
    return dict(redacted(document))


def _defaults(files: Sequence[InputFile]) -> DefaultsOf:
    is_jsonl = any(file.is_jsonl for file in files)
    return DefaultsOf.SERVER if is_jsonl else DefaultsOf.PROGRAM


def versions() -> dict[str, str]:
    """This program's version and those of what it runs on, as installed here."""
    found = {"maverick-batch": __version__, "python": platform.python_version()}
    found["engine"] = engine_version()
    for package in _RECORDED_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _identity(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What, beside the input's files, must not change under a run; the cluster's side may."""
    config = manifest["config"]
    return {
        "input.columns": config["input"]["columns"],
        "input.template": _with_defaults(RequestTemplate, config["input"].get("template")),
        "output.carry": config["output"]["carry"],
        "seed": config["seed"],
        "sampling": _with_defaults(SamplingDefaults, config["sampling"]),
        "model": _model_identity(manifest["model"]),
    }


def _model_identity(model: Mapping[str, Any]) -> dict[str, Any]:
    """A branch that has moved is no change: the run goes on with the commit it began with."""
    return {
        "name": model["name"],
        "revision": model.get("branch", model.get("revision")),
        "max_patches": model.get("max_patches"),
    }


def _with_defaults(model: type[BaseModel], saved: Mapping[str, Any] | None) -> Any:
    """A section as an earlier version saved it, with defaults for the fields that are new since."""
    if saved is None:
        return None
    fields = model.model_fields.items()
    defaults = {name: field.get_default() for name, field in fields if not field.is_required()}
    return {**defaults, **saved}


def _changed_keys(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    theirs, ours = _identity(saved), _identity(wanted)
    return [key for key in ours if any(_differences(key, theirs[key], ours[key]))]


def _check_acceptable(keys: Collection[str]) -> None:
    unknown = sorted(set(keys) - set(ACCEPTABLE_CHANGES))
    if unknown:
        raise ConfigError(
            f"--accept-changed {unknown[0]}: must be one of {', '.join(ACCEPTABLE_CHANGES)}."
        )


def _check_same(
    uri: str, saved: Mapping[str, Any], wanted: Mapping[str, Any], changed: Sequence[str]
) -> None:
    """Refuse the changes that nobody accepted, all in one message."""
    if not changed:
        return
    theirs, ours = _identity(saved), _identity(wanted)
    named = [text for key in changed for text in _differences(key, theirs[key], ours[key])]
    remedy = "restore it, or start over with --new-run, which discards what the folder holds"
    if set(changed) <= set(ACCEPTABLE_CHANGES):
        accepted = " ".join(f"--accept-changed {key}" for key in changed)
        remedy += f", or go on with {accepted}: rows already done stay as they are"
    raise RunMismatchError(f"{uri} holds a run with {'; '.join(named)}. Either {remedy}.")


def _differences(key: str, old: Any, new: Any) -> Iterator[str]:
    """``another KEY: OLD there, NEW here``; of objects, just the keys that differ.

    An absent key is null.
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in dict.fromkeys([*old, *new]):
            yield from _differences(f"{key}.{name}", old.get(name), new.get(name))
    elif old != new:
        yield f"another {key}: {json.dumps(old)} there, {json.dumps(new)} here"


def _with_accepted(
    saved: Mapping[str, Any], wanted: Mapping[str, Any], changed: Sequence[str]
) -> dict[str, Any]:
    """The saved manifest with the accepted changes, and a history of them."""
    theirs = {**_identity(saved), "model": saved["model"]}
    ours = {**_identity(wanted), "model": wanted["model"]}
    at = datetime.now(UTC).isoformat(timespec="seconds")
    history = [{"key": key, "from": theirs[key], "to": ours[key], "at": at} for key in changed]
    replaced = {key: wanted["config"][key] for key in ("seed", "sampling") if key in changed}
    manifest = {**saved, "config": {**saved["config"], **replaced}}
    if "model" in changed:
        manifest |= {"model": wanted["model"], "engine": wanted["engine"]}
        manifest["config"]["engine"] = wanted["config"]["engine"]
    return {**manifest, "history": [*saved.get("history", []), *history]}


def _check_same_files(uri: str, planned: Sequence[InputFile], found: Sequence[InputFile]) -> None:
    """Refuse an input that is not the planned one; names what changed, was added or is gone."""
    theirs = {file.uri: file for file in planned}
    ours = {file.uri: file for file in found}
    changes = {name: theirs[name].changes(ours[name]) for name in theirs if name in ours}
    named = [
        *_some("changed", [f"{name} ({what})" for name, what in changes.items() if what]),
        *_some("added", [name for name in ours if name not in theirs]),
        *_some("gone", [name for name in theirs if name not in ours]),
    ]
    if named:
        raise RunMismatchError(
            f"the input is not the one that the run in {uri} was planned for: {'; '.join(named)}. "
            "Either restore it, or start over with --new-run, which discards what the folder "
            "holds, or give another output.uri."
        )


def _some(what: str, names: Sequence[str]) -> list[str]:
    if not names:
        return []
    more = len(names) - _NAMED_FILES
    listed = ", ".join(names[:_NAMED_FILES]) + (f" and {more} more" if more > 0 else "")
    return [f"{len(names)} {'file' if len(names) == 1 else 'files'} {what}: {listed}"]


def _check_leftovers(uri: str, *, new_run: bool) -> None:
    """A folder that is to hold a new run may hold no parts, unless they are to be discarded."""
    parts = storage.list_files(storage.join(uri, "data"), suffixes=(".parquet",))
    strange = [part.uri for part in parts if part_number(part.uri) is None]
    if strange:
        raise RunMismatchError(f"{strange[0]} is no part of a run; move it away.")
    if not new_run and (parts or storage.list_files(storage.join(uri, "_journal"))):
        raise RunMismatchError(
            f"{uri} holds data/ or _journal/ but no run.json, as after a --new-run that was cut "
            "short; discard them with --new-run, or give another output.uri."
        )


def _discard(uri: str, confirm: Callable[[], None]) -> None:
    """Delete a run's objects, by the names this program gives; whatever else is there stays.

    The manifest goes before what it describes: from then on the folder is refused until another
    ``--new-run`` has finished the work. The lease stays, as its holder is doing this.
    """
    storage.delete(storage.join(uri, "run.json"))
    data = storage.list_files(storage.join(uri, "data"), suffixes=(".parquet",))
    parts = [entry.uri for entry in data if part_number(entry.uri) is not None]
    journal = [entry.uri for entry in storage.list_files(storage.join(uri, "_journal"))]
    doomed = [*parts, *journal]
    step = _DELETED_AT_A_TIME if storage.deletes_at_once(uri) else 1
    for first in range(0, len(doomed), step):
        confirm()
        storage.delete_all(doomed[first : first + step])
    storage.remove_empty_folders(storage.join(uri, "_journal"))
    described = (
        *("_duplicates.parquet", "_plan.json", "_progress.json"),
        *("report.json", "report.html"),
    )
    for name in (*described, *OPENAI_FILES):
        confirm()
        storage.delete(storage.join(uri, name))


def _load(uri: str, *, new_run: bool) -> Mapping[str, Any] | None:
    """The manifest of the run to go on with; None if there is none, or it is to be discarded.

    Raises:
        RunMismatchError: another program wrote it; or it is damaged, and not to be discarded.
    """
    manifest_uri = storage.join(uri, "run.json")
    try:
        document = json.loads(storage.read_bytes(manifest_uri))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        document, fault = None, str(error)
    else:
        fault = f"it holds {json.dumps(document)[:_SHOWN_CHARACTERS]}"
    if not isinstance(document, Mapping) or not document:
        if new_run:
            return None
        raise RunMismatchError(_damaged(manifest_uri, fault))
    if not _is_manifest(document):
        raise RunMismatchError(f"{manifest_uri} is not this program's; use another folder.")
    return None if new_run else document


def _is_manifest(document: Mapping[str, Any]) -> bool:
    """Whether all is there that a resumed run asks for."""
    try:
        _identity(document)
        return isinstance(document["input"], Mapping) and "name" in document["model"]
    except (KeyError, TypeError, AttributeError):
        return False


def _damaged(uri: str, fault: object) -> str:
    return (
        f"{uri} is missing or damaged ({fault}). Put it back as it was, or start over with "
        "--new-run, which discards what the folder holds."
    )


def _load_plan(uri: str) -> Plan:
    plan_uri = storage.join(uri, "_plan.json")
    try:
        return Plan.from_json(storage.read_bytes(plan_uri))
    except FileNotFoundError:
        raise RunMismatchError(_damaged(plan_uri, "there is no such object")) from None
    except (ValueError, RecursionError) as error:
        raise RunMismatchError(_damaged(plan_uri, error)) from None


def _to_bytes(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=2) + "\n").encode()
