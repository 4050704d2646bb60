"""What is compared: models in their shapes, ways to train them, and the batches of each way."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

HELD, CONTEXT = 0.6e9, 0.45e9  # of a card: by the desktop and others, and by the driver for this process
RANK = 16
OPTIMIZER = "adamw8bit"  # what the plans of small cards count on
OFFLOADS = ("offload", "offload_stream")
WAYS = ("streamed", "planned", "fp8", "int8", "peft", *OFFLOADS)
SMALL = {"num_layers": 1, "num_single_layers": 3, "num_attention_heads": 2, "joint_attention_dim": 64}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model by its family and its geometry, in Diffusers' words; page: of configs/model, for its plan.

    block_inputs: where the inputs of recomputed blocks wait, as in the plan that the model is held to.
    """

    family: str
    page: str
    geometry: Mapping[str, Any]
    block_inputs: str = "device"

    def small(self) -> Shape:
        return replace(self, geometry={**self.geometry, **SMALL})


def shape(family: str, page: str, layers: int, singles: int, heads: int, text: int, *, guidance: bool) -> Shape:
    sizes = {"num_layers": layers, "num_single_layers": singles, "num_attention_heads": heads}
    return Shape(family=family, page=page, geometry={**sizes, "joint_attention_dim": text, "guidance_embeds": guidance})


MODELS = {
    "flux1": shape("flux1", "flux1_dev", 19, 38, 24, 4096, guidance=True),
    "klein_9b": shape("flux2_klein", "flux2_klein_base_9b", 8, 24, 32, 12288, guidance=False),
    "dev_32b": replace(shape("flux2_dev", "flux2_dev", 8, 48, 48, 15360, guidance=True), block_inputs="host"),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row: a way to train, on so many pictures of a size. card: GB of the card that this one is capped to."""

    way: str
    batch: int
    px: int
    card: int | None = None

    @property
    def seat(self) -> object:
        """Cases of one seat are answered by one process."""
        return (self.way, self.card if self.way == "planned" else None)

    def __str__(self) -> str:
        return f"{self.way} {self.batch} x {self.px}" + (f" on {self.card} GB" if self.card else "")


def cases(name: str, ways: Collection[str], *, small: bool) -> tuple[list[Case], list[Case]]:
    """Of a model in some ways, beside `resident`: those that take turns, and those that are run once."""
    large, little = (64, 32) if small else (1024, 512)
    if name == "dev_32b":  # all of it resident takes 40 GB, and says nothing that the others do not
        return [Case(way="streamed", batch=1, px=large)], []
    turns = [
        *(Case(way=way, batch=4, px=large) for way in ("resident", "streamed")),
        Case(way="resident", batch=1, px=little),
        Case(way="streamed", batch=1, px=little, card=8),
        Case(way="resident", batch=4, px=little),
        *(Case(way="planned", batch=4, px=little, card=card) for card in (8, 12)),
        *(Case(way=way, batch=1, px=large) for way in ("resident", "streamed")),
    ]
    others = [Case(way=way, batch=4, px=large) for way in ("fp8", "int8")]
    others += [Case(way=way, batch=1, px=large) for way in ("peft", *OFFLOADS)]
    alone = [case for case in others if case.way in ways and name == "flux1"]
    asked = [case for case in turns if case.way in ways]
    compared = {(case.batch, case.px) for case in (*asked, *alone)}
    return [c for c in turns if c in asked or (c.way == "resident" and (c.batch, c.px) in compared)], alone
