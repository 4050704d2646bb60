"""Turn an adapter into files that ComfyUI, Forge, Forge Neo, InvokeAI and Diffusers load, and prove it.

    flux2-lora export adapter=outputs/mine                               the one file that all of them read
    flux2-lora export adapter=outputs/mine formats=[comfyui,diffusers]   a client's own naming
    flux2-lora export adapter=style.safetensors output=converted.safetensors   any LoRA of a known naming
    flux2-lora export adapter=outputs/mine rank=4 dtype=bf16             smaller, with the error it costs
    flux2-lora export adapter=outputs/mine hosts=[fp8,nf4]               what is left of it in quantised models

Every file is read back, each key is mapped as each client maps it, and the update of every weight is rebuilt and
compared with scale * B A. A file that does not match is not left behind; the table is stored as <name>.proof.json.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table

from flux2_lora.config import arguments, program
from flux2_lora.errors import UserError, did_you_mean
from flux2_lora.export import table
from flux2_lora.export.resize import resized
from flux2_lora.export.survival import HOSTS, Survival, advice, survival
from flux2_lora.families import ModelSpec, load_family, open_model
from flux2_lora.lora_origin import refuse_other_model
from flux2_lora.options import option
from flux2_lora.publish.release import DTYPES, Source, refuse_unknown_formats, release, source_of, with_modules
from flux2_lora.training.progress import console


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """configs/export.yaml. adapter: run, checkpoint or file; output: null puts files into the run's export/.

    rank: of a smaller file, null for the adapter's own. privacy: strict leaves out captions, folder names and the
    cover. hosts: quantised models in which to measure what is left of the update; they need the base, see model.
    """

    model: ModelSpec
    adapter: str
    formats: list[str] = field(default_factory=lambda: ["universal"])
    dtype: str = option("fp32", one_of=tuple(DTYPES))
    rank: int | None = option(None, at_least=1)
    privacy: str = option("open", one_of=("open", "strict"))
    hosts: list[str] = field(default_factory=list)
    output: str | None = None


@program("export")
def main(config: ExportConfig) -> None:
    refuse_unknown_formats(config.formats)
    for host in config.hosts:
        if host not in HOSTS:
            raise UserError(f"hosts names {host!r}, which is no way to store a model", did_you_mean(host, list(HOSTS)))
    source = source_of(config.adapter, told_architecture(config.model))
    console.print(f"adapter   {config.adapter}: {source.lora.summary}")
    if config.hosts:
        refuse_other_model(config.adapter, source.lora, open_model(config.model))
    if config.rank is not None:
        smaller, error = resized(source.lora.modules, config.rank, source.lora.architecture)
        source = with_modules(source, smaller)
        console.print(f"rank      {config.rank}: {error:.2%} of the update is lost")
    for released in release(
        source, files_of(config, source), dtype=DTYPES[config.dtype], strict=config.privacy == "strict"
    ):
        if released.proofs:
            console.print(table(released.proofs))
        kept = "as trained" if released.format == "peft" else config.dtype
        console.print(f"export    {released.path} ({kept})")
    if config.hosts:
        found = survival(open_model(config.model).weights, source.lora.modules, config.hosts)
        console.print(survival_table(found))
        for line in advice(found):
            console.print(line)


def files_of(config: ExportConfig, source: Source) -> dict[str, Path]:
    """Format -> its file: `output` for one format, else <name> (universal) and <name>-<format>.

    Without output, the name is outputs/<name>/export/<name> for an adapter inside a run, with what makes it another
    file than the run's own export; privately the trigger word; of a loose file its own name.
    """
    if config.output and not config.output.endswith(".safetensors"):
        raise UserError(f"output={config.output} is no file's name", "end it in .safetensors")
    if config.output and len(config.formats) == 1:
        return {config.formats[0]: Path(config.output).expanduser()}
    if config.output:
        place = Path(config.output).expanduser()
    elif source.run is not None:
        private = config.privacy == "strict"
        title = (source.lora.trigger_word or "lora") if private else source.title
        changed = f"-rank{config.rank}" * (config.rank is not None) + f"-{config.dtype}" * (config.dtype != "fp32")
        place = source.run / "export" / f"{title}{changed}.safetensors"
    else:
        place = source.path
    plain = "" if config.output or source.run is not None else "-universal"
    return {
        name: place.with_stem(f"{place.stem}{plain if name == 'universal' else f'-{name}'}") for name in config.formats
    }


def told_architecture(model: ModelSpec) -> str | None:
    """That of the model, where the user named one."""
    named = any(argument.startswith(("model=", "model.family=")) for argument in arguments())
    return load_family(model.family).architecture if named else None


def survival_table(found: list[Survival]) -> Table:
    """One row a block, two columns a host."""
    hosts = list(dict.fromkeys(one.host for one in found))
    shown = Table(title="what is left where the LoRA is merged: kept / noise", title_justify="left")
    shown.add_column("block")
    for host in hosts:
        shown.add_column(host, justify="right")
    for block in dict.fromkeys(one.block for one in found):
        cells = [next(one for one in found if (one.host, one.block) == (host, block)) for host in hosts]
        shown.add_row(block, *(f"{one.kept:.2f} / {one.noise:.2f}" for one in cells))
    return shown


if __name__ == "__main__":
    main()
