"""pipeline.vllm_cpu: expert-id mapping against a dense reference, and the guards around a patch.

Needs torch, not vLLM: stand-ins take the place of vLLM's classes. That the replaced methods make
the real engine right is tests/integration/test_expert_parallel.py.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from pipeline import vllm_cpu  # noqa: E402  (after the skip)

TOKENS, WIDTH, EXPERTS, HIDDEN = 17, 8, 6, 12


class Experts:
    """A dense MoE: gated MLPs without bias, computed one token at a time."""

    def __init__(self, ids: list[int]) -> None:
        generator = torch.Generator().manual_seed(1)
        gates = torch.randn(EXPERTS, HIDDEN, WIDTH, generator=generator, dtype=torch.float64)
        ups = torch.randn(EXPERTS, HIDDEN, WIDTH, generator=generator, dtype=torch.float64)
        downs = torch.randn(EXPERTS, WIDTH, HIDDEN, generator=generator, dtype=torch.float64)
        self.gates, self.ups, self.downs = gates[ids], ups[ids], downs[ids]

    def __call__(self, hidden: Any, weights: Any, ids: Any, *, weight_on_input: bool) -> Any:
        output = torch.zeros_like(hidden)
        for token in range(hidden.shape[0]):
            for slot in range(ids.shape[1]):
                expert = int(ids[token, slot])
                assert 0 <= expert < len(self.gates), "a kernel would read past its weights"
                weight = 1.0 if weight_on_input else weights[token, slot]
                output[token] += weight * self._mlp(expert, hidden[token])
        return output

    def _mlp(self, expert: int, row: Any) -> Any:
        gate = torch.nn.functional.silu(self.gates[expert] @ row)
        return self.downs[expert] @ (gate * (self.ups[expert] @ row))


def expert_map(local: list[int]) -> Any:
    mapped = torch.full((EXPERTS,), -1, dtype=torch.int32)
    for position, expert in enumerate(local):
        mapped[expert] = position
    return mapped


def make_input(top_k: int) -> tuple[Any, Any, Any]:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    weights = torch.rand(TOKENS, top_k, generator=generator, dtype=torch.float64)
    order = torch.rand(TOKENS, EXPERTS, generator=generator).argsort(dim=1)
    return hidden, weights, order[:, :top_k].to(torch.int32)


@pytest.mark.parametrize(("top_k", "weight_on_input"), [(1, True), (1, False), (2, False)])
@pytest.mark.parametrize("ranks", [[[0, 1, 2], [3, 4, 5]], [[0, 2, 4], [1, 3], [5]]])
def test_sum_over_ranks_equals_all_experts_in_one_place(
    top_k: int, weight_on_input: bool, ranks: list[list[int]]
) -> None:
    hidden, weights, ids = make_input(top_k)
    expected = Experts(list(range(EXPERTS)))(hidden, weights, ids, weight_on_input=weight_on_input)
    total = torch.zeros_like(expected)
    for local in ranks:
        mapped = vllm_cpu.localize(
            hidden, weights, ids, expert_map(local), weight_on_input=weight_on_input
        )
        total += Experts(local)(*mapped, weight_on_input=weight_on_input)
    torch.testing.assert_close(total, expected)


def test_mapping_keeps_the_id_type_and_leaves_its_arguments_alone() -> None:
    hidden, weights, ids = make_input(1)
    before = [item.clone() for item in (hidden, weights, ids)]
    _, _, local = vllm_cpu.localize(hidden, weights, ids, expert_map([1, 3]), weight_on_input=True)
    assert local.dtype == ids.dtype
    for item, copy in zip((hidden, weights, ids), before, strict=True):
        assert torch.equal(item, copy)


class StandInExperts:
    """Same signature as the method of vLLM 0.32, as far as the wrapper reads it."""

    w1_bias: Any = None
    w2_bias: Any = None

    def apply(
        self,
        output: Any,
        hidden_states: Any,
        topk_weights: Any,
        topk_ids: Any,
        expert_map: Any,
        apply_router_weight_on_input: bool,
    ) -> None:
        output.append((hidden_states, topk_weights, topk_ids))


def replacement(owner: type, *, lacks: tuple[str, ...] = ()) -> vllm_cpu.Replacement:
    return vllm_cpu.Replacement(
        owner, "apply", ("output.append",), lacks, vllm_cpu.with_local_experts
    )


def fresh_owner() -> type:
    return type("Owner", (StandInExperts,), {"apply": StandInExperts.apply})


def test_replaced_method_maps_positional_and_keyword_calls_alike() -> None:
    owner = fresh_owner()
    assert vllm_cpu.replace(replacement(owner)) is None
    hidden, weights, ids = make_input(1)
    mapping = expert_map([0, 1, 2])
    seen: list[Any] = []
    owner().apply(seen, hidden, weights, ids, mapping, True)
    owner().apply(
        output=seen,
        hidden_states=hidden,
        topk_weights=weights,
        topk_ids=ids,
        expert_map=mapping,
        apply_router_weight_on_input=True,
    )
    assert torch.equal(seen[0][2], seen[1][2])
    assert int(seen[0][2].max()) <= 2


def test_without_expert_map_the_call_passes_through_untouched() -> None:
    owner = fresh_owner()
    vllm_cpu.replace(replacement(owner))
    hidden, weights, ids = make_input(1)
    seen: list[Any] = []
    owner().apply(seen, hidden, weights, ids, None, True)
    assert seen[0][0] is hidden
    assert seen[0][2] is ids


def test_biased_experts_are_refused_rather_than_computed_wrongly() -> None:
    owner = fresh_owner()
    vllm_cpu.replace(replacement(owner))
    hidden, weights, ids = make_input(1)
    experts = owner()
    experts.w1_bias = torch.ones(1)
    with pytest.raises(NotImplementedError, match="enable_expert_parallel"):
        experts.apply([], hidden, weights, ids, expert_map([0]), True)


def test_method_is_replaced_once() -> None:
    owner = fresh_owner()
    vllm_cpu.replace(replacement(owner))
    once = owner.apply  # type: ignore[attr-defined]
    assert vllm_cpu.replace(replacement(owner)) is None
    assert owner.apply is once  # type: ignore[attr-defined]


def test_method_that_is_not_as_expected_is_left_alone() -> None:
    owner = fresh_owner()
    original = owner.apply  # type: ignore[attr-defined]
    wrong_has = vllm_cpu.Replacement(owner, "apply", ("no such text",), (), lambda f: f)
    assert "no longer has `no such text`" in str(vllm_cpu.replace(wrong_has))
    assert "now has `topk_ids`" in str(vllm_cpu.replace(replacement(owner, lacks=("topk_ids",))))
    assert owner.apply is original  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("version", "verified"),
    [("0.32.0", True), ("0.32.1+cpu", True), ("0.31.9", False), ("0.33.0", False), ("0.3", False)],
)
def test_only_versions_this_was_run_with_are_patched(version: str, verified: bool) -> None:
    assert vllm_cpu.is_verified(version) is verified


class TransposingConvolution:
    """Stand-in for the vision tower's first layer: records how its input lies in memory."""

    def __init__(self) -> None:
        self.contiguous: list[bool] = []

    def unfold(self, tile: Any) -> Any:
        return tile

    def linear(self, patches: Any) -> tuple[Any, None]:
        self.contiguous.append(patches.is_contiguous())
        return patches, None


