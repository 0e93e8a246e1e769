"""pipeline.vllm_cpu_routing: what the CPU's runner tells the connector, with stand-ins for both.

That the real ones fit is tests/integration/test_requests.py and test_expert_parallel.py.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipeline import vllm_cpu_routing as routing


class Config:
    """As far as vLLM's check reads it."""

    def __init__(self, *, stages: int = 1) -> None:
        self.use_v2_model_runner = False
        self.stages = stages

    def verify(self) -> str:
        if not self.use_v2_model_runner:
            raise ValueError("requires Model Runner V2")
        if self.stages > 1:
            raise ValueError("incompatible with pipeline parallelism")
        return "verified"


def test_only_the_runner_is_not_held_against_a_config() -> None:
    verify = routing.with_the_v1_runner_accepted(Config.verify)
    with pytest.raises(ValueError, match="Runner V2"):
        Config().verify()
    config = Config()
    assert verify(config) == "verified"
    assert config.use_v2_model_runner is False
    with pytest.raises(ValueError, match="pipeline parallelism"):
        verify(Config(stages=2))


class Pending:
    """A step's snapshot."""

    def __init__(self, step: Any) -> None:
        self.step = step
        self.sampled: list[int] = []
        self.rejected: list[int] = []

    def enqueue_cpu_copy(self, num_sampled: np.ndarray, num_rejected: np.ndarray) -> None:
        self.sampled, self.rejected = num_sampled.tolist(), num_rejected.tolist()

    def process_output(self) -> dict[str, Any]:
        return {"starts": self.step.num_computed_tokens_np.tolist(), "sampled": self.sampled}


class Connector:
    """Notes what it is told; ``hands_over`` as the first rank does."""

    def __init__(self, *, hands_over: bool = True) -> None:
        self.hands_over = hands_over
        self.begun: list[Any] = []
        self.steps: list[Any] = []

    def begin_step(self, metadata: Any) -> None:
        self.begun.append(metadata)

    def prepare_output(self, step: Any) -> Pending | None:
        self.steps.append(step)
        return Pending(step) if self.hands_over else None


class Runner:
    """Two rows: one is being read, one gets its next token."""

    def __init__(self, connector: Connector | None = None) -> None:
        if connector is not None:
            self.aux_output_connector = connector
        self.execute_model_state: object | None = None
        self.query_start_loc = SimpleNamespace(np=np.array([0, 7, 8, 99, 99]))
        self.input_batch = SimpleNamespace(
            num_reqs=2, req_ids=["a", "b"], num_computed_tokens_cpu=np.array([0, 41, 5, 5])
        )

    def execute_model(self, scheduler_output: Any) -> str:
        self.execute_model_state = object()
        return "executed"

    def sample_tokens(self) -> Any:
        self.execute_model_state = None
        self.input_batch.num_computed_tokens_cpu[:] = 100  # as the next step would
        return SimpleNamespace(sampled_token_ids=[[], [13]], aux_output_connector_output=None)


EXECUTE = routing.with_step_begun(Runner.execute_model)
SAMPLE = routing.with_routed_experts(Runner.sample_tokens)
STEP = SimpleNamespace(aux_output_connector_metadata="metadata")


def test_a_steps_rows_are_told_as_they_were_before_its_tokens_were_drawn() -> None:
    connector = Connector()
    runner = Runner(connector)
    assert EXECUTE(runner, STEP) == "executed"
    assert connector.begun == ["metadata"]
    output = SAMPLE(runner)
    (step,) = connector.steps
    assert step.req_ids == ["a", "b"]
    assert step.query_start_loc_np.tolist() == [0, 7, 8]
    assert output.aux_output_connector_output == {"starts": [0, 41], "sampled": [0, 1]}


def test_a_rank_that_hands_nothing_over_leaves_the_output_as_it_is() -> None:
    runner = Runner(Connector(hands_over=False))
    EXECUTE(runner, STEP)
    assert SAMPLE(runner).aux_output_connector_output is None


def test_a_step_without_rows_draws_nothing_and_tells_nothing() -> None:
    connector = Connector()
    assert SAMPLE(Runner(connector)).sampled_token_ids == [[], [13]]
    assert connector.steps == []


def test_without_the_argument_nothing_changes() -> None:
    runner = Runner()
    assert EXECUTE(runner, object()) == "executed"
    assert SAMPLE(runner).aux_output_connector_output is None


def test_routers_are_not_listened_to_unless_the_argument_is_set() -> None:
    off = SimpleNamespace(aux_output_config=SimpleNamespace(enabled=False))
    runner = SimpleNamespace(vllm_config=off)
    initialize = routing.with_connector(lambda self, config: f"initialized with {config}")
    assert initialize(runner, "groups") == "initialized with groups"
    assert not hasattr(runner, "aux_output_connector")
