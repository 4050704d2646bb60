"""The preview pack: pictures that carry their settings, and beside each grid what draws them in ComfyUI and Diffusers.

A PNG has up to four text chunks: `parameters` (Forge, CivitAI), `flux2_lora` (all settings, read back by
`read_settings`), and `prompt` and `workflow`, which open the graph when it is dropped onto ComfyUI. What a picture was
drawn from lies in `inputs`, as the model got it, so that nobody scales or cuts it another way.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from flux2_lora.errors import UserError
from flux2_lora.files import digest, write_bytes, write_text
from flux2_lora.inference.comfyui import comfyui_api, comfyui_ui
from flux2_lora.inference.diffusers_inputs import INPUTS, modules_of
from flux2_lora.inference.diffusers_script import diffusers_script
from flux2_lora.inference.settings import (
    LATENT_MASK,
    MASK,
    ORIGINAL,
    PICTURE,
    SHOWN_MASK,
    Inputs,
    Settings,
    a1111_text,
    from_mapping,
    public,
    to_json,
)
from flux2_lora.inference.starts import Start

_CHUNK = "flux2_lora"
_INPUT = re.compile(rf"[0-9a-f]{{8}}-(?:{PICTURE}|{ORIGINAL}|{MASK}|{LATENT_MASK}|{SHOWN_MASK}|reference-\d+)\.png")
_NAMES = ("workflow.api.json", "workflow.json", "with_diffusers.py")  # diffusers.py would import itself
_COPIES = ("seams.py", "tiles.py")


def save_picture(picture: Image.Image, path: Path, settings: Settings) -> None:
    """Write a PNG with its settings; absolute paths in them are cut to their last part."""
    shown, chunks = public(settings), PngInfo()
    chunks.add_text("parameters", a1111_text(settings))
    chunks.add_text(_CHUNK, to_json(shown))
    if settings.elsewhere:
        chunks.add_text("prompt", json.dumps(comfyui_api(shown)))
        chunks.add_text("workflow", json.dumps(comfyui_ui(shown)))
    content = BytesIO()
    picture.save(content, format="PNG", pnginfo=chunks)
    write_bytes(path, content.getvalue(), durable=False)


def read_settings(path: Path) -> Settings:
    """The settings that `save_picture` wrote; UserError for a picture without them."""
    remedy = "give a PNG that this program wrote; editors and websites often drop what pictures carry"
    try:
        with Image.open(path) as picture:
            text = picture.info[_CHUNK]
        return from_mapping(json.loads(text))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist", remedy) from error
    except (UnidentifiedImageError, KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path} carries no settings", remedy) from error


def save_inputs(folder: Path, start: Start | None, references: Sequence[Image.Image] = ()) -> Inputs:
    """Write what pictures are drawn from into `inputs` of their folder, under names of its own content.

    start: the picture that is redrawn; references: as the model looks at them.
    """
    pictures = _pictures_of(start, references)
    parts = [f"{role} {picture.mode} {picture.size}".encode() + picture.tobytes() for role, picture in pictures.items()]
    inputs = Inputs(key=digest(*parts)[:8])
    if start is not None:
        box = None if start.region is None else start.region.box
        inputs = replace(inputs, height=start.height, width=start.width, box=box, tile=start.tile)
    for role, picture in pictures.items():
        write_bytes(folder / INPUTS / inputs.file(role), _png(picture), durable=False)
    return inputs


def _pictures_of(start: Start | None, references: Sequence[Image.Image]) -> dict[str, Image.Image]:
    """Role -> picture. The mask of the latents is as large as the picture, each token a square of one grey."""
    pictures = {} if start is None else {PICTURE: start.picture}
    if start is not None and start.region is not None:
        region = start.region
        latent_mask = region.tokens.resize(start.picture.size, Image.Resampling.NEAREST)
        pictures |= {ORIGINAL: region.original, MASK: region.mask, LATENT_MASK: latent_mask, SHOWN_MASK: region.shown}
    return pictures | {f"reference-{number}": one for number, one in enumerate(references, start=1)}


def write_pack(folder: Path, settings: Settings, *others: Settings) -> list[Path]:
    """Write workflow.api.json, workflow.json and with_diffusers.py, and the modules that it imports; their paths.

    Of a picture whose inputs were not kept there are none, and earlier ones are removed; so are inputs of others.

    others: more pictures of the grid, which differ in prompt and inputs; the script draws all, the workflows the first.
    The script names its models in full, since it is run on this machine.
    """
    _forget_inputs(folder, [settings, *others])
    if not settings.elsewhere:
        for name in (*_NAMES, *_COPIES):
            (folder / name).unlink(missing_ok=True)
        return []
    contents = {
        "workflow.api.json": json.dumps(comfyui_api(settings), indent=2) + "\n",
        "workflow.json": json.dumps(comfyui_ui(settings), indent=2) + "\n",
        "with_diffusers.py": diffusers_script(settings, *others),
        **{Path(str(module.__file__)).name: inspect.getsource(module) for module in modules_of(settings)},
    }
    for name, content in contents.items():
        write_text(folder / name, content)
    return [folder / name for name in contents]


def _forget_inputs(folder: Path, drawn: Sequence[Settings]) -> None:
    """Remove what earlier pictures of this folder were drawn from."""
    kept = {one.inputs.file(role) for one in drawn if one.inputs is not None for role in one.input_roles}
    for file in (folder / INPUTS).glob("*.png"):
        if _INPUT.fullmatch(file.name) and file.name not in kept:
            file.unlink()


def _png(picture: Image.Image) -> bytes:
    content = BytesIO()
    picture.save(content, format="PNG")
    return content.getvalue()
