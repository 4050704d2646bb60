"""Write a LoRA file, prove it, and only then let anybody see it.

Law: nothing is left behind that was not proved, and an earlier file of the name stays until the new one is.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from flux2_lora.adapters import Adapter, Lora, LoraWeights, save_adapter
from flux2_lora.export.formats import FORMATS, state_of
from flux2_lora.export.proof import Proof, prove, save_proof
from flux2_lora.files import as_asked, sync_folder, write_tensors


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
    the format cannot hold or a folder that cannot be written, RunError for a file that fails its proof.
    """
    tensors = FORMATS[format](modules, architecture, dtype)
    told = {**header, **_ranks(header, tensors), "modelspec.hash_sha256": _hash(tensors)}
    with drafted(path) as draft:
        write_tensors(draft, tensors, told)
        proofs = prove(draft, modules, architecture, dtype=dtype, format=format)
    save_proof(path, proofs, _file_hash(path))
    return proofs


@contextmanager
def drafted(path: Path) -> Iterator[Path]:
    """A file beside `path` that takes its place in the end, and is gone after an error; UserError where none can be."""
    draft = path.with_name(f".{path.name}.unproved")
    with as_asked(path, "output"):
        try:
            yield draft
            os.replace(draft, path)
            sync_folder(path.parent)
        finally:
            if draft.is_file():
                draft.unlink()


def export_peft(lora: Lora, path: Path, *, family: str, targets: list[str]) -> None:
    """Write a LoRA as an adapter of this program, which a run can go on from; its tensors are as they were read."""
    state, rank, alpha = state_of(lora)
    save_adapter(
        path,
        Adapter(state=state, rank=rank, alpha=alpha, targets=targets, family=family, trigger_word=lora.trigger_word),
    )


def _ranks(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The largest rank of the matrices that are written, which fusing makes larger, where the header tells one."""
    if "ss_network_dim" not in header:
        return {}
    rank = max(len(tensor) for name, tensor in tensors.items() if name.endswith(("lora_down.weight", "lora_A.weight")))
    return {"ss_network_dim": str(rank), "ss_network_alpha": str(float(rank))}


def _hash(tensors: Mapping[str, Tensor]) -> str:
    """ModelSpec's hash: SHA-256 of what follows the header of the file."""
    raw = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    return "0x" + hashlib.sha256(raw[8 + int.from_bytes(raw[:8], "little") :]).hexdigest()


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
