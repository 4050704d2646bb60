"""The proof of an exported file: re-read as each client reads it, every update rebuilt and compared with the adapter's.

Law: a client has matched a Linear when what it would add to that weight is scale * B A of the adapter, rounded to the
type of the file and no further. Differences are relative: |update read - update trained| / |update trained|, Frobenius
norms, taken of the small factors so that no weight-sized matrix is formed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flux2_lora.adapters import LoraWeights
from flux2_lora.errors import RunError
from flux2_lora.export.clients import CLIENTS, LoraFile, Reading, clients_of, file_of, invokeai_note
from flux2_lora.files import write_text

_EXACT = 1e-6
"""Relative difference to the rounded update that float32 products may have."""
_MOST_ROUNDING = 0.05
"""Where factors cancel, rounding them may cost more than a file is good for."""
_ROUNDING = {torch.bfloat16: 2.1 * 2**-8, torch.float16: 2.1 * 2**-11}
"""Of |B| |A|: two factors rounded to nearest give 2u + u^2. What is lost beyond lies outside of the type's range."""
REQUIRED: Mapping[str, tuple[str, ...]] = {
    "universal": ("ComfyUI", "Forge", "Forge Neo", "Diffusers", "InvokeAI"),
    "comfyui": ("ComfyUI",),
    "diffusers": ("Diffusers",),
}
"""Format -> the clients that must read all of it, where they run the model at all."""


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What one client makes of a file: Linears updated rightly, of how many, and the largest relative difference.

    total counts what the file changes beyond the adapter, and names that the client passes over, too. required: whether
    the file must not be left behind unless all match.
    """

    client: str
    matched: int
    total: int
    worst: float
    note: str = ""
    required: bool = True

    @property
    def whole(self) -> bool:
        """Whether the client reads all of the adapter and nothing else."""
        return self.matched == self.total


def prove(
    path: Path,
    modules: Mapping[str, LoraWeights],
    architecture: str,
    *,
    dtype: torch.dtype,
    format: str = "universal",  # noqa: A002
) -> list[Proof]:
    """Re-read `path` in each client's grammar; RunError, and the file removed, unless all that must can read it."""
    proofs = proofs_of(_read(path), modules, architecture, dtype=dtype, required=REQUIRED[format])
    if not all(proof.whole for proof in proofs if proof.required):
        path.unlink()
        raise RunError(
            f"{path.name.removeprefix('.').removesuffix('.unproved')} did not carry the adapter and was removed:\n"
            f"{table(proofs)}",
            "numbers that are too large, too small or cancel each other need dtype=fp32",
        )
    return proofs


def proofs_of(
    file: LoraFile,
    modules: Mapping[str, LoraWeights],
    architecture: str,
    *,
    dtype: torch.dtype,
    required: Sequence[str] = (),
) -> list[Proof]:
    """One for each client that runs the architecture. dtype: what the adapter may have been rounded to."""
    fused = any(not name.name.startswith("transformer.") for name in file.entries)
    proofs, judge = [], _Judge(modules, dtype)
    for client in clients_of(architecture):
        reading = CLIENTS[client](file, architecture)
        note = reading.refusal or (
            invokeai_note(modules, fused=fused) if client == "InvokeAI" and architecture == "flux2" else ""
        )
        matched, total, worst = judge.compared(reading)
        proofs.append(
            Proof(client=client, matched=matched, total=total, worst=worst, note=note, required=client in required)
        )
    return proofs


def table(proofs: Sequence[Proof]) -> str:
    """Aligned text: one line a client, notes below."""
    rows = [("client", "modules", "worst difference")]
    rows += [(p.client, f"{p.matched} of {p.total}", f"{p.worst:.1e}" if p.matched else "-") for p in proofs]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    lines = [f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]}" for row in rows]
    return "\n".join(lines + [f"{p.client}: {p.note}" for p in proofs if p.note])


def save_proof(path: Path, proofs: Sequence[Proof], sha256: str) -> Path:
    """Write <stem>.proof.json beside the file; returns its path. sha256: of the file that was proved."""
    target = path.with_name(f"{path.stem}.proof.json")
    content = {"file": path.name, "sha256": sha256, "clients": [asdict(proof) for proof in proofs]}
    write_text(target, json.dumps(content, indent=2) + "\n")
    return target


