"""mini-Maverick: Llama 4 Maverick's architecture at 1/250,000 of its size.

In: nothing. Out: the configuration, tokenizer, chat template and image processor of the
model, without weights; `train_mini_maverick` adds those.

What is kept from Maverick: a mixture of experts on every second layer (top-1 of 8, plus a
shared expert), one layer without rotary embedding in four, no query/key norm, chunked local
attention, a vision tower with pixel shuffle, tiles with a global thumbnail, the special tokens
and the chat format. What is smaller: every width, and the vocabulary, which is one token per
byte, so that any UTF-8 text survives a round trip.

transformers takes seconds to import, so each function imports it.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from transformers import (
        GenerationConfig,
        Llama4Config,
        Llama4Processor,
        PreTrainedTokenizerFast,
    )

CHECKPOINT: Final = Path(__file__).parent / "mini-maverick"

TILE_PX: Final = 56
PATCH_PX: Final = 14
"""(56 / 14)^2 patches, pixel-shuffled 2 x 2 into one token."""
MAX_TILES: Final = 16
"""Llama 4's own limit (`max_patches`); the thumbnail comes on top."""
MAX_POSITIONS: Final = 4096
ATTENTION_CHUNK: Final = 1024
"""Tokens; a multiple of every KV block size in use, as vLLM asks."""

BYTE_TOKENS: Final = 256
SPECIAL_TOKENS: Final = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|header_start|>",
    "<|header_end|>",
    "<|eom|>",
    "<|eot|>",
    "<|step|>",
    "<|image_start|>",
    "<|image_end|>",
    "<|image|>",
    "<|patch|>",
    "<|tile_x_separator|>",
    "<|tile_y_separator|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|finetune_right_pad|>",
)
TOKEN_ID: Final = {token: BYTE_TOKENS + i for i, token in enumerate(SPECIAL_TOKENS)}
VOCAB_SIZE: Final = BYTE_TOKENS + len(SPECIAL_TOKENS)

# Llama 4's format. Unlike the original it trims nothing, so that text stays byte for byte, and
# refuses a role or a content part it does not know instead of dropping it. Tools are told in the
# first user turn; the model is not trained to call them.
CHAT_TEMPLATE: Final = """\
{{- bos_token }}
{%- set told = namespace(tools=not tools) %}
{%- for message in messages %}
    {%- if message['role'] == 'tool' %}
        {%- set role = 'ipython' %}
    {%- elif message['role'] in ['system', 'user', 'assistant', 'ipython'] %}
        {%- set role = message['role'] %}
    {%- else %}
        {{- raise_exception('unknown role: ' ~ message['role']) }}
    {%- endif %}
    {{- '<|header_start|>' + role + '<|header_end|>\\n\\n' }}
    {%- if role == 'user' and not told.tools %}
        {%- set told.tools = true %}
        {{- 'Given the following functions, please respond with a JSON for a function call ' }}
        {{- 'with its proper arguments that best answers the given prompt.\\n\\n' }}
        {{- 'Respond in the format {"name": function name, "parameters": dictionary of ' }}
        {{- 'argument name and its value}. Do not use variables.\\n\\n' }}
        {%- for tool in tools %}
            {{- tool | tojson(indent=4) + '\\n\\n' }}
        {%- endfor %}
    {%- endif %}
    {%- if message['content'] is string %}
        {{- message['content'] }}
    {%- else %}
        {%- for content in message['content'] %}
            {%- if content['type'] == 'image' %}
                {{- '<|image|>' }}
            {%- elif content['type'] == 'text' %}
                {{- content['text'] }}
            {%- else %}
                {{- raise_exception('unknown content type: ' ~ content['type']) }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {%- if message['tool_calls'] %}
        {{- '<|python_start|>' }}
        {%- for call in message['tool_calls'] %}
            {{- '{"name": ' + call['function']['name'] | tojson + ', "parameters": ' }}
            {{- call['function']['arguments'] | tojson + '}' }}
            {{- '' if loop.last else '; ' }}
        {%- endfor %}
        {{- '<|python_end|>' }}
    {%- endif %}
    {{- '<|eot|>' }}
{%- endfor %}
{%- if not told.tools %}
    {{- raise_exception('tools are told in the first user turn, and there is none') }}
{%- endif %}
{%- if add_generation_prompt %}
    {{- '<|header_start|>assistant<|header_end|>\\n\\n' }}
{%- endif %}
"""


