"""Fold adapters into each other, or into the base model.

    flux2-lora merge adapters=[outputs/mine,style.safetensors] weights=[1,0.5] output=both.safetensors
    flux2-lora merge adapters=[outputs/mine,style.safetensors] rank=16 output=both.safetensors
    flux2-lora merge adapters=[outputs/mine] base=true output=mine-model.safetensors

Of several adapters one LoRA is made whose update is the weighted sum of theirs, exactly, at the sum of their ranks, or
at a lower rank with the error that it costs. Folded into the base (model=...), the result is the whole transformer in
BFL's names, which ComfyUI and Forge load as a diffusion model, and this program by model.path=.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from flux2_lora.adapters import Lora, summed
from flux2_lora.config import program
from flux2_lora.errors import UserError
from flux2_lora.export import table
from flux2_lora.export.resize import resized
from flux2_lora.families import ModelSpec, open_model
from flux2_lora.files import as_asked
from flux2_lora.lora_files import read_any
from flux2_lora.lora_origin import origin_of, refuse_other_model, width_of
from flux2_lora.merged import write_merged
from flux2_lora.options import option
from flux2_lora.publish.release import DTYPES, Source, release
from flux2_lora.training.progress import console


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """configs/merge.yaml. weights: one an adapter, 1 where not given; rank: null for the sum of the ranks."""

    model: ModelSpec
    adapters: list[str] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    base: bool = False
    rank: int | None = option(None, at_least=1)
    dtype: str = option("fp32", one_of=tuple(DTYPES))
    output: str = "outputs/merged.safetensors"


@program("merge")
def main(config: MergeConfig) -> None:
    if not config.adapters:
        raise UserError("adapters=[] names nothing to merge", "give adapters=[outputs/mine,style.safetensors]")
    weights = config.weights or [1.0] * len(config.adapters)
    if len(weights) != len(config.adapters):
        raise UserError(
            f"weights has {len(weights)} numbers for {len(config.adapters)} adapters", "give one an adapter"
        )
    loras, path = [read_any(place) for place in config.adapters], Path(config.output).expanduser()
    for place, lora in zip(config.adapters, loras, strict=True):
        refuse_another(config.adapters[0], loras[0], place, lora)
        console.print(f"adapter   {place}: {lora.summary}")
    modules = summed(loras, weights)
    if config.base and config.rank is not None:
        raise UserError("rank says nothing of a whole model", "leave it out, or leave base=true out")
    if config.base:
        model = open_model(config.model)
        for place, lora in zip(config.adapters, loras, strict=True):
            refuse_other_model(place, lora, model)
        with as_asked(path, "output"):
            write_merged(path, model.weights, modules, model.family.architecture, DTYPES[config.dtype])
        console.print(f"model     {path}")
        return
    if config.rank is not None:
        modules, error = resized(modules, config.rank, loras[0].architecture)
        console.print(f"rank      {config.rank}: {error:.2%} of the update is lost")
    words = ", ".join(dict.fromkeys(lora.trigger_word for lora in loras if lora.trigger_word)) or None
    merged = replace(loras[0], modules=modules, total=len(modules), trigger_word=words, header=spoken(loras[0]))
    [released] = release(Source(lora=merged, path=path), {"universal": path}, dtype=DTYPES[config.dtype])
    console.print(table(released.proofs))
    console.print(f"export    {released.path}")


def refuse_another(first_place: str, first: Lora, place: str, lora: Lora) -> None:
    """UserError for adapters of different architectures or sizes."""
    shapes = {m: (len(pair.up), pair.down.shape[1]) for m, pair in first.modules.items()}
    differ = any(
        shapes.get(m, found) != found
        for m, pair in lora.modules.items()
        for found in [(len(pair.up), pair.down.shape[1])]
    )
    widths = {width for width in (width_of(first), width_of(lora)) if width}
    if first.architecture != lora.architecture or len(widths) > 1 or differ:
        raise UserError(
            f"{place} is of {origin_of(lora).title}, {first_place} of {origin_of(first).title}, or of another size",
            "merge adapters of one model",
        )


def spoken(lora: Lora) -> dict[str, str]:
    """Of a header, what is true of the sum too: the model."""
    keys = ("ss_base_model_version", "modelspec.architecture", "modelspec.resolution", "modelspec.license")
    return {key: lora.header[key] for key in keys if key in lora.header}


if __name__ == "__main__":
    main()
