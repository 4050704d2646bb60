"""Products x W^T in the type that W is stored in, for devices that multiply it faster than 16 bits.

Law: only x is rounded, each token by its own largest magnitude; values are multiplied as they are stored, sums are kept
in 32 bits, and the scales of token and row are applied to the sums. Few rows, such as the one that modulates all tokens
of a picture, are not rounded at all. Backward is not concerned: there W's scales would lie along the sum.
cuBLASLt multiplies 8-bit matrices in one layout only on most cards, both with the summed index contiguous (PyTorch
issues 152150 and 198126), while a CPU takes any: layouts are asserted here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flux2_lora.errors import UserError

E4M3 = torch.float8_e4m3fn
DEQUANTIZE = "dequantize"
LARGEST = {E4M3: torch.finfo(E4M3).max, torch.int8: 127.0}
STORED = {"fp8": E4M3, "int8": torch.int8}
_FEW_ROWS = 16  # the most that torch._int_mm refuses on CUDA; a layer over more of them is not bound by reading W
_ALIGNED = 16
_ROWS_AT_ONCE = 4096  # 32-bit sums of FLUX.2 dev's widest projection take 0.9 GB for so many
_NEEDS = {"fp8": ((8, 9), "RTX 40 and newer"), "int8": ((7, 5), "RTX 20 and newer")}
_TRIAL = 4608, 3072, 12288  # tokens of a picture of 1024 px and its text, through FLUX.1's MLP
_CLEAR = 0.97  # of the time: what saves less is noise, and costs accuracy


def round_tokens(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[tokens in] -> (e4m3 or int8 [tokens in], scale [tokens 1] float32).

    Reads x twice and writes nothing wider than it: a product in 8 bits is worth little beside passes in float32.
    """
    largest = torch.linalg.vector_norm(x, float("inf"), dim=1, keepdim=True).float()
    scale = torch.where(largest > 0, largest / LARGEST[dtype], torch.ones_like(largest))
    scaled = torch.mul(x, 1 / scale, out=torch.empty(x.shape, dtype=x.dtype, device=x.device))
    return (scaled.round_() if dtype == torch.int8 else scaled).to(dtype), scale


def fp8_product(x: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    """[tokens in], e4m3 [out in], scale [out 1] or [1 1] -> [tokens out] in the type of x, by way of bfloat16."""
    rounded, token_scale = round_tokens(x, E4M3)
    row_scale = scale.t().expand(1, len(values)).contiguous()
    columns = _columns(rounded, values)
    product = torch._scaled_mm(rounded, columns, scale_a=token_scale, scale_b=row_scale, out_dtype=torch.bfloat16)  # noqa: SLF001 - the public one is newer than the oldest PyTorch that is supported
    return product.to(x.dtype)


def int8_product(x: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    """[tokens in], int8 [out in], scale [out 1] or [1 1] -> [tokens out] in the type of x, some tokens at a time."""
    whole = torch.empty(len(x), len(values), dtype=x.dtype, device=x.device)
    for part, into in zip(x.split(_ROWS_AT_ONCE), whole.split(_ROWS_AT_ONCE), strict=True):
        # No fewer rows than CUDA takes, in the last part too.
        padded = nn.functional.pad(part, (0, 0, 0, max(_FEW_ROWS + 1 - len(part), 0)))
        rounded, token_scale = round_tokens(padded, torch.int8)
        sums = torch._int_mm(rounded, _columns(rounded, values))[: len(part)]  # noqa: SLF001 - there is no public one
        torch.mul(sums, token_scale[: len(part)], out=into)
        into.mul_(scale.t())
    return whole


_PRODUCTS: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"fp8": fp8_product, "int8": int8_product}
MATMULS = (DEQUANTIZE, *_PRODUCTS)


def product(matmul: str, x: Tensor, values: Tensor, scale: Tensor) -> Tensor | None:
    """x W^T [... out] of x [... in] by a way of `MATMULS`; None where W is to be rebuilt, always for few rows."""
    rows = x.flatten(0, -2)
    if matmul == DEQUANTIZE or len(rows) <= _FEW_ROWS:
        return None
    return _PRODUCTS[matmul](rows, values, scale).view(*x.shape[:-1], len(values))


def _columns(rounded: Tensor, values: Tensor) -> Tensor:
    """W^T [in out], column-major as it lies."""
    assert rounded.is_contiguous(), "tokens are to be row-major"
    assert values.is_contiguous(), "W^T is to be column-major"
    return values.t()


def refuse_matmul(matmul: str, base: str, device: torch.device) -> None:
    """UserError for a way to multiply that the stored kind or the device has not."""
    if matmul == DEQUANTIZE:
        return
    if base != matmul:
        raise UserError(
            f"precision.matmul={matmul} multiplies weights that are stored in {matmul}, and precision.base={base}",
            f"set precision.base={matmul}, or precision.matmul={DEQUANTIZE}",
        )
    if device.type not in ("cuda", "cpu") or torch.version.hip:
        there = "ROCm" if torch.version.hip else device.type
        raise UserError(
            f"precision.matmul={matmul} is for NVIDIA cards, and the device is {there}",
            f"set precision.matmul={DEQUANTIZE}",
        )
    if device.type == "cuda":
        _refuse_card(matmul, torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))


