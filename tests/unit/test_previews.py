"""What a preview holds of a device, and when."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from flux2_lora.conditioning import Conditioning
from flux2_lora.inference.previews import Previewer, PreviewSpec


class Vae(nn.Module):
    """Says where it was moved, and fails there if so told."""

    def __init__(self, failing: str = "") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.moves: list[str] = []
        self.failing = failing

    def to(self, device: torch.device) -> Vae:  # type: ignore[override]
        self.moves.append(device.type)
        if device.type == self.failing:
            raise torch.OutOfMemoryError
        return self


def previewer(**given: Any) -> Previewer:
    """On a device that holds no numbers."""
    others: dict[str, Any] = dict.fromkeys(("family", "vae", "scene", "folder", "title", "settings", "last"))
    return Previewer(**{**others, "spec": PreviewSpec(), "device": torch.device("meta"), **given})


@pytest.mark.parametrize("failing", ["", "meta", "preview"])
def test_the_autoencoder_is_on_the_device_while_a_preview_is_drawn_and_on_the_host_after_it(
    monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    vae, there = Vae(failing), []

    def drawn(*_: object) -> None:
        there.extend(vae.moves)
        if failing == "preview":
            raise torch.OutOfMemoryError

    monkeypatch.setattr(Previewer, "_draw", drawn)
    try:
        previewer(vae=vae).draw(nn.Identity(), 1)
    except torch.OutOfMemoryError:
        assert failing
    assert there == ([] if failing == "meta" else ["meta"])
    assert vae.moves == ["meta", "cpu"]


def test_texts_of_previews_come_to_the_device_when_they_are_drawn() -> None:
    text = Conditioning(embeds=torch.zeros(1, 2, 3), pooled=torch.zeros(1, 4))
    prompted = previewer(scene=SimpleNamespace(negative=text))._prompted(text)
    for one in (prompted.positive, prompted.negative):
        assert one.embeds.is_meta
        assert one.pooled is not None
        assert one.pooled.is_meta
