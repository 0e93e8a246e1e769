"""Engine profiles: how to run one model on one kind of hardware, and what that takes.

In: a name (``cluster/engines/<name>.yaml``) or a path, and overrides of engine arguments. Out: a
frozen ``EngineProfile``. Argument names are checked against vLLM's own, read from its source
without importing it, so that a typing error costs milliseconds and no GPU.
"""

from __future__ import annotations

import ast
import logging
import os
from collections.abc import Mapping
from difflib import get_close_matches
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.errors import ConfigError
from pipeline.validation import describe

log = logging.getLogger(__name__)

REPO_ROOT = Path(__file__).resolve().parents[1]
_PROFILES = REPO_ROOT / "cluster" / "engines"
_REQUIRED_ARGUMENTS = ("max_model_len", "max_num_seqs", "max_num_batched_tokens")
"""AsyncLLM's defaults for these are small or depend on the hardware: a profile states them."""
_PARALLEL_SIZES = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
_OURS = ("model", "revision")
"""Engine arguments that have a place of their own in the profile."""
_CACHE_SCHEME = "cache://"
_LOAD_FORMATS = (
    "auto",
    "safetensors",
    "fastsafetensors",
    "instanttensor",
    "mistral",
    "runai_streamer",
    "runai_streamer_sharded",
    "sharded_state",
    "dummy",
)
"""vLLM's load formats that read safetensors or nothing. Of the others, some unpickle."""
_PICKLED = frozenset({".bin", ".pt", ".pth", ".ckpt"})


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Needs(_Section):
    """What one replica takes from the cluster."""

    nodes: Annotated[int, Field(ge=1)] = 1
    """Nodes one replica spans."""
    gpus_per_node: Annotated[int, Field(ge=0)] = 0
    """GPUs on each of them."""
    cpus_per_node: Annotated[int, Field(ge=1)]
    """CPUs on each of them: engine processes, tokenizer, image processing."""
    memory_gib_per_node: Annotated[float, Field(gt=0)]
    """Main memory on each of them, GiB."""
    accelerator: str | None = None
    """Kind of GPU as Ray names it, e.g. H100; null: any, or none."""


class EngineProfile(_Section):
    """One model on one kind of hardware."""

    description: str
    """One line for people."""
    model: Annotated[str, Field(min_length=1)]
    """A folder (relative: to the repo), ``cache://<name>`` or a hub id."""
    revision: str | None = None
    """Hub revision; null for folders."""
    engine_args: dict[str, Any]
    """vLLM's AsyncEngineArgs by their own names."""
    env: dict[str, str] = {}
    """Environment of the engine's processes."""
    needs: Needs
    """What one replica takes from the cluster."""
    verified: str
    """On what hardware and versions this profile was run, or that it was not."""

    @property
    def tensor_parallel_size(self) -> int:
        """GPUs (or CPU processes) one layer is split over."""
        return int(self.engine_args.get("tensor_parallel_size", 1))

    @property
    def pipeline_parallel_size(self) -> int:
        """Stages the layers are split into."""
        return int(self.engine_args.get("pipeline_parallel_size", 1))

    @property
    def data_parallel_size(self) -> int:
        """Copies of the attention layers in the one engine."""
        return int(self.engine_args.get("data_parallel_size", 1))

    @property
    def expert_parallel_size(self) -> int:
        """Ranks the experts are spread over: TP x DP with expert parallelism, else 1."""
        if not self.engine_args.get("enable_expert_parallel", False):
            return 1
        return self.tensor_parallel_size * self.data_parallel_size

    @property
    def ranks(self) -> int:
        """Worker processes of the engine: TP x PP x DP."""
        return self.tensor_parallel_size * self.pipeline_parallel_size * self.data_parallel_size

    @model_validator(mode="after")
    def _check(self) -> EngineProfile:
        missing = [name for name in _REQUIRED_ARGUMENTS if name not in self.engine_args]
        if missing:
            raise ValueError(f"engine_args must set {', '.join(missing)}")
        _check_arguments(self.engine_args)
        _check_brings_no_code(self.engine_args)
        for name in (*_REQUIRED_ARGUMENTS, *_PARALLEL_SIZES):
            value = self.engine_args.get(name, 1)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"engine_args.{name} = {value!r}: must be a whole number from 1")
        gpus = self.needs.nodes * self.needs.gpus_per_node
        if gpus and gpus != self.ranks:
            raise ValueError(
                f"needs {self.needs.nodes} x {self.needs.gpus_per_node} GPUs, but the engine has "
                f"{self.ranks} ranks (TP x PP x DP)"
            )
        return self


