"""Full-size models by the pages of configs/model, cards by those of configs/hardware, and what steps take on them."""

from __future__ import annotations

from functools import cache

import torch
import yaml

from flux2_lora.adapters import AdapterSpec
from flux2_lora.bundled import share
from flux2_lora.families import Geometry, ModelSpec, Outline, outline
from flux2_lora.planning.hardware import Card, HardwareSpec, card_of
from flux2_lora.planning.sketch import Costs
from flux2_lora.planning.work import Work
from flux2_lora.quantize import PrecisionSpec

MODELS = ("flux1_dev", "flux2_klein_base_4b", "flux2_klein_base_9b", "flux2_dev")
CARDS = ("rtx4060_8gb", "rtx3060_12gb", "rtx4070_12gb")


@cache
def outline_of(model: str) -> Outline:
    """The model of a page, whose files are not here."""
    page = yaml.safe_load((share() / "configs" / "model" / f"{model}.yaml").read_text())
    spec = ModelSpec(
        family=page["family"],
        path="nobody/nothing",
        title=page["title"],
        architecture_name=page["architecture_name"],
        geometry=Geometry(**page["geometry"]),
    )
    return outline(spec)


def work_of(model: str, px: int, **changes: object) -> Work:
    return Work(outline=outline_of(model), resolution=px, **changes)  # type: ignore[arg-type]


@cache
def costs_of(model: str, px: int, base: str = "fp8", batch: int = 1, rank: int = 16) -> Costs:
    """What a step takes on a card that computes in bfloat16."""
    work = work_of(model, px, precision=PrecisionSpec(base=base), batch_size=batch, adapter=AdapterSpec(rank=rank))
    return work.costs(card("rtx4060_8gb"))


@cache
def card(name: str, **changes: float) -> Card:
    """The card of a page, with some of its numbers changed."""
    page = yaml.safe_load((share() / "configs" / "hardware" / f"{name}.yaml").read_text())
    return card_of(HardwareSpec(**{**page, **changes}), torch.device("cpu"))
