"""Prices: amounts worked out by hand, and lists that are wrong in one way or another."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline.config import PricesSection, parse_config
from pipeline.errors import ConfigError
from pipeline.prices import HostedPrice, PriceList, Usage, hosted_cost, load_prices, money
from pipeline.profile import EngineProfile, load_profile
from pipeline.read import open_input
from pipeline.run import Run, open_run

USAGE = Usage(
    prompt_tokens=3_000_000,
    image_tokens=1_000_000,
    completion_tokens=2_000_000,
    images=5_000,
    seconds=5_400,
)


@pytest.fixture
def h100() -> EngineProfile:
    return load_profile("maverick-fp8-8xh100")


def hosted(**changes: Any) -> HostedPrice:
    document = {"name": "x", "input_per_million": 0.17, "output_per_million": 0.85}
    return HostedPrice.model_validate({**document, "as_of": "2026-11-22", **changes})


def test_images_are_charged_by_the_thousand_and_their_tokens_not_again() -> None:
    found = hosted_cost(hosted(per_1000_images=0.6684), USAGE)
    assert found == pytest.approx(2 * 0.17 + 2 * 0.85 + 5 * 0.6684)


def test_without_a_price_of_images_their_tokens_are_input() -> None:
    assert hosted_cost(hosted(), USAGE) == pytest.approx(3 * 0.17 + 2 * 0.85)


def test_the_clusters_cost_is_replicas_times_gpus_times_hours(h100: EngineProfile) -> None:
    prices = load_prices(PricesSection(gpu_hour=2.0))
    found = money(prices, h100, 3, USAGE)
    assert found["currency"] == "USD"
    assert found["cluster"] == {"gpu_hours": 36.0, "gpu_hour_price": 2.0, "cost": 72.0}
    assert [set(each) for each in found["hosted"]] == [{"name", "cost", "as_of"}] * 2


def test_the_shipped_list_knows_the_shipped_profiles_gpus_and_the_owners_prices(
    h100: EngineProfile,
) -> None:
    prices = load_prices(PricesSection())
    assert prices.of_gpu(h100.needs) == prices.gpu_hour["H100"].price
    assert prices.of_gpu(load_profile("maverick-fp8-8xh200").needs) is not None
    first = prices.hosted[0]
    assert (first.input_per_million, first.output_per_million) == (0.17, 0.85)
    assert first.per_1000_images == 0.6684


def test_no_gpus_and_gpus_without_a_price_cost_nothing_that_could_be_told(
    h100: EngineProfile,
) -> None:
    own = load_prices(PricesSection(gpu_hour=2.0))
    assert money(own, load_profile("mini-maverick-tp1"), 1, USAGE)["cluster"] is None
    assert money(PriceList(), h100, 1, USAGE)["cluster"] is None


def test_a_list_of_ones_own(tmp_path: Path, h100: EngineProfile) -> None:
    path = tmp_path / "mine.yaml"
    mine = {"currency": "EUR", "gpu_hour": {"H100": {"price": 1.5, "as_of": "2026-11-01"}}}
    path.write_text(yaml.safe_dump(mine))
    found = money(load_prices(PricesSection(file=str(path))), h100, 1, USAGE)
    assert found == {
        "currency": "EUR",
        "cluster": {"gpu_hours": 12.0, "gpu_hour_price": 1.5, "cost": 18.0},
        "hosted": [],
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "No such file"),
        ("- 1", "must be a mapping"),
        ("hosted: [", "while parsing"),
        ("own_gpu_hour: 1", "must be a mapping like"),
        ("gpu_hours: {}", "unknown key 'gpu_hours'; did you mean 'gpu_hour'"),
        ("gpu_hour: {H100: {price: -1, as_of: 2026-11-22}}", "gpu_hour.H100.price"),
        ("gpu_hour: {H100: {price: 1}}", "as_of"),
    ],
)
def test_a_broken_list_is_named_with_its_file(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "prices.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_prices(PricesSection(file=str(path)))
    assert str(path) in str(caught.value)
    assert words in str(caught.value)


def test_other_prices_are_no_other_run(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["Hi"]}), tmp_path / "a.parquet")

    def look(**prices: Any) -> Run:
        document = {
            "input": {"uri": f"{tmp_path}/a.parquet"},
            "output": {"uri": f"{tmp_path}/out"},
            "engine": {"profile": "mini-maverick-tp1"},
            "prices": prices,
        }
        config = parse_config(document, source="test")
        found = open_input(config.input.uri, renamed={}, carry=None)
        return open_run(config, load_profile(config.engine.profile), found)

    look(gpu_hour=1).start()
    assert look(gpu_hour=2).exists
