"""Train mini-Maverick from scratch on a CPU and write its checkpoint.

    python -m cluster.models.train_mini_maverick --out DIR [--steps N]

In: the training digits (`cluster.models.digits`) and the tasks (`cluster.models.tasks`). Out: a
folder that transformers and vLLM load: bf16 weights, config, tokenizer, chat template, image
processor. Every example is new: its digits are drawn and distorted at random, its wording is
varied. Training runs in fp32; the loss counts the answer and the end-of-turn token only.

The run is seeded, but not bit-exact across machines or thread counts.
"""

import argparse
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Final

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from cluster.models.digits import Digit, Split, digits, render
from cluster.models.mini_maverick import (
    CHECKPOINT,
    TILE_PX,
    build_config,
    build_generation_config,
    build_processor,
)
from cluster.models.tasks import Example, Task, random_example

if TYPE_CHECKING:
    from transformers import Llama4ForConditionalGeneration, Llama4Processor

log = logging.getLogger(__name__)

SEED: Final = 20261122
STEPS: Final = 1200
PEAK_LR: Final = 2e-3
WARMUP_SHARE: Final = 0.1
"""Of the steps; then the rate falls to zero along a cosine."""
WEIGHT_DECAY: Final = 0.05
CLIP_NORM: Final = 1.0
BALANCE_WEIGHT: Final = 0.01
"""Of the load-balancing loss, which keeps all experts in use (and both ranks of EP=2 busy)."""
BATCH: Final[Mapping[Task, int]] = {
    Task.SINGLE: 24,
    Task.WIDE: 32,
    Task.LARGER: 16,
    Task.COUNT: 16,
}
"""Examples a step; each task is a batch of its own, as their lengths differ."""

SYSTEM_PROMPTS: Final = (
    "You are a helpful assistant.",
    "Answer briefly.",
    "You read handwritten digits.",
    "Answer with digits only.",
)
SYSTEM_SHARE: Final = 0.15
TEXT_FIRST_SHARE: Final = 0.15
CASUAL_SHARE: Final = 0.15
"""Of the prompts: lower case or without the final punctuation mark."""


def distort(digit: Digit, rng: Random) -> Image.Image:
    """A tile with the digit turned, scaled, moved, and its ink made lighter; white outside."""
    angle = math.radians(rng.uniform(-10, 10))
    scale = rng.uniform(0.9, 1.12)
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    centre = TILE_PX / 2
    x, y = centre + rng.uniform(-3, 3), centre + rng.uniform(-3, 3)
    tile = render(digit).transform(
        (TILE_PX, TILE_PX),
        Image.Transform.AFFINE,
        (cos, sin, centre - cos * x - sin * y, -sin, cos, centre + sin * x - cos * y),
        resample=Image.Resampling.BILINEAR,
        fillcolor=(255, 255, 255),
    )
    fade = rng.uniform(0.75, 1.0)
    return tile.point(lambda level: int(255 - fade * (255 - level)))


def casual(prompt: str, rng: Random) -> str:
    """The prompt as a hasty user types it."""
    return prompt.lower() if rng.random() < 0.5 else prompt.rstrip(".?")


