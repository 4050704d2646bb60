"""The table of names, against the real transformer class."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from diffusers import Flux2Transformer2DModel
from torch import nn

from flux2_lora.keys import ARCHITECTURES, bfl_of, is_target, kohya_of, members_of

GOLDEN = Path(__file__).parents[1] / "golden" / "flux2_keys.json"


@pytest.fixture(scope="module")
def linears() -> dict[str, int]:
    """Linear -> its rows, of a small Flux.2 transformer."""
    transformer = Flux2Transformer2DModel(
        attention_head_dim=128,
        num_attention_heads=2,
        num_layers=1,
        num_single_layers=2,
        in_channels=128,
        joint_attention_dim=64,
        guidance_embeds=False,
    )
    return {name: module.out_features for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}


def test_every_linear_has_a_place_and_returns_from_it(linears: dict[str, int]) -> None:
    for name in linears:
        assert name in members_of("flux2", bfl_of("flux2", name).module)


def test_the_linears_of_the_blocks_are_the_targets(linears: dict[str, int]) -> None:
    assert {name for name in linears if is_target("flux2", name)} == {name for name in linears if "blocks." in name}


def test_members_own_disjoint_rows_that_fill_the_weight(linears: dict[str, int]) -> None:
    for weight in {bfl_of("flux2", name).module for name in linears}:
        members = members_of("flux2", weight)
        places = [bfl_of("flux2", member) for member in members]
        unit = sum(linears[member] for member in members) // places[0].parts
        assert [place.start for place in places] == [0, *(place.stop for place in places[:-1])]
        assert places[-1].stop == places[-1].parts
        assert [linears[m] for m in members] == [unit * (place.stop - place.start) for place in places]


def test_no_place_is_given_twice() -> None:
    table = ARCHITECTURES["flux2"]
    places = [*table.blocks.values(), *table.outside.values()]
    assert len(places) == len(set(places))


def test_kohya_spelling_is_unambiguous(linears: dict[str, int]) -> None:
    weights = {bfl_of("flux2", name).module for name in linears}
    assert len({kohya_of(weight) for weight in weights}) == len(weights)
    assert kohya_of("double_blocks.0.img_attn.qkv") == "lora_unet_double_blocks_0_img_attn_qkv"


def test_only_the_number_of_the_block_is_replaced() -> None:
    place = bfl_of("flux2", "transformer_blocks.10.attn.to_out.0")
    assert place.module == "double_blocks.10.img_attn.proj"
    assert members_of("flux2", "double_blocks.0.img_mlp.0") == ("transformer_blocks.0.ff.linear_in",)


@pytest.mark.parametrize("name", ["transformer_blocks.0.attn.to_qkv", "transformer_blocks.0.norm1", "proj", ""])
def test_unknown_names_are_errors(name: str) -> None:
    with pytest.raises(KeyError):
        bfl_of("flux2", name)
    with pytest.raises(KeyError):
        members_of("flux2", name)


def test_the_key_map_is_the_golden_one(linears: dict[str, int]) -> None:
    places = {name: bfl_of("flux2", name) for name in linears}
    rows = {name: [p.module, p.start, p.stop, p.parts, p.swapped] for name, p in places.items()}
    assert rows == json.loads(GOLDEN.read_text())
