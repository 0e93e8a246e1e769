"""Seeds: fixed by (run seed, custom_id, sample index) for ever, and different for each."""

from pipeline.seeds import derive_seed, sample_seed


def test_a_seed_never_changes_between_versions() -> None:
    assert derive_seed(20261122, "row-1", 0) == 4181708068671367779
    assert derive_seed(0, "", 0) == 5216689652456017177


def test_every_part_of_the_identity_counts() -> None:
    seeds = {
        derive_seed(run, custom_id, sample)
        for run in (1, 2)
        for custom_id in ("a", "b", "a\x00", "ü", "\ud800")
        for sample in (0, 1)
    }
    assert len(seeds) == 2 * 5 * 2


def test_seeds_fit_a_signed_64_bit_integer_and_do_not_collide() -> None:
    seeds = [derive_seed(7, f"row-{i}", 0) for i in range(20_000)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_samples_of_a_row_with_a_seed_have_seeds_of_their_own_and_none_is_minus_one() -> None:
    assert [sample_seed(7, index) for index in range(3)] == [7, 8, 9]
    assert sample_seed(2**63 - 1, 1) == 0
    assert [sample_seed(-3, index) for index in range(4)] == [-3, -2, 0, 1]
    assert sample_seed(-(2**63), 0) == -(2**63)
