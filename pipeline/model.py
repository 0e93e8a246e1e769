"""A model's small files: tokenizer, chat template, image tiling, revision. No weights, no engine.

In: a model folder (or hub id) and the engine arguments that change prompts. Out: ``PromptFormat``,
which turns a chat into the very token ids the engine will see, and counts them. Loaded once per
process. Imports transformers (its tokenizers are the reference), not vllm.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from pipeline.errors import ConfigError, ErrorCode, RowError
from pipeline.images import ImageTiling
from pipeline.profile import is_commit, locate_model
from pipeline.sampling import SamplingDefaults
from pipeline.validation import describe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_HUB_S = 10.0
"""Longest wait for the hub's answer to which commit a branch stands for."""
_SMALL_FILE = 16 * 2**20  # bytes; larger files (weights) enter the revision by name and size
_NO_LIMIT = 2**40  # tokens; prompts are measured by prepare, the tokenizer need not warn
_ALWAYS_COUNTED = 2 * 2**20
"""Characters of a prompt that are tokenized even if they cannot fit: the record tells the count."""
_BATCH_CHARACTERS = 2**18
"""Characters tokenized at a time, by the memory that tokens take meanwhile."""
_IMAGE_TOKEN = "<|image|>"
_PROBE = "content-format-probe"
_GENERATION = (
    *("temperature", "top_p", "top_k", "min_p", "max_new_tokens"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
)
"""Keys of a generation config that vLLM's server takes its sampling defaults from."""
_GENERAL_TOKENIZERS = ("TokenizersBackend", "PreTrainedTokenizerFast", "PreTrainedTokenizer")
"""Names in a tokenizer's configuration of transformers' one class around ``tokenizer.json``."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What decides a prompt's tokens."""

    model: str
    """As the profile names it; each node finds its own copy."""
    revision: str | None
    max_model_len: int
    """Tokens, prompt and completion together."""
    max_tiles: int | None = None
    """Tiles per image, where the engine's ``mm_processor_kwargs.max_patches`` sets it."""
    generation_config: str = "auto"
    """vLLM's argument: where its server's sampling defaults come from."""
    generation_overrides: tuple[tuple[str, Any], ...] = ()
    """vLLM's ``override_generation_config``, as far as it is about sampling."""

    @classmethod
    def from_engine_args(
        cls, model: str, revision: str | None, engine_args: Mapping[str, Any]
    ) -> ModelSpec:
        """The spec of a profile's model under its engine arguments."""
        processor = engine_args.get("mm_processor_kwargs") or {}
        overrides = engine_args.get("override_generation_config") or {}
        return cls(
            model,
            revision,
            engine_args["max_model_len"],
            processor.get("max_patches"),
            engine_args.get("generation_config", "auto"),
            tuple((name, overrides[name]) for name in _GENERATION if name in overrides),
        )


@dataclass(frozen=True, slots=True)
class ImageFormat:
    """How images stand in a model's prompts."""

    tiling: ImageTiling
    placeholder_id: int
    """The token the chat template writes once per image (``<|image|>``)."""
    patch_id: int
    """The token the engine expands it into; a prompt never holds it by itself."""


@dataclass(frozen=True)
class PromptFormat:
    """Renders and counts prompts of one model."""

    tokenizer: PreTrainedTokenizerBase
    max_model_len: int
    images: ImageFormat | None
    """None: a text model."""
    takes_parts: bool
    """Whether the chat template walks content parts, or wants one string."""
    takes_tools: bool
    """Whether the chat template tells the model of tools."""
    knows_developer: bool
    """Whether the chat template has a word for developer turns; they are system turns else."""
    longest_token: int
    """Characters of the longest token: no prompt has fewer tokens than its length over this."""
    vocab_size: int
    """Token ids the model knows: those from 0 to below this."""

    def tokenize(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None
    ) -> list[int]:
        """Token ids of a chat with the assistant's turn opened: one image token per image.

        Raises:
            RowError: as ``render``.
        """
        (ids,) = self.encode([self.render(messages, tools)])
        return ids

    def render(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None
    ) -> str:
        """The text of a chat with the assistant's turn opened.

        Raises:
            RowError: ``invalid_messages`` when the chat template refuses the messages, or would
                leave calls of tools out; ``invalid_parameter`` when it takes no tools;
                ``context_length_exceeded`` when no tokenizer could make it fit.
        """
        from jinja2 import TemplateError

        self._check_tools(messages, tools)
        try:
            text: str = self.tokenizer.apply_chat_template(
                self._conversation(messages),
                tools=tools or None,
                tokenize=False,
                add_generation_prompt=True,
            )
        except TemplateError as error:
            raise RowError(
                ErrorCode.INVALID_MESSAGES, f"the chat template refuses the messages: {error}"
            ) from None
        self.check_size(text)
        return text

    def encode(self, texts: Sequence[str], *, special_tokens: bool = False) -> list[list[int]]:
        """Token ids of each text; with the tokenizer's special tokens (BOS) if asked for, once: a
        text that begins with the BOS already gets no second one.

        Many at once take less than half the CPU of one by one.
        """
        if special_tokens:
            texts = [text.removeprefix(self._bos) for text in texts]
        batches = batched_by_size(texts, _BATCH_CHARACTERS)
        return [ids for batch in batches for ids in self._encode(batch, special_tokens)]

    @cached_property
    def _bos(self) -> str:
        """The text of the token that the tokenizer puts first; empty if it puts none."""
        added = self.tokenizer("")["input_ids"][:1] == [self.tokenizer.bos_token_id]
        return str(self.tokenizer.bos_token) if added else ""

    def _encode(self, texts: list[str], special_tokens: bool) -> list[list[int]]:
        if not self.tokenizer.is_fast:
            ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=special_tokens)[
                "input_ids"
            ]
            return ids
        # What the tokenizer's own call does, without the places of tokens in the text, which take
        # half of its time.
        backend = self.tokenizer.backend_tokenizer
        encodings = backend.encode_batch_fast(texts, add_special_tokens=special_tokens)
        return [encoding.ids for encoding in encodings]

    def check_size(self, text: str) -> None:
        """Refuse text that is too long however well it tokenizes: a token takes some 300 bytes of
        memory meanwhile.

        Raises:
            RowError: ``context_length_exceeded``.
        """
        most = max(_ALWAYS_COUNTED, self.max_model_len * self.longest_token)
        if len(text) > most:
            raise RowError(
                ErrorCode.CONTEXT_LENGTH_EXCEEDED,
                f"the prompt has {len(text)} characters, at least "
                f"{len(text) // self.longest_token} tokens; the engine's max_model_len is "
                f"{self.max_model_len}",
            )

    def check_images(self, token_ids: list[int], images: int) -> None:
        """Refuse prompts whose image tokens are not exactly those of their images.

        Raises:
            RowError: ``invalid_messages``: the text holds a token that is reserved for images, or
                the model takes no images.
        """
        if self.images is None:
            if images:
                raise RowError(ErrorCode.INVALID_MESSAGES, "the model takes text only, no images")
            return
        placeholders = token_ids.count(self.images.placeholder_id)
        if placeholders != images or self.images.patch_id in token_ids:
            raise RowError(
                ErrorCode.INVALID_MESSAGES,
                f"the text holds a token the model reserves for images ({images} images, "
                f"{placeholders} image tokens in the prompt)",
            )

    def check_prompt_ids(self, token_ids: Iterable[int]) -> None:
        """Refuse a prompt of tokens that the model does not know.

        Raises:
            RowError: ``invalid_messages``.
        """
        strange = next((i for i in token_ids if not 0 <= i < self.vocab_size), None)
        if strange is not None:
            raise RowError(
                ErrorCode.INVALID_MESSAGES,
                f"prompt: token id {strange} is not within the vocabulary's {self.vocab_size}",
            )

    def check_token_ids(self, token_ids: Iterable[int], parameter: str) -> None:
        """Refuse ids, of a request's ``parameter``, that the model does not know.

        Raises:
            RowError: ``invalid_parameter``.
        """
        beyond = max(token_ids, default=0)
        if beyond >= self.vocab_size:
            raise RowError(
                ErrorCode.INVALID_PARAMETER,
                f"{parameter}: token id {beyond} is not below the vocabulary's {self.vocab_size}",
            )

    def _check_tools(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
    ) -> None:
        if self.takes_tools:
            return
        if tools:
            raise RowError(
                ErrorCode.INVALID_PARAMETER, "tools: the model's chat template takes no tools"
            )
        if any("tool_calls" in turn for turn in messages):
            raise RowError(
                ErrorCode.INVALID_MESSAGES, "tool_calls: the model's chat template takes no tools"
            )

    def _conversation(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Messages as this template wants them, the way ``vllm.LLM.chat`` hands them over."""
        turns = [{**turn, "content": self._content(turn)} for turn in messages]
        if self.knows_developer or all(turn["role"] != "developer" for turn in turns):
            return turns
        return _one_system_turn(turns)

    def _content(self, turn: dict[str, Any]) -> str | list[dict[str, Any]]:
        content = turn["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
        only_text = all(part["type"] == "text" for part in parts)
        if self.takes_parts and not (turn["role"] == "tool" and only_text):
            return parts
        texts = [part["text"] for part in parts if part["type"] == "text"]
        return "\n".join(texts if self.takes_parts else filter(None, texts))


def batched_by_size(texts: Iterable[str], most: int) -> Iterator[list[str]]:
    """``texts`` in order, in lists of up to ``most`` characters; one that is longer is alone."""
    batch: list[str] = []
    size = 0
    for text in texts:
        if batch and size + len(text) > most:
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += len(text)
    if batch:
        yield batch


@lru_cache(maxsize=4)
def load_prompt_format(spec: ModelSpec) -> PromptFormat:
    """The prompt format of ``spec``, loaded once per process: 1 CPU second of imports for Llama 4,
    7 for other models."""
    folder = model_folder(locate_model(spec.model), spec.revision)
    tokenizer = _tokenizer_class(folder).from_pretrained(
        folder, model_max_length=_NO_LIMIT, trust_remote_code=False
    )
    tokenizer(_PROBE)  # its first call sets its backend up: no truncation, no padding
    takes_parts = _takes_parts(tokenizer)
    return PromptFormat(
        tokenizer=tokenizer,
        max_model_len=spec.max_model_len,
        images=_image_format(folder, tokenizer, spec.max_tiles),
        takes_parts=takes_parts,
        takes_tools=_takes_tools(tokenizer, takes_parts),
        knows_developer=_knows_developer(tokenizer),
        longest_token=max(map(len, tokenizer.get_vocab())),
        vocab_size=_vocab_size(folder),
    )


@lru_cache(maxsize=4)
def server_defaults(spec: ModelSpec) -> SamplingDefaults:
    """What vLLM's server would take for a chat that says nothing (``DefaultsOf.SERVER``).

    Raises:
        ConfigError: the model's generation config has a value out of range.
    """
    source = spec.generation_config
    is_own = source == "auto"
    folder = model_folder(locate_model(spec.model), spec.revision) if is_own else Path(source)
    config = {} if source == "vllm" else _json(folder / "generation_config.json")
    given = {**config, **dict(spec.generation_overrides)}
    known = {name: given[name] for name in _GENERATION if given.get(name) is not None}
    for name in {"top_k", "max_new_tokens"} & set(known):
        if isinstance(known[name], float) and known[name].is_integer():
            known[name] = int(known[name])
    limit = known.pop("max_new_tokens", spec.max_model_len)
    try:
        return SamplingDefaults(max_completion_tokens=limit, **known)
    except ValidationError as error:
        fault = describe(error, SamplingDefaults)
        raise ConfigError(
            f"{folder}/generation_config.json, or override_generation_config: {fault}"
        ) from None


def _tokenizer_class(folder: Path) -> Any:
    """The class ``AutoTokenizer`` chooses, or itself.

    It imports torch to choose, 6 CPU seconds and 0.4 GB in each process that prepares rows.
    Of a Llama 4 with one of the ``_GENERAL_TOKENIZERS`` the choice is known.
    """
    settings = _json(folder / "tokenizer_config.json")
    if (
        _json(folder / "config.json").get("model_type") == "llama4"
        and settings.get("tokenizer_class") in _GENERAL_TOKENIZERS
        and "auto_map" not in settings
    ):
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer


def stop_token_ids(spec: ModelSpec) -> tuple[int, ...]:
    """Tokens that end a completion, as vLLM takes them from the model: the tokenizer's end token
    and those of ``generation_config.json``."""
    end = load_prompt_format(spec).tokenizer.eos_token_id
    folder = model_folder(locate_model(spec.model), spec.revision)
    configured = _json(folder / "generation_config.json").get("eos_token_id")
    found = configured if isinstance(configured, list) else [configured]
    return tuple(sorted({each for each in (end, *found) if each is not None}))


def model_folder(model: str, revision: str | None) -> Path:
    """``model`` as a local folder; a hub id is fetched (small files only) into the hub's cache."""
    folder = Path(model)
    if folder.is_dir():
        return folder
    if folder.is_absolute() or model.startswith("."):
        raise ConfigError(f"model folder {model} does not exist on this node.")
    from huggingface_hub import snapshot_download

    small = ["*.json", "*.jinja", "tokenizer*"]
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=small))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model {model} is no folder on this node, and the hub does not give it: {error}"
        ) from error


