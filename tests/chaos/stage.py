"""The stage of a chaos run: a mini-cluster whose S3 server stands behind the fault proxy, the
corpus in its bucket, and jobs on it, each with a run folder, a log folder and a ledger of its own.

Replicas keep off the head node (it offers no CPU): losing it would be losing the job.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from cluster import processes
from cluster.lifecycle import ClusterOptions, LocalCluster
from pipeline import storage
from tests.chaos.campaign import Campaign, Fire, Job, Story
from tests.chaos.corpus import Corpus, upload
from tests.chaos.judge import (
    Check,
    Repeat,
    find_repeats,
    judge_campaign,
    judge_records,
    judge_waste,
)
from tests.chaos.nightly import ECHO_VARIABLE, LEDGER_VARIABLE
from tests.chaos.proxy import FaultProxy
from tests.chaos.victims import Victim
from tests.variables import variables, without_ray

BASE_URI = "s3://batch/chaos"
INPUT_URI = f"{BASE_URI}/input"
_STATES = ("succeeded", "errored", "expired", "cancelled")


@dataclass(frozen=True)
class Setting:
    """What is run on the stage."""

    corpus: Corpus
    seed: int
    profile: str = "mini-maverick-tp1"
    replicas: int = 1
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Engine arguments: few sequences at a time make a small model slow enough to be shot at."""
    limits: Mapping[str, Any] = field(default_factory=dict)
    echo_delay_s: float | None = None
    """If given, the echo engine with this delay instead of the model."""
    only: str | None = None
    """Of the corpus's files this one alone: the first, or a duplicate may lack its twin."""
    arguments: Sequence[str] = ()
    """Further arguments of the job."""


@dataclass(frozen=True)
class Stage:
    """A cluster that is up, with the corpus in its bucket."""

    cluster: LocalCluster
    proxy: FaultProxy
    setting: Setting
    folder: Path

    def job(self, name: str) -> Job:
        """The job that writes the run ``name``; the same name resumes it."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        (folder / "job.yaml").write_text(yaml.safe_dump(self._config(name)))
        module = (sys.executable, "-m", "tests.chaos.nightly")
        command = (*module, "--config", str(folder / "job.yaml"), *self.setting.arguments)
        return Job(command, self._environment(folder / "ledger"), folder, folder / "ledger")

    def play(self, name: str, targets: Sequence[Victim], *, fire: Fire | None = None) -> Story:
        """Run ``name`` to its end while ``targets`` are killed."""
        rng = Random(f"{self.setting.seed}-{name}")
        job = self.job(name)
        story = Campaign(self.cluster, job, rng, fire or Fire()).run(targets)
        (job.folder / "story.json").write_text(story.to_json())
        return story

    def records(self, name: str) -> list[dict[str, Any]]:
        """All records of the run ``name``."""
        data = storage.join(BASE_URI, name, "data")
        parts = [entry.uri for entry in storage.list_files(data, suffixes=(".parquet",))]
        tables = [pq.read_table(io.BytesIO(storage.read_bytes(uri))) for uri in parts]
        rows: list[dict[str, Any]] = pa.concat_tables(tables).to_pylist() if tables else []
        return rows

    def is_marked(self, name: str) -> bool:
        """Whether the run ``name`` has its ``_SUCCESS``."""
        return storage.exists(storage.join(BASE_URI, name, "_SUCCESS"))

    def expected(self) -> list[dict[str, Any]]:
        """The input's rows, as the judge wants them."""
        return [
            {"input_file": name, "input_row": number, **row}
            for name, table in self.setting.corpus.files.items()
            if self.setting.only in (None, name)
            for number, row in enumerate(table.drop_columns(["images"]).to_pylist())
        ]

    def _config(self, name: str) -> dict[str, Any]:
        setting = self.setting
        return {
            "name": f"chaos-{name}",
            "input": {"uri": storage.join(INPUT_URI, setting.only or "")},
            "output": {"uri": storage.join(BASE_URI, name)},
            "seed": setting.seed,
            "sampling": {"temperature": 0.7, "max_completion_tokens": 64},
            "engine": {
                "profile": setting.profile,
                "replicas": setting.replicas,
                "overrides": dict(setting.overrides),
            },
            "limits": {"max_error_rate": 0.1, **setting.limits},
        }

    def _environment(self, ledger: Path) -> dict[str, str]:
        echo = self.setting.echo_delay_s
        return {
            **without_ray(),
            **self.cluster.state.environment(),
            LEDGER_VARIABLE: str(ledger),
            **({} if echo is None else {ECHO_VARIABLE: str(echo)}),
        }


@contextmanager
def set_stage(
    setting: Setting, folder: Path, *, nodes: int = 2, object_store_mb: int = 200
) -> Iterator[Stage]:
    """A stage that is taken down at the end; its credentials are in ``os.environ`` meanwhile."""
    with FaultProxy(share=0, seed=setting.seed) as proxy:
        options = ClusterOptions(
            nodes=nodes, head_cpus=0, object_store_mb=object_store_mb, s3_front=proxy.front
        )
        with (
            LocalCluster(folder / "state", options) as cluster,
            variables(cluster.state.environment()),
        ):
            upload(setting.corpus, INPUT_URI)
            yield Stage(cluster, proxy, setting, folder)


@contextmanager
def no_survivors(found: list[str]) -> Iterator[list[processes.Group]]:
    """Groups put into what is yielded: their processes that outlive the block go to ``found``."""
    groups: list[processes.Group] = []
    yield groups
    for group in groups:
        found.extend(f"{one.pid} ({one.name()})" for one in processes.find(group))


@dataclass(frozen=True)
class Outcome:
    """All that is known after a disturbed run."""

    story: Story
    repeats: Sequence[Repeat]
    checks: Sequence[Check]

    @property
    def passed(self) -> bool:
        """Whether every promise was kept."""
        return all(check.passed for check in self.checks)


def judge_run(stage: Stage, story: Story, *, wanted: int, journal_s: float) -> Outcome:
    """The run "disturbed" against the run "reference"."""
    repeats = find_repeats(story.generations, story.deaths, story.outages, journal_s=journal_s)
    expected = stage.expected()
    checks = [
        *judge_records(expected, stage.records("reference"), stage.records("disturbed")),
        judge_waste(repeats, story.generations),
        *judge_campaign(
            landed=len(story.strikes),
            wanted=wanted,
            exits=story.exits,
            driver_kills=story.driver_kills,
            errors=story.errors,
            finished=stage.is_marked("disturbed"),
            left_over=story.left_over,
            troubles=story.troubles,
        ),
        _result_adds_up(story, len(expected)),
    ]
    return Outcome(story, repeats, checks)


def _result_adds_up(story: Story, rows: int) -> Check:
    counted = dict((story.result or {}).get("rows", {}))
    whole = counted.get("total") == rows == sum(counted.get(state, 0) for state in _STATES)
    return Check("rows in = rows out", whole, str(counted))
