"""flux2_dev: Mistral Small after layers 10, 20 and 30 -> Flux2Transformer2DModel with a guidance embedding."""

from __future__ import annotations

from typing import Any

from flux2_lora.networks.flux2 import Flux2
from flux2_lora.networks.prompts import ChatText


def _messages(prompt: str) -> list[dict[str, Any]]:
    """The system message that FLUX.2 dev was trained behind, and the prompt; [IMG] would stand for a picture."""
    from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE

    texts = {"system": SYSTEM_MESSAGE, "user": prompt.replace("[IMG]", "")}
    return [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in texts.items()]


FAMILY = Flux2(
    name="flux2_dev",
    text=ChatText(
        classes=("Mistral3ForConditionalGeneration", "MistralForCausalLM", "MistralModel"),
        layers=(10, 20, 30),
        messages=_messages,
        template={"add_generation_prompt": False},
    ),
)
