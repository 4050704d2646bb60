"""Networks that say what a picture looks like, as numbers: CLIP, DINOv2 and DINOv3, from a folder on this computer.

Law: network, preprocessing and numbers are transformers' own. Nothing is fetched, no code that lies beside the weights
is run, pickles are never opened, and a folder that lacks a tensor is refused. The same picture gives the same feature,
with torchvision installed or without: CLIP and DINOv2 are preprocessed in Pillow, DINOv3 in torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from flux2_lora.devices import compute_dtype
from flux2_lora.errors import UserError, listed
from flux2_lora.networks.components import check_own_weights
from flux2_lora.weights import read_json

Features = Callable[[Sequence[Image.Image]], Tensor]
"""n pictures of any size and mode -> features [n d], float32 on the CPU, in their order, not normalised; n >= 1."""
Pixels = Callable[[Sequence[Image.Image]], Tensor]
"""n RGB pictures of any size -> what a network reads of them, [n 3 h w] float32 on the CPU."""

BATCH = 16
"""Pictures that a network reads at once."""

_CLIP, _DINO = "openai/clip-vit-large-patch14", "facebook/dinov2-small"
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_AGAIN = "the files are of different models or incomplete"


def load_features(path: str, device: torch.device) -> Features:
    """The features of `validation.features`, a transformers folder.

    d: the projection's width for CLIP (of a CLIPVisionModel, which has none, the hidden size), the hidden size for
    DINO's CLS token. UserError, naming the option, for anything but a whole folder of either kind.
    """
    folder = Path(path).expanduser()
    try:
        return _loaded(folder, device)
    except UserError as error:
        remedy = f"{error.remedy}; `hf download {_repository(folder)} --local-dir FOLDER` makes a whole folder"
        raise UserError(f"validation.features={path}: {error.what}", remedy) from error


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """A kind of folder. network: its class in transformers; feature: [n d] of what that class returns.

    pixels: the preprocessing that a folder describes. config: what the class reads instead of config.json.
    """

    network: str
    feature: Callable[[Any], Tensor]
    pixels: Callable[[Path], Pixels]
    config: Callable[[Path], Any] | None = None


def _vision_half(folder: Path) -> Any:
    """The configuration of a CLIPModel's vision network; how wide its projection is stands in the whole's."""
    import transformers

    whole = transformers.CLIPConfig.from_pretrained(folder, local_files_only=True)
    whole.vision_config.projection_dim = whole.projection_dim
    return whole.vision_config


def _pillow_pixels(processor: str, folder: Path) -> Pixels:
    """The steps of a class of transformers that computes in Pillow and NumPy."""
    import transformers

    prepared = getattr(transformers, processor).from_pretrained(folder, local_files_only=True)

    def pixels(pictures: Sequence[Image.Image]) -> Tensor:
        values: Tensor = prepared(images=pictures, return_tensors="pt")["pixel_values"]
        return values

    return pixels


def _dinov3_pixels(folder: Path) -> Pixels:
    """The steps of DINOv3ViTImageProcessor, which needs torchvision: rescaled, resized as floats, normalised."""
    import transformers

    read, _ = transformers.BaseImageProcessor.get_image_processor_dict(folder, local_files_only=True)
    told = _DINOV3_DEFAULTS | {name: value for name, value in read.items() if value is not None}
    other = [name for name, does in _DINOV3_STEPS.items() if bool(told.get(name)) != does]
    other += [] if set(told["size"]) == {"height", "width"} else ["size"]
    other += [] if told["resample"] in _DINOV3_FILTERS else ["resample"]
    if other:
        raise UserError(f"it preprocesses pictures otherwise than DINOv3 does ({listed(other)})", _AGAIN)
    size, mode = (told["size"]["height"], told["size"]["width"]), _DINOV3_FILTERS[told["resample"]]
    mean, std = (torch.tensor(told[name])[:, None, None] for name in ("image_mean", "image_std"))

    def pixels(picture: Image.Image) -> Tensor:
        levels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous() * told["rescale_factor"]
        resized = F.interpolate(levels[None], size=size, mode=mode, antialias=True)[0]
        return (resized - mean) / std

    return lambda pictures: torch.stack([pixels(picture) for picture in pictures])


_DINOV3_STEPS = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_center_crop": False, "do_pad": False}
_DINOV3_FILTERS = {2: "bilinear", 3: "bicubic"}
"""Pillow's numbers -> the same filter's name in torch."""
_DINOV3_DEFAULTS: dict[str, Any] = {
    **_DINOV3_STEPS,
    "size": {"height": 224, "width": 224},
    "resample": 2,
    "rescale_factor": 1 / 255,
    "image_mean": (0.485, 0.456, 0.406),
    "image_std": (0.229, 0.224, 0.225),
}


def _image_embeds(output: Any) -> Tensor:
    embeds: Tensor = output.image_embeds
    return embeds


def _pooled(output: Any) -> Tensor:
    pooled: Tensor = output.pooler_output
    return pooled


def _cls_token(output: Any) -> Tensor:
    hidden: Tensor = output.last_hidden_state
    return hidden[:, 0]


_CLIP_PIXELS, _DINOV2_PIXELS = (partial(_pillow_pixels, f"{name}ImageProcessorPil") for name in ("CLIP", "Bit"))
_PROJECTED = "CLIPVisionModelWithProjection"
_KINDS: Mapping[str, _Kind] = {
    "CLIPModel": _Kind(network=_PROJECTED, feature=_image_embeds, pixels=_CLIP_PIXELS, config=_vision_half),
    _PROJECTED: _Kind(network=_PROJECTED, feature=_image_embeds, pixels=_CLIP_PIXELS),
    "CLIPVisionModel": _Kind(network="CLIPVisionModel", feature=_pooled, pixels=_CLIP_PIXELS),
    "Dinov2Model": _Kind(network="Dinov2Model", feature=_cls_token, pixels=_DINOV2_PIXELS),
    "DINOv3ViTModel": _Kind(network="DINOv3ViTModel", feature=_cls_token, pixels=_dinov3_pixels),
}
"""By what config.json calls itself."""


def _loaded(folder: Path, device: torch.device) -> Features:
    """UserErrors without the option's name."""
    import transformers

    kind = _checked(folder)
    transformers.utils.logging.set_verbosity_error()  # what it has to say comes as a UserError, on one line
    transformers.utils.logging.disable_progress_bar()
    with _readable():
        pixels = kind.pixels(folder)
    model = _model(kind, folder, compute_dtype(device)).to(device)

    @torch.no_grad()
    def features(pictures: Sequence[Image.Image]) -> Tensor:
        batches = (pictures[start : start + BATCH] for start in range(0, len(pictures), BATCH))
        read = (pixels([_opaque(picture) for picture in batch]).to(device, model.dtype) for batch in batches)
        return torch.cat([kind.feature(model(pixel_values=each)).float().cpu() for each in read])

    with _readable():  # sizes that the network cannot take, or that differ from picture to picture
        features([Image.new("RGB", size) for size in ((64, 48), (48, 64))])
    return features


