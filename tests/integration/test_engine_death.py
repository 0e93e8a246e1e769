"""The real engine dies, hangs, fails at a row, or is left behind: its rows complete, its processes
end.

One replica at a time, without Ray. The row that kills the engine does so by SIGKILL to the engine
core, as the kernel does when memory runs out. Not covered: GPUs, and engines over several nodes.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from weakref import ref

import psutil
import pytest

from pipeline.admission import AdmissionWindow
from pipeline.engine import EngineRequest
from pipeline.engine_spec import EngineSpec
from pipeline.errors import ErrorCode
from pipeline.profile import load_profile
from pipeline.records import Completion, Failure, Outcome, Prepared
from pipeline.replica import Replica, ReplicaLimits
from pipeline.sampling import Sampling
from tests.chaos.corpus import MARKER_TOKENS
from tests.chaos.fragile_engine import FragileVLLM, start_fragile_vllm
from tests.hostile import png

pytestmark = [pytest.mark.engine, pytest.mark.chaos, pytest.mark.timeout(1200)]

ENGINE_CORE = "VLLM::EngineCore"
IMAGE_TOKEN = 265
ROWS = 40
POISON = 5


def spec() -> EngineSpec:
    profile = load_profile("mini-maverick-tp1", overrides={"mm_processor_cache_gb": 0.1})
    return EngineSpec(profile.model, profile.revision, profile.engine_args, profile.env)


def row(
    number: int, *, tokens: Sequence[int] = tuple(b"Count to 9."), length: int = 60
) -> Prepared:
    return Prepared(
        input_row=number,
        custom_id=f"row-{number}",
        token_ids=list(tokens),
        images=(),
        image_tokens=0,
        prompt_tokens=len(tokens),
        sampling=Sampling(temperature=1.5, max_completion_tokens=length),
        seeds=(number,),
    )


def generate(replica: Replica, rows: Sequence[Prepared]) -> dict[int, Outcome]:
    outcomes = [outcome for batch in replica.generate(0, rows) for outcome in batch]
    assert len(outcomes) == len(rows)
    return {outcome.input_row: outcome for outcome in outcomes}


def texts(outcomes: dict[int, Outcome]) -> dict[int, str]:
    return {key: o.text for key, o in outcomes.items() if isinstance(o, Completion)}


def engine_cores() -> list[psutil.Process]:
    below = psutil.Process().children(recursive=True)
    return [process for process in below if ENGINE_CORE in command_line(process)]


def command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has just ended
        return ""


ENGINES: list[ref[FragileVLLM]] = []
"""Those of the module's replica, the last one at work."""


@pytest.fixture(scope="module")
def replica(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replica]:
    book = tmp_path_factory.mktemp("book") / "ledger"

    def start() -> FragileVLLM:
        engine = start_fragile_vllm(spec(), ledger=book)
        ENGINES.append(ref(engine))
        return engine

    limits = ReplicaLimits(stall_s=10, flush_s=0.2, row_timeout_s=120)
    replica = Replica(start, limits, AdmissionWindow(8, 8))
    yield replica
    replica.shutdown()


@pytest.fixture(scope="module")
def undisturbed(replica: Replica) -> dict[int, str]:
    return texts(generate(replica, [row(number) for number in range(ROWS)]))


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGTERM])
def test_an_engine_core_that_ends_costs_no_row_and_changes_no_text(
    replica: Replica, undisturbed: dict[int, str], blow: signal.Signals
) -> None:
    before = replica.engine_restarts
    (core,) = engine_cores()
    batches = replica.generate(0, [row(number) for number in range(ROWS)])
    outcomes = list(next(batches))
    core.send_signal(blow)
    outcomes += [outcome for batch in batches for outcome in batch]
    assert replica.engine_restarts == before + 1
    assert texts({outcome.input_row: outcome for outcome in outcomes}) == undisturbed
    assert {outcome.attempts for outcome in outcomes} == {1, 2}


