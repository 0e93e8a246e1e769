"""KV-cache arithmetic: the published figures of Llama 4, and what vLLM says of engines that ran."""

import json

import pytest

from pipeline.kv_cache import GB, KVLayout, pool_bytes
from pipeline.profile import REPO_ROOT, load_profile

MAVERICK = KVLayout(global_layers=12, chunked_layers=36, chunk=8192, kv_heads=8, head_dim=128)


@pytest.mark.parametrize(("element_bytes", "per_token"), [(2, 196_608), (1, 98_304)])
def test_a_token_of_maverick_takes_what_its_layers_and_heads_say(
    element_bytes: float, per_token: int
) -> None:
    assert MAVERICK.bytes_per_token(element_bytes) == per_token
    assert MAVERICK.bytes_per_sequence(8192, element_bytes) == 8192 * per_token


def test_beyond_a_chunk_only_the_global_layers_grow() -> None:
    chunk = MAVERICK.bytes_per_sequence(8192, 1)
    assert MAVERICK.bytes_per_sequence(2 * 8192, 1) - chunk == pytest.approx(chunk / 4)
    assert MAVERICK.bytes_per_sequence(2**20, 1) / GB == pytest.approx(26.4, abs=0.1)


def test_a_prompt_that_is_being_read_holds_what_is_in_flight_as_well() -> None:
    read, held = MAVERICK.bytes_per_sequence(2**20, 1, 32768), MAVERICK.bytes_per_sequence(2**20, 1)
    assert read - held == 36 * 32768 * 2048
    assert MAVERICK.bytes_per_sequence(100, 1, 32768) == MAVERICK.bytes_per_sequence(100, 1)


def test_as_many_sequences_fit_as_vllm_says_once_it_has_started() -> None:
    """vLLM 0.32 on these profiles: "Maximum concurrency for 4,096 tokens per request"."""
    smollm2, mini = load_profile("smollm2"), load_profile("mini-maverick-tp1")
    assert smollm2.sequences(4096) == 22  # 22.75x; 93,184 tokens
    assert mini.kv_cache is not None
    in_flight = mini.engine_args["max_num_batched_tokens"]
    one = mini.kv_cache.layout.bytes_per_sequence(4096, 4, in_flight)
    assert 2**30 / one == 128  # 128.00x
    in_half = load_profile("mini-maverick-tp1", overrides={"dtype": "bfloat16"})
    assert in_half.sequences(1024) == 2 * (mini.sequences(1024) or 0) == 1024


def test_the_profiles_of_mini_maverick_have_its_own_layout() -> None:
    config = json.loads((REPO_ROOT / "cluster/models/mini-maverick/config.json").read_text())
    text = config["text_config"]
    kinds = text["layer_types"]
    layout = KVLayout(
        global_layers=kinds.count("full_attention"),
        chunked_layers=kinds.count("chunked_attention"),
        chunk=text["attention_chunk_size"],
        kv_heads=text["num_key_value_heads"],
        head_dim=text["head_dim"],
    )
    for name in ("mini-maverick", "mini-maverick-tp1"):
        cache = load_profile(name).kv_cache
        assert cache is not None
        assert cache.layout == layout


def test_the_pool_is_what_weights_and_reserve_leave() -> None:
    left = pool_bytes(gpus=8, gpu_gb=141, utilization=0.92, weights_gb=430, reserve_gb=19)
    assert left / GB == pytest.approx(588.8, abs=0.1)
    assert pool_bytes(gpus=4, gpu_gb=80, utilization=0.9, weights_gb=430, reserve_gb=19) < 0


def test_a_pool_smaller_than_one_sequence_holds_none() -> None:
    assert MAVERICK.sequences(GB, 2**20, 1) == 0
