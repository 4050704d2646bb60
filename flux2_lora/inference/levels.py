"""The noise levels that a picture was drawn at, as numbers, for programs that are told them."""

from __future__ import annotations

from flux2_lora.flow import linear_mu
from flux2_lora.inference.settings import Settings
from flux2_lora.samplers import empirical_mu, from_level, from_strength, schedule


def levels_of(settings: Settings) -> list[float]:
    """From the first to 0, as the sampler takes them: shifted, and the tail where a picture is redrawn in part."""
    if settings.inputs is not None and settings.inputs.tile is not None:
        assert settings.strength is not None
        return from_level(settings.steps, settings.strength).tolist()
    levels = schedule(settings.steps, _mu(settings))
    return (levels if settings.strength is None else from_strength(levels, settings.strength)).tolist()


def written(levels: list[float]) -> list[str]:
    """In digits without an exponent, which readers of plain numbers would take for two; exact to float32 near 1."""
    return [f"{level:.9f}" for level in levels]


def _mu(settings: Settings) -> float:
    tokens = settings.drawn_height * settings.drawn_width // 256
    if settings.family == "flux1":
        return 0.0 if settings.guidance is None else linear_mu(tokens)
    return empirical_mu(tokens, settings.steps)
