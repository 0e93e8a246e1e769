"""The main job on real parts: ``ray job submit``, S3, expert-parallel vLLM, the sample input.

What the quickstart does, and then what a user does next: the same command again, and again with a
part lost. Not covered: GPUs, more than one replica of the real engine at a time.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pytest

from cluster import parts
from cluster.quickstart import download_run
from cluster.sample import SAMPLE_FOLDER, judge, read_records, upload
from cluster.state import ClusterState
from pipeline import storage
from pipeline.fetch import ImageFetcher
from pipeline.model import ModelSpec
from pipeline.plan import make_plan
from pipeline.prepare import PrepareSpec, prepare_block
from pipeline.read import open_input, read_shard
from pipeline.records import Failure, Prepared, input_block, read_prepared
from pipeline.sampling import SamplingDefaults
from tests import prometheus
from tests.prometheus import Prometheus

pytestmark = [pytest.mark.cluster, pytest.mark.engine, pytest.mark.timeout(1800)]

RUN = "s3://batch/runs/quickstart"
VARYING = ["latency_s", "cached_tokens", "finished_at"]
"""Columns that a second generation of the same rows may have otherwise."""


def prepared_sample() -> list[Prepared | Failure]:
    """The sample's rows as the prepare step makes them, without any engine."""
    uri = str(SAMPLE_FOLDER)
    found = open_input(uri, renamed={}, carry=None)
    spec = PrepareSpec(
        model=ModelSpec("cluster/models/mini-maverick", None, max_model_len=4096),
        columns=found.columns,
        sampling=SamplingDefaults(),
        run_seed=0,
        max_image_pixels=10**7,
        fetcher=ImageFetcher(f"file://{uri}", 10**7, 4),
    )
    shards = make_plan(found.files, shard_rows=512, shard_bytes=2**30).shards
    blocks = [input_block(shard, read_shard(shard, found.columns)) for shard in shards]
    return [item for block in blocks for item in read_prepared(prepare_block(block, spec=spec))]


