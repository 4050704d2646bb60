"""One LoRA file that every client reads, and the proof that it does.

The file carries kohya's names for BFL's weights, with alpha equal to the rank of each matrix: the one form that
ComfyUI, Forge Neo, Diffusers and InvokeAI all load in full. (Diffusers' own form keeps alpha in the header alone, where
the others do not look: they apply it at the strength alpha = rank.) Law: what the file does to every weight is
(alpha / rank) B A of the trained adapter; `prove` re-reads the written bytes as each client would, and compares.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path, PurePosixPath, PureWindowsPath

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from flux2_lora.adapters import LoraWeights
from flux2_lora.errors import UserError, listed
from flux2_lora.files import sync_folder, write_tensors
from flux2_lora.keys import bfl_of, is_target, kohya_of, members_of

# The largest rounding of an entry, as a part of scale * |row of B| * |column of A|. Two factors rounded to nearest give
# 2u + u^2 with u = 2^-8 (bf16) or 2^-11 (fp16). An update at the wrong strength is off by far more than that.
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2.1 * 2**-8, torch.float16: 2.1 * 2**-11}

_REPOSITORIES = {"flux1": "flux", "flux2": "flux2"}
_HALVES = (".lora_A.weight", ".lora_B.weight")
_REMEDY = "give a run of this program (adapter=outputs/<name>) or one of its checkpoints"
_ROWS_AT_ONCE = 2048  # of an update in float64: 2048 x 6144 is 100 MB, the whole of a 6144-wide linear1 is 2.7 GB


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What one client makes of a file: BFL weights updated rightly, of how many, and the largest |difference|."""

    client: str
    matched: int
    total: int
    worst: float
    note: str = ""


def modules_of(state: Mapping[str, Tensor], rank: int, alpha: float) -> dict[str, LoraWeights]:
    """Pair PEFT's tensors <module>.lora_A.weight [r in] and <module>.lora_B.weight [out r] by module.

    Groups may have ranks of their own; alpha / rank is the scale of all. Raises UserError for other tensors, a missing
    half, shapes that are no pair, and values not finite.
    """
    factors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        module, _, half = key.rpartition(".lora_")
        factors.setdefault(module, {})[half] = tensor
    _refuse("other tensors than lora_A.weight and lora_B.weight:", [key for key in state if not key.endswith(_HALVES)])
    _refuse("only one of lora_A and lora_B of", [module for module, halves in factors.items() if len(halves) != 2])
    modules = {
        module: LoraWeights(down=halves["A.weight"], up=halves["B.weight"], scale=alpha / rank)
        for module, halves in factors.items()
    }
    mismatched = [module for module, lora in modules.items() if not _is_pair(lora)]
    _refuse("pairs other than [rank in] and [out rank] of", mismatched)
    infinite = [key for key, tensor in state.items() if not tensor.isfinite().all()]
    _refuse(
        "values that are not finite in", infinite, "export an earlier checkpoint, and train with a lower optimizer.lr"
    )
    if not modules:
        raise UserError("the adapter holds no tensors", _REMEDY)
    return modules


