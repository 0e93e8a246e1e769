"""lm-eval's ``LM`` whose answers come from a batch run.

lm-eval asks in text; the pipeline is asked in tokens, made of that text the way lm-eval's own
Hugging Face and vLLM models make them, special tokens and truncation included, so that prompts are
theirs token for token. Only requests with images go as chat messages, as raw prompts have no place
for them.

The same object is used twice: first ``ask`` takes the requests in and answers nothing, then it
answers from the run. What lm-eval asks the second time must be what it asked the first time.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    has_bos_prefix,
    maybe_truncate,
    normalize_gen_kwargs,
    postprocess_generated_text,
)

from jobs.evaluate.answers import Answer
from jobs.evaluate.feed import Request
from pipeline.errors import ConfigError
from pipeline.model import PromptFormat
from pipeline.openai_input import Endpoint

Ask = Callable[[Request, int], Answer]
"""A request, and how many of its prompt's last tokens are to have log probabilities."""
ItemKey = tuple[str, int]
"""(task, number of the item in it)"""

_IMAGE_MARK = "<image>"
"""Where lm-eval's tasks have an image in their text."""
_MAX_STOPS = 4  # of a request; what is left of an answer after further ones is cut off here
_PARAMETERS = frozenset(
    {
        *("temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
        *("frequency_penalty", "presence_penalty"),
    }
)
_OURS = frozenset({"until", "do_sample", "max_gen_toks"})


class FeedLM(TemplateLM):
    """See the module."""

    MULTIMODAL = True

    def __init__(self, prompts: PromptFormat, ask: Ask) -> None:
        super().__init__()
        self.asked: dict[ItemKey, list[str]] = defaultdict(list)
        """The ``custom_id`` of each request of an item."""
        self.unanswered: Counter[str] = Counter()
        """Requests of a task whose records did not succeed."""
        self.truncated: Counter[str] = Counter()
        """Requests of a task whose prompt was cut on the left, as it is longer than the context."""
        self.chat_as_messages = False
        """Whether chats are handed on as messages: for tasks with images."""
        self.tokenizer = prompts.tokenizer
        self._prompts = prompts
        self._ask = ask
        self._scored: Sequence[Instance] = ()

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's request cache, which is not used."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids; special tokens are added as the tokenizer does, unless ``string`` has one."""
        special = add_special_tokens
        if special is None:
            special = not has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id))
        (ids,) = self._prompts.encode([string], special_tokens=special)
        return ids

    def apply_chat_template(
        self, chat_history: list[dict[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """The chat as text, or as JSON where it goes as messages."""
        if self.chat_as_messages:
            if not add_generation_prompt:
                raise ConfigError(
                    "a task with images cannot begin the model's answer (gen_prefix)."
                )
            return json.dumps(chat_history)
        takes_parts = self._prompts.takes_parts
        turns = [
            {**turn, "content": [{"type": "text", "text": turn["content"]}]}
            if takes_parts
            else turn
            for turn in chat_history
        ]
        text: str = self.tokenizer.apply_chat_template(
            turns,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Completions, cut at the task's stop strings; an empty one where there is no answer."""
        del disable_tqdm
        texts: list[str] = []
        for _, repeated in groupby(requests, key=id):  # lm-eval repeats an instance per sample
            copies = list(repeated)
            texts.extend(self._generated(copies[0], len(copies)))
        return texts

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """(log probability of the continuation, whether it is the greedy one); -inf where there is
        no answer."""
        self._scored = requests
        return list(super().loglikelihood(requests, disable_tqdm=disable_tqdm))

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        """Refused."""
        del disable_tqdm
        raise ConfigError(
            f"task {requests[0].task_name}: log likelihoods of whole documents (perplexity) are "
            "not supported."
        )

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        **_: Any,
    ) -> list[tuple[float, bool]]:
        return [
            self._likelihood(instance, context, continuation)
            for instance, (_, context, continuation) in zip(self._scored, requests, strict=True)
        ]

    def _likelihood(
        self, instance: Instance, context: list[int], continuation: list[int]
    ) -> tuple[float, bool]:
        most = self._prompts.max_model_len - 1  # one token must be left for a completion
        token_ids = (context + continuation)[-most:]
        self.truncated[str(instance.task_name)] += len(context) + len(continuation) > most
        body = {
            "prompt": token_ids,
            "max_completion_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": True,
        }
        last = min(len(continuation), most - 1)  # the first token of all has none
        answer = self._answer(instance, Request(Endpoint.COMPLETIONS, body), last)
        if answer.prompt_logprobs is None:
            return -math.inf, False
        total = sum(logprob for logprob, _ in answer.prompt_logprobs)
        return total, all(rank == 1 for _, rank in answer.prompt_logprobs)

    def _generated(self, instance: Instance, samples: int) -> list[str]:
        context, given = instance.args[:2]
        wanted = _with_temperature(normalize_gen_kwargs(given, default_max_gen_toks=256))
        parameters = _parameters(str(instance.task_name), wanted)
        until = [*wanted["until"], self.tokenizer.decode(self.eot_token_id)]
        distinct = samples if wanted["temperature"] > 0 else 1
        if distinct > 1:
            parameters["n"] = distinct
        request = (
            self._with_images(context, instance.args[2]["visual"], parameters)
            if self.chat_as_messages
            else self._with_tokens(instance, context, parameters)
        )
        answer = self._answer(instance, request, 0)
        texts = [postprocess_generated_text(text or "", until, None) for text in answer.texts]
        return texts if len(texts) == samples else texts[:1] * samples

    def _with_tokens(
        self, instance: Instance, context: str, parameters: Mapping[str, Any]
    ) -> Request:
        whole, most = self.tok_encode(context), parameters["max_completion_tokens"]
        length = self._prompts.max_model_len
        if most >= length:
            raise ConfigError(
                f"task {instance.task_name}: answers of up to {most} tokens leave no room for a "
                f"prompt in max_model_len {length}; set tasks.generation.max_gen_toks."
            )
        token_ids, _ = maybe_truncate(whole, most, length, verbose=False)
        self.truncated[str(instance.task_name)] += len(token_ids) < len(whole)
        return Request(Endpoint.COMPLETIONS, {"prompt": token_ids, **parameters})

    def _with_images(
        self, context: str, images: Sequence[Any], parameters: Mapping[str, Any]
    ) -> Request:
        left = list(images)
        messages = [
            {**turn, "content": _parts(turn["content"], left)} for turn in json.loads(context)
        ]
        if left:
            raise ConfigError(
                f"{len(left)} images have no {_IMAGE_MARK} in the text of their item."
            )
        return Request(Endpoint.CHAT, {"messages": messages, **parameters})

    def _answer(self, instance: Instance, request: Request, last_tokens: int) -> Answer:
        task = str(instance.task_name)
        self.asked[task, int(instance.doc_id or 0)].append(request.custom_id)
        answer = self._ask(request, last_tokens)
        self.unanswered[task] += sum(text is None for text in answer.texts)
        return answer


def _with_temperature(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """lm-eval leaves it out where a task does: greedy then, unless it says that it samples."""
    return {"temperature": 1.0 if wanted["do_sample"] else 0.0, **wanted}


def _parameters(task: str, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """lm-eval's generation parameters as the pipeline's; ``wanted`` is normalized."""
    unknown = sorted(set(wanted) - _PARAMETERS - _OURS)
    if unknown:
        known = ", ".join(sorted(_PARAMETERS | _OURS))
        raise ConfigError(
            f"task {task}: generation parameter {unknown[0]!r} is not supported; known are {known}."
        )
    named = {key: wanted[key] for key in sorted(_PARAMETERS & set(wanted))}
    stops = [stop for stop in wanted["until"] if stop][:_MAX_STOPS]
    return {
        **named,
        **({"stop": stops} if stops else {}),
        "max_completion_tokens": wanted["max_gen_toks"],
    }


def _parts(text: str, images: list[Any]) -> list[dict[str, Any]]:
    """A turn's content, an image (taken from ``images``) at each mark."""
    first, *others = text.split(_IMAGE_MARK)
    parts: list[dict[str, Any]] = [{"type": "text", "text": first}] if first else []
    for piece in others:
        if not images:
            raise ConfigError(f"an item has more {_IMAGE_MARK} in its text than images.")
        parts.append({"type": "image_url", "image_url": {"url": _data_url(images.pop(0))}})
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


def _data_url(image: Any) -> str:
    """A PIL image as PNG, which keeps its pixels."""
    buffer = io.BytesIO()
    (image if image.mode != "CMYK" else image.convert("RGB")).save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
