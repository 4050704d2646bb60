"""A base of random weights with an adapter, built the way that is asked, and what a step on it takes.

Weights are made on the device block by block, as they are read; numbers do not change how long a product takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor, nn

from flux2_lora.adapters import AdapterSpec, attach, trainable
from flux2_lora.benchmark.cases import CONTEXT, HELD, OFFLOADS, OPTIMIZER, RANK, Shape
from flux2_lora.benchmark.rates import seconds
from flux2_lora.benchmark.rivals import attach_plain, offload
from flux2_lora.benchmark.worker import Answer
from flux2_lora.conditioning import Conditioning
from flux2_lora.devices import compute_dtype, largest_resident
from flux2_lora.families import Model, ModelFamily, load_family
from flux2_lora.matmul import DEQUANTIZE
from flux2_lora.networks.components import on_meta
from flux2_lora.networks.transformers import blocks_in
from flux2_lora.quantize import FrozenLinear, PrecisionSpec, load_frozen, trial_of
from flux2_lora.training.memory import MemorySpec, recompute_blocks
from flux2_lora.training.optimizers import OptimizerSpec, make_optimizer
from flux2_lora.weights import Stored

WARM = 1  # steps before those that count
BASES = {"resident": "fp8", "streamed": "fp8", "planned": "fp8", "fp8": "fp8", "int8": "int8", "peft": "bf16"}


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A model of random weights, made as they are read: what `load_frozen` asks of a model that lies in files."""

    family: ModelFamily
    geometry: Mapping[str, Any]
    device: torch.device
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def weights(self) -> Drawn:
        return self

    def empty_transformer(self) -> nn.Module:
        shell = on_meta(self.family.transformer_class, dict(self.geometry), "random")
        self.shapes.update({name: tuple(parameter.shape) for name, parameter in shell.named_parameters()})
        return shell

    def read(self, name: str) -> Stored:
        size, kind = self.shapes[name], {"dtype": compute_dtype(self.device), "device": self.device}
        if len(size) == 1:
            return Stored(values=torch.full(size, float(name.endswith("weight")), **kind))  # type: ignore[call-overload]
        return Stored(values=torch.randn(size, **kind).mul_(0.02))  # type: ignore[call-overload]


def build(model: Shape, setting: Answer, device: torch.device) -> Trained:
    """A base with an adapter, as the way asks."""
    torch.manual_seed(0)
    way, family = setting["way"], load_family(model.family)
    drawn = Drawn(family=family, geometry=model.geometry, device=device)
    stay = {"streamed": 0, "planned": setting.get("resident")}.get(way)
    memory = MemorySpec(resident_blocks=stay, slots=setting.get("slots"), host="pinned")
    count = model.geometry["num_layers"] + model.geometry["num_single_layers"]
    spec = PrecisionSpec(base=BASES.get(way, "fp8"), matmul=way if way in ("fp8", "int8") else DEQUANTIZE)
    transformer = load_frozen(cast("Model", drawn), spec, device, memory.placement(count))
    if (trial := trial_of(transformer)) is not None and trial.used == DEQUANTIZE:
        raise SystemExit(trial.words)
    if way == "peft":
        attach_plain(transformer, family.architecture)
    else:
        attach(transformer, family.architecture, AdapterSpec(rank=RANK), seed=0)
    if way in OFFLOADS:
        offload(transformer, device, streams=way == "offload_stream" and device.type == "cuda")
    parameters = list(trainable(transformer).values())
    frozen = [
        m.values for block in blocks_in(transformer).values() for m in block.modules() if isinstance(m, FrozenLinear)
    ]
    placement = memory.placement(count)
    moved = 0.0 if placement is None else 2 * (count - len(placement.resident) - placement.slots) / count
    return Trained(
        family=family,
        transformer=transformer,
        parameters=parameters,
        optimizer=make_optimizer(OptimizerSpec(kind=OPTIMIZER), [{"params": parameters, "lr": 1e-4, "lr_scale": 1.0}]),
        device=device,
        way=way,
        text=16 if setting["small"] else 512,
        copied=int(moved * sum(values.numel() for values in frozen)),
        blocks=count,
        block_inputs=model.block_inputs,
    )


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A base and its adapter, ready to take steps. text: tokens of a caption; copied: bytes a step brings over."""

    family: ModelFamily
    transformer: nn.Module
    parameters: Sequence[nn.Parameter]
    optimizer: torch.optim.Optimizer
    device: torch.device
    way: str
    text: int
    copied: int
    blocks: int
    block_inputs: str

    def measure(self, *, batch: int, px: int, card: int | None, plain: int, steps: int) -> Answer:
        """Steps on pictures of px x px; seconds of the median one, and bytes at the peak."""
        self.recompute(plain)
        inputs = self.inputs(batch, px // self.family.pixels_per_token)
        if self.device.type == "cuda":
            total = torch.cuda.get_device_properties(self.device).total_memory
            pool = total if card is None else card * 1e9 - HELD - CONTEXT
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(min(pool / total, 1.0), self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        took = [seconds(lambda: self.step(*inputs), self.device) for _ in range(WARM + steps)][WARM:]
        cuda = self.device.type == "cuda"
        held = torch.cuda.max_memory_reserved(self.device) if cuda else largest_resident()
        torch.cuda.empty_cache()  # others take their turns now
        return {"step_s": median(took), "reserved": held, "copied": self.copied}

    def recompute(self, plain: int) -> None:
        """Let blocks be computed again in backward, but for `plain` of them; in others' ways as they do it."""
        if self.way in ("peft", *OFFLOADS):
            self.transformer.enable_gradient_checkpointing()  # type: ignore[operator]
        else:
            memory = MemorySpec(plain_blocks=plain, block_inputs=self.block_inputs)
            recompute_blocks(self.transformer, memory.plain(self.blocks, self.device), memory.offload(self.device))

    def inputs(self, batch: int, side: int) -> tuple[Tensor, Tensor, Conditioning]:
        """Latents, what they are to become, and text."""
        width = cast("Any", self.transformer).config.joint_attention_dim
        latents, target = (
            torch.randn(batch, self.family.latent_channels, side, side, device=self.device) for _ in range(2)
        )
        embeds = torch.randn(batch, self.text, width, device=self.device)
        return latents, target, Conditioning(embeds=embeds, pooled=torch.randn(batch, 768, device=self.device))

    def step(self, latents: Tensor, target: Tensor, said: Conditioning) -> None:
        """Forward, backward, clip, update."""
        plain_peft = self.way == "peft"
        sigmas = torch.full((len(latents),), 0.5, device=self.device)
        with torch.autocast(self.device.type, torch.bfloat16) if plain_peft else nullcontext():
            moved = self.family.velocity(self.transformer, latents, sigmas, said)
        (moved.float() - target).square().mean().backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
