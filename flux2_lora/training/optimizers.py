"""Optimizers by name and the learning rate as a function of the step: nothing of a schedule is carried along."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from flux2_lora.errors import UserError
from flux2_lora.options import option


@dataclass(frozen=True, kw_only=True)
class OptimizerSpec:
    """kind: adamw or adamw8bit; lr after `warmup_steps`; schedule: constant, linear or cosine down to 0."""

    kind: str = option("adamw", one_of=("adamw", "adamw8bit"))
    lr: float = option(1e-4, above=0, at_most=1)
    schedule: str = option("constant", one_of=("constant", "linear", "cosine"))
    warmup_steps: int = option(10, at_least=0)
    weight_decay: float = option(0.01, at_least=0)
    max_grad_norm: float = option(1.0, above=0)


def make_optimizer(spec: OptimizerSpec, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer over `parameters`; adamw8bit imports bitsandbytes."""
    if spec.kind == "adamw":
        return torch.optim.AdamW(parameters, lr=spec.lr, weight_decay=spec.weight_decay)
    try:
        from bitsandbytes.optim import AdamW8bit  # type: ignore[attr-defined]
    except ImportError as error:
        raise UserError(
            "optimizer=adamw8bit needs bitsandbytes", "pip install bitsandbytes, or optimizer=adamw"
        ) from error
    eight_bit: torch.optim.Optimizer = AdamW8bit(parameters, lr=spec.lr, weight_decay=spec.weight_decay)
    return eight_bit


def learning_rate(spec: OptimizerSpec, step: int, max_steps: int) -> float:
    """Rate of step `step` (from 0): linear warm-up, then the schedule over what is left."""
    if step < spec.warmup_steps:
        return spec.lr * (step + 1) / (spec.warmup_steps + 1)
    left = 1 - (step - spec.warmup_steps) / max(max_steps - spec.warmup_steps, 1)
    if spec.schedule == "linear":
        return spec.lr * left
    return spec.lr * (0.5 - 0.5 * math.cos(math.pi * left)) if spec.schedule == "cosine" else spec.lr
