"""Train LoRAs of Flux.2-class models on small cards, and draw with them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flux2_lora.inference.pipeline import Pipeline
    from flux2_lora.samplers import Filling

__all__ = ["Filling", "Pipeline"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """These are imported when they are asked for: they bring torch, which a refused command should not wait for."""
    if name == "Pipeline":
        from flux2_lora.inference.pipeline import Pipeline

        return Pipeline
    if name == "Filling":
        from flux2_lora.samplers import Filling

        return Filling
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
