"""The benchmark's pure parts: rows, requests, ratios, report; and its engine's clock."""

import asyncio
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.bench.__main__ import turns
from jobs.bench.contenders import Contender
from jobs.bench.llama4_slice import profile_document, sliced
from jobs.bench.measure import BenchError, difference, end_tokens, flags, read_answers
from jobs.bench.report import document, draw, ratio_rows
from jobs.bench.requests import Done, batch_line, messages, sampling_arguments
from jobs.bench.results import (
    Measurement,
    Setting,
    Store,
    cache_hits,
    latest_settings,
    of_setting,
    ratio,
    same_work,
)
from jobs.bench.stamps import Stamps, read_seconds
from jobs.bench.timed_engine import TimedEngine
from jobs.bench.workloads import (
    MEAN_TOKENS,
    PREFIXES,
    TAIL_FACTOR,
    WORKLOADS,
    by_prefix,
    generate,
)
from pipeline.admission import EngineLoad
from pipeline.cpu import Meter
from pipeline.engine import EngineRequest
from pipeline.messages import parse_chat
from pipeline.profile import REPO_ROOT, EngineProfile, load_profile
from pipeline.sampling import Sampling, SamplingDefaults
from tests.fakes import EchoEngine

SETTING = Setting(workload="text", rows=1024, code="abc", machine="2 x a processor")


def measured(contender: Contender, number: int, seconds: float, tokens: int = 1000) -> Measurement:
    return Measurement(
        setting=SETTING,
        contender=contender,
        round=number,
        seconds=seconds,
        timed_rows=10,
        timed_tokens=tokens,
        prompt_tokens=200,
        completion_tokens=tokens,
        cached_tokens=50 if contender is Contender.PIPELINE else None,
        whole_s=2 * seconds,
        at=f"2026-11-23T0{number}:00:00+00:00",
        versions={"ray": "2.60.0"},
    )


def lengths(name: str, count: int) -> list[int]:
    rows = generate(WORKLOADS[name], count)
    return [json.loads(row["sampling"])["max_completion_tokens"] for row in rows]


@pytest.mark.parametrize("name", ["text", "tail", "prefixes", "images"])
def test_a_workload_is_the_same_rows_each_time(name: str) -> None:
    rows = generate(WORKLOADS[name], 60)
    assert rows == generate(WORKLOADS[name], 60)
    assert len({row["custom_id"] for row in rows}) == 60
    assert len({row["sampling"] for row in rows}) == 60, "each row has a seed of its own"


def test_text_lengths_have_the_mean_that_is_told() -> None:
    found = lengths("text", 1024)
    assert sum(found) / len(found) == pytest.approx(MEAN_TOKENS, rel=0.05)


def test_two_percent_of_the_tail_are_thirty_times_longer_than_the_mean() -> None:
    counts = Counter(lengths("tail", 1000))
    assert counts[TAIL_FACTOR * MEAN_TOKENS] == 20
    assert sorted(counts)[-2] <= 4 * MEAN_TOKENS