def relative_difference(truth: LoraWeights | None, read: LoraWeights | None) -> float:
    """|read - truth| / |truth| of two updates, Frobenius; None is no update. Infinite for another shape or NaN.

    The difference of two low-rank products is one, [s' B', -s B] [A'; A].
    """
    if truth is None or read is None:
        return 0.0 if norm(truth) == norm(read) else math.inf
    if truth.up.shape[0] != read.up.shape[0] or truth.down.shape[1] != read.down.shape[1]:
        return math.inf
    if read.scale == truth.scale and torch.equal(read.up, truth.up) and torch.equal(read.down, truth.down):
        return 0.0 if read.up.isfinite().all() and read.down.isfinite().all() else math.inf
    left = torch.cat([read.scale * read.up.double(), -truth.scale * truth.up.double()], dim=1)
    error, size = _norm(left, torch.cat([read.down.double(), truth.down.double()])), norm(truth)
    return math.inf if math.isnan(error) else error / size if size else math.inf if error else 0.0


def norm(pair: LoraWeights | None) -> float:
    """The Frobenius norm of an update; None has none."""
    return 0.0 if pair is None else _norm(pair.scale * pair.up.double(), pair.down.double())


def _norm(left: Tensor, right: Tensor) -> float:
    """|left @ right| of [m r] and [r n] float64: |L R|^2 = trace (L' L)(R R'), good to 1e-8 of the factors' size."""
    if not (left.isfinite().all() and right.isfinite().all()):
        return math.nan
    return math.sqrt(max(float(((left.T @ left) * (right @ right.T)).sum()), 0.0))


class _Judge:
    """Compares what clients apply with the adapter; most of them apply the same tensors, which are compared once."""

    def __init__(self, modules: Mapping[str, LoraWeights], dtype: torch.dtype) -> None:
        self._modules = modules
        self._rounded = {linear: _rounded(lora, dtype) for linear, lora in modules.items()}
        self._rounding = {linear: relative_difference(lora, self._rounded[linear]) for linear, lora in modules.items()}
        self._sound = {linear: self._rounding[linear] <= _allowed(lora, dtype) for linear, lora in modules.items()}
        self._seen: dict[tuple[object, ...], tuple[bool, float]] = {}

    def compared(self, reading: Reading) -> tuple[int, int, float]:
        """(Linears that match, of how many, worst relative difference to the trained update)."""
        found = [self._of(linear, reading.updates.get(linear)) for linear in self._modules]
        matched, worst = sum(right for right, _ in found), max(difference for _, difference in found)
        beyond = [linear for linear, read in reading.updates.items() if linear not in self._modules and norm(read) != 0]
        total = max(len(found) + len(beyond), matched + len(beyond) + len(reading.unread))
        return matched, total, worst

    def _of(self, linear: str, read: LoraWeights | None) -> tuple[bool, float]:
        if read is None:
            return False, math.inf
        key = (linear, read.scale, *((half.data_ptr(), tuple(half.shape)) for half in (read.down, read.up)))
        if key not in self._seen:
            exact = relative_difference(self._rounded[linear], read) <= _EXACT
            difference = self._rounding[linear] if exact else relative_difference(self._modules[linear], read)
            self._seen[key] = exact and self._sound[linear], difference
        return self._seen[key]


def _rounded(lora: LoraWeights, dtype: torch.dtype) -> LoraWeights:
    """The update as a file of that type can hold it, its scale folded in before."""
    return LoraWeights(down=lora.down.to(dtype), up=(lora.scale * lora.up.float()).to(dtype), scale=1.0)


def _allowed(lora: LoraWeights, dtype: torch.dtype) -> float:
    """The relative difference that rounding to a type may cause."""
    factors = abs(lora.scale) * float(lora.up.double().norm() * lora.down.double().norm())
    return min(max(_ROUNDING.get(dtype, 0.0) * factors / max(norm(lora), 1e-300), _EXACT), _MOST_ROUNDING)


def _read(path: Path) -> LoraFile:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 - no dict
            return file_of(tensors, file.metadata() or {})
    except SafetensorError:
        return LoraFile(entries=[], strays=["the file cannot be read"])
