"""From prompts to what a transformer reads: T5 alone, T5 with CLIP, or some layers of a language model.

Each class is a `TextEncoders`. Law: the embeddings equal those of the family's Diffusers pipeline: the same templates,
the same padding to one fixed length, the same layers; a mask where that pipeline uses one, and only there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flux2_lora.conditioning import Conditioning
from flux2_lora.errors import UserError
from flux2_lora.networks.components import Widths
from flux2_lora.networks.text import (
    CLIP,
    LANGUAGE,
    T5,
    PromptEncoder,
    check_encoder,
    check_tokenizer,
    clip_pooled,
    decoder_layers,
    in_waves,
    states_bytes,
    t5,
    tokenizer,
)
from flux2_lora.weights import read_json

LONGEST = 512
_T5 = ("T5EncoderModel", "T5ForConditionalGeneration")


@dataclass(frozen=True, kw_only=True)
class T5Text:
    """T5's last states, padded and unmasked. [b s d], d = 4096 for T5-XXL."""

    @property
    def parts(self) -> Mapping[str, tuple[str, ...]]:
        return {"text_encoder": _T5, "tokenizer": ()}

    def widths(self, components: Path) -> Widths:
        return Widths(embeds=_size(components / "text_encoder", "d_model"))

    def check(self, components: Path) -> None:
        check_encoder(components / "text_encoder", T5)
        check_tokenizer(components / "tokenizer")

    def load(self, components: Path, device: torch.device, length: int | None) -> PromptEncoder:
        words = _padded(tokenizer(components / "tokenizer"), length)
        states = t5(components / "text_encoder", device)
        each = states_bytes(words.length, self.widths(components).embeds, device)
        return lambda texts: in_waves(texts, each, lambda wave: Conditioning(embeds=states(words(wave))))


@dataclass(frozen=True, kw_only=True)
class T5ClipText:
    """T5's states and CLIP's pooled state of the same text: [b s 4096] and [b 768] in FLUX.1."""

    @property
    def parts(self) -> Mapping[str, tuple[str, ...]]:
        clip = ("CLIPTextModel", "CLIPTextModelWithProjection")
        return {"text_encoder": clip, "tokenizer": (), "text_encoder_2": _T5, "tokenizer_2": ()}

    def widths(self, components: Path) -> Widths:
        pooled = _size(components / "text_encoder", "hidden_size")
        return Widths(embeds=_size(components / "text_encoder_2", "d_model"), pooled=pooled)

    def check(self, components: Path) -> None:
        for kind, part in ((CLIP, ""), (T5, "_2")):
            check_encoder(components / f"text_encoder{part}", kind)
            check_tokenizer(components / f"tokenizer{part}")

    def load(self, components: Path, device: torch.device, length: int | None) -> PromptEncoder:
        short, long = _padded(tokenizer(components / "tokenizer"), None), tokenizer(components / "tokenizer_2")
        words = _padded(long, length)
        states, pooled = t5(components / "text_encoder_2", device), clip_pooled(components / "text_encoder", device)

        def encode(wave: Sequence[str]) -> Conditioning:
            return Conditioning(embeds=states(words(wave)), pooled=pooled(short(wave)))

        each = states_bytes(words.length, self.widths(components).embeds, device)
        return lambda texts: in_waves(texts, each, encode)


@dataclass(frozen=True, kw_only=True)
class ChatText:
    """States after some layers of a language model that reads the prompt as a chat: [b s len(layers) * d].

    classes: what the folder may hold; messages: prompt -> chat; template: further arguments of the chat template.
    """

    classes: tuple[str, ...]
    layers: tuple[int, ...]
    messages: Callable[[str], list[dict[str, Any]]]
    template: Mapping[str, Any]

    @property
    def parts(self) -> Mapping[str, tuple[str, ...]]:
        return {"text_encoder": self.classes, "tokenizer": ()}

    def widths(self, components: Path) -> Widths:
        return Widths(embeds=len(self.layers) * _size(components / "text_encoder", "hidden_size"))

    def check(self, components: Path) -> None:
        check_encoder(components / "text_encoder", LANGUAGE, self.layers)
        check_tokenizer(components / "tokenizer")

    def load(self, components: Path, device: torch.device, length: int | None) -> PromptEncoder:
        words, size = tokenizer(components / "tokenizer"), length or LONGEST
        if words.chat_template is None:
            raise UserError(f"{components / 'tokenizer'} has no chat template", "fetch the folder again")
        states = decoder_layers(components / "text_encoder", device, self.layers)

        def encode(wave: Sequence[str]) -> Conditioning:
            chats = [
                words.apply_chat_template(self.messages(prompt), tokenize=False, **self.template) for prompt in wave
            ]
            tokens = words(
                chats,
                padding="max_length",
                max_length=size,
                truncation=True,
                return_tensors="pt",
                add_special_tokens=not _opened_by(chats, words.bos_token),
            )
            return Conditioning(embeds=states(tokens.input_ids, tokens.attention_mask))

        each = states_bytes(size, self.widths(components).embeds // len(self.layers), device, kept=len(self.layers))
        return lambda texts: in_waves(texts, each, encode)


@dataclass(frozen=True)
class _Padded:
    """Texts -> ids [n length]."""

    tokenizer: Any
    length: int

    def __call__(self, texts: Sequence[str]) -> Tensor:
        ids: Tensor = self.tokenizer(
            list(texts), padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        ).input_ids
        return ids


def _padded(words: Any, length: int | None) -> _Padded:
    """At the length asked for, else at what the tokenizer takes, up to the 512 that FLUX was trained with."""
    return _Padded(words, length or min(words.model_max_length, LONGEST))


def _opened_by(chats: Sequence[str], token: str | None) -> bool:
    """Whether the template has put the first token already, so that the tokenizer must not."""
    return token is not None and all(chat.startswith(token) for chat in chats)


def _size(folder: Path, key: str) -> int:
    """A width from config.json, from its text part where a model has more; 0 where it says nothing."""
    config = read_json(folder / "config.json")
    return int((config.get("text_config") or config).get(key) or 0)
