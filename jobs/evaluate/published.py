"""Scores published for Llama 4 Maverick, to be shown beside ours.

Of the model card as far as it says base or instruct; the two that hosts quote do not say. A score
is comparable only where model, prompts, examples and metric are the same: the report shows ours.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

_CARD = "Llama 4 Maverick's model card"
_HOSTS = "quoted by hosts of Llama 4 Maverick"


@dataclass(frozen=True, slots=True)
class Published:
    """A published score."""

    percent: float
    model: str
    """``base``, ``instruct`` or ``not stated``."""
    source: str
    metric: str
    """lm-eval's metric that it is to be compared with."""
    settings: str = "not stated"
    """How it was asked, as far as that is published."""

    def to_json(self) -> dict[str, Any]:
        """As evaluation.json has it."""
        return asdict(self)


_MMLU_PRO = Published(80.5, "instruct", _CARD, "exact_match")
_HUMANEVAL = Published(86.0, "not stated", _HOSTS, "pass@1")
_MATH = Published(73.5, "not stated", f"{_HOSTS}; the card has 61.2 for base", "exact_match")
_CHARTQA = Published(90.0, "instruct", _CARD, "relaxed_accuracy")

PUBLISHED = {
    "mmlu": Published(85.5, "base", _CARD, "acc", "5-shot"),
    "mmlu_pro": _MMLU_PRO,
    "humaneval": _HUMANEVAL,
    "humaneval_instruct": _HUMANEVAL,
    "hendrycks_math": _MATH,
    "minerva_math": _MATH,
    "chartqa": _CHARTQA,
    "chartqa_llama": _CHARTQA,
    "chartqa_llama_90": _CHARTQA,
    "docvqa": Published(94.4, "instruct", _CARD, "anls"),
}
"""By lm-eval's name of the task. lm-eval has no docvqa, so that number has no partner yet."""
