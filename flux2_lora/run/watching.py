"""What looks at a run as it goes, set up as the run's options say: trackers, validation and previews."""

from __future__ import annotations

import dataclasses
from functools import partial

import torch

from flux2_lora.inference.own import own_samples
from flux2_lora.inference.previews import Previewer
from flux2_lora.inference.request import settings_of
from flux2_lora.inference.watch import Watch, evaluations, training_set_of
from flux2_lora.run.data import Data, base_prompts, remedies
from flux2_lora.run_options import RunOptions
from flux2_lora.training.state import TrainState
from flux2_lora.training.tracking import Metrics


def watch_run(config: RunOptions, data: Data, state: TrainState, device: torch.device) -> Watch:
    """The watch of a run that is about to begin, or to go on."""
    file, written = config.folder / "metrics.jsonl", dataclasses.asdict(config)
    metrics = Metrics(file, config.logger, name=config.name, config=written, resumed_at=state.step)
    compared, drawn = config.preview.every and config.validation.nearest, config.folder / "base_style.safetensors"
    return Watch(
        family=data.model.family,
        spec=config.validation,
        device=device,
        last=config.max_steps,
        metrics=metrics,
        previewer=_previewer(config, data, device) if config.preview.every else None,
        held_out=data.held_out,
        own=own_samples(data.encoder, state.transformer, base_prompts(config), config.dataset.side_px, drawn),
        training_set=training_set_of(data.samples, data.start.features) if compared else None,
        features=data.start.features,
        remedies=partial(remedies, config, data, device),
        at_once=config.batch_size,
        rows=evaluations(file),
    )


def _previewer(config: RunOptions, data: Data, device: torch.device) -> Previewer:
    size, export = (data.scene.height_px, data.scene.width_px), str(config.exported.resolve())
    return Previewer(
        family=data.model.family,
        vae=data.model.load_vae(torch.device("cpu")),  # brought to the device for the picture only
        spec=config.preview,
        scene=data.scene,
        folder=config.folder / "previews",
        title=config.name,
        device=device,
        settings=settings_of(data.model, config.preview.recipe, prompt="", size=size, adapters=[(export, 1.0)]),
        last=config.max_steps,
        at_once=config.batch_size,
    )