def test_patches_are_contiguous_and_equal_to_the_transposed_view() -> None:
    layer = TransposingConvolution()
    tile = torch.arange(24.0).reshape(1, 4, 6)
    forward = vllm_cpu.with_contiguous_input(lambda self, hidden_states: None)
    assert torch.equal(forward(layer, tile), tile.permute(0, 2, 1))
    assert layer.contiguous == [True]


class StandInRunner:
    """The runner's batch of four rows, of which all but the second have a generator."""

    def __init__(self) -> None:
        self.input_batch = SimpleNamespace(num_reqs=4, generators={0: "a", 2: "c", 3: "d"})
        self.discard_request_mask = SimpleNamespace(np=np.array([False, True, True, False, True]))

    def sample(self, fail: bool) -> dict[int, str]:
        if fail:
            raise ValueError
        return dict(self.input_batch.generators)


def test_generators_of_rows_whose_prompt_is_not_read_are_out_of_sight_and_come_back() -> None:
    runner = StandInRunner()
    sample = vllm_cpu.without_generators_of_unread_prompts(StandInRunner.sample)
    assert sample(runner, fail=False) == {0: "a", 3: "d"}
    assert runner.input_batch.generators == {0: "a", 2: "c", 3: "d"}
    with pytest.raises(ValueError):
        sample(runner, fail=True)
    assert runner.input_batch.generators == {0: "a", 2: "c", 3: "d"}