def conversation(example: Example, rng: Random) -> list[dict[str, Any]]:
    """The chat messages of one training example, varied in form; the answer is not in it."""
    prompt = casual(example.prompt, rng) if rng.random() < CASUAL_SHARE else example.prompt
    parts: list[dict[str, str]] = [{"type": "image"} for _ in example.images]
    text = {"type": "text", "text": prompt}
    parts = [text, *parts] if rng.random() < TEXT_FIRST_SHARE else [*parts, text]
    user = {"role": "user", "content": parts}
    if rng.random() >= SYSTEM_SHARE:
        return [user]
    return [{"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}, user]


def encode(
    processor: "Llama4Processor", examples: Sequence[Example], rng: Random
) -> tuple[dict[str, Tensor], Tensor]:
    """Model inputs padded on the right, and labels [batch, length] with -100 off the answer."""
    texts = [
        processor.apply_chat_template(conversation(e, rng), add_generation_prompt=True)
        + e.answer
        + "<|eot|>"
        for e in examples
    ]
    images = [list(e.images) for e in examples] if examples[0].images else None
    inputs = processor(
        text=texts,
        images=images,
        padding=True,
        padding_side="right",
        add_special_tokens=False,
        return_tensors="pt",
    )
    lengths = inputs["attention_mask"].sum(dim=1)
    answers = torch.tensor([len(e.answer) + 1 for e in examples])
    position = torch.arange(inputs["input_ids"].shape[1])
    on_answer = (position >= (lengths - answers)[:, None]) & (position < lengths[:, None])
    labels = inputs["input_ids"].masked_fill(~on_answer, -100)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].float()
    return dict(inputs), labels


@contextmanager
def watched_routers(model: "Llama4ForConditionalGeneration") -> Iterator[list[Tensor]]:
    """A list that every forward pass extends with the router logits [tokens, experts]."""
    seen: list[Tensor] = []
    handles = [
        moe.router.register_forward_hook(lambda _module, _inputs, outputs: seen.append(outputs[1]))
        for moe in moe_layers(model)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def top1_forward(moe: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """What `Llama4TextMoe.forward` computes, but only the chosen expert sees a token.

    The original runs all eight experts on every token and multiplies seven results by zero;
    without that a training step takes half the time.
    """
    flat = hidden_states.reshape(-1, moe.hidden_dim)
    scores, router_logits = moe.router(flat)
    chosen = router_logits.argmax(dim=-1)
    order = chosen.argsort()
    weighted = (flat * scores.gather(1, chosen[:, None]))[order]
    counts = torch.bincount(chosen, minlength=moe.num_experts).tolist()
    results = []
    for expert, tokens in enumerate(weighted.split(counts)):
        gate, up = (tokens @ moe.experts.gate_up_proj[expert]).chunk(2, dim=-1)
        results.append((up * moe.experts.act_fn(gate)) @ moe.experts.down_proj[expert])
    routed = torch.empty_like(flat).index_copy(0, order, torch.cat(results))
    return moe.shared_expert(flat) + routed, router_logits


def moe_layers(model: "Llama4ForConditionalGeneration") -> list[Any]:
    """The mixture-of-experts modules, first layer first."""
    layers = model.language_model.model.layers
    return [layer.feed_forward for layer in layers if layer.is_moe_layer]


def balance_loss(router_logits: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Switch Transformer's load-balancing loss (arXiv:2101.03961, eq. 4), mean over layers.

    One at best, the number of experts at worst; padding does not count.
    """
    real = mask.flatten().bool()
    losses = []
    for logits in router_logits:
        chances = logits[real].softmax(dim=-1)
        share = functional.one_hot(chances.argmax(dim=-1), chances.shape[-1]).float().mean(dim=0)
        losses.append(chances.shape[-1] * (share * chances.mean(dim=0)).sum())
    return torch.stack(losses).mean()


def answer_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of the answer tokens, each row weighing the same."""
    target = labels[:, 1:]
    loss = functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), target, ignore_index=-100, reduction="none"
    )
    counted = (target != -100).sum(dim=1)
    return (loss.sum(dim=1) / counted).mean()


def learning_rate(step: int, steps: int) -> float:
    """The factor on `PEAK_LR`: a linear warm-up, then a cosine to zero."""
    warmup = max(1, round(steps * WARMUP_SHARE))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def train_step(
    model: "Llama4ForConditionalGeneration",
    processor: "Llama4Processor",
    routers: list[Tensor],
    rng: Random,
) -> dict[str, float]:
    """Add the gradients of one batch of every task; returns the loss of each task."""
    pool = digits(Split.TRAIN)
    losses: dict[str, float] = {}
    for task, size in BATCH.items():
        examples = [
            random_example(task, pool, rng, draw=lambda digit: distort(digit, rng))
            for _ in range(size)
        ]
        inputs, labels = encode(processor, examples, rng)
        routers.clear()
        loss = answer_loss(model(**inputs, use_cache=False).logits, labels)
        balance = balance_loss(routers, inputs["attention_mask"])
        torch.autograd.backward(loss + BALANCE_WEIGHT * balance)
        losses[task.value] = loss.item()
    losses["balance"] = balance.item()
    return losses


def train(*, steps: int = STEPS, seed: int = SEED) -> "Llama4ForConditionalGeneration":
    """Train from random weights; returns the model in fp32."""
    from transformers import Llama4ForConditionalGeneration  # seconds to import

    torch.manual_seed(seed)
    rng = Random(seed)
    processor = build_processor()
    model = Llama4ForConditionalGeneration(build_config()).train()
    for moe in moe_layers(model):
        moe.forward = partial(top1_forward, moe)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: learning_rate(s, steps))
    started = time.monotonic()
    with watched_routers(model) as routers:
        for step in range(1, steps + 1):
            losses = train_step(model, processor, routers, rng)
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            if step % 25 == 0 or step == steps:
                log_progress(step, steps, losses, time.monotonic() - started)
    for moe in moe_layers(model):
        del moe.forward
    return model.eval()


def log_progress(step: int, steps: int, losses: Mapping[str, float], seconds: float) -> None:
    """One line: the step, the loss of each task, the time so far and to come."""
    shown = " ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
    remaining = seconds / step * (steps - step)
    log.info("step %d/%d: %s, %.0f s, ETA %.0f s", step, steps, shown, seconds, remaining)


def save(model: "Llama4ForConditionalGeneration", out: Path) -> None:
    """Write the bf16 checkpoint with everything that loads and serves it."""
    model.generation_config = build_generation_config()
    model.bfloat16().save_pretrained(out)
    build_processor().save_pretrained(out)
    for file in out.iterdir():
        file.chmod(0o644)  # safetensors writes 0600; a checkpoint is for everyone


def main() -> None:
    """Command line: train and save."""
    parser = argparse.ArgumentParser(description="Train mini-Maverick from scratch on a CPU.")
    parser.add_argument("--out", type=Path, default=CHECKPOINT, help="folder of the checkpoint")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    started = time.monotonic()
    save(train(steps=args.steps, seed=args.seed), args.out)
    log.info("saved %s after %.0f s", args.out, time.monotonic() - started)


if __name__ == "__main__":
    main()
