"""History: throughput with its pauses, replicas and starts, whatever the order of the parts."""

from dataclasses import replace

from pipeline.history import MOST_BINS, History
from pipeline.pace import Pace
from tests.report_cases import SEVERAL_STARTS, START, Night


def test_every_row_is_in_the_throughput_in_a_bounded_number_of_bins() -> None:
    night = Night(600, rows=100, replicas=3, open_s=200)
    parts = list(night.parts())
    throughput = History(reversed(parts)).throughput()
    assert throughput == History(parts).throughput()
    (stretch,) = throughput.stretches
    assert throughput.rows == sum(stretch.rows) == 60_000
    assert MOST_BINS / 3 < len(stretch.rows) <= MOST_BINS
    assert sum(stretch.tokens) == sum(sum(part.pace.tokens) for part in parts)


def test_a_run_of_one_shard_has_its_course() -> None:
    (stretch,) = History(Night(1, rows=600, open_s=60).parts()).throughput().stretches
    assert sum(count > 0 for count in stretch.rows) > 40


def test_a_pause_parts_the_throughput_and_counts_no_bins() -> None:
    throughput = History(SEVERAL_STARTS.parts()).throughput()
    assert len(throughput.stretches) == 3
    assert throughput.bin_s <= 8  # though the last start is a day after the second
    begins = [stretch.start for stretch in throughput.stretches]
    for begin, start in zip(begins, SEVERAL_STARTS.starts, strict=True):
        assert 0 <= begin + throughput.bin_s - start - 75 <= 2 * throughput.bin_s


def test_starts_and_replicas_have_what_they_committed() -> None:
    parts = list(SEVERAL_STARTS.parts())
    history = History(parts)
    assert [start.parts for start in history.starts()] == [20, 50, 26]
    assert [len(start.replicas) for start in history.starts()] == [4, 4, 4]
    replicas = history.replicas()
    assert len(replicas) == 12
    assert sum(replica.rows for replica in replicas) == 96 * 512
    assert sum(replica.tokens for replica in replicas) == sum(part.made_tokens for part in parts)
    assert [replica.nodes for replica in replicas[:4]] == [{f"gpu-0{n}"} for n in (1, 2, 3, 4)]


def test_a_replica_that_was_started_again_is_one_with_a_gap() -> None:
    first, second = Night(2, replicas=1).parts()
    assert second.attempt is not None
    later = replace(
        second.attempt, process="p2", opened=START + 900, engine_restarts=2, cold_start_s=41.5
    )
    second = replace(second, attempt=later, committed_at=START + 1_000)
    (replica,) = History([first, second]).replicas()
    assert len(replica.stretches()) == 2
    assert replica.engine_restarts == {"0000p000": 0, "p2": 2}
    assert replica.cold_starts_s == {"p2": 41.5}  # the first did not record it


def test_rows_taken_over_are_nobodys_and_keep_their_time() -> None:
    (part,) = Night(1, rows=512).parts()
    taken = Pace(1, int(START) - 3_600, (0, 1), (50, 50), (500, 500))
    history = History([replace(part, taken_over=100, made_tokens=7, pace=taken)])
    assert [(replica.rows, replica.tokens) for replica in history.replicas()] == [(412, 7)]
    assert next(stretch.start for stretch in history.throughput().stretches) == int(START) - 3_600


def test_parts_of_an_earlier_version_are_no_history() -> None:
    (part,) = Night(1).parts()
    history = History([replace(part, attempt=None, pace=Pace())])
    assert (history.starts(), history.replicas()) == ([], [])
    assert history.throughput().stretches == ()
