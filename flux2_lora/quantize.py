"""A frozen Linear that stores one byte a weight or less, and the base model read into such Linears.

Law: neither pass keeps W. Forward rebuilds it, multiplies and forgets; backward asks for the same bytes again. Autograd
would otherwise hold a 16-bit copy of every frozen layer until its backward, which is what an 8 GB card does not have.
W is scale * values: one scale a row (fp8, int8), one a tensor (files that were released so), or one for 64 numbers
(nf4, Dettmers et al. 2023, arXiv:2305.14314, section 3). What a file stores in FP8 is kept bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flux2_lora.devices import compute_dtype
from flux2_lora.errors import UserError
from flux2_lora.families import Model
from flux2_lora.files import FileDigests, digest
from flux2_lora.host import Host, InMemory, Packed, pack, written
from flux2_lora.matmul import (
    DEQUANTIZE,
    E4M3,
    LARGEST,
    MATMULS,
    STORED,
    Trial,
    product,
    refuse_matmul,
    refuse_shapes,
    trial_weight,
    try_out,
)
from flux2_lora.networks.transformers import block_linears, blocks_in
from flux2_lora.options import option
from flux2_lora.placement import Placement, memory_host, streamer_on
from flux2_lora.stream import attach_streamer
from flux2_lora.weights import Stored

_FP8 = (E4M3, torch.float8_e5m2)
_BYTES = {"fp8": 1, "int8": 1, "nf4": 0.5, "bf16": 2, "fp32": 4}
_NF4_BLOCK = 64
_ROWS_AT_ONCE = 1024  # quantised together: what is in float32 meanwhile stays below 100 MB for 24,576 columns


@dataclass(frozen=True, kw_only=True)
class PrecisionSpec:
    """How the frozen base is stored: fp8 (e4m3) or int8 with one scale a row, nf4, bf16 or fp32.

    matmul: how its products are taken forward: dequantize rebuilds W in 16 bits; fp8 and int8 multiply a base stored so
    as it is, on cards that have units for it, if that is faster there.
    """

    base: str = option("fp8", one_of=tuple(_BYTES))
    matmul: str = option(DEQUANTIZE, one_of=MATMULS)

    def bytes_of(self, numbers: int) -> int:
        """What so many numbers take in the Linears of blocks, without their scales."""
        return int(numbers * _BYTES[self.base])


def quantize_rows(weight: Tensor, dtype: torch.dtype = E4M3) -> tuple[Tensor, Tensor]:
    """[out in] -> (e4m3 or int8 [out in], scale [out 1] float32): a row's largest magnitude becomes 448 or 127."""
    weight = weight.detach().float()
    largest = weight.abs().amax(dim=1, keepdim=True)
    scale = torch.where(largest > 0, largest / LARGEST[dtype], torch.ones_like(largest))
    values = weight / scale
    return (values.round() if dtype == torch.int8 else values).to(dtype), scale


def quantize_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[out in] -> (two numbers a byte [out * in / 2, 1], largest magnitude of each 64 numbers [out * in / 64])."""
    try:
        from bitsandbytes.functional import quantize_4bit
    except ImportError as error:
        raise UserError("precision=nf4 needs bitsandbytes", "pip install bitsandbytes, or precision=fp8") from error
    packed, state = quantize_4bit(weight.float().contiguous(), blocksize=_NF4_BLOCK, quant_type="nf4")
    return packed, state.absmax


def _by_scale(values: Tensor, scale: Tensor, dtype: torch.dtype, _: tuple[int, int]) -> Tensor:
    """Rounded once: values are exact in bfloat16, and the product is taken in the wider type of the two.

    In place: a second copy of the widest projection of FLUX.2 dev would be 0.7 GB.
    """
    return values.to(dtype, copy=True).mul_(scale)


def _by_nf4(values: Tensor, scale: Tensor, dtype: torch.dtype, shape: tuple[int, int]) -> Tensor:
    """The operator is there since bitsandbytes was imported to quantise."""
    rebuilt: Tensor = torch.ops.bitsandbytes.dequantize_4bit(values, scale, _NF4_BLOCK, "nf4", shape, dtype)
    return rebuilt


_QUANTIZE: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "fp8": quantize_rows,
    "int8": partial(quantize_rows, dtype=torch.int8),
    "nf4": quantize_nf4,
}
_REBUILD: dict[str, Callable[[Tensor, Tensor, torch.dtype, tuple[int, int]], Tensor]] = {
    "fp8": _by_scale,
    "int8": _by_scale,
    "nf4": _by_nf4,
}


def rounded_to(kind: str, weight: Tensor) -> Tensor:
    """W [out in] as it comes back from fp8, int8 or nf4; float32."""
    values, scale = _quantized(Stored(values=weight), kind, weight.device)
    return _REBUILD[kind](values, scale, torch.float32, (weight.shape[0], weight.shape[1]))


class _FrozenMatmul(torch.autograd.Function):
    """x W^T + b with a gradient for x only; saves the byte form of W, not W."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        kind: str,
        shape: tuple[int, int],
        matmul: str,
    ) -> Tensor:
        ctx.save_for_backward(values, scale)
        ctx.kind, ctx.shape = kind, shape
        direct = product(matmul, x, values, scale)
        if direct is None:
            return F.linear(x, _REBUILD[kind](values, scale, x.dtype, shape), bias)
        return direct if bias is None else direct.add_(bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None, None, None]:
        values, scale = ctx.saved_tensors
        weight = _REBUILD[ctx.kind](values, scale, gradient.dtype, ctx.shape)
        return gradient @ weight, None, None, None, None, None, None


