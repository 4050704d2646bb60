"""Optimizers by name, and the learning rate as a function of the step: nothing of a schedule is carried along.

torch and bitsandbytes make the common ones; pytorch-optimizer, an extra, makes the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from flux2_lora.errors import UserError
from flux2_lora.options import option
from flux2_lora.targets import numbers_of

Groups = list[dict[str, Any]]
Maker = Callable[[Groups, "OptimizerSpec"], torch.optim.Optimizer]
SCHEDULES = ("constant", "linear", "cosine", "rex")
_EXTRA = ("prodigy", "schedule_free", "adafactor", "lion", "came")


@dataclass(frozen=True, kw_only=True)
class OptimizerSpec:
    """kind: which one; lr after `warmup_steps`, then by schedule down to 0 (constant: not at all).

    b_lr_ratio: rate of B over that of A (LoRA+). block_lr: entries such as "single[5:10]:0.5" multiply the rate of what
    flux2_lora.targets takes them to name. ema_decay: the adapter that is shown and exported is an average, 0 for none.
    """

    kind: str = option("adamw", one_of=("adamw", "adamw8bit", "paged_adamw8bit", *_EXTRA))
    lr: float = option(1e-4, above=0, at_most=10)
    schedule: str = option("constant", one_of=SCHEDULES)
    warmup_steps: int = option(10, at_least=0)
    weight_decay: float = option(0.01, at_least=0)
    max_grad_norm: float = option(1.0, above=0)
    b_lr_ratio: float = option(1.0, above=0)
    block_lr: list[str] = field(default_factory=list)
    ema_decay: float = option(0.0, at_least=0, at_most=0.99999)


def refuse_mixtures(spec: OptimizerSpec, device: torch.device) -> None:
    """UserError for options of which one would silently do nothing."""
    uneven = spec.b_lr_ratio != 1 or spec.block_lr
    if spec.kind == "prodigy" and uneven:
        raise UserError(
            "optimizer=prodigy finds one rate for all, so optimizer.b_lr_ratio and optimizer.block_lr have no place",
            "leave them at their defaults, or take another optimizer",
        )
    if spec.kind == "schedule_free" and (spec.schedule != "constant" or spec.ema_decay):
        raise UserError(
            "optimizer=schedule_free averages the weights in place of a schedule and of an EMA",
            "set optimizer.schedule=constant and optimizer.ema_decay=0",
        )
    if spec.kind == "paged_adamw8bit" and device.type != "cuda":
        raise UserError(
            f"optimizer=paged_adamw8bit pages between a CUDA device and the host, the device is {device.type}",
            "use optimizer=adamw8bit",
        )


def grouped(spec: OptimizerSpec, architecture: str, named: Mapping[str, nn.Parameter]) -> Groups:
    """Parameters of A and B by how their rate is scaled; each group keeps its factor as "lr_scale"."""
    modules = {name: name.partition(".lora_")[0] for name in named}
    factors = numbers_of(spec.block_lr, architecture, modules.values(), option="optimizer.block_lr")
    groups: dict[float, dict[str, Any]] = {}
    for name, parameter in named.items():
        scale = factors.get(modules[name]) or 1.0
        scale *= spec.b_lr_ratio if ".lora_B." in name else 1.0
        groups.setdefault(scale, {"params": [], "lr": spec.lr * scale, "lr_scale": scale})["params"].append(parameter)
    return list(groups.values())


def make_optimizer(spec: OptimizerSpec, groups: Groups) -> torch.optim.Optimizer:
    """The optimizer over `groups`; UserError with the command to install what is missing."""
    try:
        return _MAKERS[spec.kind](groups, spec)
    except ImportError as error:
        package = "flux2-lora[optimizers]" if spec.kind in _EXTRA else "bitsandbytes"
        raise UserError(
            f"optimizer={spec.kind} needs {error.name}", f"pip install '{package}', or optimizer=adamw"
        ) from error


def state_bytes(spec: OptimizerSpec) -> float:
    """Bytes of state for every number that is trained, by asking the optimizer after one step on one matrix.

    The moving average of the adapter is counted in. Moments that are paged count as if they stayed.
    """
    matrix = nn.Parameter(torch.zeros(16, 16384))
    matrix.grad = torch.ones_like(matrix)
    kind = spec.kind.removeprefix("paged_")
    optimizer = make_optimizer(replace(spec, kind=kind), [{"params": [matrix], "lr": spec.lr, "lr_scale": 1.0}])
    optimizer.step()
    held = [value for value in optimizer.state[matrix].values() if isinstance(value, Tensor)]
    return sum(value.numel() * value.element_size() for value in held) / matrix.numel() + 4 * bool(spec.ema_decay)


def _adamw(groups: Groups, spec: OptimizerSpec) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=spec.lr, weight_decay=spec.weight_decay)


def _adamw8bit(groups: Groups, spec: OptimizerSpec) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit  # type: ignore[attr-defined]

    made = PagedAdamW8bit if spec.kind.startswith("paged") else AdamW8bit
    optimizer: torch.optim.Optimizer = made(groups, lr=spec.lr, weight_decay=spec.weight_decay)
    return optimizer


def _from_extra(name: str, **settings: Any) -> Maker:
    """A class of pytorch-optimizer with the settings under which its rate means what a user expects."""

    def make(groups: Groups, spec: OptimizerSpec) -> torch.optim.Optimizer:
        import pytorch_optimizer

        made = getattr(pytorch_optimizer, name)
        optimizer: torch.optim.Optimizer = made(groups, lr=spec.lr, weight_decay=spec.weight_decay, **settings)
        return optimizer

    return make


_MAKERS: Mapping[str, Maker] = {
    "adamw": _adamw,
    "adamw8bit": _adamw8bit,
    "paged_adamw8bit": _adamw8bit,
    "prodigy": _from_extra("Prodigy", bias_correction=True, d0=1e-5),
    "schedule_free": _from_extra("ScheduleFreeAdamW"),
    # Its own scaling by the weights' size would hold B, which starts at 0, near 0.
    "adafactor": _from_extra("AdaFactor", scale_parameter=False, relative_step=False, betas=(None, 0.999)),
    "lion": _from_extra("Lion"),
    "came": _from_extra("CAME"),
}


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its part of the rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def learning_rate(spec: OptimizerSpec, step: int, max_steps: int) -> float:
    """Rate of step `step` (from 0): linear warm-up, then the schedule over what is left.

    rex falls late: (1 - t) / (1 / 2 + (1 - t) / 2) at the part t of the way. Chen et al. 2021 (arXiv:2107.04197).
    """
    if step < spec.warmup_steps:
        return spec.lr * (step + 1) / (spec.warmup_steps + 1)
    left = 1 - (step - spec.warmup_steps) / max(max_steps - spec.warmup_steps, 1)
    part = {
        "constant": 1.0,
        "linear": left,
        "cosine": 0.5 - 0.5 * math.cos(math.pi * left),
        "rex": left / (0.5 + 0.5 * left),
    }
    return spec.lr * part[spec.schedule]


def all_parameters(optimizer: torch.optim.Optimizer) -> Sequence[nn.Parameter]:
    """The parameters of all groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
