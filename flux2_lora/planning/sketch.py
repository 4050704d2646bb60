"""What one step takes, block by block, read off the model's own code as it runs on shapes alone.

Law: no coefficient stands here. Two double and two single blocks at full width are built without memory, frozen and
adapted as a run does it, and one checkpointed step goes through them on tensors that have sizes and no numbers
(PyTorch's FakeTensorMode). Each storage that is taken or given back is noted down, and each matrix product counted. A
change of the code that trains is a change of the plan.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import flop_registry

from flux2_lora.adapters import AdapterSpec, attach
from flux2_lora.conditioning import Conditioning
from flux2_lora.families import Outline
from flux2_lora.networks.transformers import block_linears
from flux2_lora.quantize import FrozenLinear, PrecisionSpec, stored_bytes
from flux2_lora.targets import resolve
from flux2_lora.weights import Stored

DOUBLE, SINGLE = "transformer_blocks", "single_transformer_blocks"
_POOLED = 768


@dataclass(frozen=True, kw_only=True)
class Pass:
    """A piece of a step. events: (storage, bytes) in order, bytes below 0 where the storage is given back."""

    events: tuple[tuple[int, int], ...] = ()
    linear_flops: int = 0
    attention_flops: int = 0

    @property
    def peak(self) -> int:
        """The most bytes that it holds beyond what there was at its start."""
        return max(accumulate((size for _, size in self.events), initial=0))

    @property
    def net(self) -> int:
        """Bytes that it leaves behind."""
        return sum(size for _, size in self.events)


@dataclass(frozen=True, kw_only=True)
class Block:
    """One block. frozen_bytes: what would be streamed; small_bytes: norms, biases and scales, which stay.

    forward keeps the block's input alone; kept is the forward that keeps everything, backward what follows it.
    """

    frozen_bytes: int
    small_bytes: int
    forward: Pass
    kept: Pass
    backward: Pass


@dataclass(frozen=True, kw_only=True)
class Costs:
    """A whole step. kinds: DOUBLE or SINGLE of every block in order; adapted: LoRA numbers of every block.

    outside_bytes: embedders, modulation and last layer; stem, head, turn: what runs before the blocks, behind them, and
    from the loss back to the last block. parameters: of the base.
    """

    kinds: tuple[str, ...]
    blocks: Mapping[str, Block]
    adapted: tuple[int, ...]
    outside_bytes: int
    parameters: int
    stem: Pass
    head: Pass
    turn: Pass

    def block(self, index: int) -> Block:
        return self.blocks[self.kinds[index]]


def measure(
    outline: Outline,
    adapter: AdapterSpec,
    precision: PrecisionSpec,
    *,
    dtype: torch.dtype,
    height: int,
    width: int,
    text_tokens: int,
    batch: int,
) -> Costs:
    """Costs of a step on `batch` pictures of height x width tokens. dtype: what the device computes in."""
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}.get(precision.base, dtype)
    model = _frozen(outline.sketch(num_layers=2, num_single_layers=2), precision.base, dtype)
    paths = block_linears(model)
    parts = {kind: model.get_submodule(f"{kind}.1") for kind in (DOUBLE, SINGLE)}
    frozen = {kind: _streamed_bytes(part) for kind, part in parts.items()}
    small = {kind: stored_bytes(part) - frozen[kind] for kind, part in parts.items()}
    outside = stored_bytes(model) - 2 * sum(frozen.values()) - 2 * sum(small.values())
    shapes = {path: _shape(model.get_submodule(path)) for path in paths}
    numbers = {kind: _numbers(part) for kind, part in parts.items()}
    counts = {DOUBLE: int(outline.config["num_layers"]), SINGLE: int(outline.config["num_single_layers"])}
    attach(model, outline.family.architecture, AdapterSpec(rank=adapter.rank), seed=0)
    step = _Step(
        outline=outline,
        shape=(batch, outline.family.latent_channels, height, width),
        text=(batch, text_tokens, int(outline.config["joint_attention_dim"])),
    )
    passes = _Tape(model).record(step)
    return Costs(
        kinds=tuple(kind for kind, count in counts.items() for _ in range(count)),
        blocks={
            kind: Block(
                frozen_bytes=frozen[kind],
                small_bytes=small[kind],
                forward=passes[f"{kind}.1 forward"],
                kept=passes[f"{kind}.1 kept"],
                backward=passes[f"{kind}.1 backward"],
            )
            for kind in counts
        },
        adapted=_adapted(adapter, outline.family.architecture, shapes, counts),
        outside_bytes=outside,
        parameters=sum(counts[kind] * numbers[kind] for kind in counts) + outside // dtype.itemsize,
        stem=passes["stem"],
        head=passes["head"],
        turn=passes["turn"],
    )


def _frozen(model: nn.Module, base: str, dtype: torch.dtype) -> nn.Module:
    """The base as `load_frozen` makes it, still without memory."""
    inside = block_linears(model) if base not in ("bf16", "fp32") else []
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
        parameter.requires_grad_(False)
    for path in inside:
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        frozen = FrozenLinear(Stored(values=linear.weight), linear.bias, base, dtype=dtype, device="meta")
        model.set_submodule(path, frozen)
    return model


def _linears(block: nn.Module) -> list[nn.Linear]:
    return [module for module in block.modules() if isinstance(module, nn.Linear)]


def _streamed_bytes(block: nn.Module) -> int:
    matrices = [linear.values if isinstance(linear, FrozenLinear) else linear.weight for linear in _linears(block)]
    return sum(matrix.numel() * matrix.element_size() for matrix in matrices)


def _numbers(block: nn.Module) -> int:
    """Numbers of a block, counted as they were before they were packed."""
    linears = _linears(block)
    own = sum(parameter.numel() for parameter in block.parameters())
    frozen = [linear for linear in linears if isinstance(linear, FrozenLinear)]
    return own + sum(
        linear.in_features * linear.out_features + (0 if linear.bias is None else linear.bias.numel())
        for linear in frozen
    )


def _shape(module: nn.Module) -> tuple[int, int]:
    assert isinstance(module, nn.Linear)
    return module.in_features, module.out_features


def _adapted(
    adapter: AdapterSpec, architecture: str, shapes: Mapping[str, tuple[int, int]], counts: Mapping[str, int]
) -> tuple[int, ...]:
    """Numbers of A and B in every block of the whole model, whose Linears have the names of the sketch, renumbered."""
    places = [f"{kind}.{number}" for kind, count in counts.items() for number in range(count)]
    names = {
        f"{place}.{path.removeprefix(sketched)}": shape
        for place in places
        for sketched in [f"{place.partition('.')[0]}.1."]
        for path, shape in shapes.items()
        if path.startswith(sketched)
    }
    totals = dict.fromkeys(places, 0)
    for module, rank in resolve(adapter.targets, architecture, names, adapter.rank).items():
        totals[".".join(module.split(".")[:2])] += rank * sum(names[module])
    return tuple(totals.values())


@dataclass(frozen=True, kw_only=True)
class _Step:
    """A step's sizes. shape: of the latents; text: of its embeddings."""

    outline: Outline
    shape: tuple[int, int, int, int]
    text: tuple[int, int, int]

    def loss(self, transformer: nn.Module) -> Tensor:
        latents, target = torch.empty(self.shape), torch.empty(self.shape)
        batch = self.shape[0]
        said = Conditioning(embeds=torch.empty(self.text), pooled=torch.empty(batch, _POOLED))
        moved = self.outline.family.velocity(transformer, latents, torch.empty(batch), said)
        return (moved - target).square().mean()


