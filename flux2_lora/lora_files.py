"""LoRA files of any trainer, read for a model: whose names they have, and what they do to each of its Linears.

    our own     <module>.lora_A.weight
    Diffusers   transformer.<module>.lora_A.weight; also PEFT's base_model.model.<module> and bare names
    BFL         diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight, or .lora_down.weight
    kohya       lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight; also with Diffusers' modules

Law: every Linear gets exactly the update that the file means, or the file is refused with the cause; no key is passed
over. A fused weight is cut into its Linears by rows. Columns of B that are zero in these rows are dropped with their
rows of A, which changes nothing, so that our own export comes back at the trained ranks.

The scale is alpha / rank. Our own alpha lies in the header, for all modules; kohya's, BFL's and ComfyUI's in a tensor
`<name>.alpha`; Diffusers' and PEFT's in the configuration of the header (`lora_adapter_metadata`) or beside the file
(adapter_config.json). A tensor goes before a configuration; where neither is there, alpha is the rank.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flux2_lora.adapters import Lora, LoraWeights, find_adapter
from flux2_lora.errors import UserError, listed
from flux2_lora.export.header import WRITTEN_BY
from flux2_lora.families import Model
from flux2_lora.files import tensors_hash
from flux2_lora.keys import ARCHITECTURES, Place, bfl_of, members_of, rows_of
from flux2_lora.lora_origin import OTHER_MODEL, TITLES, refuse_other_shapes, told_architecture
from flux2_lora.targets import numbers_of

OUR_NAMES = "our own"
_HALF = r"[._]lora(?:_linear_layer)?[._](?P<half>down|up|A|B)(?:\.default)?(?:\.weight)?"
_KEY = re.compile(rf"(?P<name>.+?)(?:{_HALF}|\.(?P<alpha>alpha))")
_PREFIX = re.compile(
    r"lora_unet_|lora_transformer_|lycoris_|(?:base_model\.model\.)?(?:transformer\.|(?:model\.)?diffusion_model\.)?"
)
_BLOCK = re.compile(r"((?:(?:single_)?transformer|double|single)_blocks)_(\d+)_(.+)")
_UNET = re.compile(r"(?:lora_unet_|unet\.)?(?:(?:down|up|input|output)_blocks|mid(?:dle)?_block)[._].*")
_TEXT = re.compile(r"(?:lora_te\d?_|text_encoders?(?:_\d)?\.).*")
_OTHER_KINDS = {
    "LoHa": r"\.hada_",
    "LoKr": r"\.lokr_",
    "DoRA": r"\.(dora_scale|lora_magnitude_vector)",
    "OFT": r"\.b?oft_",
    "GLoRA": r"\.[ab][12]\.weight$",
    "LoCon with a third matrix": r"\.lora_mid\.",
    "whole differences of weights": r"\.(diff|diff_b|set_weight)$",
    "LoRA with biases": r"\.lora_(B|up)\.bias$",
}
_OUR_HEADER = {"family", "targets", "rank", "alpha"}
_FETCH = "the file is damaged or was converted wrongly; fetch it from its first source"


@dataclass(frozen=True, kw_only=True)
class _Weight:
    """What a name of a file stands for: a BFL or Diffusers weight, and the Linears of the model that it holds."""

    weight: str
    members: tuple[str, ...]
    naming: str


@dataclass(kw_only=True)
class _Parts:
    """The tensors of one name."""

    halves: dict[str, Tensor] = field(default_factory=dict)
    alpha: float | None = None


@dataclass(frozen=True, kw_only=True)
class _Alphas:
    """Where alpha is no tensor. alpha: of all modules, None for their ranks; patterns: PEFT's, module -> its own.

    scale: of all modules, whatever their rank, as our own files mean it.
    """

    alpha: float | None = None
    patterns: Mapping[str, float] = field(default_factory=dict)
    rank_stabilised: bool = False
    scale: float | None = None

    def scale_of(self, module: str, rank: int, alpha: float | None) -> float:
        """What B A is multiplied by; alpha: that of the tensor, if there is one."""
        if self.scale is not None:
            return self.scale
        if alpha is None:
            own = (a for pattern, a in self.patterns.items() if re.match(rf"(.*\.)?({pattern})$", module))
            alpha = next(own, self.alpha)
            if alpha is not None and self.rank_stabilised:
                return alpha / math.sqrt(rank)
        return 1.0 if alpha is None else alpha / rank


def read_loras(places: Sequence[str], model: Model, blocks: Sequence[str] = ()) -> dict[str, Lora]:
    """Place (run folder, checkpoint folder or file) -> its LoRA; a place that is named again gets a number.

    blocks: entries of flux2_lora.targets. Only projections that they name are then updated, times the number of the
    entry where it has one; no entries leave everything as it is. UserError for what does not fit the model.
    """
    loras = {}
    for index, place in enumerate(places):
        lora, count = read_lora(place, model), places[: index + 1].count(place)
        loras[place if count == 1 else f"{place} ({count})"] = _within(lora, place, model, blocks) if blocks else lora
    return loras


def read_lora(place: str, model: Model) -> Lora:
    """Read a LoRA under anyone's names; UserError with the cause where it is not wholly one of this model."""
    path, architecture = find_adapter(place), model.family.architecture
    tensors, header = read_tensors(path)
    _refuse_damage(place, path, header)
    if header.keys() >= _OUR_HEADER and header["family"] != model.family.name:
        raise UserError(
            f"{place} is an adapter of the family {header['family']}, the model is of {model.family.name}",
            f"choose a model of the family {header['family']} with model=...",
        )
    parts, weights = _named(place, tensors, architecture)
    pairs = _pairs_of(place, path, header, parts, weights)
    refuse_other_shapes(place, {weights[name].weight: pair for name, pair in pairs.items()}, model)
    return _lora(place, header, pairs, weights, architecture)


