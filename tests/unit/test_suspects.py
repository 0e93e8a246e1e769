"""Rows that end their replica's process: found by halves, over as many processes as it takes."""

import math
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from random import Random

import pytest

from pipeline.commit import Destination
from pipeline.errors import EngineError, ErrorCode
from pipeline.journal import Journal
from pipeline.plan import Shard
from pipeline.records import Completion, Failure, Outcome, Prepared, SampleKey
from pipeline.sampling import Sampling
from pipeline.suspects import Suspects, check_engine, complete_alone, next_rows

MOST_PROCESSES = 100


def prepared(row: int, samples: int = 1) -> Prepared:
    return Prepared(
        input_row=row,
        custom_id=f"r{row}",
        token_ids=[1, 2, 3],
        images=(),
        image_tokens=0,
        prompt_tokens=3,
        sampling=Sampling(n=samples),
        seeds=tuple(range(samples)),
    )


def completion(row: int, sample: int) -> Completion:
    return Completion(row, f"r{row}", sample, "x", "stop", 3, 1, 0, 0, sample, 0.1)


class Engine:
    """Ends, with its process, once a killer is inside; some of the others may be through by then.

    ``EngineError`` is how that looks to what runs in the process: the engine never comes back.
    """

    def __init__(self, killers: Collection[int] = (), seed: int = 0) -> None:
        self.killers = killers
        self.asked: list[list[int]] = []
        """Rows, by call that had any."""
        self._random = Random(seed)

    def __call__(
        self, items: Sequence[Prepared | Failure], *, known: Collection[SampleKey] = ()
    ) -> Iterator[list[Outcome]]:
        rows = [item for item in items if isinstance(item, Prepared)]
        if rows:
            self.asked.append([row.input_row for row in rows])
        yield [item for item in items if isinstance(item, Failure) and item.key not in known]
        wanted = [
            (row.input_row, sample)
            for row in rows
            for sample in range(row.sampling.n)
            if (row.input_row, sample) not in known
        ]
        dies = any(row in self.killers for row, _ in wanted)
        innocent = [key for key in wanted if key[0] not in self.killers]
        through = self._random.sample(innocent, len(innocent) // 4) if dies else wanted
        yield [completion(*key) for key in through]
        if dies:
            raise EngineError("died")


class Shelf:
    """One shard's journal in a folder, and processes that come one after the other."""

    def __init__(self, folder: Path, items: Sequence[Prepared | Failure]) -> None:
        self.to = Destination(f"file://{folder}", "run-1", "m")
        self.shard = Shard(0, "file:///in.parquet", 0, 10_000)
        self.items = items
        self.folder = folder / "_journal" / "000000"

    def process(self, engine: Engine, *, start: float = 1.0, drained: bool = False) -> bool:
        """One process's attempt; False if it ended."""
        journal = Journal(self.to, self.shard)
        known = {outcome.key for outcome in journal.read()}
        suspects = Suspects(journal, "run-1", start)
        try:
            for batch in complete_alone(self.items, known, suspects, engine, lambda: drained):
                journal.append([outcome for outcome in batch if outcome.attempts])
        except EngineError:
            return False
        return True

    def run(self, engine: Engine) -> int:
        """Processes that ended until one got to the end."""
        for deaths in range(MOST_PROCESSES):
            if self.process(engine):
                return deaths
        raise AssertionError("it never comes to an end")

    def kept(self) -> dict[SampleKey, Outcome]:
        return {outcome.key: outcome for outcome in Journal(self.to, self.shard).read()}

    def trials(self) -> list[Path]:
        return sorted(self.folder.glob("*.json"))


@pytest.mark.parametrize("size", [1, 2, 3, 17, 100])
@pytest.mark.parametrize("seed", range(3))
def test_the_row_that_ends_processes_is_found_and_the_others_complete(
    tmp_path: Path, size: int, seed: int
) -> None:
    killer = Random(seed).randrange(size)
    shelf = Shelf(tmp_path, [prepared(row) for row in range(size)])
    deaths = shelf.run(Engine({killer}, seed))
    kept = shelf.kept()
    assert sorted(kept) == [(row, 0) for row in range(size)]
    fatal = [key for key, outcome in kept.items() if outcome.code is ErrorCode.ENGINE_FATAL]
    assert fatal == [(killer, 0)]
    assert kept[killer, 0].attempts == 3
    assert deaths <= math.ceil(math.log2(size)) + 3


@pytest.mark.parametrize("seed", range(4))
def test_several_such_rows_are_all_found(tmp_path: Path, seed: int) -> None:
    killers = set(Random(seed).sample(range(64), 3))
    shelf = Shelf(tmp_path, [prepared(row) for row in range(64)])
    deaths = shelf.run(Engine(killers, seed))
    kept = shelf.kept()
    assert len(kept) == 64
    assert {row for (row, _), outcome in kept.items() if outcome.code} == killers
    assert deaths <= 3 * (6 + 3)


def test_after_its_first_deaths_every_process_completes_rows_before_it_meets_the_killer(
    tmp_path: Path,
) -> None:
    shelf = Shelf(tmp_path, [prepared(row) for row in range(64)])
    engine = Engine({0})
    for _ in range(2):
        assert not shelf.process(engine)
    while True:
        before = len(shelf.kept())
        engine.asked.clear()
        ended = not shelf.process(engine)
        if engine.asked == [[0]] or not ended:
            break
        assert len(shelf.kept()) > before


def test_deaths_of_other_starts_halve_the_rows_but_convict_none(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, [prepared(0), prepared(1)])
    for start in range(2, 8):
        assert not shelf.process(Engine({1}), start=start)
    assert [key for key, outcome in shelf.kept().items() if outcome.code] == []
    assert shelf.process(Engine())  # it was the nights' fault
    assert [outcome.code for outcome in shelf.kept().values()] == [None, None]


def test_a_drain_accuses_nobody(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, [prepared(row) for row in range(4)])
    assert shelf.process(Engine(), drained=True)
    assert (shelf.trials(), shelf.kept()) == ([], {})


def test_rows_that_were_through_leave_no_trial(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, [prepared(row) for row in range(4)])
    assert shelf.process(Engine())
    assert shelf.trials() == []


def test_samples_that_were_made_before_the_death_stay(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, [prepared(0, samples=3)])
    Journal(shelf.to, shelf.shard).append([completion(0, 1)])
    shelf.run(Engine({0}))
    assert {key: outcome.code for key, outcome in shelf.kept().items()} == {
        (0, 0): ErrorCode.ENGINE_FATAL,
        (0, 1): None,
        (0, 2): ErrorCode.ENGINE_FATAL,
    }


def test_trials_of_another_run_and_objects_that_are_none_do_not_count(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, [prepared(0), prepared(1)])
    shelf.folder.mkdir(parents=True)
    for number in range(3):
        trial = '{"run": "run-0", "rows": [0], "start": 1.0}'
        (shelf.folder / f"{number}.json").write_text(trial)
    (shelf.folder / "x.json").write_text("{")
    engine = Engine()
    assert shelf.process(engine)
    assert engine.asked == [[0, 1]]


def test_rows_that_failed_before_the_engine_need_no_trial(tmp_path: Path) -> None:
    failed = Failure(0, "r0", ErrorCode.INVALID_PARAMETER, "m", seed=0)
    shelf = Shelf(tmp_path, [failed, prepared(1)])
    suspects = Suspects(Journal(shelf.to, shelf.shard), "run-1", 1.0)
    batches = complete_alone(shelf.items, (), suspects, Engine(), lambda: False)
    assert {o.key: o.code for batch in batches for o in batch} == {
        (0, 0): ErrorCode.INVALID_PARAMETER,
        (1, 0): None,
    }


def test_an_engine_that_cannot_make_one_token_is_at_fault_itself() -> None:
    class Refuses(Engine):
        def __call__(
            self, items: Sequence[Prepared | Failure], *, known: Collection[SampleKey] = ()
        ) -> Iterator[list[Outcome]]:
            (item,) = items
            yield [Failure(item.input_row, "", ErrorCode.ENGINE_FATAL, "died thrice", seed=0)]

    check_engine([prepared(5)], Engine())
    with pytest.raises(EngineError, match="died thrice"):
        check_engine([prepared(5)], Refuses())


def test_the_smallest_accused_group_is_halved_and_those_outside_of_all_go_first() -> None:
    assert next_rows(range(8), []) == tuple(range(8))
    assert next_rows(range(8), [range(8)]) == (0, 1, 2, 3)
    assert next_rows(range(8), [range(8), range(4)]) == (4, 5, 6, 7)
    assert next_rows(range(8), [range(8), range(4), range(4, 8)]) == (0, 1)
    assert next_rows([2, 5], [range(8), range(4), (4, 5)]) == (2,)
    assert next_rows([7], [(7,), (7,)]) == (7,)
