"""What each client makes of a LoRA file: which of its keys it maps to which weights, at which strength.

Our tables of their grammar, read off and measured with ComfyUI 0.29, Forge (2025-06), Forge Neo (2026-02), InvokeAI
6.14 and Diffusers 0.42; tests hold them against the last and, where it is at hand, the first. Law: nothing here leans
on the tables that files are written or read with (flux2_lora.keys), except for Linears outside the blocks; so a slip
there is seen here.

A name is a prefix and a module, BFL's (dotted or flattened by "_") or Diffusers'. Clients differ in which combinations
they know, in where they look for alpha, and in what they do with keys that they do not know.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import chain

import torch
from torch import Tensor

from flux2_lora.adapters import LoraWeights
from flux2_lora.keys import ARCHITECTURES

Shares = Mapping[str, int]
"""Linear -> its share of the rows of a weight."""


def _thirds(pattern: str) -> dict[str, int]:
    return {pattern.replace("?", part): 1 for part in "qkv"}


_ATTENTION: Mapping[str, Shares] = {
    "double_blocks.*.img_attn.qkv": _thirds("transformer_blocks.*.attn.to_?"),
    "double_blocks.*.txt_attn.qkv": _thirds("transformer_blocks.*.attn.add_?_proj"),
    "double_blocks.*.img_attn.proj": {"transformer_blocks.*.attn.to_out.0": 1},
    "double_blocks.*.txt_attn.proj": {"transformer_blocks.*.attn.to_add_out": 1},
}
_BLOCKS: Mapping[str, Mapping[str, Shares]] = {
    "flux1": {
        **_ATTENTION,
        "double_blocks.*.img_mlp.0": {"transformer_blocks.*.ff.net.0.proj": 1},
        "double_blocks.*.img_mlp.2": {"transformer_blocks.*.ff.net.2": 1},
        "double_blocks.*.txt_mlp.0": {"transformer_blocks.*.ff_context.net.0.proj": 1},
        "double_blocks.*.txt_mlp.2": {"transformer_blocks.*.ff_context.net.2": 1},
        "single_blocks.*.linear1": {
            **_thirds("single_transformer_blocks.*.attn.to_?"),
            "single_transformer_blocks.*.proj_mlp": 4,
        },
        "single_blocks.*.linear2": {"single_transformer_blocks.*.proj_out": 1},
    },
    "flux2": {
        **_ATTENTION,
        "double_blocks.*.img_mlp.0": {"transformer_blocks.*.ff.linear_in": 1},
        "double_blocks.*.img_mlp.2": {"transformer_blocks.*.ff.linear_out": 1},
        "double_blocks.*.txt_mlp.0": {"transformer_blocks.*.ff_context.linear_in": 1},
        "double_blocks.*.txt_mlp.2": {"transformer_blocks.*.ff_context.linear_out": 1},
        "single_blocks.*.linear1": {"single_transformer_blocks.*.attn.to_qkv_mlp_proj": 1},
        "single_blocks.*.linear2": {"single_transformer_blocks.*.attn.to_out": 1},
    },
}
_SUFFIX = re.compile(
    r"(?P<name>.+?)(?P<spelling>\.lora_(?P<half>down|up)\.weight|\.lora_(?P<letter>[AB])(?:\.default)?(?:\.weight)?"
    r"|(?:\.lora|_lora|\.lora_linear_layer)\.(?P<dotted>down|up)\.weight|\.alpha)"
)
_HALVES = {"down": "down", "A": "down", "up": "up", "B": "up"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Entry:
    """The tensors of one name. spelling: down_up (.lora_down.weight), a_b (.lora_A.weight) or another."""

    name: str
    spelling: str
    down: Tensor
    up: Tensor
    alpha: float | None = None

    @property
    def keys(self) -> int:
        """How many keys of the file it took."""
        return 2 if self.alpha is None else 3

    def scaled(self, alpha: float | None) -> LoraWeights:
        """The update at alpha / rank, at 1 without alpha."""
        return LoraWeights(down=self.down, up=self.up, scale=1.0 if alpha is None else alpha / len(self.down))


@dataclass(frozen=True, kw_only=True)
class LoraFile:
    """A file by names; strays: keys that make up no whole pair; header: its metadata."""

    entries: Sequence[Entry]
    strays: Sequence[str] = ()
    header: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a client applies: Linear -> its update; unread: names that it passes over; refusal: why it takes nothing."""

    updates: Mapping[str, LoraWeights] = field(default_factory=dict)
    unread: Sequence[str] = ()
    refusal: str = ""


