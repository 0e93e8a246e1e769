"""The short form of the proof: a run under fire without a model, and two drivers on one run.

The engine is the echo engine: what is tested is the way around it. Not covered here: the death of
a real engine's processes, which `make chaos` kills too.
"""

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.chaos.campaign import Driver, Fire, Job
from tests.chaos.corpus import make_corpus
from tests.chaos.judge import judge_records
from tests.chaos.ledger import LedgerReader
from tests.chaos.stage import Setting, Stage, judge_run, set_stage
from tests.chaos.victims import Victim

pytestmark = [pytest.mark.cluster, pytest.mark.chaos, pytest.mark.timeout(420)]

ROWS = 2000
FAULTS = 0.05
JOURNAL_S = 3.0
SETTING = Setting(
    corpus=make_corpus(ROWS, seed=11),
    seed=11,
    replicas=2,
    overrides={"max_num_seqs": 4},
    limits={"shard_rows": 100, "journal_s": JOURNAL_S},
    echo_delay_s=0.15,
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
    outcome = judge_run(stage, story, wanted=len(targets), journal_s=JOURNAL_S)
    assert outcome.passed, [check for check in outcome.checks if not check.passed]


def wait_for(driver: Driver, seconds: float = 120) -> int:
    """The exit code of the driver's last start."""
    deadline = time.monotonic() + seconds
    while not driver.ended():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return driver.exits[-1]


def wait_for_work(job: Job, driver: Driver) -> None:
    """Until a generation has finished."""
    reader = LedgerReader(job.ledger)
    deadline = time.monotonic() + 90
    while not reader.read():
        assert not driver.ended(), driver.results
        assert time.monotonic() < deadline
        time.sleep(0.2)


def rival(job: Job, number: int, *arguments: str) -> Driver:
    """One more driver of the same run, with logs of its own."""
    folder = job.folder / f"driver-{number}"
    folder.mkdir()
    return Driver(replace(job, command=(*job.command, *arguments), folder=folder))


def assert_whole(stage: Stage, name: str) -> None:
    checks = judge_records(stage.expected(), stage.records("reference"), stage.records(name))
    assert all(check.passed for check in checks), checks
    assert stage.is_marked(name)


def test_of_two_drivers_started_at_once_one_runs_and_one_is_refused(stage: Stage) -> None:
    quick = replace(stage, setting=replace(stage.setting, echo_delay_s=0.05))
    job = quick.job("rivals")
    drivers = [rival(job, number) for number in range(2)]
    for driver in drivers:
        driver.start()
    assert sorted(wait_for(driver) for driver in drivers) == [0, 1]
    (refused,) = [driver for driver in drivers if driver.exits == [1]]
    result = refused.results[0]
    assert result is not None
    assert "driver" in result["error"]
    assert_whole(quick, "rivals")
    reader = LedgerReader(job.ledger)
    reader.read()
    generated = Counter(one.seed for one in reader.generations)
    assert set(generated.values()) == {1}  # the refused one let no row be paid for twice


def test_a_driver_that_waits_takes_over_when_the_first_one_is_killed(stage: Stage) -> None:
    quick = replace(stage, setting=replace(stage.setting, echo_delay_s=0.1))
    job = quick.job("heirs")
    first, second = rival(job, 0), rival(job, 1, "--wait")
    first.start()
    wait_for_work(job, first)
    second.start()
    time.sleep(8)  # it is up, and sees that the first one lives
    assert not second.ended()
    first.kill()
    assert wait_for(second) == 0, second.results
    assert_whole(quick, "heirs")
