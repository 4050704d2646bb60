"""Write a LoRA file, prove it, and only then let anybody see it.

Law: nothing is left behind that was not proved, and an earlier file of the name stays until the new one is.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from flux2_lora.adapters import Adapter, Lora, LoraWeights, save_adapter
from flux2_lora.errors import UserError
from flux2_lora.export.formats import FORMATS, state_of
from flux2_lora.export.proof import Proof, prove, save_proof
from flux2_lora.files import sync_folder, write_tensors


def export_lora(
    modules: Mapping[str, LoraWeights],
    path: Path,
    *,
    architecture: str,
    dtype: torch.dtype = torch.float32,
    header: Mapping[str, str],
    format: str = "universal",  # noqa: A002 - the word for it
) -> list[Proof]:
    """Write an adapter in a client's format; nobody sees it under `path` before it is proved.

    Adds the hash of the tensors to `header`, and puts the proof beside the file. Raises UserError for an adapter that
    the format cannot hold or a folder that cannot be written, RuntimeError for a file that fails its proof.
    """
    tensors = FORMATS[format](modules, architecture, dtype)
    draft = path.with_name(f".{path.name}.unproved")
    try:
        write_tensors(draft, tensors, {**header, "modelspec.hash_sha256": _hash(tensors)})
        proofs = prove(draft, modules, architecture, dtype=dtype, format=format)
        os.replace(draft, path)
    except PermissionError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror})", "give output=... in a folder of your own"
        ) from error
    finally:
        draft.unlink(missing_ok=True)
    sync_folder(path.parent)
    save_proof(path, proofs, _file_hash(path))
    return proofs


def export_peft(lora: Lora, path: Path, *, family: str, targets: list[str]) -> None:
    """Write a LoRA as an adapter of this program, which a run can go on from; its tensors are as they were read."""
    state, rank, alpha = state_of(lora)
    save_adapter(
        path,
        Adapter(state=state, rank=rank, alpha=alpha, targets=targets, family=family, trigger_word=lora.trigger_word),
    )


def _hash(tensors: Mapping[str, Tensor]) -> str:
    """ModelSpec's hash: SHA-256 of what follows the header of the file."""
    raw = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    return "0x" + hashlib.sha256(raw[8 + int.from_bytes(raw[:8], "little") :]).hexdigest()


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
