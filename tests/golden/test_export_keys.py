"""The keys of exported files at full size, model by model: a change here is a change of what clients must read."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from flux2_lora.adapters import LoraWeights
from flux2_lora.export import FORMATS
from flux2_lora.keys import is_target
from flux2_lora.networks.transformers import block_linears
from tests.full_size import MODELS, full_size

GOLDEN = Path(__file__).with_name("export_keys.json")


def adapter(model: nn.Module, architecture: str) -> dict[str, LoraWeights]:
    """Rank 1 on every Linear of the blocks."""
    modules = {}
    for name in filter(lambda linear: is_target(architecture, linear), block_linears(model)):
        height, width = model.get_submodule(name).weight.shape  # type: ignore[misc, union-attr]
        modules[name] = LoraWeights(down=torch.randn(1, width), up=torch.ones(height, 1), scale=1.0)  # type: ignore[arg-type, list-item]
    return modules


def keys_of(name: str, form: str) -> dict[str, list[object]]:
    """Key with "*" for the number of a block -> how many blocks have it, and its shape."""
    architecture = "flux1" if name.startswith("FLUX.1") else "flux2"
    tensors = FORMATS[form](adapter(full_size(name), architecture), architecture, torch.float32)
    starred = {key: re.sub(r"blocks([._])\d+", r"blocks\1*", key) for key in tensors}
    counts = Counter(starred.values())
    return {starred[key]: [counts[starred[key]], list(tensor.shape)] for key, tensor in tensors.items()}


@pytest.mark.parametrize("form", list(FORMATS))
@pytest.mark.parametrize("name", list(MODELS))
def test_the_keys_of_a_full_adapter_are_what_they_always_were(name: str, form: str) -> None:
    assert keys_of(name, form) == json.loads(GOLDEN.read_text())[name][form]


def test_every_number_of_a_block_is_there_once() -> None:
    tensors = FORMATS["universal"](adapter(full_size("klein 4B"), "flux2"), "flux2", torch.float32)
    numbers = [
        int(found[1]) for key in tensors if (found := re.match(r"lora_unet_single_blocks_(\d+)_linear1.alpha", key))
    ]
    assert sorted(numbers) == list(range(20))
