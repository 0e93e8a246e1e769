"""The corpus: its shape, its poison, and what the prepare step makes of both."""

from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.fetch import ImageFetcher
from pipeline.model import ModelSpec
from pipeline.plan import make_plan
from pipeline.prepare import PrepareSpec, prepare_block
from pipeline.read import open_input, read_shard
from pipeline.records import Failure, Prepared, input_block, read_prepared
from pipeline.sampling import SamplingDefaults
from tests.chaos.corpus import EXPECTED, MARKER_TOKENS, Corpus, Poison, make_corpus, upload
from tests.chaos.fragile_engine import holds_marker

ROWS = 400
FOUND_LATER = {Poison.DUPLICATE, Poison.KILLS_ENGINE}
"""Not by looking at the row alone."""


def rows_of(corpus: Corpus) -> list[dict[str, object]]:
    return [row for table in corpus.files.values() for row in table.to_pylist()]


def test_one_percent_is_poison_and_every_kind_is_there() -> None:
    rows = rows_of(make_corpus(2000, seed=3))
    kinds = Counter(row["task"] for row in rows if row["expected_error"] is not None)
    assert len(rows) == 2000
    assert sum(kinds.values()) == 20
    assert set(kinds) == {str(kind) for kind in Poison}
    assert set(EXPECTED) == set(Poison)


def test_the_same_seed_gives_the_same_bytes_and_another_does_not() -> None:
    first, again, other = (make_corpus(ROWS, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.files != other.files


def test_only_poison_repeats_a_custom_id_and_only_one_of_a_good_row_before_it() -> None:
    good: set[object] = set()
    for row in rows_of(make_corpus(2000, seed=5)):
        if row["expected_error"] is None:
            assert row["custom_id"] not in good
            good.add(row["custom_id"])
        else:
            assert (row["custom_id"] in good) == (row["task"] == Poison.DUPLICATE)


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="too few"):
        make_corpus(10, seed=1)


def test_kinds_of_poison_can_be_left_out() -> None:
    rows = rows_of(make_corpus(ROWS, seed=1, poison=[Poison.TOO_LONG]))
    assert {row["task"] for row in rows if row["expected_error"]} == {Poison.TOO_LONG}
    assert not any(row["expected_error"] for row in rows_of(make_corpus(ROWS, seed=1, poison=[])))


def prepared(corpus: Corpus, folder: Path) -> list[tuple[dict[str, object], Prepared | Failure]]:
    upload(corpus, str(folder))
    found = open_input(str(folder), renamed={}, carry=None)
    spec = PrepareSpec(
        model=ModelSpec("cluster/models/mini-maverick", None, max_model_len=4096),
        columns=found.columns,
        sampling=SamplingDefaults(),
        run_seed=0,
        max_image_pixels=10**7,
        fetcher=ImageFetcher(f"file://{folder}", 10**7, 4),
    )
    shards = make_plan(found.files, shard_rows=ROWS, shard_bytes=2**30).shards
    blocks = [input_block(shard, read_shard(shard, found.columns)) for shard in shards]
    items = [item for block in blocks for item in read_prepared(prepare_block(block, spec=spec))]
    return list(zip(rows_of(corpus), items, strict=True))


def test_prepare_takes_the_good_rows_and_names_what_is_wrong_with_the_others(
    tmp_path: Path,
) -> None:
    corpus = make_corpus(ROWS, seed=7)
    assert {path.name for path in tmp_path.iterdir()} == set()
    for row, item in prepared(corpus, tmp_path):
        if row["expected_error"] is None or row["task"] in FOUND_LATER:
            assert isinstance(item, Prepared), (row, item)
        else:
            assert isinstance(item, Failure), row
            assert item.code == row["expected_error"], (row, item)
    assert pq.read_table(tmp_path / "prompts-0.parquet") == corpus.files["prompts-0.parquet"]


def test_the_marker_reaches_the_engine_in_exactly_the_rows_that_kill_it(tmp_path: Path) -> None:
    marked = 0
    for row, item in prepared(make_corpus(ROWS, seed=7), tmp_path):
        kills = row["task"] == Poison.KILLS_ENGINE
        assert (isinstance(item, Prepared) and holds_marker(item.token_ids)) == kills
        marked += kills
    assert marked > 0


@pytest.mark.parametrize(
    ("tokens", "held"),
    [
        (MARKER_TOKENS, True),
        ((1, *MARKER_TOKENS, 2), True),
        ((MARKER_TOKENS[0], *MARKER_TOKENS), True),
        (MARKER_TOKENS[:-1], False),
        ((*MARKER_TOKENS[:-1], 0, MARKER_TOKENS[-1]), False),
        ((), False),
    ],
)
def test_the_marker_is_the_whole_sequence(tokens: tuple[int, ...], held: bool) -> None:
    assert holds_marker(list(tokens)) is held
