"""Options that contradict each other, or that the model and the pictures at hand cannot meet.

Law: a wish that would be ignored is refused, before anything is written, in words that name the option.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flux2_lora.dataset import Record
from flux2_lora.errors import UserError
from flux2_lora.families import Model
from flux2_lora.matmul import refuse_matmul
from flux2_lora.run_options import RunOptions
from flux2_lora.targets import numbers_of, parse_ranked, resolve
from flux2_lora.training.optimizers import refuse_mixtures
from flux2_lora.training.tracking import refuse_missing


def refuse_contradictions(config: RunOptions, device: torch.device) -> None:
    """UserError for options that contradict each other, before anything is looked for."""
    refuse_mixtures(config.optimizer, device)
    refuse_matmul(config.precision.matmul, config.precision.base, device)
    refuse_missing(config.logger)
    for entry in config.adapter.targets:
        parse_ranked(entry)
    low, high = config.timesteps.min_sigma, config.timesteps.max_sigma
    if low >= high:
        raise UserError(f"timesteps.min_sigma={low:g} is not below timesteps.max_sigma={high:g}", "leave room between")
    if config.validation.patience and not config.validation.every:
        raise UserError("validation.patience has nothing to wait for", "set validation.every=50, or patience=0")


def refuse_what_would_do_nothing(config: RunOptions, model: Model, records: Sequence[Record]) -> None:
    """UserError for a wish that this model or these pictures cannot meet."""
    family = model.family
    ranks = resolve(config.adapter.targets, family.architecture, model.projections(), config.adapter.rank)
    numbers_of(config.optimizer.block_lr, family.architecture, ranks, option="optimizer.block_lr")
    if config.preview.guidance not in (None, config.model.guidance) and not model.takes_guidance():
        raise UserError(
            f"preview.guidance={config.preview.guidance:g} asks for a guidance embedding, which this model has not",
            "set preview.guidance=null, and preview.cfg_scale for true guidance",
        )
    if config.preview.negative_prompt and config.preview.cfg_scale <= 1:
        raise UserError("preview.negative_prompt does nothing at preview.cfg_scale=1", "set preview.cfg_scale=3")
    if config.loss.preserve and not any(record.source.trigger_word for record in records):
        raise UserError(
            "loss.preserve needs a trigger word, to put loss.preserve_class in its place", "set dataset.trigger_word"
        )