def test_an_image_that_the_engine_core_never_got_is_sent_again(replica: Replica) -> None:
    """A request that is cancelled on its way leaves vLLM's sender in the belief that the core has
    its image."""
    asked = replace(row(0, tokens=(*b"See", IMAGE_TOKEN), length=8), images=(png(56, 56),))
    before = replica.engine_restarts
    lost = EngineRequest("lost", list(asked.token_ids), asked.images, asked.sampling, seed=0)
    engine = ENGINES[-1]()
    assert engine is not None
    engine._renderer._rendered(lost)
    del engine
    outcome = generate(replica, [asked])[0]
    assert isinstance(outcome, Completion)
    assert (outcome.code, outcome.attempts, outcome.completion_tokens) == (None, 2, 8)
    assert replica.engine_restarts == before


def test_every_way_in_which_vllm_ends_a_request_is_known() -> None:
    """A new one is a record's error until somebody decides what it is."""
    from vllm.v1.engine import FINISH_REASON_STRINGS

    assert set(FINISH_REASON_STRINGS) == {"stop", "length", "abort", "error", "repetition"}


def test_the_row_that_kills_the_engine_is_found_and_the_others_complete(
    replica: Replica, undisturbed: dict[int, str]
) -> None:
    before = replica.engine_restarts
    rows = [row(number) for number in range(ROWS)]
    rows[POISON] = row(POISON, tokens=(*b"Boom", *MARKER_TOKENS))
    outcomes = generate(replica, rows)
    fatal = outcomes.pop(POISON)
    assert isinstance(fatal, Failure)
    assert fatal.code == ErrorCode.ENGINE_FATAL
    assert texts(outcomes) == {key: text for key, text in undisturbed.items() if key != POISON}
    assert replica.engine_restarts - before <= 4  # log2(8) + 1


def test_a_hung_engine_core_is_replaced(replica: Replica, undisturbed: dict[int, str]) -> None:
    before = replica.engine_restarts
    (core,) = engine_cores()
    batches = replica.generate(0, [row(number) for number in range(ROWS)])
    outcomes = list(next(batches))
    core.send_signal(signal.SIGSTOP)
    outcomes += [outcome for batch in batches for outcome in batch]
    assert replica.engine_restarts == before + 1
    assert not core.is_running() or core.status() == psutil.STATUS_ZOMBIE
    assert texts({outcome.input_row: outcome for outcome in outcomes}) == undisturbed


def test_a_row_over_its_time_is_aborted_in_the_engine(tmp_path: Path) -> None:
    engines: list[FragileVLLM] = []

    def start() -> FragileVLLM:
        engines.append(start_fragile_vllm(spec(), ledger=tmp_path / "ledger"))
        return engines[-1]

    replica = Replica(start, ReplicaLimits(row_timeout_s=0.005))  # a step takes longer
    try:
        outcomes = generate(replica, [row(number) for number in range(12)])
        codes = {(o.code, o.attempts) for o in outcomes.values() if isinstance(o, Failure)}
        assert codes == {(ErrorCode.TIMEOUT, 1)}
        assert texts(outcomes) == {}
        assert engines[0]._llm.get_num_unfinished_requests() == 0
        assert replica.engine_restarts == 0
    finally:
        replica.shutdown()


def test_an_engines_processes_end_when_the_replicas_process_is_killed() -> None:
    """vLLM's own would wait for requests for ever, and hold the memory of a GPU."""
    code = (
        "import asyncio, psutil, time\n"
        "from tests.integration.test_engine_death import spec\n"
        "from pipeline.engine import VLLMEngine\n"
        "async def main():\n"
        "    engine = VLLMEngine(spec())\n"
        "    print(*(p.pid for p in psutil.Process().children(recursive=True)), flush=True)\n"
        "    time.sleep(600)\n"
        "if __name__ == '__main__':\n"
        "    asyncio.run(main())\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        watchdog = threading.Timer(300, process.kill)
        watchdog.start()
        try:
            assert process.stdout is not None
            line = next(text for text in process.stdout if text.strip().replace(" ", "").isdigit())
            left = [psutil.Process(int(pid)) for pid in line.split()]
            assert any(ENGINE_CORE in command_line(child) for child in left)
        finally:
            process.kill()
            watchdog.cancel()
    until = time.monotonic() + 90
    while any(child.is_running() for child in left) and time.monotonic() < until:
        time.sleep(0.2)
    assert [child for child in left if child.is_running()] == []
