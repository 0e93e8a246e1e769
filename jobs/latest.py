"""``--resume-latest``: the newest run of a dated config that is not finished, else today's.

In: a config whose ``output.uri`` has ``{date}``. Out: overrides that set its date. A run that began
at 23:59 and is started again at 00:05 is found by its folder, and resumed with its own date, in
input and output alike.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from jobs.annotate.attempts import FIRST_RUN, run_uri
from jobs.evaluate.config import EvaluateConfig
from pipeline import storage
from pipeline.config import JobConfig, load_config_as, read_document
from pipeline.dates import PLACE, check_date
from pipeline.errors import ConfigError

log = logging.getLogger(__name__)

DatedKind = type[JobConfig] | type[EvaluateConfig]
_THREADS = 16
_DAY_CHARACTERS = len("YYYY-MM-DD")


@dataclass(frozen=True, slots=True)
class DatedFolder:
    """The folder that a URI with ``{date}`` stands for on one day."""

    date: str
    uri: str


def resume_latest(
    path: str | Path, overrides: Sequence[str], kind: DatedKind = JobConfig
) -> list[str]:
    """``overrides`` of a config of ``kind``, with the date of the run to go on with if one is
    unfinished.

    Raises:
        ConfigError: the config is wrong, says a date itself, or has none in ``output.uri``.
        InputError: the output's bucket cannot be reached.
        StorageError: runs cannot be looked for.
    """
    config: JobConfig | EvaluateConfig = load_config_as(kind, path, overrides)
    document = read_document(path, overrides)
    pattern = document["output"]["uri"]
    if document.get("date") is not None:
        raise ConfigError(
            f"--resume-latest finds the date by itself, and {config.date} is given: leave out one "
            "of both."
        )
    if PLACE not in pattern:
        raise ConfigError(
            f"--resume-latest: output.uri {pattern} has no {PLACE}, so it is one run, which the "
            "same command resumes; leave --resume-latest out."
        )
    _folder_above(pattern)
    storage.check_reachable(config.output.uri)
    folders = dated_folders(pattern)
    latest = _newest_unfinished(folders)
    if latest is None:
        log.info(
            "--resume-latest: of %d folders of %s none holds an unfinished run; today's is %s",
            len(folders),
            pattern,
            config.output.uri,
        )
        return [*overrides, f"date={config.date}"]
    log.info(
        "--resume-latest: %s is the newest of %d folders of %s with a run that is not finished; "
        "going on with it, as of %s",
        latest.uri,
        len(folders),
        pattern,
        latest.date,
    )
    return [*overrides, f"date={latest.date}"]


def dated_folders(pattern: str) -> list[DatedFolder]:
    """The folders there are for ``pattern``, a URI with ``{date}``, the last day first.

    Found by listing the folder above the first ``{date}``; whether what follows after it is there
    is not asked.

    Raises:
        ConfigError: nothing can be listed above ``{date}``.
        StorageError: the folder above cannot be listed.
    """
    uri = storage.absolute(pattern).rstrip("/")
    above = _folder_above(pattern)
    segment = uri[len(above) + 1 :].partition("/")[0]
    start = segment.index(PLACE)
    days = {}
    for folder in storage.list_folders(above):
        name = storage.name(folder)
        day = name[start : start + _DAY_CHARACTERS]
        if _is_day(day) and name == segment.replace(PLACE, day):
            days[day] = uri.replace(PLACE, day)
    return [DatedFolder(day, days[day]) for day in sorted(days, reverse=True)]


def _folder_above(pattern: str) -> str:
    above = storage.absolute(pattern).partition(PLACE)[0].rpartition("/")[0]
    if above.endswith(("/", ":")):
        raise ConfigError(f"{pattern}: {PLACE} must stand below a bucket or a folder.")
    return above


def _newest_unfinished(folders: Sequence[DatedFolder]) -> DatedFolder | None:
    """Looks at some at a time: the newest unfinished run is mostly among the first."""
    with ThreadPoolExecutor(_THREADS) as pool:
        for first in range(0, len(folders), _THREADS):
            some = folders[first : first + _THREADS]
            for folder, unfinished in zip(some, pool.map(_is_unfinished, some), strict=True):
                if unfinished:
                    return folder
    return None


def _is_unfinished(folder: DatedFolder) -> bool:
    if storage.exists(storage.join(folder.uri, "_SUCCESS")):
        return False
    # a dataset that was killed before its end has only that of its first attempt
    runs = (folder.uri, run_uri(folder.uri, FIRST_RUN))
    return any(storage.exists(storage.join(run, "run.json")) for run in runs)


def _is_day(text: str) -> bool:
    try:
        return check_date(text) is not None
    except ValueError:
        return False
