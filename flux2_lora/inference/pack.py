"""The preview pack: pictures that carry their settings, and beside each grid what draws them in ComfyUI and Diffusers.

A PNG has up to four text chunks: `parameters` (Forge, CivitAI), `flux2_lora` (all settings, read back by
`read_settings`), and for text to image `prompt` and `workflow`, which open the graph when it is dropped onto ComfyUI.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from flux2_lora.errors import UserError
from flux2_lora.files import write_bytes, write_text
from flux2_lora.inference.comfyui import comfyui_api, comfyui_ui
from flux2_lora.inference.diffusers_script import diffusers_script
from flux2_lora.inference.settings import Settings, a1111_text, from_mapping, public, to_json

_CHUNK = "flux2_lora"
_NAMES = ("workflow.api.json", "workflow.json", "with_diffusers.py")  # diffusers.py would import itself


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


def write_pack(folder: Path, settings: Settings, *, prompts: Sequence[str] = ()) -> list[Path]:
    """Write workflow.api.json, workflow.json and with_diffusers.py; returns their paths.

    Of other modes, of parts of adapters and with references there are none, and earlier ones are removed.

    prompts: all of the grid, for the script; the workflows draw that of `settings`. The script names its files in full,
    since it is run on this machine.
    """
    if not settings.elsewhere:
        for name in _NAMES:
            (folder / name).unlink(missing_ok=True)
        return []
    contents = (
        json.dumps(comfyui_api(settings), indent=2) + "\n",
        json.dumps(comfyui_ui(settings), indent=2) + "\n",
        diffusers_script(settings, prompts=prompts),
    )
    for name, content in zip(_NAMES, contents, strict=True):
        write_text(folder / name, content)
    return [folder / name for name in _NAMES]
