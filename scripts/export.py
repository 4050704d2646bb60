"""Turn a run's adapter into one file that ComfyUI, Forge Neo, InvokeAI and Diffusers load, and prove it.

    flux2-lora export adapter=outputs/mine

The file is read back, every key is mapped as each client maps it, and the update of every weight is rebuilt and
compared with (alpha / rank) B A. A file that does not match is not left behind.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from flux2_lora.adapters import find_adapter, read_adapters
from flux2_lora.config import program
from flux2_lora.errors import UserError, did_you_mean
from flux2_lora.export import export_universal, header, table
from flux2_lora.families import ModelSpec, load_family
from flux2_lora.options import option
from flux2_lora.training.progress import console

FORMATS = ("universal",)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """configs/export.yaml. adapter: run, checkpoint or file; output: null puts the file into the run's export/."""

    model: ModelSpec
    adapter: str
    formats: list[str] = field(default_factory=lambda: ["universal"])
    dtype: str = option("fp32", one_of=tuple(DTYPES))
    output: str | None = None


@program("export")
def main(config: ExportConfig) -> None:
    for name in config.formats:
        if name not in FORMATS:
            raise UserError(f"formats names {name!r}, which is no export format", did_you_mean(name, FORMATS))
    source, family = find_adapter(config.adapter), load_family(config.model.family)
    adapter = read_adapters([config.adapter], family.name)[config.adapter]
    path = Path(config.output).expanduser() if config.output else beside(source)
    proofs = export_universal(
        adapter.state,
        adapter.rank,
        adapter.alpha,
        path,
        architecture=family.architecture,
        dtype=DTYPES[config.dtype],
        header=header(
            title=path.stem,
            model=config.model.architecture_name,
            base=config.model.title,
            architecture=family.architecture,
            rank=adapter.rank,
            date=time.strftime("%Y-%m-%dT%H:%M:%S"),
            resolution=(config.model.resolution, config.model.resolution),
            trigger_phrase=adapter.trigger_word,
        ),
    )
    console.print(table(proofs))
    console.print(f"export    {path}")


def beside(source: Path) -> Path:
    """outputs/<name>/export/<name>.safetensors for an adapter inside a run, else <stem>-universal beside the file."""
    for folder in source.parents:
        if (folder / "checkpoints").is_dir():
            return folder / "export" / f"{folder.resolve().name}.safetensors"
    return source.with_name(f"{source.stem}-universal.safetensors")


if __name__ == "__main__":
    main()
