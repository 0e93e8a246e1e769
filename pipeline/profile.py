"""Engine profiles: how to run one model on one kind of hardware, and what that takes.

In: a name (``cluster/engines/<name>.yaml``) or a path, and overrides of engine arguments. Out: a
frozen ``EngineProfile``. Argument names are checked against vLLM's own, read from its source
without importing it, so that a typing error costs milliseconds and no GPU.
"""

from __future__ import annotations

import ast
import logging
import os
import re
from collections.abc import Mapping
from datetime import date
from difflib import get_close_matches
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.engine_code import check_engine_code
from pipeline.engine_rules import check_block_size, check_experts, expert_ranks
from pipeline.errors import ConfigError
from pipeline.installed import installed_tree
from pipeline.kv_cache import GB, KVLayout, pool_bytes
from pipeline.validation import describe

log = logging.getLogger(__name__)

REPO_ROOT = Path(__file__).resolve().parents[1]
_PROFILES = REPO_ROOT / "cluster" / "engines"
_REQUIRED_ARGUMENTS = ("max_model_len", "max_num_seqs", "max_num_batched_tokens")
"""AsyncLLM's defaults for these are small or depend on the hardware: a profile states them."""
_PARALLEL_SIZES = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
_OURS = ("model", "revision")
"""Engine arguments that have a place of their own in the profile."""
_PLACED = (
    "nnodes",
    "node_rank",
    "master_addr",
    "master_port",
    "data_parallel_address",
    "data_parallel_rank",
    "data_parallel_rpc_port",
    "data_parallel_size_local",
    "data_parallel_start_rank",
    "placement_group",
)
"""Engine arguments that follow from where a replica is put (``EngineSpec.on_node``)."""
_BACKENDS = ("distributed_executor_backend", "data_parallel_backend")
_VLLM_GPU_SHARE = 0.92
"""vLLM 0.32's own default of ``gpu_memory_utilization``."""
_TUNING = "attn_temperature_tuning"
_UNTUNED_TOKENS = 32768
"""Longest context of Llama 4 that needs no such tuning."""
FLOAT32 = ("float", "float32")
"""vLLM's names of the type whose elements take 4 bytes."""
_CACHE_SCHEME = "cache://"
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

    @property
    def gpus(self) -> int:
        """GPUs on all of its nodes."""
        return self.nodes * self.gpus_per_node


class Rates(_Section):
    """How fast one replica is, and where that is known from; ``jobs.plan`` counts with it."""

    basis: Literal["measured", "estimate"]
    """Whether somebody saw these rates on that hardware, or worked them out."""
    prompt_tokens_per_s: Annotated[float, Field(gt=0)]
    """Prompt tokens a second, image tokens included, while it does nothing else."""
    completion_tokens_per_s: Annotated[float, Field(gt=0)]
    """Completion tokens a second with the engine full."""
    load_s: Annotated[float, Field(ge=0)]
    """Seconds from a job's start to the first token of its first replica."""
    hardware: Annotated[str, Field(min_length=1)]
    """What one replica ran on, or would."""
    source: Annotated[str, Field(min_length=1)]
    """Who measured what, or from what it was worked out."""
    as_of: date
    """When that was."""


class KVCache(_Section):
    """What the engine's KV cache holds; ``max_num_seqs`` was chosen with it (see ``kv_cache``)."""

    global_layers: Annotated[int, Field(ge=1)]
    """Layers that keep the whole context."""
    chunked_layers: Annotated[int, Field(ge=0)] = 0
    """Layers that keep ``chunk`` tokens at most."""
    chunk: Annotated[int, Field(ge=0)] = 0
    """``attention_chunk_size`` of the model."""
    kv_heads: Annotated[int, Field(ge=1)]
    head_dim: Annotated[int, Field(ge=1)]
    gpu_gb: Annotated[float, Field(ge=0)] = 0
    """Memory of one GPU, GB; 0: a CPU, whose cache is VLLM_CPU_KVCACHE_SPACE GiB per process."""
    weights_gb: Annotated[float, Field(ge=0)] = 0
    """Weights on all GPUs of a replica, copies of data-parallel ranks included, GB."""
    reserve_gb: Annotated[float, Field(ge=0)] = 0
    """Activations, CUDA graphs and vision tower on all GPUs of a replica, GB."""
    sequence_tokens: Annotated[int, Field(ge=1)]
    """Length at which all of ``max_num_seqs`` must fit; longer rows run fewer at a time."""

    @property
    def layout(self) -> KVLayout:
        """How the model keeps keys and values."""
        return KVLayout(
            global_layers=self.global_layers,
            chunked_layers=self.chunked_layers,
            chunk=self.chunk,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
        )


