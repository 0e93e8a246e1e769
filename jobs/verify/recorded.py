"""A run as its folder has it: what was asked for, of which engine, and how it was planned.

In: the folder, and a config where secrets in its URIs keep the folder's own from being used. Out:
``Recorded``. Nothing is written, and no engine, model or input file is touched.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from pydantic import ValidationError

from pipeline import storage
from pipeline.config import JobConfig
from pipeline.errors import ConfigError, RunMismatchError, StorageError
from pipeline.plan import InputFile
from pipeline.profile import EngineProfile, load_profile
from pipeline.redact import MASK
from pipeline.run import Run, find_run


@dataclass(frozen=True)
class Recorded:
    """One run folder, read."""

    run: Run
    config: JobConfig
    """The run's, as resolved when it was planned."""

    @property
    def manifest(self) -> Mapping[str, Any]:
        """``run.json``."""
        return self.run.manifest

    @property
    def is_jsonl(self) -> bool:
        """Whether its input is OpenAI batch JSONL."""
        return self.run.plan.files[0].is_jsonl

    @cached_property
    def profile(self) -> EngineProfile:
        """The engine as recorded. What the record masks is taken from today's profile.

        Raises:
            ConfigError: there is no such profile today, or it does not have those values either.
            RunMismatchError: the record is of another form.
        """
        saved = dict(self.manifest["engine"])
        masked = [key for key, value in saved["env"].items() if MASK in value]
        if masked:
            engine = self.config.engine
            today = load_profile(engine.profile, overrides=engine.overrides)
            lacking = [key for key in masked if key not in today.env]
            if lacking:
                raise ConfigError(
                    f"{self.run.uri}/run.json masks the engine's {lacking[0]}, and today's profile "
                    f"{engine.profile} has no such variable; add it to its env."
                )
            saved["env"] = {**saved["env"], **{key: today.env[key] for key in masked}}
        try:
            return EngineProfile.model_validate(saved)
        except ValidationError as error:
            raise RunMismatchError(_unreadable(self.run.uri, error)) from None

    def values_of(self, key: str) -> tuple[Any, ...]:
        """All values that ``seed``, ``sampling`` or ``model`` had: accepted changes keep the rows
        that were made before."""
        now = self.manifest["model"] if key == "model" else self.manifest["config"][key]
        earlier = [each["from"] for each in self.manifest.get("history", []) if each["key"] == key]
        return (now, *earlier)


def open_recorded(run_uri: str, config: JobConfig | None = None) -> Recorded:
    """The run in a folder.

    Args:
        run_uri: the folder.
        config: the job's, if its URIs are to be used in place of those in ``run.json``.

    Raises:
        UsageError: there is no run, it is damaged, or its folder cannot be reached.
        StorageError: the folder cannot be read.
    """
    run = find_run(run_uri)
    try:
        saved = JobConfig.model_validate_json(json.dumps(run.manifest["config"]))
    except ValidationError as error:
        raise RunMismatchError(_unreadable(run.uri, error)) from None
    if config is not None:
        saved = saved.model_copy(update={"input": config.input, "images": config.images})
    return Recorded(run, saved)


def input_change(planned: InputFile) -> str:
    """What an input file has otherwise than planned, by its size and version as of now; empty if
    nothing."""
    try:
        size, version = storage.version(planned.uri)
    except FileNotFoundError:
        return "is gone"
    except StorageError as error:
        return f"cannot be looked at: {error}"
    change = planned.changes(replace(planned, size=size, version=version))
    return f"changed since the run was planned: {change}" if change else ""


def _unreadable(uri: str, error: ValidationError) -> str:
    fault = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in fault["loc"])
    return (
        f"{uri}/run.json has {where or 'values'} that this version does not read ({fault['msg']}); "
        "verify it with the version in its versions.maverick-batch."
    )
