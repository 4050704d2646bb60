"""LoRA adapters on a frozen transformer: y = W x + strength * (alpha / rank) * B A x.

Hu et al. 2021 (arXiv:2106.09685).

PEFT does the wrapping; here stand the laws around it: every projection of the chosen groups is targeted and counted
against the model, A and B are float32 whatever the base is stored in, A starts from a stream keyed by its name, B at
zero, and strength 0 is the base bit for bit, since the adapter is then switched off and not multiplied by zero. LoRAs
of any origin (flux2_lora.lora_files) are attached the same way, each Linear at its own rank and scale, or merged.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from flux2_lora.errors import UserError, listed
from flux2_lora.files import write_tensors
from flux2_lora.flow import generator
from flux2_lora.networks.transformers import block_linears, compute_device
from flux2_lora.options import option
from flux2_lora.quantize import FrozenLinear
from flux2_lora.stream import opened
from flux2_lora.targets import resolve

if TYPE_CHECKING:  # importing PEFT takes seconds, which a refused command should not cost
    from peft.tuners.lora import LoraLayer

WEIGHTS = "adapter.safetensors"


@dataclass(frozen=True, kw_only=True)
class AdapterSpec:
    """rank of B A; alpha (scale is alpha / rank; null means alpha = rank); groups as flux2_lora.targets reads them.

    rank_stabilised: the scale is alpha / sqrt(rank) instead. Kalajdzievski 2023 (arXiv:2312.03732).
    """

    rank: int = option(16, at_least=1, at_most=1024)
    alpha: float | None = option(None, above=0)
    rank_stabilised: bool = False
    targets: list[str] = field(default_factory=lambda: ["attention", "mlp"])

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A trained adapter as it lies in a file: PEFT's names, float32; A [rank in], B [out rank]."""

    state: dict[str, Tensor]
    rank: int
    alpha: float
    targets: list[str]
    family: str
    trigger_word: str | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class LoraWeights:
    """The update scale * up @ down of one Linear: down [r in], up [out r]. Equal to itself only, as tensors are."""

    down: Tensor
    up: Tensor
    scale: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Lora:
    """What a LoRA file does to a model: Diffusers module -> its update.

    naming: whose names the file has; total: Linears that it updates, of which `modules` may be a part (block ranges).
    header: the metadata of the file.
    """

    modules: dict[str, LoraWeights]
    naming: str
    total: int
    architecture: str
    header: Mapping[str, str] = field(default_factory=dict)
    family: str | None = None
    trigger_word: str | None = None

    @property
    def summary(self) -> str:
        """ "28 of 28 modules, kohya's names"."""
        return f"{len(self.modules)} of {self.total} modules, {self.naming} names"


def summed(loras: Sequence[Lora], weights: Sequence[float]) -> dict[str, LoraWeights]:
    """Linear -> the weighted sum of the updates, exact: factors stand side by side, ranks add up."""
    modules: dict[str, LoraWeights] = {}
    for module in dict.fromkeys(module for lora in loras for module in lora.modules):
        parts = [
            (lora.modules[module], weight)
            for lora, weight in zip(loras, weights, strict=True)
            if module in lora.modules
        ]
        modules[module] = LoraWeights(
            down=torch.cat([pair.down.float() for pair, _ in parts]),
            up=torch.cat([weight * pair.scale * pair.up.float() for pair, weight in parts], dim=1),
            scale=1.0,
        )
    return modules


def attach(transformer: nn.Module, architecture: str, spec: AdapterSpec, *, seed: int, name: str = "default") -> int:
    """Wrap the targeted Linears of `transformer`; returns how many. RuntimeError when PEFT missed one.

    A group with a rank of its own keeps the scale alpha / rank of the rest.
    """
    ranks = resolve(spec.targets, architecture, block_linears(transformer), spec.rank)
    wrapped = _wrap(transformer, {module: (rank, spec.scale) for module, rank in ranks.items()}, name)
    device = compute_device(transformer)
    for path, layer in wrapped.items():
        down, up = _halves(layer, name)
        bound = 1 / math.sqrt(down.in_features)
        start = torch.empty(down.weight.shape).uniform_(-bound, bound, generator=generator(seed, "adapter", path))
        _fill(layer, name, (start, torch.zeros(up.weight.shape)), device)
    return len(wrapped)