def model_name(model: str) -> str:
    """The name records carry: a hub id as it is, a folder by its last part."""
    return Path(model).name if Path(model).is_absolute() else model


def accepted_names(model: str, engine_args: Mapping[str, Any]) -> tuple[str, ...]:
    """What a request may call the model: its name in records, that name's last part, and vLLM's
    ``served_model_name``."""
    name = model_name(model)
    served = engine_args.get("served_model_name") or ()
    return tuple(
        dict.fromkeys(
            [name, name.rsplit("/", 1)[-1], *([served] if isinstance(served, str) else served)]
        )
    )


def model_revision(model: str, revision: str | None) -> str:
    """What pins the model: the hub's commit, or a SHA-256 over the folder's files.

    Small files enter by content, large ones (weights) by name and size. A branch or tag of the hub
    is resolved to its commit: by the cache of the hub's client, else by the hub. Where neither
    knows, ``revision`` stays as it is, and a warning says so.
    """
    folder = Path(model)
    if not folder.is_dir():
        return _hub_commit(model, revision or "main")
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix != ".md"):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)}\0{size}\0".encode())
        if size <= _SMALL_FILE:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return f"sha256:{digest.hexdigest()}"


def _hub_commit(model: str, revision: str) -> str:
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    from huggingface_hub.utils import httpx  # whichever its client is made of

    if is_commit(revision):
        return revision
    try:
        cached = try_to_load_from_cache(model, "config.json", revision=revision)
        if isinstance(cached, str):
            return Path(cached).parent.name
        return HfApi().model_info(model, revision=revision, timeout=_HUB_S).sha or revision
    except (OfflineModeIsEnabled, HfHubHTTPError, httpx.HTTPError, OSError, ValueError) as error:
        log.warning(
            "the commit behind revision %s of %s is not known here (%s), so run.json names the "
            "revision alone; a commit in the profile's revision pins the model",
            revision,
            model,
            type(error).__name__,
        )
        return revision


