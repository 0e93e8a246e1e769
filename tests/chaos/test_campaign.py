"""The campaign's own rules: what counts as progress, who is killed, what is written down.

The driver here is a small program; real jobs under fire are in test_short_chaos.
"""

import json
import sys
import time
from pathlib import Path
from random import Random

import psutil
import pytest

from tests.chaos.campaign import Driver, Job, Story, Strike, Watcher, first_progress
from tests.chaos.judge import Check, Repeat
from tests.chaos.ledger import Generation, Ledger, LedgerReader
from tests.chaos.run import check_rows, draw_victims, kinds_for, strike_rows, to_markdown
from tests.chaos.stage import Outcome
from tests.chaos.victims import Victim
from tests.waiting import wait_until


def generation(at: float, *, pid: int = 1, started: float = 1.0, engine: int = 10) -> Generation:
    return Generation(at, "0-0-0", 1, 5, 7, pid, started, engine)


def strike(victim: Victim = Victim.REPLICA, at: float = 10.0, until: float = 10.0) -> Strike:
    return Strike(victim, at, until, 1, "node-1")


@pytest.mark.parametrize(
    ("after", "seen"),
    [
        ([], None),
        ([generation(11)], None),
        ([generation(11), generation(12, engine=11)], 12),
        ([generation(12, pid=2)], 12),
        ([generation(12, started=9.0)], 12),
    ],
)
def test_progress_after_a_kill_comes_from_an_engine_that_was_not_there_before(
    after: list[Generation], seen: float | None
) -> None:
    assert first_progress(strike(), [generation(9), *after]) == seen


def test_progress_after_an_outage_is_any_generation_after_its_end() -> None:
    outage = strike(Victim.S3, 10, 20)
    assert first_progress(outage, [generation(9), generation(15)]) is None
    assert first_progress(outage, [generation(9), generation(15), generation(21)]) == 21


def test_every_kind_is_drawn_equally_often_in_an_order_of_the_seed() -> None:
    kills = 5 * len(Victim)
    drawn = draw_victims(kills, list(Victim), Random(1))
    assert {kind: drawn.count(kind) for kind in Victim} == dict.fromkeys(Victim, 5)
    assert drawn == draw_victims(kills, list(Victim), Random(1))
    assert drawn != draw_victims(kills, list(Victim), Random(2))


def test_only_engines_of_several_ranks_have_workers_to_kill() -> None:
    assert set(kinds_for("mini-maverick")) == set(Victim)
    assert set(Victim) - set(kinds_for("mini-maverick-tp1")) == {Victim.WORKER, Victim.WORKER_TERM}


def test_a_reader_takes_whole_lines_only_and_each_once(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    reader = LedgerReader(path)
    assert reader.read() == []
    ledger = Ledger(path)
    ledger.write(generation(1))
    with path.open("ab") as file:
        file.write(b'{"at": 2, ')
    assert reader.read() == [generation(1)]
    assert reader.read() == []
    path.write_bytes(path.read_bytes().rpartition(b"{")[0])
    ledger.write(generation(3))
    assert reader.read() == [generation(3)]
    assert reader.generations == [generation(1), generation(3)]
    ledger.close()


def job(tmp_path: Path, code: str) -> Job:
    return Job([sys.executable, "-c", code], {}, tmp_path, tmp_path / "ledger")


def wait(driver: Driver) -> None:
    wait_until(driver.ended, 20)


def test_a_driver_is_started_again_and_each_end_is_on_record(tmp_path: Path) -> None:
    driver = Driver(job(tmp_path, 'print("noise"); print(\'{"status": "failed"}\'); exit(75)'))
    for _ in range(2):
        driver.start()
        wait(driver)
    assert driver.exits == [75, 75]
    assert driver.results == [{"status": "failed"}] * 2
    assert (driver.starts_since(0), driver.starts_since(time.time())) == (2, 0)
    assert json.loads((tmp_path / "start-01.out").read_text().splitlines()[-1])


def test_a_killed_driver_has_no_result(tmp_path: Path) -> None:
    driver = Driver(job(tmp_path, "import time; time.sleep(60)"))
    driver.start()
    driver.kill()
    wait(driver)
    assert (driver.exits, driver.results) == ([-9], [None])


def test_the_death_of_a_process_that_wrote_is_noted_once(tmp_path: Path) -> None:
    driver = Driver(job(tmp_path, "import time; time.sleep(60)"))
    driver.start()
    writer = (driver.pid, psutil.Process(driver.pid).create_time())
    watcher = Watcher(tmp_path / "ledger")
    ledger = Ledger(tmp_path / "ledger")
    with watcher.watching():
        ledger.write(generation(1, pid=writer[0], started=writer[1]))
        ledger.write(generation(1, pid=writer[0], started=5.0))
        wait_until(lambda: len(watcher.generations) == 2 and bool(watcher.deaths))
        assert set(watcher.deaths) == {(writer[0], 5.0)}  # a pid that was used before
        killed = time.time()
        driver.kill()
        wait_until(lambda: writer in watcher.deaths)
    assert 0 <= watcher.deaths[writer] - killed < 20
    assert len(watcher.generations) == 2
    ledger.close()


def test_the_table_counts_a_repeat_for_the_last_kill_before_it() -> None:
    strikes = [strike(at=10), strike(Victim.DRIVER, 30, 30)]
    story = Story(
        started=0,
        ended=60,
        strikes=strikes,
        exits=[-9, 0],
        errors=[],
        result=None,
        generations=[generation(9), generation(18.5, pid=2)],
        deaths={},
        left_over=[],
        troubles=[],
    )
    repeats = [Repeat(5, 18.5, 7, True), Repeat(5, 40, 8, False), Repeat(6, 41, 9, True)]
    outcome = Outcome(story, repeats, [Check("rows missing", False, "1 | 2")])
    assert strike_rows(outcome) == [
        ("1", "10", "replica (node-1)", "8.5", "7", "0"),
        ("2", "30", "driver (node-1)", "-", "17", "8"),
    ]
    assert check_rows(outcome) == [("rows missing", "NO", "1 | 2")]
    text = to_markdown(outcome, {"rows": 3})
    assert "| 1 | 10 | replica (node-1) | 8.5 | 7 | 0 |" in text
    assert "| rows missing | NO | 1 / 2 |" in text
    assert not outcome.passed