def read_any(place: str, architecture: str | None = None) -> Lora:
    """Read a LoRA of whatever model; UserError with the cause where it is none, or where that cannot be told.

    architecture: where the user says which. Rows of a fused weight are cut in the proportions that it has.
    """
    path = find_adapter(place)
    tensors, header = read_tensors(path)
    _refuse_damage(place, path, header)
    refusals = {}
    for likely in [architecture] if architecture else told_architecture(place, tensors, header):
        try:
            parts, weights = _named(place, tensors, likely)
        except UserError as error:
            refusals[likely] = error
            continue
        return _lora(place, header, _pairs_of(place, path, header, parts, weights), weights, likely)
    raise refusals.popitem()[1]


def _named(
    place: str, tensors: Mapping[str, Tensor], architecture: str
) -> tuple[dict[str, _Parts], dict[str, _Weight]]:
    """Name as the file spells it -> its tensors, and what it stands for in the architecture."""
    _refuse_other_kinds(place, list(tensors))
    parts = _parts_of(place, tensors)
    return parts, _weights_of(place, list(parts), architecture)


def _lora(
    place: str,
    header: Mapping[str, str],
    pairs: Mapping[str, LoraWeights],
    weights: Mapping[str, _Weight],
    architecture: str,
) -> Lora:
    """All that was read, cut into Linears."""
    ours = header.keys() >= _OUR_HEADER
    modules: dict[str, LoraWeights] = {}
    for name, weight in weights.items():
        cut = _cut(place, pairs[name], weight, architecture)
        _refuse(place, "says more than once what it does to", sorted(cut.keys() & modules.keys()))
        modules |= cut
    if not modules:
        raise UserError(f"{place} changes nothing: it holds no B that is not zero", "give a LoRA that was trained")
    return Lora(
        modules=modules,
        naming=OUR_NAMES if ours else " and ".join(sorted({weight.naming for weight in weights.values()})),
        total=len(modules),
        architecture=architecture,
        family=header["family"] if ours else None,
        trigger_word=header.get("trigger_word") or header.get("modelspec.trigger_phrase") or None,
        header=header,
    )


def _within(lora: Lora, place: str, model: Model, blocks: Sequence[str]) -> Lora:
    """The part of a LoRA that is in these blocks; UserError where that is none of it."""
    numbers = numbers_of(blocks, model.family.architecture, model.projections(), option="blocks")
    factors = {module: 1.0 if number is None else number for module, number in numbers.items()}
    modules = {
        module: replace(weights, scale=weights.scale * factors[module])
        for module, weights in lora.modules.items()
        if factors.get(module)
    }
    if not modules:
        raise UserError(f"blocks=[{','.join(blocks)}] leaves nothing of {place}", "give blocks that it was trained on")
    return replace(lora, modules=modules)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, header) of a safetensors file; UserError where it is not whole."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118 - no dict
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is not a whole safetensors file ({error})", "fetch it again; pickles (.pt, .bin) are never opened"
        ) from error