def test_prefixes_are_shared_equally_shuffled_and_can_be_sorted() -> None:
    rows = generate(WORKLOADS["prefixes"], 160)
    systems = [json.loads(row["messages"])[0]["content"] for row in rows]
    assert set(Counter(systems).values()) == {160 // PREFIXES}
    ordered = [row["prefix"] for row in by_prefix(rows)]
    assert ordered == sorted(ordered)
    shuffled = [row["prefix"] for row in rows]
    assert shuffled not in (ordered, [i % PREFIXES for i in range(160)])


def test_rows_are_what_the_pipeline_takes() -> None:
    for workload in WORKLOADS.values():
        SamplingDefaults.model_validate({**workload.sampling, "logit_bias": {"2": -100.0}})
        for row in generate(workload, 16):
            parse_chat(None, row["messages"], row["images"])
            SamplingDefaults.model_validate(json.loads(row["sampling"]))


def test_shipped_workloads_name_profiles_that_parse() -> None:
    for workload in WORKLOADS.values():
        if not workload.needs_gpu:
            load_profile(workload.profile, overrides=workload.overrides)


def test_every_contender_is_asked_the_same() -> None:
    (row,) = generate(WORKLOADS["images"], 1)
    common = {"temperature": 0.5, "logit_bias": {"2": -100.0}}
    body = json.loads(batch_line(row, common, "a model"))["body"]
    arguments = sampling_arguments(row, common)
    assert arguments["logit_bias"] == {2: -100.0}
    assert arguments["max_tokens"] == body["max_completion_tokens"] == 8
    assert arguments["seed"] == body["seed"]
    image, text = body["messages"][0]["content"]
    assert image["image_url"]["url"].startswith("data:image/png;base64,")
    (turn,) = messages(row)
    assert turn["content"][0]["image_pil"].size == (56, 56)
    assert turn["content"][1] == text


def test_engine_arguments_become_options_of_the_command_line() -> None:
    found = flags({"enforce_eager": True, "async_scheduling": False, "a_map": {"image": 8}, "n": 3})
    assert found == [
        "--enforce-eager",
        "--no-async-scheduling",
        "--a-map",
        '{"image": 8}',
        "--n",
        "3",
    ]


def test_end_tokens_are_those_of_both_files() -> None:
    assert end_tokens(REPO_ROOT / "cluster" / "models" / "mini-maverick") == [257, 260, 261]


def test_answers_without_usage_are_not_counted() -> None:
    good = {"response": {"body": {"usage": {"prompt_tokens": 5, "completion_tokens": 3}}}}
    bad = {"response": {"body": {"error": {"message": "no"}}}}
    text = "\n".join(map(json.dumps, (good, bad, {"response": None})))
    assert read_answers(text, 2.0) == Done(2.0, rows=1, prompt_tokens=5, completion_tokens=3)


def test_a_slope_is_what_the_larger_run_did_beyond_the_smaller() -> None:
    large, small = Done(50.0, 100, 1000, 400), Done(20.0, 25, 250, 100)
    assert difference(large, small) == Done(30.0, 75, 750, 300)
    with pytest.raises(BenchError, match="--rows"):
        difference(small, large)


def test_rounds_begin_with_another_contender_each() -> None:
    a, b = Contender.PIPELINE, Contender.LLM
    assert turns((a, b), 2) == [(0, a), (0, b), (1, b), (1, a)]


def test_ratios_pair_rounds_and_tell_the_median() -> None:
    ours = {n: measured(Contender.PIPELINE, n, s) for n, s in ((0, 10.0), (1, 20.0), (2, 5.0))}
    theirs = {
        n: measured(Contender.LLM, n, s) for n, s in ((0, 9.0), (1, 22.0), (2, 5.0), (3, 1.0))
    }
    found = ratio(ours, theirs)
    assert found is not None
    assert (found.low, found.middle, found.high) == pytest.approx((0.9, 1.0, 1.1))
    assert found.rounds == 3
    assert ratio(ours, {7: theirs[0]}) is None


def test_other_work_is_no_comparison() -> None:
    ours = {0: measured(Contender.PIPELINE, 0, 10.0, 1000)}
    nearly = {0: measured(Contender.LLM, 0, 10.0, 991)}
    other = {0: measured(Contender.LLM, 0, 10.0, 985)}
    assert same_work(ours, nearly)
    assert not same_work(ours, other)
    groups = {Contender.PIPELINE: ours, Contender.LLM: other}
    ((_, _, told),) = ratio_rows(WORKLOADS["text"], groups)
    assert "not comparable" in told


def test_the_cache_hit_ratio_is_of_prompt_tokens() -> None:
    found = cache_hits({0: measured(Contender.PIPELINE, 0, 1.0)})
    assert found is not None
    assert found.middle == 0.25
    assert cache_hits({0: measured(Contender.RUN_BATCH, 0, 1.0)}) is None


def test_what_is_stored_comes_back(tmp_path: Path) -> None:
    store = Store(tmp_path / "new" / "results.jsonl")
    assert store.read() == []
    kept = [measured(Contender.PIPELINE, n, 1.0 + n) for n in range(2)]
    for one in kept:
        store.add(one)
    assert store.read() == kept
    assert of_setting(kept, SETTING) == {Contender.PIPELINE: {0: kept[0], 1: kept[1]}}


def test_a_small_trial_does_not_replace_a_measurement() -> None:
    real = measured(Contender.PIPELINE, 0, 1.0)
    trial = replace(real, setting=replace(SETTING, rows=48), at="2026-11-24T00:00:00+00:00")
    later = replace(real, setting=replace(SETTING, code="def"), at="2026-11-24T00:00:00+00:00")
    assert latest_settings([real, trial]) == {"text": SETTING}
    assert latest_settings([real, trial, later]) == {"text": later.setting}


def test_the_report_tells_ratios_targets_and_what_has_not_run() -> None:
    found = [measured(Contender.PIPELINE, n, 10.0) for n in range(3)]
    found += [measured(Contender.LLM, n, 9.9) for n in range(3)]
    text = document(found, {})
    row = "| text | 1024 | `vllm-llm` | 0.990 **0.990** 0.990 | 3 | >= 0.98 | reached |"
    assert row in text
    assert "2 x a processor" in text
    assert "ray 2.60.0" in text
    assert "`python -m jobs.bench --workload llama4-slice`" in text
    assert "needs a GPU, and has not run" in text


def test_the_report_tells_the_ceiling() -> None:
    cost = {
        "workload": "images",
        "rows": 4000,
        "rows_per_s": 410.5,
        "cpu_s_per_1000_rows": {"read": 0.5, "driver": 0.25},
        "whole": 0.8,
        "accounted": 0.94,
    }
    memory = {"workload": "memory", "rows": 1_000_000, "mib_per_100k_rows": {"driver": 0.3}}
    text = document([], {"images": cost, "memory": memory})
    row = "| 4,000 images | 410.5 | >= 400 | read 0.500, driver 0.250 | 0.800 | 94% |"
    assert row in text
    assert "driver +0.3" in text


def test_the_report_of_nothing_says_so() -> None:
    assert "Nothing has been measured yet" in document([], {})


def test_the_picture_is_the_same_file_each_time(tmp_path: Path) -> None:
    groups = {who: {0: measured(who, 0, 5.0)} for who in (Contender.PIPELINE, Contender.LLM)}
    ratios = {"text": ratio_rows(WORKLOADS["text"], groups)}
    first, second = tmp_path / "a.svg", tmp_path / "b.svg"
    draw(ratios, first)
    draw(ratios, second)
    assert first.read_bytes() == second.read_bytes()
    assert "text: vllm-llm" in first.read_text()


def test_stamps_span_first_entry_to_last_exit(tmp_path: Path) -> None:
    path = tmp_path / "stamps.json"
    stamps = Stamps(path)
    stamps.enter()
    stamps.enter()
    stamps.leave()
    assert not path.exists(), "a request is still in flight"
    stamps.leave()
    first = json.loads(path.read_text())
    stamps.enter()
    stamps.leave()
    second = json.loads(path.read_text())
    assert second["start"] == first["start"]
    assert second["end"] > first["end"]
    assert read_seconds(path) == second["end"] - second["start"]


def test_a_timed_engine_warms_up_before_the_clock(tmp_path: Path) -> None:
    path = tmp_path / "stamps.json"
    request = EngineRequest("r", [65, 66], (), Sampling(max_completion_tokens=50), seed=1)

    inner = _Watched(path)
    steps: list[EngineLoad] = []

    async def run() -> None:
        timed = TimedEngine(inner, Stamps(path))
        timed.listen(steps.append, Meter())
        await asyncio.gather(timed.generate(request), timed.generate(request))

    asyncio.run(run())
    assert inner.asked == [f"warm-up-{i}" for i in range(8)] + ["r", "r"]
    assert not inner.stamped_while_warming
    assert steps
    assert max(step.running for step in steps) <= 2, "a window would widen"
    assert read_seconds(path) >= 0


class _Watched(EchoEngine):
    def __init__(self, path: Path) -> None:
        super().__init__(delay_s=0.02)
        self.asked: list[str] = []
        self.stamped_while_warming = False
        self._path = path

    async def generate(self, request: EngineRequest):  # type: ignore[no-untyped-def]
        self.asked.append(request.request_id)
        self.stamped_while_warming |= request.request_id.startswith("warm") and self._path.exists()
        return await super().generate(request)


def test_the_slice_of_llama_4_has_its_widths_and_a_profile_that_parses(tmp_path: Path) -> None:
    mini = json.loads((REPO_ROOT / "cluster/models/mini-maverick/config.json").read_text())
    text = sliced(mini, 4)["text_config"]
    assert (text["hidden_size"], text["num_local_experts"], text["vocab_size"]) == (
        5120,
        128,
        202048,
    )
    assert text["moe_layers"] == [1, 3]
    assert text["layer_types"][3] == "full_attention"
    EngineProfile.model_validate(profile_document(tmp_path, 4))
