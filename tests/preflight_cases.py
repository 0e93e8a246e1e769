"""Nodes, facts and a crew for the preflight's tests: each is sound, until a test plants a fault."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from cluster.preflight.crew import Node, Unanswered
from pipeline.capacity import NodeCapacity

T = TypeVar("T")

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def cpu_node(name: str, *, held_cpus: float = 0, memory_gib: float = 16) -> Node:
    """A node without GPUs."""
    capacity = NodeCapacity(name, cpus=4, gpus=0, memory_gib=memory_gib)
    return Node(f"id-{name}", name, "127.0.0.1", capacity, 0.3, held_cpus=held_cpus)


def gpu_node(name: str, *, gpus: int = 8, held_gpus: float = 0) -> Node:
    """A node with 8 H100, as far as Ray counts."""
    capacity = NodeCapacity(name, cpus=208, gpus=gpus, memory_gib=1800, accelerator="H100")
    return Node(f"id-{name}", name, "10.0.0.1", capacity, 200, held_gpus=held_gpus)


class HereCrew:
    """Nodes that are all this process, each question in a thread of its own.

    ``planted`` has answers by node name and the name of the function that is asked; a planted
    function is called with the question's positional arguments.
    """

    def __init__(
        self,
        nodes: Sequence[Node],
        planted: Mapping[tuple[str, str], Any] | None = None,
        *,
        grows: bool = False,
    ) -> None:
        self.nodes = nodes
        self.grows = grows
        self.asked: list[tuple[str, str]] = []
        self._planted = planted or {}
        self._names = {node.id: node.name for node in nodes}

    def ask(
        self, questions: Mapping[str, Callable[[], T]], *, timeout_s: float, gpus: int = 0
    ) -> dict[str, T | Unanswered]:
        """As ``Crew.ask``, without its limit."""
        if not questions:
            return {}
        with ThreadPoolExecutor(len(questions)) as pool:
            answers = pool.map(self._answer, questions, questions.values())
            return dict(zip(questions, answers, strict=True))

    def _answer(self, node: str, question: Callable[[], Any]) -> Any:
        key = (self._names[node], getattr(question, "func", question).__name__)
        self.asked.append(key)
        if key not in self._planted:
            return question()
        planted = self._planted[key]
        return planted(*getattr(question, "args", ())) if callable(planted) else planted


def put_tensors(path: Path, names: Sequence[str], *, fill: bytes = b"\1") -> None:
    """A sound safetensors file with four bytes for each tensor."""
    header = {
        name: {"dtype": "F32", "shape": [1], "data_offsets": [4 * at, 4 * at + 4]}
        for at, name in enumerate(names)
    }
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + fill * 4 * len(names))


def put_model(folder: Path) -> Path:
    """A model in two files with an index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama4"}')
    files = {
        "model-00001-of-00002.safetensors": ["a", "b"],
        "model-00002-of-00002.safetensors": ["c"],
    }
    for name, tensors in files.items():
        put_tensors(folder / name, tensors)
    places = {tensor: name for name, tensors in files.items() for tensor in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder
