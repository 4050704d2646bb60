"""Where a model lies: a Diffusers folder, a repository on the Hugging Face hub, or one file beside such a folder.

Law: what is here is recognised by its configuration and by the headers of its weights, never by its name, and before
anything of it is loaded. The hub is reached through huggingface_hub alone, which honours HF_HUB_OFFLINE, HF_TOKEN and
HF_HOME; only the parts that are asked for are fetched, and of weights only safetensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from flux2_lora.errors import UserError, listed
from flux2_lora.weights import open_folder, read_json

_CONFIG_ONLY = "transformer/config.json"
_FETCHED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """transformer: a folder with config.json and safetensors, or one file; components: the Diffusers folder beside it.

    components holds VAE, text encoders and tokenizers, one folder each. option: how the user named it, for messages.
    """

    transformer: Path
    components: Path
    option: str


def locate(path: str, components: str | None, parts: Sequence[str]) -> ModelFiles:
    """Find, or fetch, the files of `model.path`; parts: the folders that are needed beside the transformer.

    Components are looked at for one file, and for a folder that holds a transformer and nothing else. UserError where
    nothing is there, where the hub says no, or where one file comes without its components.
    """
    place = Path(path).expanduser()
    if place.is_file():
        if components is None:
            raise UserError(
                f"model.path={path} is one file, which holds the transformer alone",
                "add model.components=..., a Diffusers folder or hub id with VAE, text encoders and tokenizers",
            )
        beside = _folder(components, "model.components", [*parts, _CONFIG_ONLY])
        return ModelFiles(transformer=place, components=beside, option=f"model.components={components}")
    folder = _folder(path, "model.path", ["transformer", *parts])
    bare = (folder / "transformer").is_dir() and not any((folder / part).is_dir() for part in parts)
    if bare and components is not None:
        beside = _folder(components, "model.components", parts)
        return ModelFiles(
            transformer=folder / "transformer", components=beside, option=f"model.components={components}"
        )
    return ModelFiles(transformer=folder / "transformer", components=folder, option=f"model.path={path}")


def check_folders(files: ModelFiles, parts: Sequence[str], family: str) -> None:
    """UserError that lists every part whose folder is absent."""
    absent = [f"{part}/" for part in parts if not (files.components / part).is_dir()]
    if not files.transformer.exists():
        absent = ["transformer/", *absent]
    if absent:
        raise UserError(
            f"{files.option} lacks {listed(absent)}",
            f"a {family} model is a Diffusers folder with transformer/, {', '.join(f'{part}/' for part in parts)}",
        )


def check_parts(files: ModelFiles, parts: Mapping[str, Sequence[str]], family: str) -> None:
    """UserError unless every part is of one of its classes (none: not looked at), with whole safetensors."""
    for part, classes in parts.items():
        if classes:
            check_class(files.components / part, classes, family)
            open_folder(files.components / part)


def check_class(folder: Path, classes: Sequence[str], family: str) -> None:
    """UserError unless config.json names one of `classes` and no quantisation of its own."""
    config = read_json(folder / "config.json")
    kinds = [config.get("_class_name"), *(config.get("architectures") or [])]
    if not set(classes) & set(kinds):
        found = next((str(kind) for kind in kinds if kind), "no class")
        raise UserError(
            f"{folder} holds {found}, not the {classes[0]} of the family {family}",
            "choose the model's own family with model=..., or another model.path",
        )
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "an unknown method")
        raise UserError(
            f"{folder} is quantised by {method}",
            "give the original weights (precision.base quantises them while loading), or a scaled fp8 file",
        )


def is_distilled(files: ModelFiles) -> bool:
    """Whether the Diffusers folder says that its model is step-distilled."""
    index = files.components / "model_index.json"
    beside = files.transformer.parent == files.components
    return beside and index.is_file() and read_json(index).get("is_distilled") is True


def _folder(place: str, option: str, parts: Sequence[str]) -> Path:
    folder = Path(place).expanduser()
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", place):
        raise UserError(
            f"{option}={place} does not exist", "give a Diffusers folder, a hub id (owner/name) or a safetensors file"
        )
    return _fetched(place, option, parts)


def _fetched(repository: str, option: str, parts: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    wanted = ["model_index.json", *(f"{part}/{kind}" for part in parts if part != _CONFIG_ONLY for kind in _FETCHED)]
    wanted += [_CONFIG_ONLY] if _CONFIG_ONLY in parts else []
    # The hub's errors derive from those of its HTTP library; transfers by xet end in RuntimeError.
    broken_off = cast("tuple[type[Exception], ...]", (*HfHubHTTPError.__bases__, OSError, RuntimeError))
    here = f"{option}={repository} is no folder or file here, and"
    try:
        return Path(snapshot_download(repository, allow_patterns=wanted))
    except GatedRepoError as error:
        raise UserError(
            f"{option}={repository} is gated, and this computer has no access to it",
            "accept its licence on its hub page, then run `hf auth login` or set HF_TOKEN",
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"{here} the hub has no such model, or hides it from you",
            "check the spelling; a private model needs `hf auth login` or HF_TOKEN",
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise UserError(
            f"{here} it is not in the hub's cache, and the hub cannot be reached",
            "download it while online (HF_HUB_OFFLINE unset), or give a folder with model.path=...",
        ) from error
    except HfHubHTTPError as error:
        raise UserError(f"{here} the hub answers: {str(error).splitlines()[0]}", "try again later") from error
    except broken_off as error:
        raise UserError(
            f"{option}={repository}: the download broke off ({str(error).partition(chr(10))[0]})",
            "the same command goes on with it",
        ) from error
