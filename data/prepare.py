"""Encode a folder of pictures and captions into the caches, as `flux2-lora train` would at its start.

    flux2-lora prepare dataset.folder=~/pictures/mine

Useful where the encoders need another machine or another hour than the training: the caches are content-addressed, so
a run that finds them whole loads no encoder at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flux2_lora.buckets import assign
from flux2_lora.config import program
from flux2_lora.dataset import DatasetSpec, preview_prompts, scan, scan_validation
from flux2_lora.devices import pick_device
from flux2_lora.families import ModelSpec, open_model
from flux2_lora.options import option
from flux2_lora.training.encoding import Encoder, encode_samples
from flux2_lora.training.tracking import console


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """configs/prepare.yaml."""

    model: ModelSpec
    dataset: DatasetSpec
    output_dir: str = "outputs"
    seed: int = option(0, at_least=0)
    device: str = "auto"


@program("prepare")
def main(config: PrepareConfig) -> None:
    device, model = pick_device(config.device), open_model(config.model)
    found = scan(config.dataset)
    training, validation = scan_validation(config.dataset, found, config.seed)
    for name, reason in found.skipped:
        console.print(f"skipped {name}: {reason}")
    encoder = Encoder(model, Path(config.output_dir).expanduser() / "cache", device)
    captions = [record.caption for record in (*training, *validation)]
    encoder.encode_texts([*captions, "", *preview_prompts(config.dataset)])  # together: each layer is read once
    for records in (training, validation):
        sizes = assign([(r.width, r.height) for r in records], config.dataset.resolution, model.family.pixels_per_token)
        encode_samples(encoder, records, sizes, flip=config.dataset.flip, seed=config.seed)
    console.print(
        f"{len(training)} pictures to train on and {len(validation)} to validate with are in {encoder.folder}"
    )


if __name__ == "__main__":
    main()
