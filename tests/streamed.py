"""Small bases of both architectures whose blocks are streamed, and a copier that does its worst."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flux2_lora.adapters import AdapterSpec, Lora, LoraWeights, attach, lora_layers
from flux2_lora.conditioning import Conditioning
from flux2_lora.copiers import AtOnce, Copier
from flux2_lora.families import load_family
from flux2_lora.host import Host, InMemory, pack
from flux2_lora.networks.transformers import blocks_in
from flux2_lora.stream import Streamer, attach_streamer, spread
from tests.conftest import quantised

CPU = torch.device("cpu")
BLOCKS = 5


@dataclass
class Adversary:
    """Ruins a slot as soon as a copy is submitted, and copies then, at the wait, or at random; notes all in `trace`."""

    host: Host
    slots: Sequence[Tensor]
    when: str = "wait"
    trace: list[tuple[str, int]] = field(default_factory=list)
    pending: dict[int, int] = field(default_factory=dict)
    chance: random.Random = field(default_factory=lambda: random.Random(0))

    def submit(self, slot: int, block: int) -> None:
        self.trace.append(("submit", slot))
        self.slots[slot].fill_(0x7F)
        self.pending[slot] = block
        if self.when == "submit" or (self.when == "random" and self.chance.random() < 0.5):
            self.copy(slot)

    def wait(self, slot: int) -> None:
        self.trace.append(("wait", slot))
        self.copy(slot)

    def copy(self, slot: int) -> None:
        if slot in self.pending:
            self.host.read(self.pending.pop(slot), self.slots[slot])


def flux2() -> nn.Module:
    from diffusers import Flux2Transformer2DModel

    model: nn.Module = Flux2Transformer2DModel(
        in_channels=128,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    return model


def flux1() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    model: nn.Module = FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=False,
    )
    return model


@dataclass(frozen=True)
class Case:
    """A base, and how it is driven."""

    architecture: str
    base: nn.Module

    def adapted(self, rank: int = 2) -> nn.Module:
        """A copy with adapters that do something."""
        transformer = copy.deepcopy(self.base)
        attach(transformer, self.architecture, AdapterSpec(rank=rank), seed=0)
        noise = torch.Generator().manual_seed(1)
        for _, layer in lora_layers(transformer):
            up = layer.lora_B["default"].weight
            with torch.no_grad():
                up.copy_(0.1 * torch.randn(up.shape, generator=noise))
        return transformer

    def velocity(self, transformer: nn.Module, seed: int = 0) -> Tensor:
        """What the model says of a noisy picture of six tokens."""
        family = load_family("flux1" if self.architecture == "flux1" else "flux2_small")
        noise = torch.Generator().manual_seed(seed)
        latents = torch.randn(1, family.latent_channels, 2, 3, generator=noise)
        pooled = torch.randn(1, 20, generator=noise) if self.architecture == "flux1" else None
        text = Conditioning(embeds=torch.randn(1, 4, 24, generator=noise), pooled=pooled)
        return family.velocity(transformer, latents, torch.tensor([0.6]), text)

    def step(self, transformer: nn.Module, seed: int = 0) -> list[Tensor]:
        """Loss and gradients of a step, which is taken."""
        loss = self.velocity(transformer, seed).square().mean()
        loss.backward()
        found = [loss.detach()]
        for parameter in (p for p in transformer.parameters() if p.requires_grad):
            assert parameter.grad is not None
            found.append(parameter.grad.clone())
            with torch.no_grad():
                parameter.sub_(0.1 * parameter.grad)
            parameter.grad = None
        return found

    def lived(self, transformer: nn.Module) -> Tensor:
        """All that a step, a validation, two sampling steps and another step give."""
        found = self.step(transformer)
        with torch.no_grad():
            found += [self.velocity(transformer, seed) for seed in (1, 2, 3)]
        return torch.cat([tensor.flatten().float() for tensor in [*found, *self.step(transformer, 4)]])


def stream_blocks(
    transformer: nn.Module,
    *,
    slots: int,
    resident: int = 0,
    copier: Callable[[Host, Sequence[Tensor]], Copier] = AtOnce,
) -> Any:
    """Stream a transformer that is there already; returns the copier."""
    stay, host = spread(resident, BLOCKS), InMemory("memory", partial(torch.empty, dtype=torch.uint8))
    blocks = [block for number, block in enumerate(blocks_in(transformer).values()) if number not in stay]
    layouts = [pack(block) for block in blocks]
    for number, (block, layout) in enumerate(zip(blocks, layouts, strict=True)):
        host.add(number, block, layout)
    flats = [torch.empty(max(layout.size for layout in layouts), dtype=torch.uint8) for _ in range(slots)]
    made = copier(host, flats)
    attach_streamer(transformer, Streamer(blocks, layouts, host, flats, made))
    return made


def some_lora(transformer: nn.Module) -> Lora:
    noise = torch.Generator().manual_seed(2)
    linears = {
        path: m for path, m in transformer.named_modules() if isinstance(m, nn.Linear) and "transformer_blocks" in path
    }
    weights = {
        path: LoraWeights(
            down=torch.randn(2, linear.in_features, generator=noise),
            up=torch.randn(linear.out_features, 2, generator=noise),
            scale=0.1,
        )
        for path, linear in linears.items()
    }
    return Lora(modules=weights, naming="ours", total=len(weights), architecture="flux2")


def every_case() -> dict[tuple[str, str], Case]:
    """By architecture and kind of base."""
    made = {}
    for architecture, build in (("flux2", flux2), ("flux1", flux1)):
        for kind in ("fp8", "int8", "nf4", "bf16", "fp32"):
            torch.manual_seed(0)
            base = build().eval().requires_grad_(False)
            base = quantised(base, kind) if kind in ("fp8", "int8", "nf4") else base
            made[architecture, kind] = Case(architecture, base.bfloat16() if kind == "bf16" else base)
    return made