def _checked(folder: Path) -> _Kind:
    """The kind of a folder whose files are all there; reads configurations and headers only."""
    if not folder.is_dir():
        raise UserError("there is no such folder", "nothing is fetched by its name")
    config = read_json(folder / "config.json")
    kind = _kind_of(config)
    check_own_weights(folder, config, such_as=f"{_DINO} or {_CLIP}")
    if not any((folder / name).is_file() for name in _PROCESSOR_FILES):
        raise UserError(f"its image processor is missing ({' or '.join(_PROCESSOR_FILES)})", _AGAIN)
    return kind


def _kind_of(config: Mapping[str, Any]) -> _Kind:
    classes = [str(name) for name in config.get("architectures") or []]
    found = next((name for name in classes if name in _KINDS), None)
    if found is None:
        remote = ", whose code lies in the repository and is not run" if "auto_map" in config else ""
        raise UserError(
            f"config.json names {listed(classes) or 'no class'}{remote}",
            f"give one of {', '.join(_KINDS)}",
        )
    return _KINDS[found]


def _model(kind: _Kind, folder: Path, dtype: torch.dtype) -> Any:
    """The network in its evaluation mode; UserError where a tensor is missing or of another shape.

    Attention is said to be torch's own because config.json could name a kernel to fetch.
    """
    import transformers

    with _readable():
        model, told = getattr(transformers, kind.network).from_pretrained(
            folder,
            config=None if kind.config is None else kind.config(folder),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=dtype,
            attn_implementation="sdpa",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    unfit = sorted({*told["missing_keys"], *(key for key, *_ in told["mismatched_keys"])})
    if unfit:
        raise UserError(f"the weights do not fit config.json, which wants {listed(unfit, 3)}", _AGAIN)
    return model


@contextmanager
def _readable() -> Iterator[None]:
    """What transformers raises over a folder comes out as UserError, on one line."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # as many kinds as a configuration can be wrong
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"it cannot be read ({reason})", _AGAIN) from error


def _opaque(picture: Image.Image) -> Image.Image:
    """RGB, white where it is transparent, as transformers does."""
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    seen = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")


def _repository(folder: Path) -> str:
    """What to download: a path that is the name of a repository of CLIP or DINO, or else the smallest of DINOv2."""
    name = folder.as_posix()
    return name if re.fullmatch(r"(facebook|laion|openai)/\w[\w.-]*", name) else _DINO