class _Tape(TorchDispatchMode):
    """Notes down storages and products of one checkpointed step; a block's second forward runs inside backward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model, self.passes = model, dict[str, "_Notes"]()
        self._known = weakref.WeakKeyDictionary[torch.UntypedStorage, int]()
        self._taken, self._backward = 0, False
        self._turn_to("stem")

    def record(self, step: _Step) -> dict[str, Pass]:
        """One step: the passes by name, as "transformer_blocks.1 kept"."""
        model, mode = self.model, FakeTensorMode()
        with mode:
            _materialise(model)
            for tensor in (*model.parameters(), *model.buffers()):
                self._known[tensor.untyped_storage()] = 0
            for kind in (DOUBLE, SINGLE):
                for number in range(2):
                    self._watch(f"{kind}.{number}")
            model.enable_gradient_checkpointing()  # type: ignore[operator]
            # A recomputed forward that stops at its last saved tensor would not say where backward begins.
            with self, set_checkpoint_early_stop(False):
                loss = step.loss(model)
                self._backward = True
                self._turn_to("turn")
                loss.backward()
        return {name: notes.done() for name, notes in self.passes.items()}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._take(tensor.untyped_storage())
        count = flop_registry.get(func._overloadpacket)  # noqa: SLF001 - as FlopCounterMode does
        if count is not None:
            flops = int(count(*args, **(kwargs or {}), out_val=out))
            self._notes.count(flops, attention="attention" in str(func))
        return out

    def _take(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._known:
            self._taken += 1
            self._known[storage] = self._taken
            self._notes.events.append((self._taken, storage.nbytes()))
            weakref.finalize(storage, self._give_back, self._taken, storage.nbytes())

    def _give_back(self, number: int, size: int) -> None:
        self._notes.events.append((number, -size))

    def _turn_to(self, name: str) -> None:
        self._notes = self.passes.setdefault(name, _Notes())

    def _watch(self, place: str) -> None:
        block = self.model.get_submodule(place)
        block.register_forward_pre_hook(self._named(f"{place} kept", f"{place} forward"))
        block.register_forward_hook(
            self._named(f"{place} backward", "head" if place == f"{SINGLE}.1" else f"{place} on")
        )

    def _named(self, in_backward: str, in_forward: str) -> Callable[..., None]:
        return lambda *_: self._turn_to(in_backward if self._backward else in_forward)


@dataclass
class _Notes:
    """A pass while it is written."""

    events: list[tuple[int, int]] = field(default_factory=list)
    linear_flops: int = 0
    attention_flops: int = 0

    def count(self, flops: int, *, attention: bool) -> None:
        if attention:
            self.attention_flops += flops
        else:
            self.linear_flops += flops

    def done(self) -> Pass:
        return Pass(events=tuple(self.events), linear_flops=self.linear_flops, attention_flops=self.attention_flops)


def _materialise(model: nn.Module) -> None:
    """Tensors of the meta device become tensors of a CPU without numbers: SDPA then takes its fused form."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            fake = torch.empty(parameter.shape, dtype=parameter.dtype)
            setattr(module, name, nn.Parameter(fake, requires_grad=parameter.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
