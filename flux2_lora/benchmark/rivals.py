"""Others' ways to train the same base, as their documentation has them: PEFT, and Diffusers' group offload."""

from __future__ import annotations

import re

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from flux2_lora.adapters import AdapterSpec, trainable
from flux2_lora.benchmark.cases import RANK
from flux2_lora.networks.transformers import block_linears
from flux2_lora.quantize import FrozenLinear
from flux2_lora.targets import resolve


def offload(transformer: nn.Module, device: torch.device, *, streams: bool) -> None:
    """Diffusers' group offload of every block, with bytes as parameters: its stream leaves buffers where they are."""
    for linear in [module for module in transformer.modules() if isinstance(module, FrozenLinear)]:
        values = linear.values
        del linear.values
        linear.register_parameter("values", nn.Parameter(values, requires_grad=False))
    transformer.enable_group_offload(  # type: ignore[operator]
        onload_device=device, offload_type="block_level", num_blocks_per_group=1, use_stream=streams
    )


def attach_plain(transformer: nn.Module, architecture: str) -> None:
    """PEFT as its documentation has it, on the same projections, with adapters in float32."""
    named = resolve(AdapterSpec().targets, architecture, block_linears(transformer), RANK)
    pattern = "|".join(map(re.escape, named))
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=pattern), transformer)
    for parameter in trainable(transformer).values():
        parameter.data = parameter.data.float()