def _refuse_damage(place: str, path: Path, header: Mapping[str, str]) -> None:
    """UserError where an export of this program has not the tensors that were written; others may carry any hash."""
    told = header.get("modelspec.hash_sha256", "").removeprefix("0x")
    if told and WRITTEN_BY in header and told != tensors_hash(path):
        raise UserError(f"{place} is damaged: its numbers are not those that were written", _FETCH)


def _parts_of(place: str, tensors: Mapping[str, Tensor]) -> dict[str, _Parts]:
    """Name as the file spells it -> its tensors; UserError for keys of another form."""
    parts: dict[str, _Parts] = {}
    unknown = []
    for key, tensor in tensors.items():
        found = _KEY.fullmatch(key)
        if found is None or (found["alpha"] and tensor.numel() != 1):
            unknown.append(key)
            continue
        named = parts.setdefault(found["name"], _Parts())
        if found["alpha"]:
            named.alpha = float(tensor.item())
            continue
        half = {"A": "down", "B": "up"}.get(found["half"], found["half"])
        _refuse(place, "says more than once what it does to", [found["name"]] if half in named.halves else [])
        named.halves[half] = tensor
    _refuse(place, f"holds keys that no LoRA has, {len(unknown)} of {len(tensors)}:", unknown)
    return parts


def _weights_of(place: str, names: Sequence[str], architecture: str) -> dict[str, _Weight]:
    """Name -> what it stands for; UserError that says what the file is where the architecture lacks some."""
    weights = {name: _located(name, architecture) for name in names}
    known = {name: weight for name, weight in weights.items() if weight is not None}
    unknown = [name for name in names if name not in known]
    title = TITLES[architecture]
    if any(_UNET.fullmatch(name) for name in unknown):
        raise UserError(f"{place} is a LoRA of a UNet (SDXL or SD 1.5), the model is {title}", OTHER_MODEL)
    for other in ARCHITECTURES.keys() - {architecture}:
        if any(_located(name, other) for name in unknown):
            raise UserError(f"{place} is a LoRA of {TITLES[other]}, the model is {title}", OTHER_MODEL)
    texts = [name for name in unknown if _TEXT.fullmatch(name)]
    _refuse(place, "changes text encoders too:", texts, "give a LoRA of the transformer alone")
    _refuse(
        place, f"holds names that no {title} transformer has, {len(unknown)} of {len(names)}:", unknown, OTHER_MODEL
    )
    return known


def _located(name: str, architecture: str) -> _Weight | None:
    """What a name stands for in any model of the architecture; None for nothing.

    "_" and "." are the same here: no two names of an architecture differ in them alone.
    """
    found = _PREFIX.match(name)
    prefix = found[0] if found else ""
    flat = name[len(prefix) :].replace(".", "_")
    block = _BLOCK.fullmatch(flat)
    starred = _table(architecture).get(f"{block[1]}_*_{block[3]}" if block else flat)
    if starred is None:
        return None
    weight = starred.replace("*", block[2] if block else "")
    is_bfl = starred not in _linears(architecture)
    naming = "kohya" if prefix.endswith("_") else "BFL" if is_bfl else "Diffusers"
    return _Weight(weight=weight, members=members_of(architecture, weight) if is_bfl else (weight,), naming=naming)


def _linears(architecture: str) -> Mapping[str, Place]:
    table = ARCHITECTURES[architecture]
    return {**table.blocks, **table.outside}


@cache
def _table(architecture: str) -> Mapping[str, str]:
    """Name with "_" for every "." -> the name of a Linear or of a BFL weight; "*" for the number of a block."""
    linears = _linears(architecture)
    return {name.replace(".", "_"): name for name in [*linears, *(place.module for place in linears.values())]}


