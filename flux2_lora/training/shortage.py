"""What to say when memory runs out: which options need less, and about how much each of them frees.

An estimate from the step's shape. With u, the bytes of all tokens of a batch at the model's width: a block that is
computed again keeps 1 u, one that keeps its activations 23 u, and the one that is being differentiated 30 u (measured
on blocks of both architectures with adapters on all Linears: 21 to 24 u, and a quarter for what is temporary).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from flux2_lora.adapters import AdapterSpec
from flux2_lora.devices import compute_dtype
from flux2_lora.errors import RunError
from flux2_lora.families import Model
from flux2_lora.quantize import PrecisionSpec
from flux2_lora.targets import resolve
from flux2_lora.training.memory import Choice, MemorySpec

_PLAIN, _WORKING = 23, 30
_WORDS = ("out of memory", "can't allocate memory", "not enough memory")  # CUDA and MPS; a CPU under Linux, Windows


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What a step holds. tokens: of one picture and of its text; width_bytes: a token's, at the model's width.

    adapter_bytes: parameters and gradients, for moments depend on the optimizer. resident_bytes: of frozen blocks on
    the device, beyond what two slots take. inputs_on_host: of recomputed blocks; None where the host's memory is the
    device's.
    """

    batch_size: int
    picture_tokens: int
    text_tokens: int
    width_bytes: int
    blocks: int
    plain_blocks: int
    resident_bytes: int
    adapter_bytes: int
    inputs_on_host: bool | None = None

    @property
    def activation_bytes(self) -> int:
        """What forward leaves for backward, and what one block needs there."""
        unit = self.batch_size * (self.picture_tokens + self.text_tokens) * self.width_bytes
        recomputed = self.blocks - self.plain_blocks
        inputs = min(recomputed, 2) if self.inputs_on_host else recomputed
        return unit * (inputs + _PLAIN * self.plain_blocks + _WORKING)


@dataclass(frozen=True, kw_only=True)
class Knob:
    """An option as it would be written, and about how many bytes it frees."""

    option: str
    freed_bytes: int


def demand_of(
    model: Model,
    precision: PrecisionSpec,
    memory: MemorySpec,
    adapter: AdapterSpec,
    device: torch.device,
    *,
    choice: Choice | None = None,
    batch_size: int,
    side_px: int,
    text_tokens: int,
) -> Demand:
    """Of a run on square pictures, read off the names and shapes of the model's weights.

    choice: what was chosen where `memory` leaves it open.
    """
    shapes, blocks = model.weights.shapes, model.blocks()
    config = model.family.configuration(shapes)
    stored = sum(math.prod(shape) for name, shape in shapes.items() if "transformer_blocks." in name and len(shape) > 1)
    placement = memory.placement(blocks, choice)
    stay = blocks if placement is None else len(placement.resident)
    ranks = resolve(adapter.targets, model.family.architecture, model.projections(), adapter.rank)
    return Demand(
        batch_size=batch_size,
        picture_tokens=(side_px // model.family.pixels_per_token) ** 2,
        text_tokens=text_tokens,
        width_bytes=config["num_attention_heads"] * config["attention_head_dim"] * compute_dtype(device).itemsize,
        blocks=blocks,
        plain_blocks=len(memory.plain(blocks, device, choice)),
        resident_bytes=max(precision.bytes_of(stored * (stay - 2) // blocks), 0),
        adapter_bytes=sum(8 * rank * sum(shapes[f"{module}.weight"]) for module, rank in ranks.items()),
        inputs_on_host=memory.inputs_leave(device, choice) if device.type == "cuda" else None,
    )


def knobs(demand: Demand, *, resolution: int, rank: int) -> list[Knob]:
    """The options that need less memory, the one that frees most first."""
    side, half = resolution * 3 // 4 // 16 * 16, max(demand.batch_size // 2, 1)
    fewer = int(demand.picture_tokens * (side / resolution) ** 2)
    found = [
        Knob(option="memory.resident_blocks=0", freed_bytes=demand.resident_bytes),
        _activations("memory.plain_blocks=0", demand, replace(demand, plain_blocks=0)),
        _activations(f"batch_size={half}", demand, replace(demand, batch_size=half)),
        _activations(f"dataset.resolution={side}", demand, replace(demand, picture_tokens=fewer)),
        Knob(option=f"adapter.rank={max(rank // 2, 1)}", freed_bytes=demand.adapter_bytes // 2 if rank > 1 else 0),
    ]
    if demand.inputs_on_host is False:
        found.append(_activations("memory.block_inputs=host", demand, replace(demand, inputs_on_host=True)))
    return sorted((knob for knob in found if knob.freed_bytes > 0), key=lambda knob: -knob.freed_bytes)


def in_words(found: Sequence[Knob]) -> str:
    """ "memory.plain_blocks=0 frees about 1.20 GB, batch_size=1 0.80 GB"."""
    amounts = [f"{knob.option} frees about {knob.freed_bytes / 1e9:.2g} GB" for knob in found]
    return ", ".join(amounts) or "use a smaller model, or device=cpu"


def is_shortage(error: BaseException) -> bool:
    """Whether an exception says that memory ran out; only CUDA has a type of its own for it."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)
    )


def cause_of(error: BaseException) -> str:
    """An exception's first line: PyTorch goes on about its allocator."""
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextmanager
def shortage_told(during: str, remedies: Callable[[], Sequence[Knob]]) -> Iterator[None]:
    """Memory that runs out inside becomes a RunError that names what frees some."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_shortage(error):
            raise
        raise RunError(f"memory ran out {during} ({cause_of(error)})", in_words(remedies())) from error


def _activations(option: str, before: Demand, after: Demand) -> Knob:
    return Knob(option=option, freed_bytes=before.activation_bytes - after.activation_bytes)
