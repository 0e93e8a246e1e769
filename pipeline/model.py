"""A model's small files: tokenizer, chat template, image tiling, revision. No weights, no engine.

In: a model folder (or hub id) and the engine arguments that change prompts. Out: ``PromptFormat``,
which turns a chat into the very token ids the engine will see, and counts them. Loaded once per
process. Imports transformers (its tokenizers are the reference), not vllm.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError, ErrorCode, RowError
from pipeline.images import ImageTiling
from pipeline.profile import locate_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SMALL_FILE = 16 * 2**20  # bytes; larger files (weights) enter the revision by name and size
_NO_LIMIT = 2**40  # tokens; prompts are measured by prepare, the tokenizer need not warn
_IMAGE_TOKEN = "<|image|>"
_PROBE = "content-format-probe"


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

    @classmethod
    def from_engine_args(
        cls, model: str, revision: str | None, engine_args: Mapping[str, Any]
    ) -> ModelSpec:
        """The spec of a profile's model under its engine arguments."""
        processor = engine_args.get("mm_processor_kwargs") or {}
        return cls(model, revision, engine_args["max_model_len"], processor.get("max_patches"))


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
    vocab_size: int
    """Token ids the model knows: those from 0 to below this."""

    def tokenize(self, messages: list[dict[str, Any]]) -> list[int]:
        """Token ids of a chat with the assistant's turn opened: one image token per image.

        Raises:
            RowError: ``invalid_messages`` when the chat template refuses the messages.
        """
        from jinja2 import TemplateError

        turns = [self._content(turn) for turn in messages]
        try:
            text = self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise RowError(
                ErrorCode.INVALID_MESSAGES, f"the chat template refuses the messages: {error}"
            ) from None
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return list(ids)

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

    def check_token_ids(self, token_ids: Iterable[int]) -> None:
        """Refuse ids, of ``logit_bias``, that the model does not know.

        Raises:
            RowError: ``invalid_parameter``.
        """
        beyond = max(token_ids, default=0)
        if beyond >= self.vocab_size:
            raise RowError(
                ErrorCode.INVALID_PARAMETER,
                f"logit_bias: token id {beyond} is not below the vocabulary's {self.vocab_size}",
            )

    def _content(self, turn: dict[str, Any]) -> dict[str, Any]:
        """One message as this template wants it, the way ``vllm.LLM.chat`` hands it over."""
        role = "system" if turn["role"] == "developer" else turn["role"]
        content = turn["content"]
        if self.takes_parts:
            if isinstance(content, str):
                content = [{"type": "text", "text": content}]
        elif not isinstance(content, str):
            content = "\n".join(part["text"] for part in content if part["type"] == "text")
        return {**turn, "role": role, "content": content}


@lru_cache(maxsize=4)
def load_prompt_format(spec: ModelSpec) -> PromptFormat:
    """The prompt format of ``spec``, loaded once per process (2-4 s, mostly imports)."""
    from transformers import AutoTokenizer

    folder = model_folder(locate_model(spec.model), spec.revision)
    tokenizer = AutoTokenizer.from_pretrained(
        folder, model_max_length=_NO_LIMIT, trust_remote_code=False
    )
    return PromptFormat(
        tokenizer=tokenizer,
        max_model_len=spec.max_model_len,
        images=_image_format(folder, tokenizer, spec.max_tiles),
        takes_parts=_takes_parts(tokenizer),
        vocab_size=_vocab_size(folder),
    )


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


def model_revision(model: str, revision: str | None) -> str:
    """What pins the model: the hub revision, or a SHA-256 over the folder's files.

    Small files enter by content, large ones (weights) by name and size.
    """
    folder = Path(model)
    if not folder.is_dir():
        return revision or "main"
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix != ".md"):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)}\0{size}\0".encode())
        if size <= _SMALL_FILE:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return f"sha256:{digest.hexdigest()}"


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


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document