def attach_loras(transformer: nn.Module, loras: Mapping[str, Lora]) -> list[str]:
    """Attach LoRAs beside each other at strength 1; returns the names to use in `set_strengths`, in their order."""
    names = [f"adapter{index}" for index in range(len(loras))]
    for name, lora in zip(names, loras.values(), strict=True):
        sizes = {module: (weights.down.shape[0], weights.scale) for module, weights in lora.modules.items()}
        for path, layer in _wrap(transformer, sizes, name).items():
            weights = lora.modules[path]
            _fill(layer, name, (weights.down, weights.up), compute_device(transformer))
    set_strengths(transformer, dict.fromkeys(names, 1.0))
    return names


@torch.no_grad()
def merge_loras(transformer: nn.Module, strengths: Mapping[str, float]) -> None:
    """Add strength * scale * B A of each named adapter to the base for good, and remove all adapters.

    The sum is taken in float32 and rounded, or quantised again, once. KeyError for a name that is not attached.
    """
    layers = dict(lora_layers(transformer))
    for unknown in strengths.keys() - {name for layer in layers.values() for name in layer.lora_A}:
        raise KeyError(unknown)
    for path, layer in layers.items():
        base = cast("nn.Linear", layer.get_base_layer())
        updates = [
            strength * layer.lora_alpha[name] / layer.r[name] * up.weight.float() @ down.weight.float()
            for name, strength in strengths.items()
            if strength != 0 and name in layer.lora_A
            for down, up in [_halves(layer, name)]
        ]
        with opened(transformer, base) if updates else nullcontext():
            if updates and isinstance(base, FrozenLinear):
                base.add(reduce(torch.add, updates))
            elif updates:
                base.weight.copy_(reduce(torch.add, updates, base.weight.float()))
        transformer.set_submodule(path, base)
    if layers:
        del transformer.peft_config  # PEFT's record of what is attached


def _wrap(transformer: nn.Module, sizes: Mapping[str, tuple[int, float]], name: str) -> dict[str, LoraLayer]:
    """Wrap modules at (rank, scale) each, in the model's order; RuntimeError when PEFT missed one."""
    from peft import LoraConfig, inject_adapter_in_model

    from flux2_lora.lora_linear import LoraLinear

    groups: dict[tuple[int, float], list[str]] = {}
    for module, size in sizes.items():
        groups.setdefault(size, []).append(re.escape(module))
    (rank, scale), *_ = groups
    patterns = {f"^(?:{'|'.join(modules)})": size for size, modules in groups.items()}
    config = LoraConfig(
        r=rank,
        lora_alpha=scale * rank,  # type: ignore[arg-type]
        target_modules="|".join(map(re.escape, sizes)),
        rank_pattern={pattern: rank for pattern, (rank, _) in patterns.items()},
        alpha_pattern={pattern: scale * rank for pattern, (rank, scale) in patterns.items()},
        bias="none",
    )
    config._register_custom_module({nn.Linear: LoraLinear})  # noqa: SLF001 - PEFT documents it for this use
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are meant
        inject_adapter_in_model(config, transformer, adapter_name=name)
    wrapped: dict[str, LoraLayer] = {
        path: layer for path, layer in lora_layers(transformer) if name in layer.lora_A and type(layer) is LoraLinear
    }
    if wrapped.keys() != sizes.keys():
        raise RuntimeError(f"PEFT wrapped {len(wrapped)} modules where {len(sizes)} were targeted")
    return wrapped


def _halves(layer: LoraLayer, name: str) -> tuple[nn.Linear, nn.Linear]:
    """A and B of an adapter."""
    return cast("nn.Linear", layer.lora_A[name]), cast("nn.Linear", layer.lora_B[name])