class FrozenLinear(nn.Linear):
    """y = x W^T + b with frozen W [out in] in `kind`; computes in the type of x (or of autocast).

    A subclass of nn.Linear so that PEFT wraps it as one. `weight` is rebuilt on each reading and has no gradient.
    """

    values: Tensor
    scale: Tensor
    matmul = DEQUANTIZE

    def __init__(
        self, stored: Stored, bias: Tensor | None, kind: str, *, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        """stored: W as a file has it; its FP8 is kept where kind is fp8. dtype: of `weight` and of the bias."""
        values, scale = _quantized(stored, kind, torch.device(device))
        self._set(values, scale, None if bias is None else bias.to(device, dtype), kind, stored.values.shape, dtype)

    @classmethod
    def of_parts(
        cls,
        values: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        kind: str,
        *,
        shape: tuple[int, int],
        dtype: torch.dtype,
    ) -> FrozenLinear:
        """Of what another one of this kind has stored for W of that shape [out in]."""
        made = cls.__new__(cls)
        made._set(values, scale, bias, kind, shape, dtype)  # noqa: SLF001 - its own
        return made

    def _set(
        self, values: Tensor, scale: Tensor, bias: Tensor | None, kind: str, shape: Sequence[int], dtype: torch.dtype
    ) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = shape
        self.kind, self.compute_dtype = kind, dtype
        self.register_buffer("values", values)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """On the meta device while a streamed layer's bytes are on none."""
        shape = self.out_features, self.in_features
        if self.values.is_meta:
            return torch.empty(shape, dtype=self.compute_dtype, device="meta")
        return _REBUILD[self.kind](self.values, self.scale, self.compute_dtype, shape)

    def multiply_by(self, matmul: str) -> None:
        """Take products forward in a way of `MATMULS`; UserError for weights that a file has in FP8 of another kind."""
        if matmul != DEQUANTIZE and self.values.dtype != STORED[matmul]:
            raise UserError(
                f"precision.matmul={matmul} multiplies {STORED[matmul]}, and the model's file has {self.values.dtype}",
                f"set precision.matmul={DEQUANTIZE}",
            )
        self.matmul = matmul

    def add(self, update: Tensor) -> None:
        """W += update [out in], in float32; the sum is quantised anew in the same kind."""
        weight = _REBUILD[self.kind](self.values, self.scale, torch.float32, (self.out_features, self.in_features))
        self.values, self.scale = _quantized(Stored(values=weight + update), self.kind, weight.device)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        shape = (self.out_features, self.in_features)
        result: Tensor = _FrozenMatmul.apply(x, self.values, self.scale, bias, self.kind, shape, self.matmul)
        return result

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenLinear:  # noqa: FBT001, FBT002 - torch's signature
        """Follow moves between devices, but let no `.to(dtype)` widen the bytes or narrow the scales."""
        before = {name: getattr(self, name) for name in ("values", "scale")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, kept in before.items():
            moved = getattr(self, name)
            setattr(self, name, moved if moved.dtype == kept.dtype else kept.to(moved.device))
        return self


def load_frozen(
    model: Model, spec: PrecisionSpec, device: torch.device, placement: Placement | None = None
) -> nn.Module:
    """The model's transformer on the device, frozen, the Linears of its blocks in the precision asked for.

    Tensors are read, quantised and moved one at a time, so host memory holds the quantised model and one weight.
    Embedders, modulation and the last layer keep their type: few bytes, and the most sensitive. With a placement the
    weights of the blocks that do not stay leave the device block by block, and are streamed (`flux2_lora.stream`).
    UserError where products cannot be taken as asked; on a card they are tried out first (`trial_of`).
    """
    refuse_matmul(spec.matmul, spec.base, device)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}.get(spec.base, compute_dtype(device))
    transformer = model.empty_transformer()
    refuse_shapes(spec.matmul, _block_linears(transformer))
    matmul = spec.matmul
    if matmul != DEQUANTIZE and device.type == "cuda":
        transformer.trial = trial = _tried(spec, device)  # type: ignore[assignment]
        matmul = trial.used
    loader = _Loader(model=model, transformer=transformer, kind=spec.base, matmul=matmul, dtype=dtype, device=device)
    size = spec.bytes_of(sum(linear.weight.numel() for linear in _block_linears(loader.transformer).values()))
    paths = list(blocks_in(loader.transformer))
    loader.load_outside(paths)
    streamed = [] if placement is None else [n for n in range(len(paths)) if n not in placement.resident]
    if placement is None or not streamed:
        for path in paths:
            loader.load_block(path)
        return loader.transformer
    kind = placement.host_for(size * len(streamed) // len(paths), device)
    if kind == "disk":
        host, layouts = loader.load_from_disk(placement.folder, streamed)
    else:
        host, layouts = loader.load_to_memory(memory_host(kind, device), streamed)
    blocks = [loader.transformer.get_submodule(paths[number]) for number in streamed]
    attach_streamer(loader.transformer, streamer_on(device, blocks, layouts, host, placement.slots, kind))
    return loader.transformer


@dataclass(frozen=True, kw_only=True)
class _Loader:
    """Fills a transformer that is on the meta device, block by block."""

    model: Model
    transformer: nn.Module
    kind: str
    matmul: str
    dtype: torch.dtype
    device: torch.device

    def load_outside(self, paths: Sequence[str]) -> None:
        """All modules but those of blocks."""
        inside = tuple(f"{path}." for path in paths)
        for path, module in list(self.transformer.named_modules()):
            if not f"{path}.".startswith(inside):
                self._fill(path, module)

    def load_block(self, path: str) -> nn.Module:
        """One block, on the device."""
        block = self.transformer.get_submodule(path)
        for name, module in list(block.named_modules(prefix=path)):
            if isinstance(module, nn.Linear) and self.kind in _REBUILD:
                stored = self.model.weights.read(f"{name}.weight")
                linear = FrozenLinear(stored, self._bias(name, module), self.kind, dtype=self.dtype, device=self.device)
                linear.multiply_by(self.matmul)
                self.transformer.set_submodule(name, linear)
            else:
                self._fill(name, module)
        return block

    def load_to_memory(self, host: InMemory, streamed: Sequence[int]) -> tuple[Host, list[Packed]]:
        """All blocks; the weights of the streamed ones go on to `host`, which numbers them from 0."""
        layouts: list[Packed] = []
        for number, path in enumerate(blocks_in(self.transformer)):
            block = self.load_block(path)
            if number in streamed:
                packed = pack(block)
                host.add(len(layouts), block, packed)
                packed.bind(block, torch.empty(packed.size, dtype=torch.uint8, device="meta"))
                layouts.append(packed)
        return host, layouts

    def load_from_disk(self, folder: Path, streamed: Sequence[int]) -> tuple[Host, list[Packed]]:
        """All blocks from the file of their quantised weights, which is made first where there is none yet."""
        host = written(folder.expanduser(), self._key(folder.expanduser()), self._blocks_in_turn)
        buffer = torch.empty(max(packed.size for packed in host.blocks), dtype=torch.uint8)
        for number, (path, block) in enumerate(blocks_in(self.transformer).items()):
            packed = host.blocks[number]
            self._load_around(path, number, packed, host.scales)
            if number not in streamed:
                host.read(number, buffer)
                packed.bind(block, buffer[: packed.size].to(self.device, copy=True))
        host.renumber(streamed)
        return host, host.blocks

    def _load_around(self, path: str, number: int, packed: Packed, scales: Mapping[str, Tensor]) -> None:
        """A block without the weights in `packed`."""
        block, nowhere = (
            self.transformer.get_submodule(path),
            torch.empty(packed.size, dtype=torch.uint8, device="meta"),
        )
        leaves = {f"{path}.{leaf.path}": leaf for leaf in packed.leaves}
        for name, module in list(block.named_modules(prefix=path)):
            leaf = leaves.get(name)
            if leaf is None or not isinstance(module, nn.Linear):
                self._fill(name, module)
                continue
            bias = self._bias(name, module)
            if self.kind in _REBUILD:
                scale = scales[f"{number}.{leaf.path}.scale"].to(self.device)
                shape = module.out_features, module.in_features
                linear = FrozenLinear.of_parts(
                    leaf.view(nowhere), scale, bias, self.kind, shape=shape, dtype=self.dtype
                )
                linear.multiply_by(self.matmul)
                self.transformer.set_submodule(name, linear)
            elif bias is not None:
                module.bias = nn.Parameter(bias, requires_grad=False)
        packed.bind(block, nowhere)

    def _blocks_in_turn(self) -> Iterator[nn.Module]:
        """Blocks of a transformer that is there for their sake, each dropped after its turn."""
        other = replace(self, transformer=self.model.empty_transformer())
        for path in list(
            blocks_in(other.transformer)
        ):  # names alone: a dictionary would keep every block until the end
            yield other.load_block(path)
            other.transformer.set_submodule(path, nn.Identity())

    def _key(self, folder: Path) -> str:
        """Spells all that the file of blocks depends on."""
        content = FileDigests(folder / "files.json").of(self.model.files.transformer)
        return digest("blocks 1", content, self.kind, str(self.dtype), self.device.type)

    def _bias(self, name: str, linear: nn.Linear) -> Tensor | None:
        return None if linear.bias is None else self.model.weights.read(f"{name}.bias").dense(self.dtype, self.device)

    def _fill(self, path: str, module: nn.Module) -> None:
        """Read a module's own parameters; its buffers are there already and move."""
        for name, _ in list(module.named_parameters(recurse=False)):
            stored = self.model.weights.read(f"{path}.{name}" if path else name)
            setattr(module, name, nn.Parameter(stored.dense(self.dtype, self.device), requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(self.device))


def trial_of(transformer: nn.Module) -> Trial | None:
    """What was found when the products of a loaded base were tried out, if they were."""
    return getattr(transformer, "trial", None)


def _tried(spec: PrecisionSpec, device: torch.device) -> Trial:
    weight = Stored(values=trial_weight(device))
    linear = FrozenLinear(weight, None, spec.base, dtype=torch.bfloat16, device=device)

    @torch.no_grad()
    def multiply(way: str, x: Tensor) -> Tensor:
        linear.multiply_by(way)
        result: Tensor = linear(x)
        return result

    return try_out(spec.matmul, multiply, device)


def _block_linears(transformer: nn.Module) -> dict[str, nn.Linear]:
    """Path -> Linear, of all blocks."""
    found = {path: transformer.get_submodule(path) for path in block_linears(transformer)}
    return {path: module for path, module in found.items() if isinstance(module, nn.Linear)}


def stored_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers as they are stored."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _quantized(stored: Stored, kind: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """(values, scale) of a kind, on the device."""
    if kind == "fp8" and stored.values.dtype in _FP8:
        kept = stored.to(device)
        return kept.values, torch.ones(1, 1, device=device) if kept.scale is None else kept.scale
    # Pieces of 1024 rows are whole blocks of 64 numbers too, whatever the width.
    starts = range(0, len(stored.values), _ROWS_AT_ONCE)
    pieces = [_QUANTIZE[kind](stored.rows(i, i + _ROWS_AT_ONCE).dense(torch.float32, device)) for i in starts]
    values, scales = zip(*pieces, strict=True)
    return torch.cat(values), torch.cat(scales)
