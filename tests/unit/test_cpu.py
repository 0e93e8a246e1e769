"""CPU time by step: laps, threads and blocks add up to what their process took."""

import threading
import time

import pyarrow as pa

from pipeline.cpu import Laps, Meter, Step, added, block_cpu, thread_laps, with_cpu


def work(seconds: float) -> None:
    """Take so much CPU."""
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


def test_laps_sum_to_the_clock() -> None:
    ticks = iter([5.0, 6.5, 9.0])
    laps = Laps(lambda: next(ticks))
    assert [laps.lap(), laps.lap()] == [1.5, 2.5]


def test_a_step_has_its_own_threads_time_and_the_rest_is_rays() -> None:
    meter = Meter()
    before = time.process_time()
    with meter.counts(Step.COMMIT):
        work(0.02)
        time.sleep(0.02)
    work(0.03)
    spent = meter.take({})
    assert spent["commit"] >= 0.02
    assert spent["ray"] >= 0.03
    assert sum(spent.values()) <= time.process_time() - before + 0.01
    assert meter.take({}).keys() == {"ray"}


def test_another_threads_time_can_be_read_while_it_runs() -> None:
    done, stop = threading.Event(), threading.Event()

    def run() -> None:
        work(0.02)
        done.set()
        stop.wait()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        laps = thread_laps(thread)
        done.wait()
        work(0.5)
        assert laps.lap() < 0.25  # what this thread took meanwhile is not in it
    finally:
        stop.set()
        thread.join()


def test_a_blocks_cost_is_replaced_and_travels_in_each_row() -> None:
    block = pa.table({"row": [1, 2]})
    assert block_cpu(block) == {}
    read = with_cpu(block, {Step.READ: 0.5})
    both = with_cpu(read, added(block_cpu(read), {Step.PREPARE: 1.0, Step.RAY: 0.25}))
    assert block_cpu(both.slice(1)) == {"read": 0.5, "prepare": 1.0, "ray": 0.25}
    assert both.column_names == ["row", "cpu_s"]


def test_a_block_may_say_nothing() -> None:
    assert block_cpu(with_cpu(pa.table({"row": [1]}), {})) == {}
