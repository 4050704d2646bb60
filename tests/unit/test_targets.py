"""Groups of projections in words, on the names of the real models at full size."""

from __future__ import annotations

import pytest
from torch import nn

from flux2_lora.adapters import AdapterSpec, attach, lora_layers
from flux2_lora.errors import UserError
from flux2_lora.networks.transformers import block_linears
from flux2_lora.targets import parse_ranked, resolve
from tests.full_size import full_size


@pytest.mark.parametrize(
    ("name", "architecture", "billions", "modules"),
    [
        ("klein 4B", "flux2", 3.88, 100),
        ("klein 9B", "flux2", 9.08, 144),
        ("small", "flux2", 11.90, 170),
        ("FLUX.2 dev", "flux2", 32.22, 192),
        ("FLUX.1 dev", "flux1", 11.90, 418),
    ],
)
def test_full_size_models_have_their_parameters_and_modules(
    name: str, architecture: str, billions: float, modules: int
) -> None:
    model = full_size(name)
    assert round(sum(p.numel() for p in model.parameters()) / 1e9, 2) == billions
    resolved = resolve(["attention", "mlp"], architecture, block_linears(model), 16)
    assert len(resolved) == modules
    assert set(resolved.values()) == {16}


@pytest.fixture(scope="module")
def klein() -> list[str]:
    return block_linears(full_size("klein 4B"))


@pytest.fixture(scope="module")
def flux1() -> list[str]:
    return block_linears(full_size("FLUX.1 dev"))


@pytest.mark.parametrize(
    ("entries", "count"),
    [
        (["attention"], 5 * 8 + 20 * 2),
        (["mlp"], 5 * 4 + 20 * 2),
        (["double"], 5 * 12),
        (["single"], 20 * 2),
        (["single[5:10]"], 5 * 2),
        (["single[:3]", "single[18:]"], 5 * 2),
        (["single[1:3]", "single[2:4]"], 3 * 2),
        (["double[0:2].attention"], 2 * 8),
        (["double.mlp", "single [ 0 : 1 ]"], 5 * 4 + 2),
        (["double[4:99]"], 12),
    ],
)
def test_entries_name_the_union_of_what_they_say(klein: list[str], entries: list[str], count: int) -> None:
    assert len(resolve(entries, "flux2", klein, 8)) == count


@pytest.mark.parametrize(
    ("entries", "count"),
    [
        (["attention"], 19 * 8 + 38 * 4),
        (["mlp"], 19 * 4 + 38 * 2),
        (["double", "single"], 418),
        (["single.mlp"], 38 * 2),
    ],
)
def test_flux1_has_its_fused_output_in_both_kinds_and_modulation_in_none(
    flux1: list[str], entries: list[str], count: int
) -> None:
    resolved = resolve(entries, "flux1", flux1, 8)
    assert len(resolved) == count
    assert not [module for module in resolved if ".norm" in module]


def test_a_range_names_its_blocks_and_no_other(klein: list[str]) -> None:
    resolved = resolve(["single[5:7]"], "flux2", klein, 8)
    assert set(resolved) == {
        f"single_transformer_blocks.{n}.attn.{leaf}" for n in (5, 6) for leaf in ("to_qkv_mlp_proj", "to_out")
    }


def test_the_later_entry_sets_the_rank(klein: list[str]) -> None:
    ranks = resolve(["double", "attention:32", "single[0:1]:4"], "flux2", klein, 8)
    assert ranks["transformer_blocks.0.ff.linear_in"] == 8
    assert ranks["transformer_blocks.0.attn.to_q"] == 32
    assert ranks["single_transformer_blocks.1.attn.to_out"] == 32
    assert ranks["single_transformer_blocks.0.attn.to_out"] == 4


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ("atention", "did you mean attention?"),
        ("singel[5:10]", "did you mean single?"),
        ("attention[5:10]", "no group"),
        ("single[5]", "ranges are written"),
        ("single.double", "no group"),
        ("mlp.attention", "no group"),
        ("attention:0", "rank from 1"),
        ("", "no group"),
        ("single[5:10", "ranges are written"),
    ],
)
def test_an_entry_that_says_nothing_is_refused(entry: str, text: str) -> None:
    with pytest.raises(UserError) as error:
        parse_ranked(entry)
    assert text in str(error.value)


def test_a_range_beyond_the_model_is_refused_with_the_counts(klein: list[str]) -> None:
    with pytest.raises(UserError, match=r"single\[20:\]") as error:
        resolve(["attention", "single[20:]"], "flux2", klein, 8)
    assert "5 double and 20 single" in error.value.remedy


def test_an_empty_list_leaves_nothing_to_train(klein: list[str]) -> None:
    with pytest.raises(UserError, match="leaves nothing"):
        resolve([], "flux2", klein, 8)


def test_attached_ranks_are_the_resolved_ones_and_the_scale_is_one_for_all(transformer: nn.Module) -> None:
    spec = AdapterSpec(rank=4, alpha=8, targets=["double", "single[1:2]:2"])
    assert attach(transformer, "flux2", spec, seed=0) == 12 + 2
    found = dict(lora_layers(transformer))
    assert {layer.r["default"] for path, layer in found.items() if path.startswith("single")} == {2}
    assert {layer.r["default"] for path, layer in found.items() if not path.startswith("single")} == {4}
    assert {layer.scaling["default"] for layer in found.values()} == {2.0}
