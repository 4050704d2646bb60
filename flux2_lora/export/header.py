"""What an exported file says of itself: ModelSpec 1.0.1, and the keys of kohya's that Forge and LoRA managers read.

Law: all values are texts, as safetensors wants them, and none names a folder of this machine; of an absolute path the
last part is told. The hash of the tensors is added when they are known.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BytesIO

from PIL import Image

from flux2_lora.files import without_folders

_REPOSITORIES = {"flux1": "flux", "flux2": "flux2"}
_COVER_PX = 256
RUN_CARD = "flux2_lora.run_card"
WRITTEN_BY = "flux2_lora.version"
"""Whose hash is that of its tensors: readers may refuse a file that was damaged since."""


@dataclass(frozen=True, kw_only=True)
class About:
    """What is known of an adapter besides its tensors.

    title: also its name in prompts (Forge). model: "Flux.2-klein-4b"; base: "Flux.2 Klein 4B", by which managers
    filter. date: ISO 8601; resolution: (height, width) in px. tags: folder -> tag -> how many captions have it.
    licence: of the base, as the hub spells it. run_card: what the run can be made again from, as JSON. version: of this
    program.
    """

    title: str
    model: str
    base: str
    architecture: str
    date: str
    resolution: tuple[int, int] | None = None
    trigger_phrase: str | None = None
    licence: str | None = None
    pictures: int | None = None
    tags: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    cover: Image.Image | None = None
    run_card: str | None = None
    version: str | None = None


def header(about: About, *, rank: int) -> dict[str, str]:
    """The metadata of a file whose largest matrix has that rank.

    ss_network_alpha is the rank, since the file has its scale folded in: a reader that trusts the header is right too.
    Sources: the ModelSpec standard; kohya's sd-scripts, train_util.py; Forge's network.py; ComfyUI's asset scanner.
    """
    title, model, base = (without_folders(text) for text in (about.title, about.model, about.base))
    trigger = about.trigger_phrase or ""
    size = f"{about.resolution[1]}x{about.resolution[0]}" if about.resolution else ""
    values = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{model}/lora",
        "modelspec.implementation": f"https://github.com/black-forest-labs/{_REPOSITORIES[about.architecture]}",
        "modelspec.title": title,
        "modelspec.date": about.date,
        "modelspec.resolution": size,
        "modelspec.trigger_phrase": trigger,
        "modelspec.usage_hint": f"Write {trigger} in the prompt. Strength 1 is as trained." if trigger else "",
        "modelspec.license": about.licence or "",
        "ss_output_name": title,
        "ss_base_model_version": base,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(float(rank)),
        "ss_resolution": f"({size.replace('x', ', ')})" if size else "",
        "ss_num_train_images": "" if about.pictures is None else str(about.pictures),
        "ss_tag_frequency": json.dumps(about.tags, ensure_ascii=False) if about.tags else "",
        **(_pictured(about.cover) if about.cover else {}),
        RUN_CARD: about.run_card or "",
        WRITTEN_BY: about.version or "",
    }
    return {key: value for key, value in values.items() if value}


def _pictured(cover: Image.Image) -> dict[str, str]:
    """A JPEG of at most 256 px a side, under the names that ModelSpec and Forge give it."""
    small, content = cover.convert("RGB"), BytesIO()
    small.thumbnail((_COVER_PX, _COVER_PX), Image.Resampling.LANCZOS)
    small.save(content, "JPEG", quality=85)
    text = base64.b64encode(content.getvalue()).decode()
    return {"modelspec.thumbnail": f"data:image/jpeg;base64,{text}", "ssmd_cover_images": json.dumps([text])}
