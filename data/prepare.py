"""Encode pictures and captions into the caches, as `flux2-lora train` would at its start, and check what is there.

    flux2-lora prepare dataset.folder=~/pictures/mine
    flux2-lora prepare dataset.folder=~/pictures/mine cache.max_gb=50

Useful where the encoders need another machine or another hour than the training: the caches are content-addressed, so
a run that finds them whole loads no encoder at all. Entries that are found damaged are made again, entries beyond the
limits of cache.max_gb and cache.max_days are deleted, the longest unused first.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flux2_lora.caches import CacheSpec
from flux2_lora.config import program
from flux2_lora.dataset import DatasetSpec, preview_prompts, scan
from flux2_lora.dataset.seen import Memory
from flux2_lora.devices import pick_device
from flux2_lora.families import ModelSpec, load_family, open_model
from flux2_lora.options import option
from flux2_lora.training.encoding import Encoder, encode_samples, prune_cache, texts_of
from flux2_lora.training.progress import console


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """configs/prepare.yaml. name: outputs/<name>/skipped.txt lists the pictures that cannot be used."""

    model: ModelSpec
    dataset: DatasetSpec
    cache: CacheSpec
    name: str
    output_dir: str = "outputs"
    seed: int = option(0, at_least=0)
    device: str = "auto"


@program("prepare")
def main(config: PrepareConfig) -> None:
    device, skipped = pick_device(config.device), Path(config.output_dir).expanduser() / config.name / "skipped.txt"
    cache, step = config.cache.place, load_family(config.model.family).pixels_per_token
    memory = Memory(cache / "pictures.json")
    found = scan(config.dataset, seed=config.seed, step=step, memory=memory, cache=cache, report=skipped)
    model = open_model(config.model)
    for line in found.report(skipped):
        console.print(line)
    memory.save()

    encoder = Encoder(model, cache, device, background=config.dataset.background)
    records = [*found.training, *found.validation]
    encoder.encode_texts([*texts_of(records), "", *preview_prompts(config.dataset)])  # each layer is read once for all
    for part in (found.training, found.validation):
        encode_samples(encoder, part, config.dataset, config.seed)
    encoder.verify()
    prune_cache(config.cache, encoder)

    counts = f"{len(found.training)} pictures to train on and {len(found.validation)} to validate with"
    console.print(f"{counts} are in {cache}")
    if encoder.healed:
        console.print(f"{encoder.healed} damaged entries were made again")


if __name__ == "__main__":
    main()
