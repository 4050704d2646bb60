"""What a plan is made for, and what it says: a run as the planner sees it, and one way to run it on a card."""

from __future__ import annotations

from dataclasses import dataclass, field

from flux2_lora.adapters import AdapterSpec
from flux2_lora.families import Outline
from flux2_lora.planning.hardware import Card
from flux2_lora.planning.memory import Layout, Learning, Vram
from flux2_lora.planning.sketch import Costs, measure
from flux2_lora.quantize import PrecisionSpec

_PIXELS_A_TOKEN = 16


@dataclass(frozen=True, kw_only=True)
class Previews:
    """A round of pictures. passes: forward passes of a step of a picture, two under CFG; every: 0 for none."""

    every: int = 0
    pictures: int = 4
    steps: int = 20
    passes: int = 1


@dataclass(frozen=True, kw_only=True)
class Given:
    """What of a layout the user has settled; None and auto are open. host, block_inputs: as `MemorySpec` names them."""

    resident: int | None = None
    slots: int | None = None
    plain: int | None = None
    host: str = "auto"
    block_inputs: str = "auto"


@dataclass(frozen=True, kw_only=True)
class Work:
    """A run as the planner sees it. resolution: px of a square's side; matmul: of the frozen products, bf16 or fp8."""

    outline: Outline
    adapter: AdapterSpec = field(default_factory=AdapterSpec)
    precision: PrecisionSpec = field(default_factory=PrecisionSpec)
    learning: Learning = field(default_factory=Learning)
    previews: Previews = field(default_factory=Previews)
    resolution: int = 1024
    batch_size: int = 1
    grad_accumulation: int = 1
    max_steps: int = 1000
    matmul: str = "bf16"
    given: Given = field(default_factory=Given)

    def costs(self, card: Card) -> Costs:
        """What a step of this run takes on a card."""
        side = self.resolution // _PIXELS_A_TOKEN
        return measure(
            self.outline,
            self.adapter,
            self.precision,
            dtype=card.dtype,
            height=side,
            width=side,
            text_tokens=self.outline.text_tokens,
            batch=self.batch_size,
        )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One way to run. host: where streamed blocks lie, memory or disk; device: none is streamed.

    step_s: of an optimizer step; draw_s: of a forward pass over a batch; preview_s: of a round of previews.
    plain_bytes: what one more plain block keeps.
    """

    name: str
    layout: Layout
    host: str
    matmul: str
    vram: Vram
    host_bytes: int
    disk_bytes: int
    step_s: float
    draw_s: float
    preview_s: float
    run_s: float
    plain_bytes: int
    blocks: int

    @property
    def slots(self) -> int:
        return self.layout.slots

    @property
    def resident_blocks(self) -> int:
        return self.layout.resident

    @property
    def plain_blocks(self) -> int:
        return self.layout.plain

    @property
    def inputs_on_host(self) -> bool:
        return self.layout.inputs_on_host

    @property
    def words(self) -> str:
        """ "planned   streamed: 0 of 57 blocks stay, 24 keep their activations; 7.2 GB, 2.76 s a step"."""
        inputs = ", inputs of the others wait in host memory" if self.inputs_on_host else ""
        return (
            f"planned   {self.name}: {self.resident_blocks} of {self.blocks} blocks stay, {self.plain_blocks} keep "
            f"their activations{inputs}; {self.vram.peak / 1e9:.1f} GB, {self.step_s:.2f} s a step"
        )

    @property
    def checkpointing(self) -> bool:
        """Whether any block is recomputed in backward."""
        return self.plain_blocks < self.blocks

    def fits(self, card: Card) -> bool:
        return self.vram.peak <= card.vram_bytes and (not card.streams or self.host_bytes <= card.host_bytes)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """chosen is the fastest that fits; others are shown beside it, whether they fit or not."""

    card: Card
    chosen: Plan
    others: tuple[Plan, ...]
