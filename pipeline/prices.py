"""Money: what a run's GPUs cost, and what hosted APIs would charge for the same tokens.

In: a price list (``cluster/prices.yaml``, or the config's own) and what a run uses. Out: amounts.

    GPU-hours = replicas x GPUs of one x wall seconds / 3,600;  cost = GPU-hours x price of one
    hosted    = (input x input price + output x output price) / 1,000,000 + images x their price

Where an API charges by the image, the tokens of images are not charged again as input.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.config import PricesSection
from pipeline.errors import ConfigError
from pipeline.profile import REPO_ROOT, EngineProfile, Needs
from pipeline.validation import describe

_DEFAULT = REPO_ROOT / "cluster" / "prices.yaml"
_DIGITS = 6
"""Of an amount's fraction: a test run costs less than a cent."""

Price = Annotated[float, Field(ge=0)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class HostedPrice(_Section):
    """What one API charges."""

    name: Annotated[str, Field(min_length=1)]
    """For people."""
    input_per_million: Price
    """For a million prompt tokens."""
    output_per_million: Price
    """For a million completion tokens."""
    per_1000_images: Price | None = None
    """For a thousand images; null: they are charged as the prompt tokens they take."""
    as_of: date
    """When that was the price."""


class GpuPrice(_Section):
    """What one GPU costs for an hour."""

    price: Price
    """Of one GPU, not of a node."""
    as_of: date
    """When that was the price."""


class PriceList(_Section):
    """Prices in one currency."""

    currency: Annotated[str, Field(pattern="^[A-Z]{3}$")] = "USD"
    """ISO 4217."""
    hosted: list[HostedPrice] = []
    """APIs to compare with."""
    gpu_hour: dict[str, GpuPrice] = {}
    """Kind of GPU as Ray names it -> its price."""
    own_gpu_hour: Price | None = None
    """What the config says one costs, whatever its kind."""

    def of_gpu(self, needs: Needs) -> float | None:
        """What an hour of one of a replica's GPUs costs; None: it has none, or nobody says."""
        if not needs.gpus:
            return None
        if self.own_gpu_hour is not None:
            return self.own_gpu_hour
        found = self.gpu_hour.get(needs.accelerator or "")
        return found.price if found else None


@dataclass(frozen=True, slots=True)
class Usage:
    """What a run uses of the things that cost money."""

    prompt_tokens: float
    """Image tokens included."""
    image_tokens: float
    completion_tokens: float
    images: float
    seconds: float
    """Of wall time, while all replicas hold their GPUs."""


def load_prices(section: PricesSection) -> PriceList:
    """The price list that a config asks for.

    Raises:
        ConfigError: no such file, no YAML, an unknown key, or a value out of its range.
    """
    path = Path(section.file) if section.file else _DEFAULT
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"prices.file {path}: {error.strerror}.") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"prices.file {path}: {' '.join(str(error).split())}.") from None
    if not isinstance(document, dict) or "own_gpu_hour" in document:
        raise ConfigError(f"prices.file {path}: must be a mapping like cluster/prices.yaml.")
    try:
        return PriceList.model_validate({**document, "own_gpu_hour": section.gpu_hour})
    except ValidationError as error:
        raise ConfigError(f"prices.file {path}: {describe(error, PriceList)}") from None


def hosted_cost(price: HostedPrice, usage: Usage) -> float:
    """What ``price`` comes to for ``usage``."""
    by_image = price.per_1000_images is not None
    prompt = usage.prompt_tokens - (usage.image_tokens if by_image else 0)
    tokens = prompt * price.input_per_million + usage.completion_tokens * price.output_per_million
    return tokens / 1e6 + usage.images * (price.per_1000_images or 0) / 1e3


def gpu_hours(needs: Needs, replicas: int, seconds: float) -> float:
    """GPU-hours of ``replicas`` over ``seconds`` of wall time."""
    return replicas * needs.gpus * seconds / 3600


def money(
    prices: PriceList, profile: EngineProfile, replicas: int, usage: Usage
) -> Mapping[str, Any]:
    """``money`` of ``report.json``: ``cluster`` is null without GPUs or without a price of them."""
    price = prices.of_gpu(profile.needs)
    hours = gpu_hours(profile.needs, replicas, usage.seconds)
    return {
        "currency": prices.currency,
        "cluster": None
        if price is None
        else {
            "gpu_hours": round(hours, _DIGITS),
            "gpu_hour_price": price,
            "cost": round(hours * price, _DIGITS),
        },
        "hosted": [
            {
                "name": each.name,
                "cost": round(hosted_cost(each, usage), _DIGITS),
                "as_of": each.as_of.isoformat(),
            }
            for each in prices.hosted
        ],
    }
