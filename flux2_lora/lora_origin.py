"""Which model a LoRA is of, told by its shapes, its names and its header.

Names alone do not tell: the double blocks of FLUX.1 and FLUX.2 are named alike in BFL's and kohya's files, and models
of one architecture differ in width and depth only. Where a file may be of either architecture, it is asked in turn what
it says itself, which proportions its weights have, and how many blocks it names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from flux2_lora.adapters import Lora, LoraWeights
from flux2_lora.errors import UserError, listed
from flux2_lora.families import Model
from flux2_lora.keys import ARCHITECTURES, members_of

TITLES = {"flux1": "FLUX.1", "flux2": "FLUX.2"}
OTHER_MODEL = "use it with the model that it was trained on; choose that with model=..."
_OTHER_SIZE = f"{OTHER_MODEL} (FLUX.1 and klein 4B are 3072 wide, klein 9B 4096, FLUX.2 dev 6144)"
# Outputs over inputs of BFL weights whose names are the same in both architectures.
_PROPORTIONS: Mapping[str, Mapping[str, float]] = {
    "linear1": {"flux1": 7, "flux2": 9},
    "linear2": {"flux1": 1 / 5, "flux2": 1 / 4},
    "mlp.0": {"flux1": 4, "flux2": 6},
    "mlp.2": {"flux1": 1 / 4, "flux2": 1 / 3},
}
_MOST_DOUBLE_BLOCKS_OF_FLUX2 = 8


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A model as files name it. title: as managers filter by it; name: as ModelSpec headers spell it.

    family: empty where it is not known.
    """

    title: str
    name: str
    family: str


# By architecture and width.
_ORIGINS = {
    ("flux1", 3072): Origin(title="Flux.1 D", name="flux-1-dev", family="flux1"),
    ("flux2", 3072): Origin(title="Flux.2 Klein 4B", name="Flux.2-klein-4b", family="flux2_klein"),
    ("flux2", 4096): Origin(title="Flux.2 Klein 9B", name="Flux.2-klein-9b", family="flux2_klein"),
    ("flux2", 6144): Origin(title="Flux.2 D", name="Flux.2-dev", family="flux2_dev"),
    ("flux2", 256): Origin(title="flux2-lora tiny", name="Flux.2-small", family="flux2_small"),
}
_HALF = re.compile(r"(.+?)[._]lora(?:_linear_layer)?[._](down|up|A|B)(?:\.default)?(?:\.weight)?")


