"""What one picture was drawn with, as one value: enough to draw it again, here and in other programs.

Law: what is made public names no folder of this machine; of an absolute path only the last part is kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path, PureWindowsPath
from typing import Any

from flux2_lora import __version__
from flux2_lora.files import tensors_hash, without_folders
from flux2_lora.samplers import USUAL, Filling

TEXT_TO_IMAGE = "text to image"
PICTURE, ORIGINAL, MASK, LATENT_MASK, SHOWN_MASK = "picture", "original", "mask", "latent-mask", "original-mask"
_A1111_SAMPLERS = {"euler": "Euler", "heun": "Heun"}


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The pictures that a picture was drawn from, which lie in the folder `inputs` beside it.

    key: what the names of their files begin with, a digest of them all; height, width: px of the picture that was
    redrawn, None where there are references alone; box: where it lies in the original (left, top, right, bottom), None
    without a mask; tile: tokens along a side that the model saw at once, None for all.
    """

    key: str
    height: int | None = None
    width: int | None = None
    box: tuple[int, int, int, int] | None = None
    tile: int | None = None

    def file(self, role: str) -> str:
        """The name of a file. role: see `Settings.input_roles`."""
        return f"{self.key}-{role}.png"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """model_path: folder, hub id or file; components: where the rest lies when that is a file of the transformer alone.

    guidance: the embedded scale, None exactly where the model has no guidance embedding; cfg_scale: true CFG above 1.
    adapters: (file, strength); strength: how much of a picture was redrawn, None for text to image. height, width: px,
    as asked for. max_sequence_length: tokens of a prompt, None for the family's own. references: how many pictures the
    model looked at; blocks: where alone the adapters acted; fill: of the mask. inputs: the pictures it was drawn from,
    None where they were not kept.
    """

    family: str
    model_title: str
    model_path: str
    prompt: str
    height: int
    width: int
    steps: int
    seed: int
    components: str | None = None
    negative_prompt: str = ""
    sampler: str = "euler"
    guidance: float | None = None
    cfg_scale: float = 1.0
    adapters: tuple[tuple[str, float], ...] = ()
    mode: str = TEXT_TO_IMAGE
    strength: float | None = None
    fill: Filling = USUAL
    max_sequence_length: int | None = None
    references: int = 0
    blocks: tuple[str, ...] = ()
    inputs: Inputs | None = None
    version: str = __version__

    @property
    def elsewhere(self) -> bool:
        """Whether a workflow and a script can draw the same: all is there, and a mask was filled as they do."""
        if self.fill != USUAL:
            return False
        return self.inputs is not None or (self.mode == TEXT_TO_IMAGE and not self.references)

    @property
    def drawn_height(self) -> int:
        """Whole tokens of 16 px, as all samplers round; a picture that is redrawn is filled up to them."""
        if self.inputs is None or self.inputs.height is None:
            return self.height // 16 * 16
        return -(-self.inputs.height // 16) * 16

    @property
    def drawn_width(self) -> int:
        if self.inputs is None or self.inputs.width is None:
            return self.width // 16 * 16
        return -(-self.inputs.width // 16) * 16

    @property
    def input_roles(self) -> list[str]:
        """What the files of `inputs` are: the picture, what painting under a mask takes, and references."""
        if self.inputs is None:
            return []
        redrawn = [] if self.inputs.height is None else [PICTURE]
        masked = [] if self.inputs.box is None else [ORIGINAL, MASK, LATENT_MASK, SHOWN_MASK]
        return [*redrawn, *masked, *self.reference_roles]

    @property
    def reference_roles(self) -> list[str]:
        return [f"reference-{number}" for number in range(1, self.references + 1)]

    @property
    def active_adapters(self) -> list[tuple[str, float]]:
        """Those that change the picture."""
        return [(file, strength) for file, strength in self.adapters if strength != 0]

    @property
    def negative(self) -> str | None:
        """The negative prompt where it has an effect."""
        return self.negative_prompt if self.cfg_scale > 1 else None


def public(settings: Settings) -> Settings:
    """The same without folders of this machine."""
    return replace(
        settings,
        model_path=without_folders(settings.model_path),
        components=without_folders(settings.components) if settings.components else None,
        adapters=tuple((without_folders(file), strength) for file, strength in settings.adapters),
    )


def last_part(path: str) -> str:
    """The name at the end of a path of any system, or of a hub id."""
    return PureWindowsPath(path).name


def to_json(settings: Settings) -> str:
    return json.dumps(asdict(settings))


def from_mapping(values: Mapping[str, Any]) -> Settings:
    """Settings of what `to_json` wrote, KeyError or TypeError for what is not; entries of later versions drop out."""
    adapters = tuple((str(file), float(strength)) for file, strength in values["adapters"])
    known = {field.name: values[field.name] for field in fields(Settings) if field.name in values}
    given = values.get("inputs")
    inputs = Inputs(**{**given, "box": given["box"] and tuple(given["box"])}) if given else None
    parts = {"fill": Filling(**values.get("fill", {})), "blocks": tuple(values.get("blocks", ())), "inputs": inputs}
    return Settings(**{**known, **parts, "adapters": adapters})


def a1111_text(settings: Settings) -> str:
    """What the Stable Diffusion web UI writes into its pictures, and Forge and CivitAI read. Names no folder."""
    names = [(Path(last_part(file)).stem, strength, file) for file, strength in settings.active_adapters]
    lines = [" ".join([settings.prompt, *(f"<lora:{name}:{strength:g}>" for name, strength, _ in names)])]
    if settings.negative:
        lines.append(f"Negative prompt: {settings.negative}")
    values: dict[str, str | int] = {
        "Steps": settings.steps,
        "Sampler": _A1111_SAMPLERS[settings.sampler],
        "CFG scale": f"{settings.cfg_scale:g}",
    }
    if settings.guidance is not None:
        values["Distilled CFG Scale"] = f"{settings.guidance:g}"
    values |= {
        "Seed": settings.seed,
        "Size": f"{settings.drawn_width}x{settings.drawn_height}",
        "Model": settings.model_title,
    }
    if settings.strength is not None:
        values["Denoising strength"] = f"{settings.strength:g}"
    hashes = [f"{name}: {digest}" for name, _, file in names if (digest := _lora_hash(file))]
    if hashes:
        values["Lora hashes"] = ", ".join(hashes)
    values["Version"] = f"flux2-lora {settings.version}"
    lines.append(", ".join(f"{key}: {_quoted(str(value))}" for key, value in values.items()))
    return "\n".join(lines)


def _quoted(value: str) -> str:
    """As that web UI quotes: what holds its separators."""
    return json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ',:\n"') else value


def _lora_hash(file: str) -> str | None:
    """12 digits of the SHA-256 of a safetensors file behind its header, by which LoRAs are found; None without one."""
    path = Path(file).expanduser()
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    return _hash_behind_header(path, path.stat().st_mtime_ns)


@cache
def _hash_behind_header(path: Path, changed_ns: int) -> str:  # noqa: ARG001 - a file that changed is read again
    return tensors_hash(path)[:12]
