"""Batches that do not fit are split; the rest of sampling is held against Diffusers in tests/parity."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest
import torch

from flux2_lora.errors import RunError, UserError
from flux2_lora.families import Model
from flux2_lora.inference import memory
from flux2_lora.inference.memory import most_at_once, needed_bytes
from flux2_lora.inference.sampling import split_to_fit
from flux2_lora.quantize import PrecisionSpec, load_frozen

CPU = torch.device("cpu")


def test_what_does_not_fit_at_once_is_made_of_halves_in_order() -> None:
    sizes = []

    def make(items: Sequence[int]) -> list[int]:
        sizes.append(len(items))
        if len(items) > 2:
            raise torch.OutOfMemoryError
        return [item * 10 for item in items]

    assert split_to_fit(make, range(7)) == [0, 10, 20, 30, 40, 50, 60]
    assert sizes == [7, 3, 1, 2, 4, 2, 2]


def test_one_that_does_not_fit_is_said() -> None:
    def make(_items: Sequence[int]) -> list[int]:
        raise torch.OutOfMemoryError

    with pytest.raises(RunError, match="memory ran out while one picture was drawn") as told:
        split_to_fit(make, range(3))
    assert "memory=stream" in told.value.remedy


def test_as_many_are_drawn_at_once_as_fit(tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = load_frozen(tiny_model, PrecisionSpec(base="fp8"), CPU), tiny_model.load_vae(CPU), CPU
    needed = partial(needed_bytes, *parts, other_tokens=32)
    one = needed(256, 256)
    monkeypatch.setattr(memory, "free_bytes", lambda _device: int(3.5 * one))
    assert most_at_once(needed, CPU, 256, 256) == 3
    monkeypatch.setattr(memory, "free_bytes", lambda _device: one - 1)
    with pytest.raises(UserError, match="256 x 256 px needs about") as told:
        most_at_once(needed, CPU, 256, 256)
    fits = int(str(told.value).split("hint: ")[1].split(" x ")[0])
    assert needed(fits, fits) < one <= needed(fits + 16, fits + 16)