def _pairs_of(
    place: str, path: Path, header: Mapping[str, str], parts: Mapping[str, _Parts], weights: Mapping[str, _Weight]
) -> dict[str, LoraWeights]:
    """Name -> its update, float32; UserError for missing halves, matrices that are no pair, values not finite."""
    _refuse(place, "lacks A or B of", [name for name, part in parts.items() if len(part.halves) != 2], _FETCH)
    _refuse(place, "holds A and B that are no pair of matrices:", [n for n, p in parts.items() if not _is_pair(p)])
    whole = [n for n, p in parts.items() if not all(half.is_floating_point() for half in p.halves.values())]
    _refuse(place, "holds whole numbers in", whole)
    alphas, pairs = _alphas(place, path, header), {}
    for name, part in parts.items():
        down, up = part.halves["down"].float(), part.halves["up"].float()
        scale = alphas.scale_of(weights[name].weight, len(down), part.alpha)
        pairs[name] = LoraWeights(down=down, up=up, scale=scale)
    broken = [
        name
        for name, pair in pairs.items()
        if not (math.isfinite(pair.scale) and pair.down.isfinite().all() and pair.up.isfinite().all())
    ]
    _refuse(place, "holds values that are not finite in", broken)
    return pairs


def _is_pair(parts: _Parts) -> bool:
    down, up = parts.halves["down"], parts.halves["up"]
    return down.ndim == up.ndim == 2 and down.shape[0] == up.shape[1] and bool(down.numel() and up.numel())


def _alphas(place: str, path: Path, header: Mapping[str, str]) -> _Alphas:
    """What the header says of alpha, or the configuration beside a file of PEFT's."""
    beside = path.with_name("adapter_config.json")
    text = header.get("lora_adapter_metadata")
    try:
        if header.keys() >= _OUR_HEADER:
            return _Alphas(scale=float(header["alpha"]) / int(header["rank"]))
        if text is None and path.name == "adapter_model.safetensors" and beside.is_file():
            text = beside.read_text(encoding="utf-8")
        if text is None:
            return _Alphas()
        raw: dict[str, Any] = json.loads(text)
        config: dict[str, Any] = {key.removeprefix("transformer."): value for key, value in raw.items()}
        patterns = {pattern: float(alpha) for pattern, alpha in (config.get("alpha_pattern") or {}).items()}
        for pattern in patterns:
            re.compile(pattern)
        alpha = config.get("lora_alpha")
        return _Alphas(
            alpha=None if alpha is None else float(alpha),
            patterns=patterns,
            rank_stabilised=bool(config.get("use_rslora")),
        )
    except (ValueError, TypeError, AttributeError, ZeroDivisionError, re.error) as error:
        raise UserError(f"{place} carries a configuration that cannot be read ({error})", _FETCH) from error


def _refuse_other_kinds(place: str, keys: Sequence[str]) -> None:
    for kind, mark in _OTHER_KINDS.items():
        found = [key for key in keys if re.search(mark, key)]
        _refuse(
            place,
            f"holds {kind} in {len(found)} of its {len(keys)} keys:",
            found,
            "only plain LoRA is read, W + scale * B A; convert the file with its trainer, or choose another",
        )


def _cut(place: str, pair: LoraWeights, weight: _Weight, architecture: str) -> dict[str, LoraWeights]:
    """Linear -> its part of a weight's update; a Linear whose rows of B are all zero has none."""
    if weight.members == (weight.weight,):
        return {weight.weight: pair}
    height = len(pair.up)
    shares = {member: bfl_of(architecture, member) for member in weight.members}
    odd = [f"{weight.weight} [{height} ...]"] if any(height % share.parts for share in shares.values()) else []
    _refuse(place, "holds weights whose rows cannot be shared out:", odd)
    parts = {}
    for member, share in shares.items():
        rows = pair.up[rows_of(share, height)]
        rows = torch.cat(rows.chunk(2)[::-1]) if share.swapped else rows
        used = rows.any(dim=0) if len(shares) > 1 else torch.ones(rows.shape[1], dtype=torch.bool)
        if used.any():
            parts[member] = replace(pair, down=pair.down[used], up=rows[:, used])
    return parts


def _refuse(place: str, what: str, names: Sequence[str], remedy: str = _FETCH) -> None:
    if names:
        raise UserError(f"{place} {what} {listed(names, 3)}", remedy)
