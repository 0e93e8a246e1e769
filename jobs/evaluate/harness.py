"""lm-eval's tasks on local data: what they ask, and what they make of the answers.

In: a task's section of the config. Out: a ``Benchmark``, which puts its requests to an ``LM`` and,
asked once more with the answers at hand, lets ``lm_eval.evaluate`` do the rest: prompts, few-shot
examples, filters, metrics, aggregation and standard errors are lm-eval's own. The random choices of
both passes start from lm-eval's default seeds, so the second asks what the first did.
"""

from __future__ import annotations

import logging
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

import lm_eval.tasks
import numpy as np
from jinja2 import UndefinedError
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory  # alone lets a group's tasks be given settings
from lm_eval.tasks._index import Kind

from jobs.evaluate.config import TaskSection
from jobs.evaluate.data import Splits, check_column, shipped
from jobs.evaluate.feed_lm import FeedLM
from pipeline.errors import ConfigError

_OWN_TASKS = Path(__file__).parent / "tasks"
_ALL_TASKS = Path(lm_eval.tasks.__file__).parent
_NAME_LINE = re.compile(
    r"^[\"']?(?:task|group|tag)[\"']?:[ ]*[\"']?([\w.:()-]+)[\"']?[ ]*(?:#|$)", re.M
)
_BOOTSTRAPS = 1_000
"""Resamplings for the standard error of metrics that are no means; lm-eval's default takes long."""


class LocalTask(ConfigurableTask):
    """A task as its YAML has it, with its data set taken from ``tasks.data``."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def download(self, dataset_kwargs: Mapping[str, Any] | None = None, **_: Any) -> None:
        """Open the splits; nothing is downloaded.

        Raises:
            ConfigError: no data were named, and none ship with the task.
        """
        name, published = str(self.config.task), str(self.DATASET_PATH)
        uri = (dataset_kwargs or {}).get("data_dir") or shipped(published)
        if uri is None:
            raise ConfigError(
                f"task {name}: data is missing; name the folder or bucket that holds {published} "
                "as it is published (tasks.data)."
            )
        main = self.config.test_split or self.config.validation_split
        if main is None:
            raise ConfigError(f"task {name}: names neither a test nor a validation split.")
        self.dataset = Splits(name, uri, self.DATASET_NAME, published, main)


@dataclass(frozen=True)
class Benchmark:
    """One entry of the config's ``tasks``: a task, or a group of them."""

    section: TaskSection
    tasks: Mapping[str, LocalTask]
    """Leaves, by name."""
    groups: Mapping[str, Any]
    """lm-eval's groups among them, by name; empty for a single task."""

    @property
    def runs_code(self) -> bool:
        """Whether scoring it runs what the model wrote."""
        return any(getattr(task, "UNSAFE_CODE", False) for task in self.tasks.values())

    def ask(self, lm: FeedLM) -> None:
        """Put every request to ``lm``; answers are attached to the tasks' instances.

        Raises:
            ConfigError: settings and data do not fit.
        """
        with self._set_up(lm):
            for task in self.tasks.values():
                task.build_all_requests(limit=self.section.limit, **self._chat(lm, task=True))
                for instances in _by_kind(task.instances):
                    repeated = [i for i in instances for _ in range(i.repeats or 1)]
                    answers = getattr(lm, instances[0].request_type)(repeated)
                    for instance, answer in zip(repeated, answers, strict=True):
                        instance.resps.append(answer)

    def score(self, lm: FeedLM) -> Mapping[str, Any]:
        """lm-eval's results, with all items, from the answers of ``lm``.

        Model-written code is run if the benchmark ``runs_code``: ask before.
        """
        with self._set_up(lm):
            results: Mapping[str, Any] = evaluate(
                lm,
                {"tasks": dict(self.tasks), "groups": dict(self.groups)},
                limit=self.section.limit,
                bootstrap_iters=_BOOTSTRAPS,
                confirm_run_unsafe_code=True,
                **self._chat(lm, task=False),
            )
        return results

    @contextmanager
    def _set_up(self, lm: FeedLM) -> Iterator[None]:
        """Both passes start alike, and with the section's settings."""
        random.seed(DEFAULT_RANDOM_SEED)
        np.random.seed(DEFAULT_OTHER_SEED)
        for task in self.tasks.values():
            task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
        lm.chat_as_messages = any(
            getattr(task, "MULTIMODAL", False) for task in self.tasks.values()
        )
        if lm.chat_as_messages and not self.section.chat:
            raise ConfigError(f"task {self.section.name}: has images, which want chat: true.")
        try:
            yield
        finally:
            lm.chat_as_messages = False

    def _chat(self, lm: FeedLM, *, task: bool) -> dict[str, Any]:
        """How prompts are made, as a task's method or ``evaluate`` wants it."""
        chat = self.section.chat
        shared = {
            "system_instruction": self.section.system,
            "apply_chat_template": chat,
            "fewshot_as_multiturn": self.section.fewshot_as_multiturn,
        }
        if not task:
            return shared
        return {**shared, "chat_template": lm.apply_chat_template if chat else None}