def told_architecture(place: str, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> list[str]:
    """The architectures that a file may be of, one where that can be told; UserError where it is open."""
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, tensor in tensors.items():
        if (found := _HALF.fullmatch(key)) and tensor.ndim == 2:
            half = {"A": "down", "B": "up"}.get(found[2], found[2])
            shapes.setdefault(found[1].replace("_", "."), {})[half] = tuple(tensor.shape)
    told = _by_words(header) or _by_names(shapes) or _by_proportions(shapes) or _by_depth(shapes) or _by_width(shapes)
    if told:
        return [told]
    if any(re.search(r"(?:^|\.)(?:double|transformer)\.blocks\.", name) for name in shapes):
        raise UserError(
            f"{place} may be of FLUX.1 or of FLUX.2: it changes only what both have", "say which with model=..."
        )
    return list(ARCHITECTURES)


def origin_of(lora: Lora) -> Origin:
    """The model that a LoRA is of: what its header says, and else what its architecture and width tell."""
    known = _ORIGINS.get((lora.architecture, width_of(lora) or 0))
    title, name = TITLES[lora.architecture], lora.architecture
    found = known or Origin(title=title, name=name, family="flux1" if lora.architecture == "flux1" else "")
    told = lora.header.get("ss_base_model_version") or lora.header.get("modelspec.base_model")
    spelled = lora.header.get("modelspec.architecture", "").removesuffix("/lora")
    return Origin(title=told or found.title, name=spelled or found.name, family=lora.family or found.family)


def width_of(lora: Lora) -> int | None:
    """The width of the model: what most of the Linears that read its states have as inputs; None for none of them."""
    reading = (".to_q", ".to_k", ".to_v", "_proj", ".linear_in", ".0.proj", ".proj_mlp", ".to_qkv_mlp_proj")
    widths = [pair.down.shape[1] for name, pair in lora.modules.items() if name.endswith(reading)]
    heights = [len(pair.up) for name, pair in lora.modules.items() if name.endswith((".to_out.0", ".to_add_out"))]
    found = widths or heights
    return max(set(found), key=found.count) if found else None


def refuse_other_shapes(place: str, pairs: Mapping[str, LoraWeights], model: Model) -> None:
    """UserError for pairs, by weight, that do not fit the model's Linears or have none: another size or depth."""
    architecture, wrong, lost = model.family.architecture, [], []
    for weight, pair in pairs.items():
        shapes = [model.weights.shapes.get(f"{member}.weight", ()) for member in _members(architecture, weight)]
        if not all(shapes):
            lost.append(weight)
            continue
        height, wide = sum(shape[0] for shape in shapes), shapes[0][1]
        if (len(pair.up), pair.down.shape[1]) != (height, wide):
            other = _by_proportion(weight, len(pair.up) / pair.down.shape[1])
            if other not in (None, architecture):
                raise UserError(
                    f"{place} is a LoRA of {TITLES[str(other)]}, the model is {TITLES[architecture]}", OTHER_MODEL
                )
            wrong.append(f"{weight} [{len(pair.up)} {pair.down.shape[1]}] for [{height} {wide}]")
    count = len(pairs)
    for what, names in (
        (f"is a LoRA of a model of another size, {len(wrong)} of {count} modules differ in shape:", wrong),
        (f"changes modules that this model does not have, {len(lost)} of {count}:", lost),
    ):
        if names:
            raise UserError(f"{place} {what} {listed(names, 3)}", _OTHER_SIZE)


def refuse_other_model(place: str, lora: Lora, model: Model) -> None:
    """UserError for a LoRA of another architecture or size than the model."""
    if lora.architecture != model.family.architecture:
        raise UserError(
            f"{place} is a LoRA of {TITLES[lora.architecture]}, the model is {TITLES[model.family.architecture]}",
            OTHER_MODEL,
        )
    refuse_other_shapes(place, lora.modules, model)


def _members(architecture: str, weight: str) -> tuple[str, ...]:
    """The Linears of a BFL weight, or the Linear of that name."""
    try:
        return members_of(architecture, weight)
    except KeyError:
        return (weight,)


def _by_words(header: Mapping[str, str]) -> str | None:
    """What the header says; our own files name a family."""
    keys = ("family", "modelspec.architecture", "modelspec.implementation", "ss_base_model_version")
    for text in (header.get(key, "").lower() for key in keys):
        if found := re.search(r"flux[-._ ]?([12])(?!\d)", text):
            return f"flux{found[1]}"
        if text.rstrip("/").endswith("black-forest-labs/flux"):
            return "flux1"
    return None


def _by_names(shapes: Iterable[str]) -> str | None:
    """Linears that one architecture has alone; dots stand for "_" too."""
    alone = {
        "flux1": re.compile(r".*(img\.mod\.lin|txt\.mod\.lin|proj\.mlp|ff(\.context)?\.net\.\d.*|\.single.*proj\.out)"),
        "flux2": re.compile(r".*(to\.qkv\.mlp\.proj|ff(\.context)?\.linear\.(in|out)|stream\.modulation.*)"),
    }
    return next((name for name, mark in alone.items() if any(mark.fullmatch(entry) for entry in shapes)), None)


def _by_proportions(shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> str | None:
    for name, halves in shapes.items():
        if (
            halves.keys() == {"down", "up"}
            and halves["down"][1]
            and (found := _by_proportion(name, halves["up"][0] / halves["down"][1]))
        ):
            return found
    return None


def _by_proportion(weight: str, proportion: float) -> str | None:
    """The architecture in which a weight of this name has so many outputs for each input."""
    for ending, proportions in _PROPORTIONS.items():
        if weight.endswith(ending):
            return next((name for name, its in proportions.items() if math.isclose(proportion, its)), None)
    return None


def _by_width(shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> str | None:
    """FLUX.1 is 3072 wide and nothing else; what reads q, k or v has the model's width as inputs."""
    reads = re.compile(r".*(to\.[qkv]|add\.[qkv]\.proj|attn\.qkv)")
    widths = {halves["down"][1] for name, halves in shapes.items() if "down" in halves and reads.fullmatch(name)}
    return "flux2" if widths and 3072 not in widths else None


def _by_depth(shapes: Iterable[str]) -> str | None:
    numbers = [int(found[1]) for name in shapes if (found := re.search(r"double\.blocks\.(\d+)\.", name))]
    return "flux1" if max(numbers, default=0) >= _MOST_DOUBLE_BLOCKS_OF_FLUX2 else None