def load_profile(name_or_path: str, *, overrides: Mapping[str, Any] | None = None) -> EngineProfile:
    """The profile of that name or path, with engine arguments replaced by ``overrides``.

    Raises:
        ConfigError: unknown profile, unknown key or argument, or values that do not fit together.
    """
    path = _profile_path(name_or_path)
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}.") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: must be a YAML mapping.")
    arguments = {**(document.get("engine_args") or {}), **(overrides or {})}
    try:
        return EngineProfile.model_validate({**document, "engine_args": arguments})
    except ValidationError as error:
        raise ConfigError(f"{path}: {describe(error, EngineProfile)}") from None


def profile_names() -> list[str]:
    """Names of the profiles that come with the project."""
    return sorted(path.stem for path in _PROFILES.glob("*.yaml"))


def locate_model(model: str) -> str:
    """``model`` as this node finds it: an absolute folder, or a hub id unchanged.

    Raises:
        ConfigError: a ``cache://`` model that was not made on this node, or a folder whose only
            weights are pickled.
    """
    if model.startswith(_CACHE_SCHEME):
        return str(_without_pickles(_cached_model(model.removeprefix(_CACHE_SCHEME))))
    inside = REPO_ROOT / model
    if inside.is_dir():
        return str(_without_pickles(inside))
    if not Path(model).is_absolute() and model.count("/") != 1:  # hub ids are owner/name
        raise ConfigError(f"model {model}: there is no such folder in {REPO_ROOT}.")
    return model


def cache_folder() -> Path:
    """Where converted models are kept: in ``$XDG_CACHE_HOME``, else in ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "maverick-batch"


def _cached_model(name: str) -> Path:
    folder = cache_folder() / name
    if not folder.is_dir():
        raise ConfigError(
            f"model {_CACHE_SCHEME}{name} is not in {folder.parent}; make it with "
            f"`python -m cluster.models.{name.split('-', 1)[0]}`."
        )
    return folder


def _without_pickles(folder: Path) -> Path:
    """``folder``, unless vLLM would fall back to unpickling weights there."""
    files = list(folder.iterdir())
    pickled = sorted(path.name for path in files if path.suffix in _PICKLED)
    if pickled and not any(path.suffix == ".safetensors" for path in files):
        raise ConfigError(
            f"model {folder}: {pickled[0]} is a pickle, which can run code as it is loaded; "
            "convert the weights to safetensors."
        )
    return folder


def _profile_path(name_or_path: str) -> Path:
    if "/" in name_or_path or name_or_path.endswith((".yaml", ".yml")):
        path = Path(name_or_path)
        if not path.is_file():
            raise ConfigError(f"engine.profile {name_or_path}: no such file.")
        return path
    path = _PROFILES / f"{name_or_path}.yaml"
    if not path.is_file():
        known = profile_names()
        close = get_close_matches(name_or_path, known, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ConfigError(
            f"engine.profile {name_or_path!r} is unknown; {hint}Known are {', '.join(known)}."
        )
    return path


def _check_arguments(arguments: Mapping[str, Any]) -> None:
    for name in _OURS:
        if name in arguments:
            raise ValueError(f"engine_args.{name}: set the profile's own key '{name}' instead")
    known = vllm_argument_names()
    if known is None:
        log.warning("vLLM is not installed here: the names of engine arguments are not checked")
        return
    for name in arguments:
        if name not in known:
            close = get_close_matches(name, sorted(known), n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"vLLM has no engine argument {name!r}{hint}")


def _check_brings_no_code(arguments: Mapping[str, Any]) -> None:
    if arguments.get("trust_remote_code", False) is not False:
        raise ValueError(
            "engine_args.trust_remote_code: models bring no code here; leave it out, and take a "
            "model that vLLM knows itself"
        )
    load_format = arguments.get("load_format", "auto")
    if load_format not in _LOAD_FORMATS:
        raise ValueError(
            f"engine_args.load_format = {load_format!r} may run code of the weights' files; "
            f"convert them to safetensors and use one of {', '.join(_LOAD_FORMATS)}"
        )


@lru_cache(maxsize=1)
def vllm_argument_names() -> frozenset[str] | None:
    """Fields of vLLM's EngineArgs and AsyncEngineArgs, by parsing its source; None without vLLM."""
    package = find_spec("vllm")
    if package is None or not package.submodule_search_locations:
        return None
    source = Path(package.submodule_search_locations[0]) / "engine" / "arg_utils.py"
    tree = ast.parse(source.read_text(encoding="utf-8"))
    return frozenset(
        statement.target.id
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name in ("EngineArgs", "AsyncEngineArgs")
        for statement in node.body
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
    )
