"""flux2_small: T5 states -> Flux2Transformer2DModel -> AutoencoderKLFlux2. The bundled miniature is one of these."""

from __future__ import annotations

from flux2_lora.networks.flux2 import Flux2
from flux2_lora.networks.prompts import T5Text

FAMILY = Flux2(name="flux2_small", text=T5Text(), takes_references=False)