class EngineProfile(_Section):
    """One model on one kind of hardware."""

    description: str
    """One line for people."""
    model: Annotated[str, Field(min_length=1)]
    """A folder (relative: to the repo, else to the project installed on the node),
    ``cache://<name>`` or a hub id."""
    revision: str | None = None
    """Hub revision; null for folders. A run resolves a branch to its commit once, and keeps it."""
    engine_args: dict[str, Any]
    """vLLM's AsyncEngineArgs by their own names."""
    env: dict[str, str] = {}
    """Environment of the engine's processes."""
    needs: Needs
    """What one replica takes from the cluster."""
    verified: str
    """On what hardware and versions this profile was run, or that it was not."""
    rates: Rates | None = None
    """How fast one replica is; null: unknown, and a plan tells no time."""
    kv_cache: KVCache | None = None
    """What the KV cache holds; null: unknown, and nothing is checked against it."""
    experts: Annotated[int, Field(ge=1)] | None = None
    """Routed experts of each MoE layer; null: unknown or none, and their spread is not checked."""

    def at(self, revision: str) -> EngineProfile:
        """The profile with its model pinned to ``revision``, if that is a commit of the hub."""
        return self.model_copy(update={"revision": revision}) if is_commit(revision) else self

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
        return expert_ranks(self.engine_args)

    @property
    def ranks(self) -> int:
        """Worker processes of the engine: TP x PP x DP."""
        return self.tensor_parallel_size * self.pipeline_parallel_size * self.data_parallel_size

    def sequences(self, tokens: int) -> int | None:
        """Sequences of ``tokens`` that one data-parallel rank's KV cache holds; None: unknown."""
        if self.kv_cache is None:
            return None
        return self.kv_cache.layout.sequences(
            self._kv_pool(self.kv_cache), tokens, self._kv_element_bytes
        )

    @property
    def dtype(self) -> str:
        """Type the engine computes in, by vLLM's names; "auto" is one of two bytes."""
        return str(self.engine_args.get("dtype", "auto"))

    @property
    def _kv_element_bytes(self) -> float:
        kept_as = str(self.engine_args.get("kv_cache_dtype", "auto"))
        if kept_as == "auto":
            kept_as = self.dtype
        return 1 if kept_as.startswith("fp8") else 4 if kept_as in FLOAT32 else 2

    @property
    def gpu_share(self) -> float:
        """Share of each GPU's memory (0-1) that the engine takes."""
        share = self.engine_args.get("gpu_memory_utilization", _VLLM_GPU_SHARE)
        if not isinstance(share, int | float) or isinstance(share, bool) or not 0 < share <= 1:
            raise ValueError(
                f"engine_args.gpu_memory_utilization = {share!r}: must be above 0 and at most 1"
            )
        return float(share)

    def _kv_pool(self, cache: KVCache) -> float:
        """Bytes that one data-parallel rank has for its KV cache."""
        if not cache.gpu_gb:
            space = float(self.env.get("VLLM_CPU_KVCACHE_SPACE", "0"))
            return space * 2**30 * self.tensor_parallel_size * self.pipeline_parallel_size
        pool = pool_bytes(
            gpus=self.needs.gpus,
            gpu_gb=cache.gpu_gb,
            utilization=self.gpu_share,
            weights_gb=cache.weights_gb,
            reserve_gb=cache.reserve_gb,
        )
        return pool / self.data_parallel_size

    def _check_longest_fits(self) -> None:
        """vLLM would refuse it, too, once the weights are loaded."""
        if self.kv_cache is None:
            return
        tokens = self.engine_args["max_model_len"]
        pool = self._kv_pool(self.kv_cache)
        steps = 2 if self.engine_args.get("async_scheduling", True) else 1
        longest = self.kv_cache.layout.bytes_per_sequence(
            tokens, self._kv_element_bytes, steps * self.engine_args["max_num_batched_tokens"]
        )
        if longest > pool:
            raise ValueError(
                f"engine_args.max_model_len = {tokens}: one such sequence takes "
                f"{longest / GB:.1f} GB of KV cache, and {pool / GB:.1f} GB are left; lower it, or "
                "take more GPUs"
            )

    @model_validator(mode="after")
    def _check(self) -> EngineProfile:
        missing = [name for name in _REQUIRED_ARGUMENTS if name not in self.engine_args]
        if missing:
            raise ValueError(f"engine_args must set {', '.join(missing)}")
        _check_arguments(self.engine_args)
        check_engine_code(self.engine_args)
        for name in (*_REQUIRED_ARGUMENTS, *_PARALLEL_SIZES):
            value = self.engine_args.get(name, 1)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"engine_args.{name} = {value!r}: must be a whole number from 1")
        gpus = self.needs.gpus
        if gpus and gpus != self.ranks:
            raise ValueError(
                f"needs {self.needs.nodes} x {self.needs.gpus_per_node} GPUs, but the engine has "
                f"{self.ranks} ranks (TP x PP x DP)"
            )
        self._check_longest_fits()
        if self.kv_cache is not None and self.kv_cache.chunked_layers:
            check_block_size(self.engine_args, self.kv_cache.chunk)
        check_experts(self.engine_args, self.experts, self.expert_parallel_size)
        return self


