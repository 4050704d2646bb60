"""Edit one picture: inpaint under a mask, outpaint over its borders, or redraw it (image to image).

    flux2-lora edit image=photo.png mask=mask.png prompt='a red apple' adapters=[outputs/mine]
    flux2-lora edit image=photo.png outpaint.right=256 prompt='a wide meadow'
    flux2-lora edit image=photo.png strength=0.5 prompt='a red apple'

Where the mask is black the picture comes back byte for byte. Writes 0000.png (the last strength) and grid.png.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from flux2_lora.adapters import find_adapter
from flux2_lora.config import program
from flux2_lora.devices import pick_device
from flux2_lora.errors import UserError
from flux2_lora.families import ModelSpec, open_model
from flux2_lora.inference.edit import Border, extend, inpaint, soften
from flux2_lora.inference.grid import Section, draw_grid
from flux2_lora.inference.pictures import fit, read_picture
from flux2_lora.inference.pipeline import Prompted, initial_noise
from flux2_lora.inference.session import encode_prompts, open_session
from flux2_lora.lora_files import read_loras
from flux2_lora.options import option
from flux2_lora.quantize import PrecisionSpec
from flux2_lora.training.progress import console


@dataclass(frozen=True, kw_only=True)
class EditConfig:
    """configs/edit.yaml. height and width: null keeps the picture's size, cut to whole tokens."""

    model: ModelSpec
    precision: PrecisionSpec
    outpaint: Border
    image: str
    prompt: str = ""
    negative_prompt: str = ""
    mask: str | None = None
    feather_px: int = option(0, at_least=0)
    height: int | None = option(None, at_least=16)
    width: int | None = option(None, at_least=16)
    strength: float = option(0.6, above=0, at_most=1)
    steps: int = option(50, at_least=1)
    guidance: float | None = option(None, at_least=0)
    cfg_scale: float = option(1.0, at_least=0)
    adapters: list[str] = field(default_factory=list)
    strengths: list[float] = field(default_factory=lambda: [1.0])
    seed: int = option(0, at_least=0)
    device: str = "auto"
    output: str = "outputs/edit"


@program("edit")
def main(config: EditConfig) -> None:
    picture = read_picture(config.image, "image")
    if config.height or config.width:
        picture = fit(picture, config.height or picture.height, config.width or picture.width)
    drawn = read_picture(config.mask, "mask").convert("L") if config.mask else None
    if drawn is not None and drawn.size != picture.size:
        raise UserError(
            f"mask={config.mask} is {drawn.width} x {drawn.height}, the picture {picture.width} x {picture.height}",
            "give a mask of the picture's size: white is repainted, black is kept",
        )
    canvas, mask, mode = what_to_paint(config, picture, drawn)
    device = pick_device(config.device)
    for place in config.adapters:
        find_adapter(place)  # before a model is fetched
    model = open_model(config.model)
    loras = read_loras(config.adapters, model)
    for place, lora in loras.items():
        console.print(f"adapter   {place}: {lora.summary}")
    if config.guidance is not None and not model.takes_guidance():
        console.print(f"guidance={config.guidance:g} is ignored: this model has no guidance embedding, use cfg_scale")
    positive, negative = encode_prompts(model, [config.prompt, config.negative_prompt], device)
    session = open_session(model, config.precision, loras, device)
    whole = padded(canvas, session.family.pixels_per_token)
    prompted = Prompted(positive=positive, negative=negative, cfg_scale=config.cfg_scale, guidance=config.guidance)
    noise = initial_noise(session.family, whole.height, whole.width, [config.seed]).to(session.device)
    strength = config.strength if mode == "image to image" else 1.0
    results = []
    for multiplier in config.strengths:
        session.use([multiplier] * len(session.adapters))
        painted = inpaint(
            session.family,
            session.transformer,
            session.vae,
            prompted,
            whole,
            padded(mask, session.family.pixels_per_token),
            noise,
            config.steps,
            strength=strength,
        )
        results.append(painted.crop((0, 0, canvas.width, canvas.height)))

    folder = Path(config.output).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    results[-1].save(folder / "0000.png")
    headings = ["picture", "mask", *[f"x {multiplier:g}" for multiplier in config.strengths]]
    section = Section(columns=headings, rows=[(config.prompt, [picture, mask, *results])])
    draw_grid(f"{mode}, seed {config.seed}", [section]).save(folder / "grid.png")
    console.print(f"result    {folder / '0000.png'}")
    console.print(f"grid      {folder / 'grid.png'}")


def what_to_paint(
    config: EditConfig, picture: Image.Image, drawn: Image.Image | None
) -> tuple[Image.Image, Image.Image, str]:
    """(canvas, mask, mode): a drawn mask and borders may be used together; neither repaints the whole picture."""
    if config.outpaint == Border():
        if drawn is None:
            return picture, Image.new("L", picture.size, 255), "image to image"
        return picture, soften(drawn, config.feather_px), "inpaint"
    canvas, mask = extend(picture, config.outpaint)
    if drawn is not None:
        mask.paste(soften(drawn, config.feather_px), (config.outpaint.left, config.outpaint.top))
    return canvas, mask, "outpaint"


def padded(picture: Image.Image, step_px: int) -> Image.Image:
    """Repeat the right and bottom edges up to whole tokens."""
    right, bottom = -picture.width % step_px, -picture.height % step_px
    if not right and not bottom:
        return picture
    return extend(picture, Border(right=right, bottom=bottom))[0]


if __name__ == "__main__":
    main()