def _refuse_card(matmul: str, card: str, capability: tuple[int, int]) -> None:
    needed, sold_as = _NEEDS[matmul]
    if capability < needed:
        other = " precision.base=int8 precision.matmul=int8, or" if capability >= _NEEDS["int8"][0] else ""
        raise UserError(
            f"precision.matmul={matmul} needs compute capability {needed[0]}.{needed[1]} ({sold_as}), "
            f"and {card} has {capability[0]}.{capability[1]}",
            f"set{other} precision.matmul={DEQUANTIZE}",
        )


def refuse_shapes(matmul: str, linears: Mapping[str, nn.Linear]) -> None:
    """UserError that names a Linear whose sides are not multiples of 16, as units for 8 bits ask; by path."""
    odd = [path for path, one in linears.items() if one.in_features % _ALIGNED or one.out_features % _ALIGNED]
    if matmul != DEQUANTIZE and odd:
        first = linears[odd[0]]
        raise UserError(
            f"precision.matmul={matmul} takes sides that are multiples of {_ALIGNED}, and {odd[0]} is "
            f"{first.out_features} x {first.in_features}",
            f"set precision.matmul={DEQUANTIZE}",
        )


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What one product took on a device both ways. cause: why the device does not multiply so at all."""

    matmul: str
    direct_s: float
    rebuilt_s: float
    cause: str | None = None

    @property
    def used(self) -> str:
        """The way to go: the one asked for where it is clearly faster."""
        return self.matmul if self.cause is None and self.direct_s < _CLEAR * self.rebuilt_s else DEQUANTIZE

    @property
    def words(self) -> str:
        """One line for people."""
        if self.cause is not None:
            return f"precision.matmul={self.matmul} is not used: this PyTorch does not multiply so here ({self.cause})"
        verb = "takes" if self.used == self.matmul else "is not used: it takes"
        times = f"{1e3 * self.direct_s:.2f} ms a product where a rebuilt weight takes {1e3 * self.rebuilt_s:.2f} ms"
        return f"precision.matmul={self.matmul} {verb} {times}"


def try_out(matmul: str, multiply: Callable[[str, Tensor], object], device: torch.device) -> Trial:
    """Time `multiply(way, x)` on the tokens of a picture, both ways in turns; the best of each counts."""
    x = torch.randn(*_TRIAL[:2], device=device, dtype=torch.bfloat16)
    best = dict.fromkeys((matmul, DEQUANTIZE), float("inf"))
    try:
        for _ in range(8):
            for way in best:
                best[way] = min(best[way], _seconds(lambda way=way: multiply(way, x), device))  # type: ignore[misc]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return Trial(matmul=matmul, direct_s=0.0, rebuilt_s=0.0, cause=str(error).splitlines()[0])
    return Trial(matmul=matmul, direct_s=best[matmul], rebuilt_s=best[DEQUANTIZE])


def trial_weight(device: torch.device) -> Tensor:
    """W [out in] of the product that is tried."""
    return torch.randn(_TRIAL[2], _TRIAL[1], device=device, dtype=torch.bfloat16)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    torch.accelerator.synchronize(device)
    began = time.perf_counter()
    work()
    torch.accelerator.synchronize(device)
    return time.perf_counter() - began