def load(section: TaskSection) -> Benchmark:
    """The benchmark of a section, its data opened and its settings applied.

    Raises:
        UsageError: no such task, or its data are missing or do not fit; names what is expected.
        StorageError: data cannot be read.
    """
    manager = _manager(section.name)
    _check_kind(manager, section.name)
    overrides = {"class": LocalTask, "dataset_kwargs": {"data_dir": section.data}}
    index = manager.task_index
    try:
        built = TaskFactory().build(index[section.name], overrides=overrides, registry=index)
        loaded = manager.load([built])
    except (KeyError, IndexError, UndefinedError) as error:
        raise ConfigError(
            f"task {section.name}: the data in {section.data} lack what the task reads: {error}."
        ) from error
    except (ImportError, ModuleNotFoundError) as error:
        raise ConfigError(f"task {section.name}: lm-eval needs more for it: {error}.") from error
    tasks: dict[str, LocalTask] = loaded["tasks"]
    for name, task in tasks.items():
        _apply(section, name, task)
    groups = loaded["groups"]
    _check_metric(section, tasks, groups)
    return Benchmark(section, tasks, groups)


def _check_metric(
    section: TaskSection, tasks: Mapping[str, LocalTask], groups: Mapping[str, Any]
) -> None:
    """Refuse, before anything is generated, what would have no score in the end."""
    if section.name in groups and not groups[section.name].has_aggregation:
        raise ConfigError(
            f"tasks: lm-eval has no score for {section.name!r} as a whole; name its tasks instead: "
            f"{', '.join(tasks)}."
        )
    metric, _, chosen = (section.metric or "").partition(",")
    for name, task in tasks.items():
        metrics = list(task.aggregation())
        filters = [each["name"] for each in task.get_config("filter_list") or [{"name": "none"}]]
        if (metric and metric not in metrics) or (chosen and chosen not in filters):
            raise ConfigError(
                f"tasks {name}: metric {section.metric!r} is none of {', '.join(metrics)}, with "
                f"or without a filter ({', '.join(filters)})."
            )


def _apply(section: TaskSection, name: str, task: LocalTask) -> None:
    """The section's settings, by ``simple_evaluate``'s rules."""
    own = task.get_config("num_fewshot")
    shots = 0 if own == 0 else (own if section.num_fewshot is None else section.num_fewshot)
    task.set_config(key="num_fewshot", value=shots or 0)
    if shots and task.dataset.missing:
        raise ConfigError(
            f"task {name}: {shots} worked examples are wanted, but split "
            f"{sorted(task.dataset.missing)[0]!r} is not in {section.data}; put it there, or set "
            "tasks.num_fewshot: 0."
        )
    if section.generation and task.get_config("output_type") == "generate_until":
        task.set_config(key="generation_kwargs", value=dict(section.generation), update=True)
    if section.subject is not None:
        check_column(name, task.eval_docs, section.subject)


def _check_kind(manager: TaskManager, name: str) -> None:
    entry = manager.task_index[name]
    if entry.kind is Kind.TAG:
        raise ConfigError(
            f"tasks: {name!r} is a tag, which has no score; name its tasks: "
            f"{', '.join(sorted(entry.tags))}."
        )
    if entry.kind is Kind.PY_TASK:
        raise ConfigError(f"tasks: {name!r} loads its data with code of its own; not supported.")


@lru_cache(maxsize=8)
def _manager(name: str) -> TaskManager:
    """The tasks that ship here, or lm-eval's in the folders that know ``name``.

    Only for a group with members elsewhere, all 14,000 of lm-eval's: that takes ten seconds.

    Raises:
        ConfigError: there is no such task.
    """
    own = _index([])
    if name in own.task_index:
        return own
    folders = _folders()
    if name not in folders:
        close = get_close_matches(name, [*own.task_index, *folders], n=1)
        hint = f"did you mean {close[0]!r}?" if close else "see lm-eval's list of tasks."
        raise ConfigError(f"tasks: there is no task {name!r}; {hint}")
    manager = _index(sorted(folders[name]))
    whole = all(member in manager.task_index for member in _members(manager, name))
    return manager if whole else _index([_ALL_TASKS])


@lru_cache(maxsize=1)
def _folders() -> Mapping[str, set[Path]]:
    """The folders of lm-eval's tasks whose files name a task, group or tag, by that name."""
    found: dict[str, set[Path]] = defaultdict(set)
    for path in _ALL_TASKS.rglob("*.yaml"):
        folder = _ALL_TASKS / path.relative_to(_ALL_TASKS).parts[0]
        for name in _NAME_LINE.findall(path.read_text(encoding="utf-8", errors="replace")):
            found[name].add(folder)
    return found


def _index(folders: Sequence[Path]) -> TaskManager:
    with _only_errors("lm_eval"):  # ours replace some of lm-eval's, which it warns of
        return TaskManager(include_defaults=False, include_path=[*folders, _OWN_TASKS])


def _members(manager: TaskManager, name: str) -> Iterable[str]:
    """Names below a group, at any depth."""
    entry = manager.task_index.get(name)
    if entry is None or entry.kind is not Kind.GROUP:
        return
    for member in (entry.cfg or {}).get("task") or ():
        if isinstance(member, str):
            yield member
            yield from _members(manager, member)


@contextmanager
def _only_errors(logger: str) -> Iterator[None]:
    found = logging.getLogger(logger)
    before = found.level
    found.setLevel(logging.ERROR)
    try:
        yield
    finally:
        found.setLevel(before)


def _by_kind(instances: Sequence[Instance]) -> list[list[Instance]]:
    kinds: dict[str, list[Instance]] = {}
    for instance in instances:
        kinds.setdefault(instance.request_type, []).append(instance)
    return list(kinds.values())
