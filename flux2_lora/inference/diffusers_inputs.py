"""The parts of a Diffusers program that draw from pictures: one way for every family and mode.

The family's plain pipeline is handed what our sampler starts from, our noise levels on a scheduler that does not shift
them again, and a callback that puts back what is not painted; Diffusers' pipelines for single modes differ from each
other, and most families have none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType

from flux2_lora import tiles
from flux2_lora.inference import seams
from flux2_lora.inference.levels import levels_of, written
from flux2_lora.inference.settings import LATENT_MASK, MASK, ORIGINAL, PICTURE, SHOWN_MASK, Settings

INPUTS = "inputs"

_PIXELS = '''

def pixels(picture):
    """[1 3 h w] in [-1, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1


def tokens(latents):
    """[1 c h w] -> [1 h*w c]."""
    return latents.flatten(2).transpose(1, 2)
'''

_READ = '''

def read(mask):
    """[h w] in [0, 1]."""
    return torch.from_numpy(np.array(Image.open(inputs / mask))).float() / 255

'''

_FLUX1 = '''

def kept_and_noise(picture):
    """A picture's latents, drawn from its posterior, and their noise; both of one stream, [1 64 h w]."""
    stream, vae = torch.Generator("cpu").manual_seed({seed}), pipeline.vae
    posterior = vae.encode(pixels(picture).to(pipeline._execution_device, dtype)).latent_dist
    kept = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=stream).to(posterior.mean)
    kept = (kept.float() - vae.config.shift_factor) * vae.config.scaling_factor
    noise = torch.randn(kept.shape, generator=stream).to(kept)
    return torch.nn.functional.pixel_unshuffle(kept, 2), torch.nn.functional.pixel_unshuffle(noise, 2)
'''

_FLUX2 = '''

def kept_and_noise(picture):
    """A picture's latents and their noise, [1 128 h w]."""
    stream = torch.Generator("cpu").manual_seed({seed})
    kept = pipeline._encode_vae_image(pixels(picture).to(pipeline._execution_device, dtype), stream).float()
    return kept, torch.randn(kept.shape, generator=stream).to(kept)
'''

_TILES = '''

