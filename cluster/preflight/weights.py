"""The model's files, compared between all nodes that can hold a replica.

In: what each node has (``weight_files``). Out: faults: each node's own, and files that are not the
same everywhere, which would have tokens depend on where a row was generated.
"""

from __future__ import annotations

from collections.abc import Mapping

from cluster.preflight.findings import Check, Fault, shared
from cluster.preflight.weight_files import ModelFile, Weights

_ABSENT = "absent"
_DIGITS = 12  # of a checksum, for people


def judge_weights(found: Mapping[str, Weights]) -> list[Fault]:
    """Faults of the model's files, by node name."""
    own = [(node, problem) for node, weights in found.items() for problem in weights.problems]
    present = {node: weights for node, weights in found.items() if weights.folder}
    return [*shared(Check.WEIGHTS, own), *_differences(present)]


def _differences(found: Mapping[str, Weights]) -> list[Fault]:
    files = {node: {file.name: file for file in weights.files} for node, weights in found.items()}
    names = sorted({name for each in files.values() for name in each})
    faults = []
    for name in names:
        states: dict[str, list[str]] = {}
        for node, each in files.items():
            states.setdefault(_state(each.get(name)), []).append(node)
        if len(states) > 1:
            faults.append(_unequal(name, states))
    return faults


def _state(file: ModelFile | None) -> str:
    if file is None:
        return _ABSENT
    checksum = f", SHA-256 {file.sha256[:_DIGITS]}" if file.sha256 else ""
    return f"{file.size} bytes{checksum}"


def _unequal(name: str, states: Mapping[str, list[str]]) -> Fault:
    fewest = min(len(nodes) for nodes in states.values())
    odd = tuple(node for nodes in states.values() if len(nodes) == fewest for node in nodes)
    told = "; ".join(f"{state} on {', '.join(nodes)}" for state, nodes in states.items())
    message = f"the model's {name} is not the same everywhere ({told})"
    return Fault(Check.WEIGHTS, odd, f"{message}; copy the model again, from one place")
