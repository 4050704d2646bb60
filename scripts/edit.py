"""Edit one picture: inpaint under a mask, outpaint over its borders, enlarge it, or redraw it (image to image).

    flux2-lora edit image=photo.png mask=mask.png prompt='a red apple' adapters=[outputs/mine]
    flux2-lora edit image=photo.png outpaint.right=256 prompt='a wide meadow'
    flux2-lora edit image=photo.png ratio=16:9 prompt='a wide meadow'
    flux2-lora edit image=photo.png upscale=2 prompt='a red apple'
    flux2-lora edit image=photo.png strength=0.5 prompt='a red apple'

A mask is any picture: what is bright or painted, or made transparent, is drawn anew; everything else comes back byte
for byte. A picture with transparent parts needs no mask. Writes 0000.png (the last column) and grid.png; the picture
carries its settings, and beside the grid lie a ComfyUI workflow and a Diffusers script that give the same, with what
they draw from in inputs/.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from PIL import Image, ImageOps

from flux2_lora.config import program
from flux2_lora.devices import pick_device
from flux2_lora.errors import UserError
from flux2_lora.families import ModelSpec, open_model
from flux2_lora.inference.edit import Border, border_for, extend, soften
from flux2_lora.inference.grid import Section, draw_grid
from flux2_lora.inference.pack import save_inputs, save_picture, write_pack
from flux2_lora.inference.pictures import fit, mask_of, read_picture
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
from flux2_lora.inference.starts import Start
from flux2_lora.options import option
from flux2_lora.quantize import PrecisionSpec
from flux2_lora.samplers import USUAL, Filling
from flux2_lora.training.memory import MemorySpec
from flux2_lora.training.progress import console


@dataclass(frozen=True, kw_only=True)
class EditConfig(Recipe, AdapterChoice):
    """configs/edit.yaml. height and width: null keeps the picture's size. ratio: width:height to outpaint to.

    strength: null for 1 under a mask, 0.35 for upscale and 0.6 without either. feather_px, crop, padding_px and fill:
    see `Pipeline.inpaint`.
    """

    model: ModelSpec
    precision: PrecisionSpec
    memory: MemorySpec
    outpaint: Border
    fill: Filling
    image: str
    prompt: str = ""
    mask: str | None = None
    invert_mask: bool = False
    feather_px: int = option(0, at_least=0)
    crop: str = option("auto", one_of=("auto", "always", "never"))
    padding_px: int = option(64, at_least=0)
    ratio: str | None = None
    upscale: float = option(1.0, at_least=1, at_most=8)
    height: int | None = option(None, at_least=16)
    width: int | None = option(None, at_least=16)
    strength: float | None = option(None, at_least=0, at_most=1)
    references: list[str] = field(default_factory=list)
    device: str = "auto"
    output: str = "outputs/edit"

    def or_else(self, usual: float) -> float:
        """The strength that was asked for, or what is usual for the mode."""
        return usual if self.strength is None else self.strength


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be done. mask: grey, of the canvas' size, 255 = new; None where all of it is drawn anew.

    strength: how much is redrawn; padding_px: what the model sees around the mask; fill: of the mask.
    """

    mode: str
    picture: Image.Image
    canvas: Image.Image
    strength: float
    mask: Image.Image | None = None
    padding_px: int = 0
    fill: Filling = USUAL


