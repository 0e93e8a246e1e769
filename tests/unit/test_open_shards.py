"""What a replica reports of its shards: nothing is lost with a pulse that nobody heard."""

from pipeline.open_shards import OpenShards
from pipeline.progress import Tally
from pipeline.roster import Phase, Pulse, Roster


def test_a_shard_that_ended_is_reported_until_somebody_heard_it() -> None:
    shards = OpenShards()
    with shards.shard(7):
        shards.count(7, Tally(rows=3, tokens=30))
    lost, _ = shards.look()
    again, any_open = shards.look()
    assert (lost, again, any_open) == ({7: Tally(rows=3, tokens=30)}, lost, False)
    shards.heard(again)
    assert shards.look() == ({}, False)


def test_a_shard_that_went_on_since_the_pulse_is_reported_again() -> None:
    shards = OpenShards()
    with shards.shard(7):
        shards.count(7, Tally(rows=3))
        pulse, _ = shards.look()
        shards.count(7, Tally(rows=1))
    shards.heard(pulse)
    assert shards.look() == ({7: Tally(rows=4)}, False)


def test_a_tally_that_is_heard_twice_counts_once() -> None:
    roster = Roster()
    for _ in range(2):
        roster.beat(Pulse("a", "a1", Phase.RUNNING, {7: Tally(rows=3)}, 0))
    assert roster.look().tally == Tally(rows=3)


def test_tokens_that_earlier_attempts_made_are_not_this_process_own() -> None:
    shards = OpenShards()
    with shards.shard(7):
        shards.count(7, Tally(rows=3, tokens=30, known_rows=3, known_tokens=30))
        shards.count(7, Tally(rows=1, tokens=9))
    assert shards.made_tokens == 9
