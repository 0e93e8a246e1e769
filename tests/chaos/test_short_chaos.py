"""The short form of the proof: a run under fire without a model, and two drivers on one run.

The engine is the echo engine: what is tested is the way around it. Not covered here: the death of
a real engine's processes, which `make chaos` kills too.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.chaos.campaign import Driver, Fire, Job, Watcher
from tests.chaos.corpus import make_corpus
from tests.chaos.judge import find_repeats, judge_records, judge_waste
from tests.chaos.stage import Setting, Stage, judge_run, set_stage
from tests.chaos.victims import Victim
from tests.waiting import wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.chaos, pytest.mark.timeout(900)]

ROWS = 1200
FAULTS = 0.05
JOURNAL_S = 3.0
EXCUSED_S = JOURNAL_S + 4.0  # a busy machine writes late
SETTING = Setting(
    corpus=make_corpus(ROWS, seed=11),
    seed=11,
    replicas=2,
    overrides={"max_num_seqs": 4},
    limits={"shard_rows": 100, "journal_s": JOURNAL_S},
    echo_delay_s=0.4,  # work for a minute at least: all kills find it at work
)
FIRE = Fire(pause_s=(2.0, 4.0), outage_s=5.0, node_away_s=1.0, stuck_s=150.0)


def undisturbed(stage: Stage) -> Stage:
    """The same stage, with an engine that answers at once."""
    return replace(stage, setting=replace(stage.setting, echo_delay_s=0.001))


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """A cluster, the corpus in its bucket, and an undisturbed run of it."""
    with set_stage(SETTING, tmp_path_factory.mktemp("chaos")) as stage:
        reference = undisturbed(stage).play("reference", [])
        assert reference.exits == (0,), reference.errors
        yield stage


def test_a_run_under_fire_keeps_every_promise(stage: Stage) -> None:
    stage.proxy.set_share(FAULTS)
    targets = [Victim.REPLICA, Victim.S3, Victim.DRIVER, Victim.RAYLET]
    story = stage.play("disturbed", targets, fire=FIRE)
    counts = stage.proxy.counts
    stage.proxy.set_share(0)
    assert len(counts) >= 4, counts  # faults did happen, of several kinds
    outcome = judge_run(stage, story, wanted=len(targets), journal_s=EXCUSED_S)
    assert outcome.passed, [check for check in outcome.checks if not check.passed]


def rival(job: Job, number: int, *arguments: str) -> Driver:
    """One more driver of the same run, with logs of its own."""
    folder = job.folder / f"driver-{number}"
    folder.mkdir()
    return Driver(replace(job, command=(*job.command, *arguments), folder=folder))


def test_of_several_drivers_one_runs_one_is_refused_and_one_that_waits_inherits(
    stage: Stage,
) -> None:
    setting = replace(stage.setting, echo_delay_s=1.0, only="prompts-0.parquet")
    shared = replace(stage, setting=setting)
    job = shared.job("rivals")
    first, second, heir = rival(job, 0), rival(job, 1), rival(job, 2, "--wait")
    watcher = Watcher(job.ledger)
    with watcher.watching(), contextlib.ExitStack() as ending:
        for driver in (first, second, heir):
            ending.callback(driver.kill)
        for driver in (first, second):
            driver.start()
        wait_until(lambda: first.ended() or second.ended(), 300)
        refused, owner = (first, second) if first.exits else (second, first)
        assert refused.exits == [1]
        assert "another driver" in str(refused.results)
        wait_until(lambda: bool(watcher.generations), 300)
        heir.start()
        time.sleep(8)  # it is up, and sees that the owner lives
        assert not heir.ended()
        assert not owner.ended()
        owner.kill()
        wait_until(heir.ended, 300)
    assert heir.exits == [0], heir.results
    assert shared.is_marked("rivals")
    expected, reference = shared.expected(), shared.records("reference")
    checks = judge_records(expected, reference, shared.records("rivals"))
    repeats = find_repeats(watcher.generations, watcher.deaths, [], journal_s=EXCUSED_S)
    checks.append(judge_waste(repeats, watcher.generations))
    assert all(check.passed for check in checks), checks
