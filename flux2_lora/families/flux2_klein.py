"""flux2_klein: Qwen3 after layers 9, 18 and 27 -> Flux2Transformer2DModel, without guidance embedding: true CFG."""

from __future__ import annotations

from flux2_lora.networks.flux2 import Flux2
from flux2_lora.networks.prompts import ChatText

FAMILY = Flux2(
    name="flux2_klein",
    text=ChatText(
        classes=("Qwen3ForCausalLM", "Qwen3Model"),
        layers=(9, 18, 27),
        messages=lambda prompt: [{"role": "user", "content": prompt}],
        template={"add_generation_prompt": True, "enable_thinking": False},
    ),
)
