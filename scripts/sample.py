"""Pictures from prompts: one row a prompt, one column a strength of each adapter, the base first.

    flux2-lora sample prompts='[red apple, cat face]' adapters=[outputs/mine] strengths=[0.5,1]
    flux2-lora sample image=photo.png strength=0.6 prompts='[a red apple]'          image to image

Writes 0000.png, 0001.png, ... in the order of prompts (the last column), and grid.png with all of them.
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
from flux2_lora.inference.grid import Section, draw_grid
from flux2_lora.inference.pictures import fit, read_picture, to_pictures, to_pixels
from flux2_lora.inference.pipeline import Prompted, generate, initial_noise
from flux2_lora.inference.session import Session, encode_prompts, open_session
from flux2_lora.lora_files import read_loras
from flux2_lora.options import option
from flux2_lora.quantize import PrecisionSpec
from flux2_lora.training.progress import console


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """configs/sample.yaml. strength: how much of `image` is redrawn; strengths: multipliers of the adapters."""

    model: ModelSpec
    precision: PrecisionSpec
    prompts: list[str] = field(default_factory=list)
    negative_prompt: str = ""
    height: int = option(1024, at_least=16)
    width: int = option(1024, at_least=16)
    steps: int = option(50, at_least=1)
    guidance: float | None = option(None, at_least=0)
    cfg_scale: float = option(1.0, at_least=0)
    adapters: list[str] = field(default_factory=list)
    strengths: list[float] = field(default_factory=lambda: [1.0])
    image: str | None = None
    strength: float = option(0.6, above=0, at_most=1)
    seed: int = option(0, at_least=0)
    device: str = "auto"
    output: str = "outputs/sample"


@program("sample")
def main(config: SampleConfig) -> None:
    if not config.prompts:
        raise UserError("prompts=[] asks for no picture", "give prompts='[first prompt, second prompt]'")
    source = read_picture(config.image, "image") if config.image else None
    device = pick_device(config.device)
    for place in config.adapters:
        find_adapter(place)  # before a model is fetched
    model = open_model(config.model)
    loras = read_loras(config.adapters, model)
    for place, lora in loras.items():
        console.print(f"adapter   {place}: {lora.summary}")
    if config.guidance is not None and not model.takes_guidance():
        console.print(f"guidance={config.guidance:g} is ignored: this model has no guidance embedding, use cfg_scale")
    *positives, negative = encode_prompts(model, [*config.prompts, config.negative_prompt], device)
    session = open_session(model, config.precision, loras, device)

    columns = columns_of(config)
    rows: list[tuple[str, list[Image.Image]]] = []
    for prompt, positive in zip(config.prompts, positives, strict=True):
        prompted = Prompted(positive=positive, negative=negative, cfg_scale=config.cfg_scale, guidance=config.guidance)
        rows.append((prompt, [draw(config, session, prompted, source, strengths) for _, strengths in columns]))
        console.print(f"{len(rows)} of {len(config.prompts)}: {prompt}")

    folder = Path(config.output).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    for index, (_, pictures) in enumerate(rows):
        pictures[-1].save(folder / f"{index:04d}.png")
    title = f"{config.model.title}, seed {config.seed}, {config.steps} steps"
    draw_grid(title, [Section(columns=[heading for heading, _ in columns], rows=rows)]).save(folder / "grid.png")
    console.print(f"grid      {folder / 'grid.png'}")


def columns_of(config: SampleConfig) -> list[tuple[str, list[float]]]:
    """(heading, one strength an adapter) of every column: the base, then each adapter alone at each strength."""
    none = [0.0] * len(config.adapters)
    columns = [("base", none)]
    for index, place in enumerate(config.adapters):
        for strength in config.strengths:
            one = [strength if i == index else 0.0 for i in range(len(none))]
            columns.append((f"{Path(place).stem} x {strength:g}", one))
    return columns


def draw(
    config: SampleConfig, session: Session, prompted: Prompted, source: Image.Image | None, strengths: list[float]
) -> Image.Image:
    session.use(strengths)
    family, device = session.family, session.device
    noise = initial_noise(family, config.height, config.width, [config.seed]).to(device)
    start = None
    if source is not None:
        side = family.pixels_per_token
        fitted = fit(source, config.height // side * side, config.width // side * side)
        start = family.encode_pixels(session.vae, to_pixels(fitted).to(device)).mean
    strength = config.strength if source is not None else 1.0
    latents = generate(family, session.transformer, prompted, noise, config.steps, start=start, strength=strength)
    return to_pictures(family.decode_latents(session.vae, latents))[0]


if __name__ == "__main__":
    main()
