"""The roster: tallies that never count twice, orders that reach everyone, replicas that went."""

from pipeline.progress import Tally
from pipeline.roster import DRIVER_SILENCE_S, Order, Phase, Pulse, Roster, Silent, Snapshot


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def pulse(
    replica: str = "a",
    process: str = "a1",
    phase: Phase = Phase.RUNNING,
    shards: dict[int, Tally] | None = None,
    restarts: int = 0,
    error: str | None = None,
) -> Pulse:
    return Pulse(replica, process, phase, shards or {}, restarts, error)


def watch(roster: Roster, clock: Clock, seconds: int) -> Snapshot:
    """What the driver sees last, which looks once a second for so long."""
    for _ in range(seconds):
        clock.now += 1
        seen = roster.look()
    return seen


def test_a_shard_that_is_done_again_counts_once() -> None:
    roster = Roster()
    roster.beat(pulse(shards={0: Tally(10, 1, 100), 1: Tally(5, 0, 50)}))
    roster.beat(pulse(process="a2", shards={0: Tally(4, 0, 40)}))
    assert roster.look().tally == Tally(9, 0, 90)
    roster.beat(pulse(replica="b", process="b1", shards={0: Tally(12, 1, 120)}))
    assert roster.look().tally == Tally(17, 1, 170)


def test_restarts_of_engines_and_processes_are_counted() -> None:
    roster = Roster()
    roster.beat(pulse(restarts=1))
    roster.beat(pulse(restarts=2))
    roster.beat(pulse(process="a2", restarts=1))
    roster.beat(pulse(replica="b", process="b1"))
    seen = roster.look()
    assert (seen.engine_restarts, seen.replica_restarts) == (3, 1)


def test_the_last_error_is_kept_until_there_is_another() -> None:
    roster = Roster()
    roster.beat(pulse(process="a0", error="no device"))
    roster.beat(pulse(process="a1"))
    assert roster.look().last_error == "no device"


def test_a_drain_reaches_those_that_come_later_with_what_is_left_of_it() -> None:
    clock = Clock()
    roster = Roster(clock)
    assert roster.beat(pulse()) == Order()
    roster.drain(20)
    clock.now += 5
    assert roster.beat(pulse()) == Order(drain_s=15)
    clock.now += 30
    assert roster.beat(pulse(replica="b", process="b1")) == Order(drain_s=0)


def test_replicas_stop_by_themselves_when_the_driver_is_silent() -> None:
    clock = Clock()
    roster = Roster(clock)
    roster.look()
    for _ in range(int(DRIVER_SILENCE_S)):
        clock.now += 1
        assert roster.beat(pulse()) == Order()
    clock.now += 1
    assert roster.beat(pulse()) == Order(drain_s=0.0)


def test_a_machine_that_stood_still_makes_no_driver_silent() -> None:
    clock = Clock()
    roster = Roster(clock)
    roster.look()
    clock.now += 10 * DRIVER_SILENCE_S  # then a replica comes before the driver
    assert roster.beat(pulse()) == Order()
    for _ in range(int(DRIVER_SILENCE_S)):
        clock.now += 1
        assert roster.beat(pulse()) == Order()
    clock.now += 1
    assert roster.beat(pulse()) == Order(drain_s=0.0)


def test_only_replicas_that_are_heard_of_are_running() -> None:
    clock = Clock()
    roster = Roster(clock)
    roster.beat(pulse())
    roster.beat(pulse(replica="b", process="b1", phase=Phase.STARTING))
    roster.beat(pulse(replica="c", process="c1", phase=Phase.DRAINED))
    assert roster.look().running == 1
    assert watch(roster, clock, 60).running == 0


def test_the_longest_silent_replica_comes_first() -> None:
    clock = Clock()
    roster = Roster(clock)
    roster.beat(pulse())
    watch(roster, clock, 8)
    roster.beat(pulse(replica="b", process="b1"))
    assert roster.look().silent == (Silent("a", 8.0), Silent("b", 0.0))


def test_time_in_which_all_stood_still_is_nobodys_silence() -> None:
    clock = Clock()
    roster = Roster(clock)
    roster.beat(pulse())
    clock.now += 60
    seen = roster.look()
    assert (seen.running, seen.silent) == (1, (Silent("a", 0.0),))
    assert watch(roster, clock, 10).running == 0
