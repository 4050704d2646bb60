"""Train LoRAs of Flux.2-class models on small cards, and draw with them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flux2_lora.inference.pipeline import Pipeline

__all__ = ["Pipeline"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Pipeline is imported when it is asked for: it brings torch, which a refused command should not wait for."""
    if name == "Pipeline":
        from flux2_lora.inference.pipeline import Pipeline

        return Pipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