def byte_alphabet() -> dict[str, int]:
    """The printable character that byte-level BPE writes for each byte, with the byte as its id.

    The mapping is GPT-2's: printable Latin-1 characters stand for themselves, the others are
    shifted to U+0100 and up.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(BYTE_TOKENS) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(0x100 + i): byte for i, byte in enumerate(rest)})
    return alphabet


def build_tokenizer() -> "PreTrainedTokenizerFast":
    """One token per byte and Llama 4's special tokens; no merges, no normalisation."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(vocab=byte_alphabet(), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    bos = "<|begin_of_text|>"
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos}:1 $B:1",
        special_tokens=[(bos, TOKEN_ID[bos])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token="<|eot|>",
        pad_token="<|finetune_right_pad|>",
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS,
        model_input_names=["input_ids", "attention_mask"],
        chat_template=CHAT_TEMPLATE,
    )


def build_processor() -> "Llama4Processor":
    """Llama 4's own processor over 56 px tiles."""
    from transformers import Llama4ImageProcessor, Llama4Processor

    image_processor = Llama4ImageProcessor(
        size={"height": TILE_PX, "width": TILE_PX},
        max_patches=MAX_TILES,
        resize_to_max_canvas=False,
    )
    return Llama4Processor(
        image_processor=image_processor,
        tokenizer=build_tokenizer(),
        patch_size=PATCH_PX,
        pixel_shuffle_ratio=0.5,
        chat_template=CHAT_TEMPLATE,
    )


def build_config() -> "Llama4Config":
    """The architecture, 1.56 M parameters; every width is divisible by two for TP=2."""
    from transformers import Llama4Config

    text = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 128,
        "intermediate_size": 128,  # of one expert
        "intermediate_size_mlp": 256,  # of a dense layer
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_local_experts": 8,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
        "no_rope_layer_interval": 4,
        "use_qk_norm": False,
        "attention_chunk_size": ATTENTION_CHUNK,
        "attn_temperature_tuning": False,
        "max_position_embeddings": MAX_POSITIONS,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "initializer_range": 0.04,
        "bos_token_id": TOKEN_ID["<|begin_of_text|>"],
        "eos_token_id": stop_token_ids(),
        "pad_token_id": TOKEN_ID["<|finetune_right_pad|>"],
    }
    vision = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 256,  # 4 x hidden_size: what pixel shuffle hands to the adapter
        "image_size": TILE_PX,
        "patch_size": PATCH_PX,
        "pixel_shuffle_ratio": 0.5,
        "projector_input_dim": 128,
        "projector_output_dim": 128,
        "vision_output_dim": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "initializer_range": 0.04,
    }
    return Llama4Config(
        text_config=text,
        vision_config=vision,
        boi_token_index=TOKEN_ID["<|image_start|>"],
        eoi_token_index=TOKEN_ID["<|image_end|>"],
        image_token_index=TOKEN_ID["<|patch|>"],
    )


def build_generation_config() -> "GenerationConfig":
    """Stop tokens only: no sampling defaults that would silently change a request."""
    from transformers import GenerationConfig

    return GenerationConfig(
        bos_token_id=TOKEN_ID["<|begin_of_text|>"],
        eos_token_id=stop_token_ids(),
        pad_token_id=TOKEN_ID["<|finetune_right_pad|>"],
    )


def stop_token_ids() -> list[int]:
    """Ids that end a completion, as in Llama 4's generation config."""
    return [TOKEN_ID[token] for token in ("<|end_of_text|>", "<|eom|>", "<|eot|>")]
