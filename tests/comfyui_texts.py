"""Text encoders made of a file: an extension of ComfyUI, which runs it, that replaces its two loaders of them.

Its real ones have one size each, some gigabytes. Here a file under their name holds the states of a few prompts; its
own tokenizers still say how long each is, and its own reading of brackets which prompt is meant.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import folder_paths
import nodes
from comfy import sd1_clip
from comfy.text_encoders.flux import FluxTokenizer, KleinTokenizer
from comfy.text_encoders.sd3_clip import SD3Tokenizer
from safetensors import safe_open

NODE_CLASS_MAPPINGS: dict[str, Any] = {}
TOKENIZERS = {
    ("clip_l.safetensors", "flux"): FluxTokenizer,
    ("t5xxl_fp16.safetensors", "sd3"): SD3Tokenizer,
    ("qwen_3_4b.safetensors", "flux2"): KleinTokenizer,
    ("mistral_3_small_flux2_bf16.safetensors", "flux2"): None,  # its tokenizer comes with its weights
}


class States:
    """What ComfyUI's nodes call a CLIP."""

    def __init__(self, name: str, kind: str) -> None:
        self.path = folder_paths.get_full_path_or_raise("text_encoders", name)
        tokenizer = TOKENIZERS[name, kind]
        self.tokenizer = tokenizer() if tokenizer else None
        self.options: dict[str, int] = {}

    def clone(self) -> States:
        made = copy.copy(self)
        made.options = dict(self.options)
        return made

    def set_tokenizer_option(self, name: str, value: int) -> None:
        self.options[name] = value

    def tokenize(self, text: str) -> tuple[str, int | None]:
        """The text without escapes, and its length in tokens where ComfyUI has the tokenizer."""
        parts = sd1_clip.token_weights(sd1_clip.escape_important(text), 1.0)
        if any(weight != 1.0 for _, weight in parts):
            raise ValueError(f"ComfyUI reads emphasis in {text!r}")
        plain = "".join(sd1_clip.unescape_important(part) for part, _ in parts)
        if self.tokenizer is None:
            return plain, None
        tokens = self.tokenizer.tokenize_with_weights(text, tokenizer_options=self.options)
        [batch] = tokens["t5xxl"] if "t5xxl" in tokens else tokens["qwen3_4b"]
        return plain, len(batch)

    def encode_from_tokens_scheduled(self, tokens: tuple[str, int | None]) -> list[list[Any]]:
        text, length = tokens
        with safe_open(self.path, "pt") as file:
            place = json.loads(file.metadata()["texts"]).index(text)
            embeds = file.get_tensor(f"embeds.{place}")
            pooled = file.get_tensor(f"pooled.{place}") if f"pooled.{place}" in file.keys() else None  # noqa: SIM118
        if length not in (None, embeds.shape[1]):
            raise ValueError(f"ComfyUI makes {length} tokens of {text!r}, and not {embeds.shape[1]}")
        return [[embeds, {"pooled_output": pooled}]]


def _load(self: Any, clip_name: str, type: str, device: str) -> tuple[States]:  # noqa: A002
    return (States(clip_name, type),)


def _load_two(self: Any, clip_name1: str, clip_name2: str, type: str, device: str) -> tuple[States]:  # noqa: A002
    return (States(clip_name1, type),)


nodes.CLIPLoader.load_clip = _load
nodes.DualCLIPLoader.load_clip = _load_two
