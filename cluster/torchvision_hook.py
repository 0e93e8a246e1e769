"""Import hook that lets a torchvision without its native library be imported.

PyPI's torchvision is a CUDA build. Beside a CPU torch its ``_C`` library cannot load, torchvision
then registers a meta kernel for an operator nobody declared, and dies with ``operator
torchvision::nms does not exist``; vLLM and transformers die with it. Nothing here needs those
operators, only their declarations.

``cluster.repair`` copies this file into site-packages and starts it from a ``.pth`` file, so it
acts in every process of the environment. It costs well under a millisecond at interpreter start:
torch is touched only after ``torchvision.extension`` has run and said that its library did not
load. An intact torchvision is left as it is.

Standard library only; it must not import anything of this project.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # `typing` itself takes milliseconds to import, in every process
if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

_WATCHED = "torchvision.extension"

_SCHEMAS = {
    "torchvision::nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "torchvision::qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


class TorchvisionFinder:
    """Meta-path finder for ``torchvision.extension`` alone; every other name costs one compare."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: ModuleType | None = None) -> Any:
        """Return the module's own spec with ``exec_module`` wrapped; None for any other name."""
        if name != _WATCHED:
            return None
        from importlib.machinery import PathFinder  # deferred: not paid at interpreter start

        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            _declare_after_loading(spec)
        return spec


def _declare_after_loading(spec: ModuleSpec) -> None:
    loader: Any = spec.loader
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        execute(module)
        has_ops = getattr(module, "_has_ops", None)
        if has_ops is not None and not has_ops():
            declare_missing_ops()

    loader.exec_module = exec_module


def declare_missing_ops() -> None:
    """Declare the schemas torchvision registers kernels for; calling them still fails, clearly."""
    import torch  # deferred: runs only inside `import torchvision`, which has imported torch

    library: Any = torch.library
    for name, schema in _SCHEMAS.items():
        library.define(name, schema)


def install() -> None:
    """Put the finder first on ``sys.meta_path``; a second call does nothing."""
    if TorchvisionFinder not in sys.meta_path:
        sys.meta_path.insert(0, TorchvisionFinder)