def universal(modules: Mapping[str, LoraWeights], architecture: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of the file: three for each BFL weight that holds a trained Linear.

    <kohya name>.lora_down.weight [r in], .lora_up.weight [out r] with the scale folded in before the cast, and
    .alpha [] = r, in float32 since bfloat16 cannot hold every rank. Raises UserError for a Linear outside the blocks.
    """
    tensors = {}
    for weight in _weights_of(modules, architecture):
        down, up = _fused(modules, architecture, members_of(architecture, weight))
        name = kohya_of(weight)
        tensors[f"{name}.lora_down.weight"] = down.to(dtype)
        tensors[f"{name}.lora_up.weight"] = up.to(dtype)
        tensors[f"{name}.alpha"] = torch.tensor(float(down.shape[0]))
    return tensors


def export_universal(
    state: Mapping[str, Tensor],
    rank: int,
    alpha: float,
    path: Path,
    *,
    architecture: str,
    dtype: torch.dtype,
    header: Mapping[str, str],
) -> list[Proof]:
    """Write a PEFT adapter as the one file for all clients; nobody sees it under `path` before it is proved.

    Adds the hash of the tensors to `header`. Raises UserError for an adapter that cannot be exported, RuntimeError
    for a file that fails its proof; an earlier file of that name is then still there.
    """
    modules = modules_of(state, rank, alpha)
    tensors = universal(modules, architecture, dtype)
    draft = path.with_name(f".{path.name}.unproved")
    write_tensors(draft, tensors, {**header, "modelspec.hash_sha256": _hash(tensors)})
    proofs = prove(draft, modules, architecture)
    os.replace(draft, path)
    sync_folder(path.parent)
    return proofs


def prove(path: Path, modules: Mapping[str, LoraWeights], architecture: str) -> list[Proof]:
    """Re-read `path` in each client's grammar and compare every update with `modules`.

    Removes the file and raises RuntimeError unless all clients take all of it and every update is within `ROUNDING`.
    """
    file, strays = _read(path)
    weights = _weights_of(modules, architecture)
    names = len(file) + strays
    compare = cache(_compared)  # most weights reach all clients uncut, and each comparison forms the whole update
    proofs = [
        _proof(client, read(file, weights, _GRAMMARS[architecture]), names, modules, weights, compare)
        for client, read in CLIENTS.items()
    ]
    if any(proof.matched != proof.total for proof in proofs):
        path.unlink()
        raise RuntimeError(f"{path.name} did not carry the adapter and was removed:\n{table(proofs)}")
    return proofs


def table(proofs: Sequence[Proof]) -> str:
    """Aligned text: one line a client, notes below."""
    rows = [("client", "modules", "worst difference")]
    rows += [(p.client, f"{p.matched} of {p.total}", f"{p.worst:.1e}") for p in proofs]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    lines = [f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]}" for row in rows]
    return "\n".join(lines + [f"{p.client}: {p.note}" for p in proofs if p.note])


def header(
    *,
    title: str,
    model: str,
    base: str,
    rank: int,
    date: str,
    resolution: tuple[int, int],
    trigger_phrase: str | None = None,
    architecture: str = "flux2",
) -> dict[str, str]:
    """ModelSpec 1.0.1 and the kohya keys that clients show; the hash is added when the tensors are known.

    title: also the name in prompts (Forge); model: "Flux.2-klein-4b"; base: "Flux.2 Klein 4B", by which file managers
    filter; date: ISO 8601; resolution: height, width in px. No captions, and of an absolute path the last part only.
    ss_network_alpha is the rank, since the file has its scale folded in: a reader that trusts the header is right too.
    """
    title, model, base = (_without_folders(text) for text in (title, model, base))
    height, width = resolution
    values = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{model}/lora",
        "modelspec.implementation": f"https://github.com/black-forest-labs/{_REPOSITORIES[architecture]}",
        "modelspec.title": title,
        "modelspec.date": date,
        "modelspec.resolution": f"{width}x{height}",
        "modelspec.trigger_phrase": trigger_phrase or "",
        "ss_output_name": title,
        "ss_base_model_version": base,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(float(rank)),
    }
    return {key: value for key, value in values.items() if value}


def _weights_of(modules: Mapping[str, LoraWeights], architecture: str) -> dict[str, tuple[str, ...]]:
    """BFL weight -> all Linears it holds, for the weights that hold a trained one."""
    outside = [module for module in modules if not is_target(architecture, module)]
    _refuse("Linears that clients drop or refuse:", outside, "train with adapter.targets=[attention,mlp]")
    weights = dict.fromkeys(bfl_of(architecture, module).module for module in modules)
    return {weight: members_of(architecture, weight) for weight in weights}


def _fused(modules: Mapping[str, LoraWeights], architecture: str, members: Sequence[str]) -> tuple[Tensor, Tensor]:
    """(down [sum of ranks, in], up [rows, sum of ranks]) of a weight's members; exact.

    Downs are stacked, scaled ups stand on a block diagonal. A member without adapter keeps blocks of zeros, as wide as
    the first trained one: where all ranks are equal, Diffusers cuts the weight back into pairs of that rank.
    """
    parts = {member: bfl_of(architecture, member) for member in members}
    shares = {member: place.stop - place.start for member, place in parts.items()}
    trained = {member: modules[member] for member in members if member in modules}
    first, lora = next(iter(trained.items()))
    unit = lora.up.shape[0] // shares[first]
    if any(
        m.up.shape[0] != unit * shares[name] or m.down.shape[1] != lora.down.shape[1] for name, m in trained.items()
    ):
        raise UserError(f"the adapter's tensors differ in shape between {listed(members)}", _REMEDY)
    rank = lora.down.shape[0]
    blank = {
        member: LoraWeights(
            down=torch.zeros_like(lora.down), up=torch.zeros(unit * share, rank, dtype=lora.up.dtype), scale=0.0
        )
        for member, share in shares.items()
    }
    rows = [trained.get(member) or blank[member] for member in members]
    down = torch.cat([part.down.float() for part in rows])
    return down, torch.block_diag(*(part.scale * part.up.float() for part in rows))


def _refuse(what: str, names: Sequence[str], remedy: str = _REMEDY) -> None:
    if names:
        raise UserError(f"the adapter holds {what} {listed(names, 3)}", remedy)


def _is_pair(lora: LoraWeights) -> bool:
    return lora.down.ndim == lora.up.ndim == 2 and lora.down.shape[0] == lora.up.shape[1] > 0


def _hash(tensors: Mapping[str, Tensor]) -> str:
    """ModelSpec's hash: SHA-256 of what follows the header of the file, which opens with its length in 8 bytes."""
    raw = save(dict(tensors))
    return "0x" + hashlib.sha256(raw[8 + int.from_bytes(raw[:8], "little") :]).hexdigest()


def _without_folders(text: str) -> str:
    """The last part of an absolute path, other text as it is."""
    for path in (PurePosixPath(text), PureWindowsPath(text)):
        if path.is_absolute() or text.startswith("~"):
            return path.name
    return text


def _read(path: Path) -> tuple[dict[str, LoraWeights], int]:
    """The whole modules of a file under its own names, and how many names are not whole."""
    try:
        tensors = load(path.read_bytes())
    except SafetensorError:
        return {}, 1
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, part = key.partition(".")
        groups.setdefault(name, {})[part] = tensor
    file = {name: _lora(parts) for name, parts in groups.items() if _is_whole(parts)}
    return file, len(groups) - len(file)


def _is_whole(parts: Mapping[str, Tensor]) -> bool:
    if parts.keys() != {"lora_down.weight", "lora_up.weight", "alpha"} or parts["alpha"].numel() != 1:
        return False
    down, up = parts["lora_down.weight"], parts["lora_up.weight"]
    return down.ndim == up.ndim == 2 and down.shape[0] == up.shape[1] > 0


def _lora(parts: Mapping[str, Tensor]) -> LoraWeights:
    down, up = parts["lora_down.weight"], parts["lora_up.weight"]
    return LoraWeights(down=down, up=up, scale=parts["alpha"].item() / down.shape[0])


def _proof(
    client: str,
    reading: Reading,
    names: int,
    modules: Mapping[str, LoraWeights],
    weights: Mapping[str, tuple[str, ...]],
    compare: Callable[[LoraWeights | None, LoraWeights | None], tuple[float, float]],
) -> Proof:
    """Compare weight by weight. Names of the file that end in none of `weights` count in the total, unmatched."""
    found = {member: lora for members in reading.values() for member, lora in members.items()}
    matched, worst = 0, 0.0
    for members in weights.values():
        compared = [compare(modules.get(member), found.get(member)) for member in members]
        matched += all(error <= allowed for error, allowed in compared)
        worst = max(worst, *(error for error, _ in compared))
    wanted = {member for members in weights.values() for member in members}
    foreign = names - sum(not wanted.isdisjoint(members) for members in reading.values())
    note = _invokeai_note(modules) if client == "InvokeAI" else ""
    return Proof(client=client, matched=matched, total=len(weights) + foreign, worst=worst, note=note)


def _compared(truth: LoraWeights | None, read: LoraWeights | None) -> tuple[float, float]:
    """(largest |difference| of two updates, what rounding may cause); None is a Linear without update.

    The difference of two low-rank products is one: [s B, -s' B'] [A; A'], taken in float64.
    """
    if read is None:
        return (math.inf, 0.0) if truth else (0.0, 0.0)
    truth = truth or replace(read, scale=0.0)
    if _size(truth) != _size(read):
        return math.inf, 0.0
    left = torch.cat([truth.scale * truth.up.double(), -read.scale * read.up.double()], dim=1)
    right = torch.cat([truth.down.double(), read.down.double()])
    pieces = left.chunk(math.ceil(len(left) / _ROWS_AT_ONCE))
    error = torch.stack([(rows @ right).abs().amax() for rows in pieces]).amax().item()
    reach = truth.scale * truth.up.double().norm(dim=1).amax() * truth.down.double().norm(dim=0).amax()
    return (math.inf if math.isnan(error) else error), ROUNDING.get(read.up.dtype, 0.0) * reach.item()


def _size(lora: LoraWeights) -> tuple[int, int]:
    return lora.up.shape[0], lora.down.shape[1]


# How clients read kohya's names: our table of their grammar, after ComfyUI 0.29, Forge Neo (2026-02), Diffusers 0.42
# and InvokeAI 6.14. None of their code runs here, and nothing here leans on `kohya_of` or on the loader's table.

File = Mapping[str, LoraWeights]
Reading = dict[str, dict[str, LoraWeights]]
Grammar = Mapping[str, Mapping[str, int]]
"""Name in the file -> the Linears that it feeds, each with its share of the rows."""


def _thirds(pattern: str) -> dict[str, int]:
    return {pattern.replace("?", part): 1 for part in "qkv"}


_ATTENTION: Grammar = {
    "double_blocks_*_img_attn_qkv": _thirds("transformer_blocks.*.attn.to_?"),
    "double_blocks_*_txt_attn_qkv": _thirds("transformer_blocks.*.attn.add_?_proj"),
    "double_blocks_*_img_attn_proj": {"transformer_blocks.*.attn.to_out.0": 1},
    "double_blocks_*_txt_attn_proj": {"transformer_blocks.*.attn.to_add_out": 1},
}
_GRAMMARS: Mapping[str, Grammar] = {
    "flux1": {
        **_ATTENTION,
        "double_blocks_*_img_mlp_0": {"transformer_blocks.*.ff.net.0.proj": 1},
        "double_blocks_*_img_mlp_2": {"transformer_blocks.*.ff.net.2": 1},
        "double_blocks_*_txt_mlp_0": {"transformer_blocks.*.ff_context.net.0.proj": 1},
        "double_blocks_*_txt_mlp_2": {"transformer_blocks.*.ff_context.net.2": 1},
        "single_blocks_*_linear1": {
            **_thirds("single_transformer_blocks.*.attn.to_?"),
            "single_transformer_blocks.*.proj_mlp": 4,
        },
        "single_blocks_*_linear2": {"single_transformer_blocks.*.proj_out": 1},
    },
    "flux2": {
        **_ATTENTION,
        "double_blocks_*_img_mlp_0": {"transformer_blocks.*.ff.linear_in": 1},
        "double_blocks_*_img_mlp_2": {"transformer_blocks.*.ff.linear_out": 1},
        "double_blocks_*_txt_mlp_0": {"transformer_blocks.*.ff_context.linear_in": 1},
        "double_blocks_*_txt_mlp_2": {"transformer_blocks.*.ff_context.linear_out": 1},
        "single_blocks_*_linear1": {"single_transformer_blocks.*.attn.to_qkv_mlp_proj": 1},
        "single_blocks_*_linear2": {"single_transformer_blocks.*.attn.to_out": 1},
    },
}


def _comfyui(file: File, weights: Mapping[str, tuple[str, ...]], grammar: Grammar) -> Reading:
    """Looks up lora_unet_<name> for every weight of the model, "_" for "."; adds the update to the fused weight.

    Forge Neo took this over. `weights` stands in for the model: those BFL weights that the adapter trained.
    """
    names = {f"lora_unet_{weight}".replace(".", "_") for weight in weights}
    return {name: _by_rows(lora, _converted(name, grammar)) for name, lora in file.items() if name in names}


def _diffusers(file: File, _: object, grammar: Grammar) -> Reading:
    """Converts block by block to its own names; cuts a block-diagonal up into one pair for each of its members.

    It scales A by alpha / rank in the type of the file: a further rounding, but for a factor of 1 none.
    """
    return {name: _by_diagonal(lora, shares) for name, lora in file.items() if (shares := _converted(name, grammar))}


def _invokeai(file: File, _: object, grammar: Grammar) -> Reading:
    """Of FLUX.2: converts to BFL's and then to Diffusers' names, each member with its rows of up and a copy of down.

    Of FLUX.1: adds the update to the fused weight, which comes to the same.
    """
    return {name: _by_rows(lora, shares) for name, lora in file.items() if (shares := _converted(name, grammar))}


CLIENTS: Mapping[str, Callable[[File, Mapping[str, tuple[str, ...]], Grammar], Reading]] = {
    "ComfyUI": _comfyui,
    "Forge Neo": _comfyui,
    "Diffusers": _diffusers,
    "InvokeAI": _invokeai,
}


def _converted(name: str, grammar: Grammar) -> dict[str, int]:
    """Linear -> share of the rows, for a name of the file; empty for one that the grammar does not know."""
    found = re.fullmatch(r"lora_unet_((?:double|single)_blocks_)(\d+)(_\w+)", name)
    shares = grammar.get(f"{found[1]}*{found[3]}", {}) if found else {}
    return {member.replace("*", found[2]): share for member, share in shares.items()} if found else {}


def _by_rows(lora: LoraWeights, shares: Mapping[str, int]) -> dict[str, LoraWeights]:
    ups = lora.up.split(_rows(lora, shares))
    return {m: LoraWeights(down=lora.down, up=up, scale=lora.scale) for m, up in zip(shares, ups, strict=True)}


def _by_diagonal(lora: LoraWeights, shares: Mapping[str, int]) -> dict[str, LoraWeights]:
    count = len(shares)
    blocks = [rows.tensor_split(count, dim=1) for rows in lora.up.split(_rows(lora, shares))]
    beside = (block for i, row in enumerate(blocks) for j, block in enumerate(row) if i != j)
    if count == 1 or lora.down.shape[0] % count or any(block.any() for block in beside):
        return _by_rows(lora, shares)
    downs = lora.down.tensor_split(count)
    return {m: LoraWeights(down=downs[i], up=blocks[i][i], scale=lora.scale) for i, m in enumerate(shares)}


def _rows(lora: LoraWeights, shares: Mapping[str, int]) -> list[int]:
    """How many rows of up belong to each member; what does not divide goes to the last."""
    unit = lora.up.shape[0] // sum(shares.values())
    rows = [unit * share for share in shares.values()]
    return [*rows[:-1], lora.up.shape[0] - sum(rows[:-1])]


def _invokeai_note(modules: Mapping[str, LoraWeights]) -> str:
    """InvokeAI tells FLUX.2 from FLUX.1 by img_attn.proj [. != 3072], or by img_mlp.0 [!= 4 * 3072 .] beside it."""
    inputs = {lora.down.shape[1] for module, lora in modules.items() if module.endswith(".attn.to_out.0")}
    beside = any(module.endswith(".ff.linear_in") for module in modules)
    if inputs and (inputs != {3072} or beside):
        return ""
    return "may take this for a FLUX.1 LoRA, which it tells apart by double blocks; adapt attention and mlp to be sure"
