"""One measurement: one contender on one workload, in a fresh process, once.

In: a workload, a number of rows, a round. Out: a ``Measurement``. Input files are made once and
kept, output folders are new each time; whatever a child starts is ended with it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pyarrow.parquet as pq
import yaml

from cluster import processes
from jobs.bench import llama4_slice, ray_llm_tuning, ray_llm_venv
from jobs.bench.contenders import Contender
from jobs.bench.machine import versions
from jobs.bench.requests import Done, EngineTask, batch_line
from jobs.bench.results import Measurement, Setting
from jobs.bench.stamps import read_seconds
from jobs.bench.workloads import NO_END, Row, Workload, by_prefix, generate, to_table
from pipeline.errors import PipelineError
from pipeline.profile import REPO_ROOT, EngineProfile, load_profile, locate_model

TIMEOUT_S = 3600.0
"""Of one child; the longest workload takes some minutes."""
SLOPE_EVERY = 4
"""The smaller of run-batch's two sizes has every fourth row: the same mix of lengths."""
_LAST_LINES = 15
_MARKER = "BENCH_CHILD"
_ONE_PROCESS = "VLLM_ENABLE_V1_MULTIPROCESSING"
"""Off, ``vllm.LLM`` renders, schedules and computes in one thread, as a contender of its own. A
profile that turns it off means the pipeline's engine, which takes a profile's variables itself."""
_RAY = (Contender.RAY_LLM, Contender.RAY_LLM_TUNED)


class BenchError(PipelineError):
    """A contender failed; the message holds the end of its log and where all of it is."""


@dataclass(frozen=True)
class Prepared:
    """A workload made ready: files and engine, shared by its contenders."""

    workload: Workload
    rows: list[Row]
    folder: Path
    """Of this workload's inputs, logs and outputs."""
    profile_path: str
    """A name or a path, as configs take it."""
    profile: EngineProfile
    model: str
    sampling: Mapping[str, Any]
    has_images: bool


def prepare(workload: Workload, count: int, out: Path) -> Prepared:
    """Make the rows and find the engine.

    Raises:
        ConfigError: the model is not on this machine; the message says how to make it.
        BenchError: the workload needs a GPU and none is visible.
    """
    profile_path = workload.profile
    if workload.needs_gpu:
        profile_path = str(llama4_slice.ensure(out / "llama4-slice"))
    profile = load_profile(profile_path, overrides=workload.overrides)
    model = locate_model(profile.model)
    rows = generate(workload, count)
    folder = out / workload.name
    folder.mkdir(parents=True, exist_ok=True)
    ends = {str(token): NO_END for token in end_tokens(Path(model))}
    return Prepared(
        workload=workload,
        rows=rows,
        folder=folder,
        profile_path=profile_path,
        profile=profile,
        model=model,
        sampling={**workload.sampling, **({"logit_bias": ends} if workload.exact else {})},
        has_images=any(row["images"] for row in rows),
    )


def end_tokens(model: Path) -> list[int]:
    """The ids at which vLLM ends a completion of this model folder, lowest first."""
    found: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        path = model / name
        ids = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
        found.update(ids if isinstance(ids, list) else [] if ids is None else [ids])
    return sorted(found)


def measure(
    prepared: Prepared, contender: Contender, number: int, setting: Setting, out: Path
) -> Measurement:
    """Run ``contender`` once, from a fresh process to its end.

    Raises:
        BenchError: it failed, or did not complete every row.
    """
    started = time.monotonic()
    timed, whole = _run(prepared, contender, out)
    if whole.rows != len(prepared.rows):
        raise BenchError(f"{contender} completed {whole.rows} of {len(prepared.rows)} rows")
    return Measurement(
        setting=setting,
        contender=contender,
        round=number,
        seconds=timed.seconds,
        timed_rows=timed.rows,
        timed_tokens=timed.completion_tokens,
        prompt_tokens=whole.prompt_tokens,
        completion_tokens=whole.completion_tokens,
        cached_tokens=whole.cached_tokens,
        whole_s=time.monotonic() - started,
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=versions_of(contender, has_images=prepared.has_images),
    )