def is_commit(revision: str) -> bool:
    """Whether a revision is a commit of the hub: no branch, no tag, no folder's digest."""
    return re.fullmatch("[0-9a-f]{40}", revision) is not None


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
        profile = EngineProfile.model_validate({**document, "engine_args": arguments})
    except ValidationError as error:
        raise ConfigError(f"{path}: {describe(error, EngineProfile)}") from None
    _warn_of_long_contexts(profile)
    return profile


def _warn_of_long_contexts(profile: EngineProfile) -> None:
    """Llama 4 wants its attention tuned beyond 32,768 tokens (vLLM, pull request 16439)."""
    generation = profile.engine_args.get("override_generation_config")
    tuned = generation.get(_TUNING) if isinstance(generation, Mapping) else None
    if tuned is False and profile.engine_args["max_model_len"] > _UNTUNED_TOKENS:
        log.warning(
            "engine_args.max_model_len = %d with %s off: prompts beyond %d tokens lose accuracy; "
            "set override_generation_config: {%s: true}",
            profile.engine_args["max_model_len"],
            _TUNING,
            _UNTUNED_TOKENS,
            _TUNING,
        )


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
    trees = [tree for tree in (REPO_ROOT, installed_tree()) if tree]  # the second: see .rayignore
    for tree in trees:
        if (tree / model).is_dir():
            return str(_without_pickles(tree / model))
    if not Path(model).is_absolute() and model.count("/") != 1:  # hub ids are owner/name
        searched = " or ".join(dict.fromkeys(map(str, trees)))
        raise ConfigError(f"model {model}: there is no such folder in {searched}.")
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
    for name in _PLACED:
        if name in arguments:
            raise ValueError(
                f"engine_args.{name}: is set when a replica is put on its nodes; leave it out, and "
                "say with needs.nodes how many one replica spans"
            )
    for name in _BACKENDS:
        if arguments.get(name) == "ray":
            raise ValueError(
                f"engine_args.{name} = 'ray': vLLM would look for GPUs beside those reserved for "
                "the replica; use 'mp', over several nodes as well"
            )
    known = vllm_argument_names()
    if known is None:
        log.warning("vLLM is not installed here: the names of engine arguments are not checked")
        return
    for name in arguments:
        if name not in known:
            close = get_close_matches(name, sorted(known), n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"vLLM has no engine argument {name!r}{hint}")


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
