"""Pictures from prompts: one row a prompt, one column a strength of each adapter, the base first.

    flux2-lora sample prompts='[red apple, cat face]' adapters=[outputs/mine] strengths=[0.5,1]
    flux2-lora sample prompts='[red apple]' adapters=[outputs/mine,style.safetensors] together=true weights=[1,0.6]
    flux2-lora sample image=photo.png strength=0.6 prompts='[a red apple]'          image to image
    flux2-lora sample prompts='[a red apple]' upscale=2                             draw, enlarge, refine in tiles

Writes 0000.png, 0001.png, ... in the order of prompts (the last column), and grid.png with all of them; each picture
carries its settings, and beside the grid lie a ComfyUI workflow and a Diffusers script that give the same, with what
they draw from in inputs/. An upscaled grid's draw the second half: from what was drawn, enlarged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from PIL import Image

from flux2_lora.config import program
from flux2_lora.devices import pick_device
from flux2_lora.errors import UserError
from flux2_lora.families import ModelSpec, open_model
from flux2_lora.inference.grid import Section, draw_grid
from flux2_lora.inference.pack import save_inputs, save_picture, write_pack
from flux2_lora.inference.pictures import read_picture
from flux2_lora.inference.pipeline import Pipeline
from flux2_lora.inference.request import (
    AdapterChoice,
    columns_of,
    in_turn,
    output_folder,
    portable,
    read_chosen,
    refuse_what_cannot_be,
    settings_of,
)
from flux2_lora.inference.sampling import Recipe
from flux2_lora.inference.settings import TEXT_TO_IMAGE
from flux2_lora.inference.starts import Start, of_size
from flux2_lora.options import option
from flux2_lora.quantize import PrecisionSpec
from flux2_lora.training.memory import MemorySpec
from flux2_lora.training.progress import console


@dataclass(frozen=True, kw_only=True)
class SampleConfig(Recipe, AdapterChoice):
    """configs/sample.yaml. strength: how much of `image` is redrawn; references: pictures that the model looks at.

    upscale: enlarge so many times, and refine at refine_strength.
    """

    model: ModelSpec
    precision: PrecisionSpec
    memory: MemorySpec
    prompts: list[str] = field(default_factory=list)
    height: int = option(1024, at_least=16)
    width: int = option(1024, at_least=16)
    image: str | None = None
    strength: float = option(0.6, at_least=0, at_most=1)
    references: list[str] = field(default_factory=list)
    upscale: float = option(1.0, at_least=1, at_most=8)
    refine_strength: float = option(0.35, at_least=0, at_most=1)
    device: str = "auto"
    output: str = "outputs/sample"


@program("sample")
def main(config: SampleConfig) -> None:
    if not config.prompts:
        raise UserError("prompts=[] asks for no picture", "give prompts='[first prompt, second prompt]'")
    source = read_picture(config.image, "image") if config.image else None
    shown = [read_picture(place, "references") for place in config.references]
    model, device = open_model(config.model), pick_device(config.device)
    refuse_what_cannot_be(config, model, references=bool(shown))
    if shown and config.upscale > 1:
        raise UserError("upscale refines without references", "draw first, then flux2-lora edit upscale=2")
    loras = read_chosen(config, model)
    prompts, folder = [*config.prompts, config.negative_prompt], output_folder(config.output)
    pipeline = Pipeline.open(model, config.precision, loras, device, prompts=prompts, memory=config.memory)
    pipeline.recipe = config
    height, width = (pipeline.whole_tokens(px) for px in (config.height, config.width))
    if (height, width) != (config.height, config.width):
        console.print(f"{config.width} x {config.height} px is rounded to {width} x {height}, which are whole tokens")
    references = [pipeline.as_seen(picture) for picture in shown]
    start = None if source is None else of_size(source, height, width)

    drawn: list[list[Image.Image]] = []
    larger: list[Start] = []
    columns = columns_of(config)
    for _ in in_turn(config, pipeline, columns):
        if start is not None:
            pictures = pipeline.draw_from(start, config.prompts, strength=config.strength, references=references)
        else:
            pictures = pipeline.generate(config.prompts, height=height, width=width, references=references)
        if config.upscale > 1:
            larger = [pipeline.to_upscale(picture, factor=config.upscale) for picture in pictures]
            pictures = refined(config, pipeline, larger)
        drawn.append(pictures)

    folder.mkdir(parents=True, exist_ok=True)
    files = portable(config.adapters, loras, model, folder, blocks=config.blocks)
    begun: Sequence[Start | None] = larger or [start] * len(config.prompts)
    inputs = [save_inputs(folder, one, references) if one is not None or references else None for one in begun]
    mode, strength = mode_of(config)
    last = settings_of(
        model,
        config,
        prompt=config.prompts[0],
        size=drawn[-1][0].size[::-1],
        adapters=list(zip(files, columns[-1][1], strict=True)),
        mode=mode,
        strength=strength,
        references=len(references),
        blocks=config.blocks,
        inputs=inputs[0],
    )
    each = [replace(last, prompt=prompt, inputs=own) for prompt, own in zip(config.prompts, inputs, strict=True)]
    for index, (settings, picture) in enumerate(zip(each, drawn[-1], strict=True)):
        save_picture(picture, folder / f"{index:04d}.png", settings)
    write_pack(folder, *each)
    title = f"{config.model.title}, seed {config.seed}, {config.steps} steps"
    rows = list(zip(config.prompts, zip(*drawn, strict=True), strict=True))
    draw_grid(title, [Section(columns=[heading for heading, _ in columns], rows=rows)]).save(folder / "grid.png")
    console.print(f"grid      {folder / 'grid.png'}")


def refined(config: SampleConfig, pipeline: Pipeline, larger: Sequence[Start]) -> list[Image.Image]:
    """The enlarged pictures, drawn anew from `refine_strength` down."""
    pairs = zip(larger, config.prompts, strict=True)
    return [pipeline.draw_from(start, [prompt], strength=config.refine_strength)[0] for start, prompt in pairs]


def mode_of(config: SampleConfig) -> tuple[str, float | None]:
    """What the grid's pictures were drawn as last, and how much of what they were drawn from was redrawn."""
    if config.upscale > 1:
        return "upscale", config.refine_strength
    return (TEXT_TO_IMAGE, None) if config.image is None else ("image to image", config.strength)


if __name__ == "__main__":
    main()