def versions_of(contender: Contender, *, has_images: bool) -> dict[str, str]:
    """Of this environment, but for the vLLM of Ray's image stage."""
    if contender in _RAY and has_images:
        package, _, number = ray_llm_tuning.OLD_VLLM.partition("==")
        return {**versions(), package: number}
    return versions()


def _run(prepared: Prepared, contender: Contender, out: Path) -> tuple[Done, Done]:
    """What was done while the clock ran, and in the whole run."""
    match contender:
        case Contender.PIPELINE:
            done = _run_pipeline(prepared, prepared.rows, contender)
        case Contender.PIPELINE_SORTED:
            done = _run_pipeline(prepared, by_prefix(prepared.rows), contender)
        case Contender.LLM | Contender.LLM_ONE_PROCESS:
            done = _run_module(prepared, contender, "jobs.bench.run_llm", sys.executable)
        case Contender.RAY_LLM | Contender.RAY_LLM_TUNED:
            own = ray_llm_venv.ensure(out / "ray-llm-venv") if prepared.has_images else None
            python = str(own or sys.executable)
            done = _run_module(prepared, contender, "jobs.bench.run_ray_llm", python)
        case Contender.RUN_BATCH:
            return _run_batch_slope(prepared)
    return done, done


def _run_pipeline(prepared: Prepared, rows: Sequence[Row], contender: Contender) -> Done:
    source = prepared.folder / f"{contender}.parquet"
    pq.write_table(to_table(rows), source)
    run, stamps = _fresh(prepared.folder / "_runs" / contender), _stamps(prepared, contender)
    config = prepared.folder / f"{contender}.yaml"
    document = {
        "name": f"bench-{prepared.workload.name}",
        "input": {"uri": str(source)},
        "output": {"uri": str(run), "carry": []},
        "sampling": dict(prepared.sampling),
        "engine": {
            "profile": prepared.profile_path,
            "overrides": dict(prepared.workload.overrides),
        },
        "limits": {"max_error_rate": 0.0},
    }
    config.write_text(yaml.safe_dump(document))
    command = [sys.executable, "-m", "jobs.bench.timed_nightly", "--config", str(config)]
    _child(prepared, contender, command, {"BENCH_STAMPS": str(stamps)})
    columns = ["status", "prompt_tokens", "completion_tokens", "cached_tokens"]
    records = ds.dataset(run / "data", format="parquet").to_table(columns).to_pylist()
    good = [record for record in records if record["status"] == "succeeded"]
    return Done(
        seconds=read_seconds(stamps),
        rows=len(good),
        prompt_tokens=sum(record["prompt_tokens"] for record in good),
        completion_tokens=sum(record["completion_tokens"] for record in good),
        cached_tokens=sum(record["cached_tokens"] for record in good),
    )


def _run_module(prepared: Prepared, contender: Contender, module: str, python: str) -> Done:
    source = prepared.folder / f"{contender}.parquet"
    pq.write_table(to_table(prepared.rows), source)
    result = prepared.folder / f"{contender}.result.json"
    result.unlink(missing_ok=True)
    task = EngineTask(
        rows=str(source),
        model=prepared.model,
        engine_args=prepared.profile.engine_args,
        sampling=prepared.sampling,
        stamps=str(_stamps(prepared, contender)),
        result=str(result),
        tuned=contender is Contender.RAY_LLM_TUNED,
        has_images=prepared.has_images,
    )
    told = prepared.folder / f"{contender}.task.json"
    told.write_text(json.dumps(asdict(task)))
    extra = dict(ray_llm_tuning.ENVIRONMENT) if task.tuned else {}
    if contender is Contender.LLM_ONE_PROCESS:
        extra[_ONE_PROCESS] = "0"
    _child(prepared, contender, [python, "-m", module, str(told)], extra)
    return Done(**json.loads(result.read_text()))


def _run_batch_slope(prepared: Prepared) -> tuple[Done, Done]:
    """vLLM's command line cannot be warmed up or stamped: two sizes, and what the rest took."""
    few = _run_batch(prepared, prepared.rows[::SLOPE_EVERY])
    all_rows = _run_batch(prepared, prepared.rows)
    return difference(all_rows, few), all_rows


