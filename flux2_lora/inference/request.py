"""What `sample` and `edit` are asked alike: which adapters, at which strengths, and what a model cannot do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from flux2_lora.adapters import Lora
from flux2_lora.errors import UserError
from flux2_lora.families import Model
from flux2_lora.inference.sampling import Recipe
from flux2_lora.lora_files import read_loras
from flux2_lora.training.progress import console


@dataclass(frozen=True, kw_only=True)
class AdapterChoice:
    """adapters: runs, checkpoints or files; weights: one an adapter, 1 where not given; strengths: what these are
    multiplied by, a column each. together: all adapters in one column, else each alone. blocks: where they act, as
    adapter.targets names groups; a number after a colon is a factor of the strength there.
    """

    adapters: list[str] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    strengths: list[float] = field(default_factory=lambda: [1.0])
    together: bool = False
    blocks: list[str] = field(default_factory=list)


def read_chosen(choice: AdapterChoice, model: Model) -> Mapping[str, Lora]:
    """The adapters, and one line about each; UserError for one that does not fit the model."""
    if choice.weights and len(choice.weights) != len(choice.adapters):
        raise UserError(
            f"weights has {len(choice.weights)} numbers for {len(choice.adapters)} adapters", "give one an adapter"
        )
    loras = read_loras(choice.adapters, model, choice.blocks)
    for place, lora in loras.items():
        console.print(f"adapter   {place}: {lora.summary}")
    return loras


def columns_of(choice: AdapterChoice) -> list[tuple[str, list[float]]]:
    """(heading, one strength an adapter) of every column: the base, then each adapter alone, or all, at each strength.

    A checkpoint goes by its run and its step.
    """
    weights = choice.weights or [1.0] * len(choice.adapters)
    columns = [("base", [0.0] * len(weights))]
    groups = [list(range(len(weights)))] if choice.together else [[index] for index in range(len(weights))]
    for group in groups if choice.adapters else []:
        name = " + ".join(_name(choice.adapters[index]) for index in group)
        for strength in choice.strengths:
            strengths = [strength * weight if index in group else 0.0 for index, weight in enumerate(weights)]
            columns.append((f"{name} x {strength:g}", strengths))
    return columns


def refuse_what_cannot_be(recipe: Recipe, model: Model, *, references: bool) -> None:
    """UserError for a negative prompt or references that the model would not look at; a word about guidance."""
    title = model.spec.title
    if recipe.negative_prompt and model.spec.distilled:
        raise UserError(
            f"negative_prompt cannot be used: {title} is distilled, and draws without classifier-free guidance",
            "leave it out, or use the base model of its size",
        )
    if recipe.negative_prompt and recipe.cfg_scale <= 1:
        raise UserError(
            f"negative_prompt has no effect at cfg_scale={recipe.cfg_scale:g}",
            "set cfg_scale=4, which takes two passes a step, or leave negative_prompt out",
        )
    if references and not model.family.takes_references:
        raise UserError(f"{title} looks at no reference pictures", "use a model of flux2_klein or flux2_dev")
    if recipe.guidance is not None and not model.takes_guidance():
        console.print(f"guidance={recipe.guidance:g} is ignored: this model has no guidance embedding, use cfg_scale")


def _name(place: str) -> str:
    path = Path(place)
    return f"{path.parent.parent.name} {path.name}" if path.parent.name == "checkpoints" else path.stem