def submit() -> tuple[int, dict[str, Any], str]:
    """Exit code of ``ray job submit``, the job's last line, and its log."""
    done = subprocess.run(
        [
            *(str(Path(sys.executable).with_name("ray")), "job", "submit", "--working-dir", "."),
            *("--", sys.executable, "-m", "jobs.nightly"),
            *("--config", "jobs/configs/quickstart.yaml"),
        ],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    log = done.stdout + done.stderr
    results = [line for line in log.splitlines() if line.startswith('{"status"')]
    assert results, log[-5000:]
    return done.returncode, json.loads(results[-1]), log


def count_with_ray_data(folder: Path) -> int:
    """In a process and a Ray of its own, as a user's notebook would."""
    code = f"import ray; print(ray.data.read_parquet({str(folder)!r}).to_pandas().shape[0])"
    environment = {key: os.environ[key] for key in os.environ if not key.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    return int(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def scraper(
    mini_cluster: ClusterState, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus | None]:
    """A Prometheus that scrapes the cluster while the module's jobs run; None: there is none."""
    if shutil.which("prometheus") is None:
        yield None
        return
    targets = parts.metrics_targets(mini_cluster)
    with prometheus.running(tmp_path_factory.mktemp("prometheus"), targets) as running:
        yield running


@pytest.fixture(scope="module")
def first(
    mini_cluster: ClusterState, scraper: Prometheus | None
) -> tuple[int, dict[str, Any], str]:
    """The first submission of the sample."""
    upload()
    return submit()


@pytest.fixture(scope="module")
def folder(
    first: tuple[int, dict[str, Any], str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The run folder, copied out of the bucket after the first submission."""
    target = tmp_path_factory.mktemp("run")
    download_run(RUN, target)
    return target


def test_every_row_ends_as_one_record_that_is_what_it_should_be(
    first: tuple[int, dict[str, Any], str], folder: Path
) -> None:
    code, result, log = first
    assert code == 0, log[-5000:]
    assert result["status"] == "complete"
    records = read_records(folder)
    verdict = judge(records)
    assert verdict.accounted, verdict
    assert result["rows"]["total"] == verdict.rows == len(records)
    assert result["rows"]["errored"] == 8
    assert verdict.digits_right >= 0.97 * verdict.digits
    assert verdict.other_right >= 0.95 * verdict.other
    assert (folder / "_SUCCESS").exists()
    assert (folder / "report.html").exists()


def test_prometheus_has_what_the_report_says_and_the_dashboard_asks_for(
    first: tuple[int, dict[str, Any], str], folder: Path, scraper: Prometheus | None
) -> None:
    scraper = scraper or pytest.skip("no prometheus here; Debian's package prometheus has it")
    _, result, _ = first
    rows = {status: n for status, n in result["rows"].items() if n and status != "total"}
    tokens = {kind: n for kind, n in result["tokens"].items() if n}
    assert scraper.settled("max by (status) (ray_maverick_rows_total)", rows) == rows
    assert scraper.settled("max by (kind) (ray_maverick_tokens_total)", tokens) == tokens
    report = json.loads((folder / "report.json").read_text())
    failures = report["errors"]
    assert scraper.settled("max by (code) (ray_maverick_failures_total)", failures) == failures

    silent = {query for query in prometheus.dashboard_queries() if not scraper.has_data(query)}
    assert silent == set()
    assert scraper.rules() == prometheus.alert_names()

    ids = {record["custom_id"] for record in read_records(folder)}
    for labels in scraper.labels('{__name__=~"ray_maverick_.+|vllm:.+"}'):
        assert labels.keys() <= prometheus.LABELS | {"__name__"}, labels
        assert not ids & set(labels.values())
        assert labels["run"] == "quickstart"


def test_the_log_proves_expert_parallelism(first: tuple[int, dict[str, Any], str]) -> None:
    _, _, log = first
    assert re.search(r"\[EP Rank 0/2\] Expert parallelism is enabled.*experts: 4/8", log)
    assert "Worker_TP1_EP1" in log


def test_prompt_tokens_are_the_engines_count_and_the_formulas(folder: Path) -> None:
    """Stored is the engine's count of its expanded prompt; prepare's is tokenizer plus formula."""
    expected = {item.custom_id: item for item in prepared_sample() if isinstance(item, Prepared)}
    tiles_seen: Counter[int] = Counter()
    for record in read_records(folder):
        if record["status"] != "succeeded":
            continue
        item = expected[record["custom_id"]]
        assert record["prompt_tokens"] == item.prompt_tokens
        if record["task"] in ("single", "wide"):
            tiles = 1 if record["task"] == "single" else len(record["label"])
            assert record["image_tokens"] == (7 if tiles == 1 else 5 * tiles + 7)
            tiles_seen[tiles] += 1
    assert set(tiles_seen) == {1, 2, 3, 4}


def test_the_output_opens_everywhere_without_options(folder: Path) -> None:
    rows = len(read_records(folder))
    assert len(pd.read_parquet(folder / "data")) == rows
    found = duckdb.connect().execute(f"select count(*) from '{folder}/data/*.parquet'")
    assert found.fetchone() == (rows,)
    assert count_with_ray_data(folder / "data") == rows


def test_the_same_command_again_generates_nothing_and_a_lost_part_only_itself(
    first: tuple[int, dict[str, Any], str], folder: Path, tmp_path: Path
) -> None:
    code, again, log = submit()
    assert (code, again["generated_rows"]) == (0, 0), log[-5000:]
    assert "starting engines" not in log
    assert again["rows"] == first[1]["rows"]

    part = "part-000002.parquet"
    uri = storage.join(RUN, "data", part)
    others = {e.uri: e.version for e in storage.list_files(storage.join(RUN, "data"))}
    storage.delete(uri)
    code, third, log = submit()
    assert code == 0, log[-5000:]
    after = {e.uri: e.version for e in storage.list_files(storage.join(RUN, "data"))}
    assert {key for key in others if after[key] != others[key]} <= {uri}
    download_run(RUN, tmp_path)
    before = pd.read_parquet(folder / "data" / part).drop(columns=VARYING)
    now = pd.read_parquet(tmp_path / "data" / part).drop(columns=VARYING)
    assert third["generated_rows"] == len(before)
    pd.testing.assert_frame_equal(before, now)