def difference(large: Done, small: Done) -> Done:
    """What the larger of two runs did beyond the smaller.

    Raises:
        BenchError: it took no longer; there are too few rows.
    """
    seconds = large.seconds - small.seconds
    if seconds <= 0:
        raise BenchError(
            f"{large.rows} rows took no longer than {small.rows}: give --rows more, as starts vary"
        )
    return Done(
        seconds=seconds,
        rows=large.rows - small.rows,
        prompt_tokens=large.prompt_tokens - small.prompt_tokens,
        completion_tokens=large.completion_tokens - small.completion_tokens,
    )


def _run_batch(prepared: Prepared, rows: Sequence[Row]) -> Done:
    contender = Contender.RUN_BATCH
    source = prepared.folder / f"{contender}-{len(rows)}.jsonl"
    lines = (batch_line(row, prepared.sampling, prepared.model) for row in rows)
    source.write_text("".join(line + "\n" for line in lines))
    answers = prepared.folder / f"{contender}-{len(rows)}.answers.jsonl"
    answers.unlink(missing_ok=True)
    # what `vllm run-batch` calls; that script of the CPU build fails on its own version
    command = [sys.executable, "-m", "vllm.entrypoints.openai.run_batch"]
    command += ["-i", str(source), "-o", str(answers), "--model", prepared.model]
    command += flags(prepared.profile.engine_args)
    seconds = _child(prepared, contender, command, {})
    return read_answers(answers.read_text("utf-8"), seconds)


def read_answers(text: str, seconds: float) -> Done:
    """Sums over the lines of an OpenAI batch output file."""
    answers = [json.loads(line) for line in text.splitlines()]
    bodies = [(answer.get("response") or {}).get("body") or {} for answer in answers]
    usages = [body["usage"] for body in bodies if body.get("usage")]
    return Done(
        seconds=seconds,
        rows=len(usages),
        prompt_tokens=sum(usage["prompt_tokens"] for usage in usages),
        completion_tokens=sum(usage["completion_tokens"] for usage in usages),
    )


def flags(engine_args: Mapping[str, Any]) -> list[str]:
    """Engine arguments as options of vLLM's command line."""
    made: list[str] = []
    for name, value in engine_args.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            made.append(f"--{option}" if value else f"--no-{option}")
        elif isinstance(value, Mapping | list):
            made += [f"--{option}", json.dumps(value)]
        else:
            made += [f"--{option}", str(value)]
    return made


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def _stamps(prepared: Prepared, contender: Contender) -> Path:
    path = (prepared.folder / f"{contender}.stamps.json").absolute()
    path.unlink(missing_ok=True)
    return path


def _child(
    prepared: Prepared, contender: Contender, command: Sequence[str], extra: Mapping[str, str]
) -> float:
    """Run a child to its end, and end whatever it leaves behind; returns its seconds."""
    log = prepared.folder / f"{contender}.log"
    log.unlink(missing_ok=True)
    marker = {_MARKER: f"{os.getpid()}-{time.monotonic_ns()}"}
    environment = {**os.environ, **prepared.profile.env}
    for name in ("RAY_ADDRESS", _ONE_PROCESS):
        environment.pop(name, None)
    environment |= {"PYTHONPATH": str(REPO_ROOT), "VLLM_NO_USAGE_STATS": "1", **extra, **marker}
    started = time.monotonic()
    with log.open("wb") as output:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=REPO_ROOT,
            start_new_session=True,
        )
        try:
            code = child.wait(TIMEOUT_S)
            seconds = time.monotonic() - started
        except subprocess.TimeoutExpired:
            raise BenchError(f"{contender} took over {TIMEOUT_S:.0f} s; log: {log}") from None
        finally:
            _end(child, marker, log.parent)
    if code != 0:
        last = log.read_text("utf-8", "replace").strip().splitlines()[-_LAST_LINES:]
        raise BenchError(f"{contender} ended with {code}; log: {log}\n" + "\n".join(last))
    return seconds


def _end(child: subprocess.Popen[bytes], marker: Mapping[str, str], folder: Path) -> None:
    group = processes.Group(records=(), marker=marker, directory=folder)
    processes.stop(group)
    child.wait()