def in_tiles(forward, height, width, tile):
    """The transformer of height x width tokens, which sees tiles of them that overlap by half."""

    def whole(hidden_states, img_ids, **others):
        def velocity(part, _):
            h, w = part.shape[2:]
            ids = img_ids.unflatten(-2, (height, width))[..., :h, :w, :].flatten(-3, -2)
            packed = forward(hidden_states=tokens(part).to(hidden_states), img_ids=ids, **others)[0]
            return packed.float().transpose(1, 2).unflatten(2, (h, w))

        x = hidden_states.float().transpose(1, 2).unflatten(2, (height, width))
        return (tokens(tiled(velocity, tile, tile // 2)(x, 0.0)).to(hidden_states),)

    return whole


pipeline.transformer.forward = in_tiles(pipeline.transformer.forward, {height}, {width}, {tile})
'''

_PUT_BACK = '''

def put_back(pipeline, step, timestep, values):
    """What is not painted, at the noise level that the step ends at."""
{first_half}    level, x = sigmas[{after}], values["latents"]
    there = tokens((1 - level) * kept + level * noise)
    return {{"latents": (painted * x + (1 - painted) * there).to(x.dtype)}}
'''

_FIRST_HALF = """\
    if step % 2 == 0 and step < 2 * len(sigmas) - 4:  # the first half of Heun's step; its last step has no second
        return {}
"""
_IMPORTED = {seams: "lay_over", tiles: "tiled"}
_EULER = {"first_half": "", "after": "step + 1"}
_HEUN = {"first_half": _FIRST_HALF, "after": "step // 2 + 1"}


def redraws(settings: Settings) -> bool:
    """Whether a picture is redrawn, and not only looked at."""
    return settings.inputs is not None and settings.inputs.height is not None


def imports_of(settings: Settings) -> tuple[list[str], list[str]]:
    """Lines before and behind those of torch and Diffusers."""
    before, behind = [], []
    if settings.inputs is not None:
        before.append("from pathlib import Path\n")
        behind.append("from PIL import Image")
    if redraws(settings):
        before.append("import numpy as np")
    for module in modules_of(settings):
        name = module.__name__.rpartition(".")[2]
        behind.append(f"\nfrom {name} import {_IMPORTED[module]}  # beside this file")
    return before, behind


def modules_of(settings: Settings) -> list[ModuleType]:
    """Modules of ours that the program imports, of which copies lie beside it."""
    inputs = settings.inputs
    needed = {
        seams: inputs is not None and inputs.box is not None,
        tiles: inputs is not None and inputs.tile is not None,
    }
    return [module for module, wanted in needed.items() if wanted]


def before_offload(settings: Settings) -> list[str]:
    """What is defined, and how the transformer is made to see tiles, which moving models about must find in place."""
    if not redraws(settings):
        return []
    parts = [f"{_PIXELS}\n"]
    if settings.inputs is not None and settings.inputs.tile is not None:
        height, width = settings.drawn_height // 16, settings.drawn_width // 16
        parts.append(f"{_TILES.format(height=height, width=width, tile=settings.inputs.tile)}\n")
    return parts


def behind_offload(settings: Settings) -> list[str]:
    """How the pictures are read, encoded and put back."""
    inputs, parts = settings.inputs, [f'inputs = Path(__file__).parent / "{INPUTS}"']
    if inputs is None:
        return []
    if not redraws(settings):
        return parts
    if inputs.box is not None:
        parts.append(_READ)
    levels = written(levels_of(settings))
    rows = [", ".join(levels[start : start + 8]) for start in range(0, len(levels), 8)]
    parts += ["sigmas = [", *(f"    {row}," for row in rows), "]"]
    if inputs.box is not None:
        parts += [
            f'mask, painted = read("{inputs.file(MASK)}"), read("{inputs.file(LATENT_MASK)}")[::16, ::16]',
            "painted = painted.flatten()[None, :, None].to(pipeline._execution_device)",
        ]
    encode = _FLUX1 if settings.family == "flux1" else _FLUX2
    parts.append(f"\n{encode.format(seed=settings.seed)}\n")
    if inputs.box is not None:
        parts.append(f"{_PUT_BACK.format(**(_HEUN if settings.sampler == 'heun' else _EULER))}\n")
    return parts


def arguments_of(settings: Settings) -> Mapping[str, str]:
    """What the pipeline is called with for its pictures, besides the rest."""
    call: dict[str, str] = {}
    if settings.references and settings.inputs is not None:
        files = ", ".join(f'"{settings.inputs.file(role)}"' for role in settings.reference_roles)
        call["image"] = f"[Image.open(inputs / name) for name in [{files}]]"
    if redraws(settings):
        call |= {"latents": "tokens(start)" if settings.family == "flux1" else "start", "sigmas": "sigmas[:-1]"}
    if settings.inputs is not None and settings.inputs.box is not None:
        call["callback_on_step_end"] = "put_back"
    return call


def pictures_of(drawn: Sequence[Settings]) -> list[str]:
    """Lines before the loop over prompts: the picture that each is drawn from."""
    names = [one.inputs.file(PICTURE) for one in drawn if one.inputs is not None and redraws(one)]
    return ["pictures = [", *(f'    "{name}",' for name in names), "]"] if names else []


def begin_of(settings: Settings) -> list[str]:
    """Lines of the loop before the pipeline is called."""
    if not redraws(settings):
        return []
    return [
        "first = Image.open(inputs / name)",
        "kept, noise = kept_and_noise(first)",
        "start = (1 - sigmas[0]) * kept + sigmas[0] * noise",
    ]


def finish_of(settings: Settings) -> list[str]:
    """Lines behind the call: cut to size, and laid into the original under a mask."""
    inputs = settings.inputs
    if inputs is None or not redraws(settings):
        return []
    corner = f"(0, 0, {inputs.width}, {inputs.height})"
    lines = [f"picture = picture.crop({corner})"]
    if inputs.box is None:
        return lines
    left, top, right, bottom = inputs.box
    return [
        *lines,
        f"laid = lay_over(pixels(first.crop({corner})), pixels(picture), mask[None, None])",
        "picture = pipeline.image_processor.postprocess(laid)[0]",
        f"picture = picture.resize({(right - left, bottom - top)}, Image.Resampling.LANCZOS)",
        f'picture, painting = Image.open(inputs / "{inputs.file(ORIGINAL)}"), picture',
        f'picture.paste(painting, {(left, top)}, Image.open(inputs / "{inputs.file(SHOWN_MASK)}"))',
    ]