def _image_format(
    folder: Path, tokenizer: PreTrainedTokenizerBase, max_tiles: int | None
) -> ImageFormat | None:
    config = _json(folder / "config.json")
    vision = config.get("vision_config")
    if vision is None:
        return None
    whole = _json(folder / "processor_config.json")
    processor = _json(folder / "preprocessor_config.json") or whole.get("image_processor", {})
    patches_per_side = vision["image_size"] // vision["patch_size"]
    tiling = ImageTiling(
        tile_size=vision["image_size"],
        tile_tokens=round(patches_per_side**2 * vision["pixel_shuffle_ratio"] ** 2),
        max_tiles=max_tiles or processor.get("max_patches", 16),
        to_max_canvas=processor.get("resize_to_max_canvas", False),
    )
    placeholder = tokenizer.convert_tokens_to_ids(whole.get("fake_image_token", _IMAGE_TOKEN))
    return ImageFormat(tiling, placeholder, config["image_token_index"])


def _vocab_size(folder: Path) -> int:
    config = _json(folder / "config.json")
    return int(config.get("text_config", config)["vocab_size"])


def _takes_parts(tokenizer: PreTrainedTokenizerBase) -> bool:
    from jinja2 import TemplateError

    message = {"role": "user", "content": [{"type": "text", "text": _PROBE}]}
    try:
        text = tokenizer.apply_chat_template([message], tokenize=False)
    except (TemplateError, TypeError):  # a template that adds strings fails on a list
        return False
    return _PROBE in text and "'text'" not in text


def _takes_tools(tokenizer: PreTrainedTokenizerBase, takes_parts: bool) -> bool:
    from jinja2 import TemplateError

    content = [{"type": "text", "text": "?"}] if takes_parts else "?"
    function = {"name": _PROBE, "description": "", "parameters": {"type": "object"}}
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            tools=[{"type": "function", "function": function}],
            tokenize=False,
        )
    except TemplateError:  # of a template that refuses all: each row is told why
        return False
    return _PROBE in text


def _knows_developer(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template names the role, by the look of it: vLLM's own test."""
    template = tokenizer.get_chat_template()
    return "'developer'" in template or '"developer"' in template


def _one_system_turn(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Developer turns as system turns, and unless that one leads already, all of these as one."""
    turns = [{**turn, "role": "system"} if turn["role"] == "developer" else turn for turn in turns]
    if all(turn["role"] != "system" for turn in turns[1:]):
        return turns
    texts = [_text(turn["content"]) for turn in turns if turn["role"] == "system"]
    merged = {"role": "system", "content": "\n\n".join(filter(None, texts))}
    return [merged, *(turn for turn in turns if turn["role"] != "system")]


def _text(content: str | list[dict[str, Any]]) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part["type"] == "text")


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document