@program("edit")
def main(config: EditConfig) -> None:
    job, folder = job_of(config), output_folder(config.output)
    shown = [read_picture(place, "references") for place in config.references]
    model, device = open_model(config.model), pick_device(config.device)
    refuse_what_cannot_be(config, model, references=bool(shown))
    loras = read_chosen(config, model)
    if job.fill != USUAL:
        console.print("fill is of this program alone: no workflow and no script are written")
    if config.fill != job.fill:
        console.print("fill is of masks and borders: there is none here")
    if job.mask is not None and job.mask.getbbox() is None:
        console.print("the mask is empty: nothing is drawn anew, and the picture comes back as it is")
    prompts = [config.prompt, config.negative_prompt]
    pipeline = Pipeline.open(model, config.precision, loras, device, prompts=prompts, memory=config.memory)
    pipeline.recipe = config
    references, start = [pipeline.as_seen(picture) for picture in shown], start_of(config, job, pipeline)
    columns = columns_of(config)
    columns = columns[1:] or columns
    results = [
        job.canvas
        if start is None
        else pipeline.draw_from(start, [config.prompt], strength=job.strength, fill=job.fill, references=references)[0]
        for _ in in_turn(config, pipeline, columns)
    ]

    folder.mkdir(parents=True, exist_ok=True)
    files = portable(config.adapters, loras, model, folder, blocks=config.blocks)
    last = settings_of(
        model,
        config,
        prompt=config.prompt,
        size=(results[-1].height, results[-1].width),
        adapters=list(zip(files, columns[-1][1], strict=True)),
        mode=job.mode,
        strength=job.strength,
        fill=job.fill,
        references=len(references),
        blocks=config.blocks,
        inputs=None if start is None else save_inputs(folder, start, references),
    )
    save_picture(results[-1], folder / "0000.png", last)
    write_pack(folder, last)
    before = {"picture": job.picture} | ({} if job.mask is None else {"mask": job.mask})
    section = Section(
        columns=[*before, *(heading for heading, _ in columns)], rows=[(config.prompt, [*before.values(), *results])]
    )
    draw_grid(f"{job.mode}, seed {config.seed}", [section]).save(folder / "grid.png")
    console.print(f"result    {folder / '0000.png'}")
    console.print(f"grid      {folder / 'grid.png'}")


def job_of(config: EditConfig) -> Job:
    """Read the files; UserError for what is missing or contradicts itself."""
    picture, drawn = read_job(config)
    border = border_of(config, picture)
    if config.upscale > 1:
        if config.mask is not None or border != Border() or config.references:
            raise UserError("upscale goes with no mask, border or references", "edit first, then upscale the result")
        return Job(mode="upscale", picture=picture, canvas=picture, strength=config.or_else(0.35))
    if border == Border() and drawn is None and config.ratio is None:
        return Job(mode="image to image", picture=picture, canvas=picture, strength=config.or_else(0.6))
    canvas, mask = extend(picture, border)
    if drawn is not None:
        mask.paste(drawn, (border.left, border.top))
    mask = soften(mask, config.feather_px)
    widest = max(border.left, border.right, border.top, border.bottom, config.padding_px)
    mode = "inpaint" if border == Border() else "outpaint"
    return Job(
        mode=mode,
        picture=picture,
        canvas=canvas,
        mask=mask,
        strength=config.or_else(1.0),
        padding_px=widest,
        fill=config.fill,
    )


def read_job(config: EditConfig) -> tuple[Image.Image, Image.Image | None]:
    """The picture in the size that was asked for, and the mask, where there is one, in the same."""
    picture = read_picture(config.image, "image")
    masked = read_picture(config.mask, "mask") if config.mask is not None else picture
    drawn = mask_of(masked) if config.mask is not None or "A" in picture.getbands() else None
    picture = picture.convert("RGB")
    if config.height or config.width:
        size = config.height or picture.height, config.width or picture.width
        picture, drawn = fit(picture, *size), None if drawn is None else fit(drawn, *size)
    if drawn is None:
        return picture, None
    if drawn.size != picture.size:
        console.print(f"the mask, {drawn.width} x {drawn.height} px, is resized to {picture.width} x {picture.height}")
        drawn = drawn.resize(picture.size, Image.Resampling.BILINEAR)
    return picture, ImageOps.invert(drawn) if config.invert_mask else drawn


def border_of(config: EditConfig, picture: Image.Image) -> Border:
    """outpaint's sides, or what reaches the ratio."""
    if config.ratio is None:
        return config.outpaint
    if config.outpaint != Border():
        raise UserError("ratio and outpaint both say how wide the border is", "give one of them")
    try:
        width, height = (float(side) for side in config.ratio.split(":"))
        return border_for(picture.width, picture.height, width / height)
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(f"ratio={config.ratio} is no ratio of width to height", "write ratio=16:9") from error


def start_of(config: EditConfig, job: Job, pipeline: Pipeline) -> Start | None:
    """What all columns are drawn from; None where nothing is to be drawn anew."""
    if job.mode == "upscale":
        return pipeline.to_upscale(job.canvas, factor=config.upscale)
    if job.mask is None:
        return pipeline.to_redraw(job.canvas)
    return pipeline.to_inpaint(job.canvas, job.mask, crop=config.crop, padding_px=job.padding_px)


if __name__ == "__main__":
    main()