def file_of(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> LoraFile:
    """Group the tensors of a file by names."""
    parts: dict[str, dict[str, Tensor]] = {}
    spellings: dict[str, str] = {}
    strays = []
    for key, tensor in tensors.items():
        found = _SUFFIX.fullmatch(key)
        if found is None:
            strays.append(key)
            continue
        half = _HALVES.get(found["half"] or found["letter"] or found["dotted"] or "", "alpha")
        parts.setdefault(found["name"], {})[half] = tensor
        if half != "alpha":
            spellings[found["name"]] = "down_up" if found["half"] else "a_b" if found["letter"] else "other"
    entries = []
    for name, tensors_of in parts.items():
        if _is_whole(tensors_of):
            alpha = float(tensors_of["alpha"].item()) if "alpha" in tensors_of else None
            down, up = tensors_of["down"], tensors_of["up"]
            entries.append(Entry(name=name, spelling=spellings[name], down=down, up=up, alpha=alpha))
        else:
            strays.append(name)
    return LoraFile(entries=entries, strays=strays, header=header)


def _is_whole(parts: Mapping[str, Tensor]) -> bool:
    if not {"down", "up"} <= parts.keys() or ("alpha" in parts and parts["alpha"].numel() != 1):
        return False
    down, up = parts["down"], parts["up"]
    return down.ndim == up.ndim == 2 and down.shape[0] == up.shape[1] > 0


# Names: prefix + module in one of four spellings.


@cache
def _spelled(architecture: str, spelling: str) -> Mapping[str, Shares]:
    """Module ("*" for the number of a block) -> Linears, by BFL's or Diffusers' names, dotted or flattened."""
    blocks = _BLOCKS[architecture]
    outside = {place.module: {linear: 1} for linear, place in ARCHITECTURES[architecture].outside.items()}
    bfl: dict[str, Shares] = {**blocks, **outside}
    own = {linear: {linear: 1} for linear in chain.from_iterable(bfl.values())}
    source, _, flattened = spelling.partition(" ")
    table: Mapping[str, Shares] = bfl if source == "bfl" else own
    return {name.replace(".", "_"): shares for name, shares in table.items()} if flattened else table


def _meant(name: str, architecture: str, prefix: str, spelling: str) -> dict[str, int]:
    """Linear -> share of the rows of what `name` stands for; empty where the client does not know it."""
    if not name.startswith(prefix):
        return {}
    rest, gap = name[len(prefix) :], "_" if spelling.endswith("flat") else r"\."
    block = re.fullmatch(rf"((?:single_)?transformer_blocks|(?:double|single)_blocks){gap}(\d+)({gap}.+)", rest)
    starred = f"{block[1]}{gap[-1]}*{block[3]}" if block else rest
    shares = _spelled(architecture, spelling).get(starred, {})
    return {linear.replace("*", block[2]) if block else linear: share for linear, share in shares.items()}


def _by_rows(pair: LoraWeights, shares: Shares) -> dict[str, LoraWeights]:
    """Every Linear its rows of up, and all of down."""
    ups = pair.up.split(_rows(pair, shares))
    return {m: LoraWeights(down=pair.down, up=up, scale=pair.scale) for m, up in zip(shares, ups, strict=True)}


def _by_diagonal(pair: LoraWeights, shares: Shares) -> dict[str, LoraWeights]:
    """As `_by_rows`, but a block-diagonal up is cut into one pair for each Linear."""
    count = len(shares)
    blocks = [rows.tensor_split(count, dim=1) for rows in pair.up.split(_rows(pair, shares))]
    beside = (block for i, row in enumerate(blocks) for j, block in enumerate(row) if i != j)
    if count == 1 or pair.down.shape[0] % count or any(block.any() for block in beside):
        return _by_rows(pair, shares)
    downs = pair.down.tensor_split(count)
    return {m: LoraWeights(down=downs[i], up=blocks[i][i], scale=pair.scale) for i, m in enumerate(shares)}


def _rows(pair: LoraWeights, shares: Shares) -> list[int]:
    """How many rows of up belong to each Linear; what does not divide goes to the last."""
    unit = pair.up.shape[0] // sum(shares.values())
    rows = [unit * share for share in shares.values()]
    return [*rows[:-1], pair.up.shape[0] - sum(rows[:-1])]


# Clients.

_KOHYA, _BFL, _OWN = ("lora_unet_", "bfl flat"), ("diffusion_model.", "bfl"), ("transformer.", "own")
_BARE, _LYCORIS, _ONETRAINER = ("", "own"), ("lycoris_", "own flat"), ("lora_transformer_", "own flat")
_LAST = "norm_out.linear"
"""BFL's weight holds its two halves in the other order; who reads it under BFL's names exchanges them."""
_MODULATION = ("double_stream_modulation_", "single_stream_modulation", "time_guidance_embed.")


def _comfyui(file: LoraFile, architecture: str) -> Reading:
    """Looks every name up in one dictionary of all spellings, and adds updates to the fused weights.

    What it does not know it reports on the console and leaves out. Alpha is a tensor or the rank; metadata is not read.
    """
    return _tolerant(file, architecture, [_KOHYA, _BFL, _OWN, _LYCORIS, _ONETRAINER, _BARE])


def _forge(file: LoraFile, architecture: str) -> Reading:
    """ComfyUI's grammar of 2024: no bare names, no FLUX.2; more than twelve keys that it does not know, no file."""
    if architecture != "flux1":
        return Reading(refusal="it has no FLUX.2")
    reading = _tolerant(file, architecture, [_KOHYA, _BFL, _OWN, _LYCORIS, _ONETRAINER])
    lost = _lost_keys(file, reading)
    return (
        Reading(refusal=f"it does not know {lost} keys, and takes no file with more than 12") if lost > 12 else reading
    )


def _forge_neo(file: LoraFile, architecture: str) -> Reading:
    """ComfyUI's grammar; refuses a file of which it does not know half."""
    reading = _tolerant(file, architecture, [_KOHYA, _BFL, _OWN, _LYCORIS, _ONETRAINER, _BARE])
    every = _lost_keys(file, Reading(unread=[entry.name for entry in file.entries]))
    if 2 * _lost_keys(file, reading) > every:
        return Reading(refusal="it does not know more than half of the keys")
    return reading


def _diffusers(file: LoraFile, architecture: str) -> Reading:
    """Sniffs the file's kind by its keys, converts to its own names, and attaches through PEFT.

    It cuts block-diagonal ups of kohya's apart. Its own files may have alpha in their configuration, for all modules.
    """
    names = [entry.name for entry in file.entries]
    if any(entry.spelling == "down_up" for entry in file.entries):
        return _diffusers_of_kohya(file, architecture)
    if architecture == "flux2" and any(name.startswith(("diffusion_model.", "base_model.model.")) for name in names):
        return _diffusers_of_bfl(file, architecture)
    if architecture == "flux1" and any(name.startswith("base_model.model.") for name in names):
        return Reading(refusal="it takes this for a file of another trainer and fails")
    if architecture == "flux2" and any(entry.alpha is not None for entry in file.entries):
        return Reading(refusal="it takes no alpha tensors beside lora_A and lora_B")
    alpha = json.loads(file.header.get("lora_adapter_metadata", "{}")).get("transformer.lora_alpha")
    updates, unread = {}, [*file.strays]
    for entry in file.entries:
        shares = _meant(entry.name, architecture, *_OWN)
        updates.update({linear: entry.scaled(alpha if entry.alpha is None else entry.alpha) for linear in shares})
        unread += [] if shares else [entry.name]
    return Reading(updates=updates, unread=unread)


def _diffusers_of_kohya(file: LoraFile, architecture: str) -> Reading:
    known = [_KOHYA] if architecture == "flux2" else [_KOHYA, _BFL]
    updates, unread = _looked_up(file.entries, architecture, known, _by_diagonal)
    dropped = [linear for linear in updates if architecture == "flux2" and linear.startswith(_MODULATION[:2])]
    dropped += [linear for linear in updates if architecture == "flux2" and "guidance_embedder" in linear]
    dropped += [linear for linear in updates if linear == _LAST]
    for linear in dropped:
        del updates[linear]
    if architecture == "flux1" and unread:
        return Reading(refusal="it refuses a file with keys that it does not know")
    return Reading(updates=updates, unread=[*unread, *dropped, *file.strays])


def _diffusers_of_bfl(file: LoraFile, architecture: str) -> Reading:
    """FLUX.2: lora_A and lora_B under BFL's or its own names; any key left over ends it."""
    prefixes = ("base_model.model.", "diffusion_model.")
    known = [(prefix, spelling) for prefix in prefixes for spelling in ("bfl", "own")]
    updates, unread = _looked_up(file.entries, architecture, known, _by_rows)
    if unread or file.strays or any(entry.alpha is not None for entry in file.entries):
        return Reading(refusal="it refuses a file of this naming with other keys, alpha among them")
    if _LAST in updates:  # copied without exchanging its halves
        return Reading(updates={name: pair for name, pair in updates.items() if name != _LAST}, unread=["norm_out"])
    return Reading(updates=updates)


def _invokeai(file: LoraFile, architecture: str) -> Reading:
    """Every key of a file must belong to one and the same grammar, else it does not know the file."""
    names = [entry.name for entry in file.entries]
    down_up, alphas = (
        {entry.spelling for entry in file.entries} == {"down_up"},
        any(e.alpha is not None for e in file.entries),
    )
    grammars: list[tuple[str, str]] = [_KOHYA] if down_up else []
    if not down_up and not alphas:
        grammars = [_OWN, _BFL, ("base_model.model.", "own"), *([_BARE] if architecture == "flux2" else [])]
    for prefix, spelling in grammars:
        updates, unread = _looked_up(file.entries, architecture, [(prefix, spelling)], _by_rows)
        outside = [linear for linear in updates if not re.match(r"(single_)?transformer_blocks\.", linear)]
        if unread or file.strays or (outside and prefix == "lora_unet_"):
            continue
        if architecture == "flux1" and spelling == "own" and not _has_first_blocks(names, prefix):
            return Reading(refusal="it knows FLUX.1 by its first blocks, which this file leaves out")
        return Reading(updates=updates)
    return Reading(refusal="it knows no grammar that all keys of this file belong to")


def _has_first_blocks(names: Iterable[str], prefix: str) -> bool:
    wanted = ("single_transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.add_q_proj")
    return {f"{prefix}{name}" for name in wanted} <= set(names)


CLIENTS: Mapping[str, Callable[[LoraFile, str], Reading]] = {
    "ComfyUI": _comfyui,
    "Forge": _forge,
    "Forge Neo": _forge_neo,
    "Diffusers": _diffusers,
    "InvokeAI": _invokeai,
}


def clients_of(architecture: str) -> list[str]:
    """Clients that run models of the architecture."""
    return [name for name in CLIENTS if name != "Forge" or architecture == "flux1"]


def invokeai_note(modules: Mapping[str, LoraWeights], *, fused: bool) -> str:
    """InvokeAI tells FLUX.2 from FLUX.1 by img_attn.proj [. != 3072], or by img_mlp.0 [!= 4 * 3072 .] beside it.

    fused: whether the file has BFL's weights; Diffusers' names of FLUX.2 stand for themselves.
    """
    inputs = {lora.down.shape[1] for module, lora in modules.items() if module.endswith(".attn.to_out.0")}
    beside = any(module.endswith(".ff.linear_in") for module in modules)
    if not fused or (inputs and (inputs != {3072} or beside)):
        return ""
    return "may take this for a FLUX.1 LoRA, which it tells apart by double blocks; adapt attention and mlp to be sure"


def _tolerant(file: LoraFile, architecture: str, known: Sequence[tuple[str, str]]) -> Reading:
    updates, unread = _looked_up(file.entries, architecture, known, _by_rows)
    lost = set(_lost_by_comfyui(file.entries, architecture))
    for name in lost:
        for linear in _meant(name, architecture, *_OWN):
            updates.pop(linear, None)
    return Reading(updates=updates, unread=[*unread, *sorted(lost), *file.strays])


def _lost_by_comfyui(entries: Sequence[Entry], architecture: str) -> Iterator[str]:
    """Modulation and time embedding of FLUX.2 have no entry under Diffusers' names there."""
    prefix = _OWN[0]
    for entry in entries:
        if (
            architecture == "flux2"
            and entry.name.startswith(prefix)
            and entry.name[len(prefix) :].startswith(_MODULATION)
        ):
            yield entry.name


def _looked_up(
    entries: Sequence[Entry],
    architecture: str,
    known: Sequence[tuple[str, str]],
    cut: Callable[[LoraWeights, Shares], dict[str, LoraWeights]],
) -> tuple[dict[str, LoraWeights], list[str]]:
    """(Linear -> update, names that are not known)."""
    updates: dict[str, LoraWeights] = {}
    unread = []
    for entry in entries:
        meanings = ((_meant(entry.name, architecture, *spelled), spelled[1]) for spelled in known)
        shares, spelling = next((found for found in meanings if found[0]), ({}, ""))
        read = cut(entry.scaled(entry.alpha), shares) if shares else {}
        if spelling.startswith("bfl") and _LAST in read:
            read = {_LAST: replace(read[_LAST], up=torch.cat(read[_LAST].up.chunk(2)[::-1]))}
        updates |= read
        unread += [] if shares else [entry.name]
    return updates, unread


def _lost_keys(file: LoraFile, reading: Reading) -> int:
    """How many keys a client does not know."""
    unread = set(reading.unread)
    return len(file.strays) + sum(entry.keys for entry in file.entries if entry.name in unread)
