"""What `sample` and `edit` are asked alike: which adapters, at which strengths, what a model cannot do, and how what
was drawn is written down.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flux2_lora.adapters import WEIGHTS, Lora, find_adapter
from flux2_lora.errors import UserError
from flux2_lora.export import export_lora
from flux2_lora.families import Model
from flux2_lora.inference.pipeline import Pipeline
from flux2_lora.inference.sampling import Recipe
from flux2_lora.inference.settings import TEXT_TO_IMAGE, Inputs, Settings
from flux2_lora.lora_files import OUR_NAMES, read_loras
from flux2_lora.samplers import USUAL, Filling
from flux2_lora.training.progress import console


@dataclass(frozen=True, kw_only=True)
class AdapterChoice:
    """adapters: runs, checkpoints or files; weights: one an adapter, 1 where not given; strengths: what these are
    multiplied by, a column each. together: all adapters in one column, else each alone. blocks: where they act, as
    adapter.targets names groups; a number after a colon is a factor of the strength there. merged: fold the adapters of
    the last column into the base and draw that column alone, which saves their work in every step.
    """

    adapters: list[str] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    strengths: list[float] = field(default_factory=lambda: [1.0])
    together: bool = False
    blocks: list[str] = field(default_factory=list)
    merged: bool = False


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

    A checkpoint goes by its run and its step. Merged adapters have the last column only.
    """
    weights = choice.weights or [1.0] * len(choice.adapters)
    columns = [("base", [0.0] * len(weights))]
    groups = [list(range(len(weights)))] if choice.together else [[index] for index in range(len(weights))]
    for group in groups if choice.adapters else []:
        name = " + ".join(name_of(choice.adapters[index]) for index in group)
        for strength in choice.strengths:
            strengths = [strength * weight if index in group else 0.0 for index, weight in enumerate(weights)]
            columns.append((f"{name} x {strength:g}", strengths))
    return columns[-1:] if choice.merged else columns


def in_turn(
    choice: AdapterChoice, pipeline: Pipeline, columns: Sequence[tuple[str, Sequence[float]]]
) -> Iterator[None]:
    """Have the pipeline draw as each column says, and say when it is drawn."""
    if choice.merged:
        pipeline.merge(columns[-1][1])
    for place, (heading, strengths) in enumerate(columns, start=1):
        if not choice.merged:
            pipeline.use(strengths)
        yield
        console.print(f"{place} of {len(columns)}: {heading}")


def portable(
    places: Sequence[str], loras: Mapping[str, Lora], model: Model, folder: Path, *, blocks: Sequence[str] = ()
) -> list[str]:
    """Files that ComfyUI and Diffusers read, one a place: the file itself, a run's export, or one made in `folder`.

    blocks: where alone the adapters act; no other program would draw a part of a file, so these are always made.
    """
    files = []
    for number, (place, lora) in enumerate(zip(places, loras.values(), strict=True)):
        name = f"{number}-{name_of(place).replace(' ', '-')}"
        within = re.sub(r"[^\w.]+", "-", "-".join(blocks)).strip("-")
        file = None if blocks else _whole(place, lora)
        if file is None:
            file = folder.resolve() / "adapters" / f"{name}{f'-{within}' if within else ''}.safetensors"
            told = {"modelspec.title": file.stem}
            export_lora(lora.modules, file, architecture=model.family.architecture, header=told)
        files.append(str(file))
    return files


def _whole(place: str, lora: Lora) -> Path | None:
    """The file itself, or the export of its run where that is current; None where one must be made."""
    source, run = find_adapter(place), Path(place).expanduser().resolve()
    if lora.naming != OUR_NAMES:
        return source.resolve()
    exported = run / "export" / f"{run.name}.safetensors"
    current = exported.is_file() and exported.stat().st_mtime >= source.stat().st_mtime
    return exported if current else None


def settings_of(
    model: Model,
    recipe: Recipe,
    *,
    prompt: str,
    size: tuple[int, int],
    adapters: Sequence[tuple[str, float]] = (),
    mode: str = TEXT_TO_IMAGE,
    strength: float | None = None,
    fill: Filling = USUAL,
    references: int = 0,
    blocks: Sequence[str] = (),
    inputs: Inputs | None = None,
) -> Settings:
    """What a picture of `size` (height, width in px) carries. strength: of image to image and what is built on it.

    Paths of this machine are made absolute, so that scripts find them from anywhere and pictures do not tell them.
    """
    spec = model.spec
    guidance = 1.0 if recipe.guidance is None else recipe.guidance
    return Settings(
        family=spec.family,
        model_title=spec.title,
        model_path=_absolute(spec.path),
        components=_absolute(spec.components) if spec.components else None,
        max_sequence_length=spec.max_sequence_length,
        prompt=prompt,
        negative_prompt=recipe.negative_prompt,
        height=size[0],
        width=size[1],
        steps=recipe.steps,
        seed=recipe.seed,
        sampler=recipe.sampler,
        guidance=guidance if model.takes_guidance() else None,
        cfg_scale=recipe.cfg_scale,
        adapters=tuple(adapters),
        mode=mode,
        strength=strength,
        fill=fill,
        references=references,
        blocks=tuple(blocks),
        inputs=inputs,
    )


def output_folder(place: str) -> Path:
    """Where results go, not made yet; UserError where nothing can be written, before anything is drawn."""
    folder = Path(place).expanduser().absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            return Path(place).expanduser()
    except OSError as error:
        raise UserError(f"output={place} cannot be written ({error.strerror})", "give a folder of your own") from error


def _absolute(place: str) -> str:
    """A path that is there in full; a hub id as it is."""
    path = Path(place).expanduser()
    return str(path.resolve()) if path.exists() else place


def refuse_what_cannot_be(recipe: Recipe, model: Model, *, references: bool) -> None:
    """UserError for a negative prompt or references that the model cannot look at; a word on what has no effect."""
    title = model.spec.title
    if recipe.negative_prompt and model.spec.distilled:
        raise UserError(
            f"negative_prompt cannot be used: {title} is distilled, and draws without classifier-free guidance",
            "leave it out, or use the base model of its size",
        )
    if recipe.negative_prompt and recipe.cfg_scale <= 1:
        console.print(f"negative_prompt has no effect at cfg_scale={recipe.cfg_scale:g}; cfg_scale=4 takes two passes")
    if references and not model.family.takes_references:
        raise UserError(f"{title} looks at no reference pictures", "use a model of flux2_klein or flux2_dev")
    if recipe.guidance is not None and not model.takes_guidance():
        console.print(f"guidance={recipe.guidance:g} is ignored: this model has no guidance embedding, use cfg_scale")


def name_of(place: str) -> str:
    """A file or run by its name, a checkpoint by its run and its step."""
    path = Path(place)
    path = path.parent if path.name == WEIGHTS else path
    name = path.stem if path.suffix == ".safetensors" else path.name
    return f"{path.parent.parent.name} {name}" if path.parent.name == "checkpoints" else name