def _fill(layer: LoraLayer, name: str, weights: tuple[Tensor, Tensor], device: torch.device) -> None:
    """Give A and B their values, where the transformer computes; a streamed base lies elsewhere."""
    for half, values in zip(_halves(layer, name), weights, strict=True):
        half.weight = nn.Parameter(values.to(device))


def lora_layers(transformer: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """(module name, layer) of every wrapped Linear, in the model's order."""
    from peft.tuners.lora import LoraLayer

    for path, module in transformer.named_modules():
        if isinstance(module, LoraLayer):
            yield path, module


def trainable(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of the adapters: everything that asks for a gradient, in the model's order."""
    return {name: parameter for name, parameter in transformer.named_parameters() if parameter.requires_grad}


@contextmanager
def switched_off(transformer: nn.Module) -> Iterator[None]:
    """While active, the transformer is the base, bit for bit. Not to be entered between a forward and its backward."""
    layers = [layer for _, layer in lora_layers(transformer)]
    training = {id(parameter) for parameter in trainable(transformer).values()}
    for layer in layers:
        layer.enable_adapters(enabled=False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(enabled=True)
        for parameter in transformer.parameters():  # PEFT would have every adapter trained from here on
            parameter.requires_grad_(id(parameter) in training)


def set_strengths(transformer: nn.Module, strengths: Mapping[str, float]) -> None:
    """Multiply each named adapter's update; all at 0 switches the wrapped layers off."""
    active = [name for name, strength in strengths.items() if strength != 0]
    for _, layer in lora_layers(transformer):
        layer.enable_adapters(bool(active))
        for name in active:
            layer.set_scale(name, strengths[name])
        if active:
            layer.set_adapter(active, inference_mode=True)


def state_of(transformer: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's names, on the CPU, float32."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(transformer, adapter_name=name)
    return {key: tensor.detach().float().cpu().clone() for key, tensor in state.items()}


def load_state(transformer: nn.Module, state: Mapping[str, Tensor], *, source: str, name: str = "default") -> None:
    """Put tensors into an attached adapter; UserError with names when any is missing, unknown or mis-shaped."""
    from peft import set_peft_model_state_dict

    there = state_of(transformer, name)
    wrong = sorted(there.keys() ^ state.keys()) + sorted(
        key for key in there.keys() & state.keys() if there[key].shape != state[key].shape
    )
    if wrong:
        raise UserError(
            f"{source} does not fit this model: {len(wrong)} of {len(there)} tensors differ ({listed(wrong, 3)})",
            "use the model that the adapter was trained on (model=..., model.path=...)",
        )
    set_peft_model_state_dict(transformer, dict(state), adapter_name=name)


def save_adapter(path: Path, adapter: Adapter) -> None:
    """One safetensors file; rank, alpha, targets, family and trigger word in its header."""
    header = {
        "format": "pt",
        "rank": str(adapter.rank),
        "alpha": str(adapter.alpha),
        "targets": json.dumps(adapter.targets),
        "family": adapter.family,
        "trigger_word": adapter.trigger_word or "",
    }
    write_tensors(path, adapter.state, header)


def read_adapter(path: Path) -> Adapter:
    """Read what `save_adapter` wrote; UserError for anything else."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is not a safetensors file ({error})", "give a run, a checkpoint or an adapter file"
        ) from error
    if "family" not in header or "targets" not in header:
        raise UserError(
            f"{path} is not an adapter of this program", f"give outputs/<name>, or a checkpoint's {WEIGHTS}"
        )
    return Adapter(
        state=state,
        rank=int(header["rank"]),
        alpha=float(header["alpha"]),
        targets=json.loads(header["targets"]),
        family=header["family"],
        trigger_word=header["trigger_word"] or None,
    )


def find_adapter(place: str) -> Path:
    """The adapter file of a run (its last checkpoint), of a checkpoint, or the file itself."""
    path = Path(place).expanduser()
    if path.is_file():
        return path
    candidates = [path / WEIGHTS, *sorted(path.glob(f"checkpoints/step-*/{WEIGHTS}"), reverse=True)]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise UserError(
        f"{place} holds no adapter", "give a run folder (outputs/<name>), a checkpoint folder or an adapter file"
    )
