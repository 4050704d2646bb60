"""LoRA files of all namings, read for FLUX.1 and FLUX.2; attached, merged, kept to blocks; and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from flux2_lora.adapters import (
    WEIGHTS,
    Adapter,
    AdapterSpec,
    Lora,
    LoraWeights,
    attach,
    attach_loras,
    lora_layers,
    merge_loras,
    save_adapter,
    set_strengths,
    state_of,
)
from flux2_lora.conditioning import Conditioning
from flux2_lora.errors import UserError
from flux2_lora.export import export_lora, modules_of
from flux2_lora.families import Model, ModelFamily, ModelSpec, load_family
from flux2_lora.lora_files import read_lora, read_loras
from flux2_lora.networks.components import shapes_of
from flux2_lora.networks.transformers import block_linears
from flux2_lora.quantize import FrozenLinear
from flux2_lora.sources import ModelFiles
from flux2_lora.weights import Stored, Weights
from tests.conftest import quantised

RANK, ALPHA = 4, 3.0
ATTENTION = {
    "double_blocks.*.img_attn.qkv": [f"transformer_blocks.*.attn.to_{part}" for part in "qkv"],
    "double_blocks.*.txt_attn.qkv": [f"transformer_blocks.*.attn.add_{part}_proj" for part in "qkv"],
    "double_blocks.*.img_attn.proj": ["transformer_blocks.*.attn.to_out.0"],
    "double_blocks.*.txt_attn.proj": ["transformer_blocks.*.attn.to_add_out"],
}
FUSED: Mapping[str, Mapping[str, list[str]]] = {
    "flux1": {
        **ATTENTION,
        "double_blocks.*.img_mlp.0": ["transformer_blocks.*.ff.net.0.proj"],
        "double_blocks.*.img_mlp.2": ["transformer_blocks.*.ff.net.2"],
        "double_blocks.*.txt_mlp.0": ["transformer_blocks.*.ff_context.net.0.proj"],
        "double_blocks.*.txt_mlp.2": ["transformer_blocks.*.ff_context.net.2"],
        "double_blocks.*.img_mod.lin": ["transformer_blocks.*.norm1.linear"],
        "single_blocks.*.linear1": [
            *(f"single_transformer_blocks.*.attn.to_{part}" for part in "qkv"),
            "single_transformer_blocks.*.proj_mlp",
        ],
        "single_blocks.*.linear2": ["single_transformer_blocks.*.proj_out"],
    },
    "flux2": {
        **ATTENTION,
        "double_blocks.*.img_mlp.0": ["transformer_blocks.*.ff.linear_in"],
        "double_blocks.*.img_mlp.2": ["transformer_blocks.*.ff.linear_out"],
        "double_blocks.*.txt_mlp.0": ["transformer_blocks.*.ff_context.linear_in"],
        "double_blocks.*.txt_mlp.2": ["transformer_blocks.*.ff_context.linear_out"],
        "single_blocks.*.linear1": ["single_transformer_blocks.*.attn.to_qkv_mlp_proj"],
        "single_blocks.*.linear2": ["single_transformer_blocks.*.attn.to_out"],
        "single_stream_modulation.lin": ["single_stream_modulation.linear"],
    },
}


def opened(transformer: nn.Module, family: str) -> Model:
    """A model as it is known before it is loaded: by the shapes of its tensors."""
    spec = ModelSpec(family=family, path="", title=family, architecture_name=family)
    files = ModelFiles(transformer=Path(), components=Path(), option="model.path")
    return Model(spec, load_family(family), files, Weights(Path(), {}, shapes_of(transformer)))


@pytest.fixture(scope="module")
def flux1() -> Model:
    from diffusers import FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
    )
    return opened(transformer, "flux1")


@pytest.fixture
def flux2(transformer: nn.Module) -> Model:
    return opened(transformer, "flux2_small")


@pytest.fixture(params=["flux1", "flux2"])
def model(request: pytest.FixtureRequest) -> Model:
    found: Model = request.getfixturevalue(request.param)
    return found


def fused(model: Model) -> Iterator[tuple[str, list[str]]]:
    """(BFL weight, its Linears) of all blocks of a model, by the table above."""
    for weight, members in FUSED[model.family.architecture].items():
        for block in "01" if "*" in weight else "0":
            linears = [member.replace("*", block) for member in members]
            if f"{linears[0]}.weight" in model.weights.shapes:
                yield weight.replace("*", block), linears


def shape(model: Model, module: str) -> tuple[int, ...]:
    return model.weights.shapes[f"{module}.weight"]


def draw(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    """A [4 columns] and B [rows 4]."""
    rng = torch.Generator().manual_seed(seed)
    return 0.2 * torch.randn(RANK, columns, generator=rng), 0.2 * torch.randn(rows, RANK, generator=rng)


def by_linear(model: Model) -> dict[str, tuple[Tensor, Tensor]]:
    """Diffusers module -> A, B."""
    modules = [member for _, members in fused(model) for member in members]
    return {module: draw(*shape(model, module), seed) for seed, module in enumerate(modules)}


def by_weight(model: Model) -> dict[str, tuple[Tensor, Tensor]]:
    """BFL weight -> A, B over the rows of all its Linears."""
    heights = {weight: sum(shape(model, m)[0] for m in members) for weight, members in fused(model)}
    widths = {weight: shape(model, members[0])[1] for weight, members in fused(model)}
    return {weight: draw(heights[weight], widths[weight], seed) for seed, weight in enumerate(heights)}


def expected(model: Model, pairs: Mapping[str, tuple[Tensor, Tensor]], scale: float) -> dict[str, Tensor]:
    """Diffusers module -> the update that pairs under either naming mean."""
    updates = {}
    for weight, members in fused(model):
        if weight in pairs:
            down, up = pairs[weight]
            rows = (scale * up @ down).split([shape(model, member)[0] for member in members])
            updates |= dict(zip(members, rows, strict=True))
    return updates or {module: scale * up @ down for module, (down, up) in pairs.items()}


def written(
    pairs: Mapping[str, tuple[Tensor, Tensor]],
    spelled: Callable[[str], str],
    halves: tuple[str, str],
    alpha: float | None = None,
) -> dict[str, Tensor]:
    """The tensors of a file."""
    tensors = {}
    for module, (down, up) in pairs.items():
        tensors[f"{spelled(module)}.{halves[0]}"] = down.clone()
        tensors[f"{spelled(module)}.{halves[1]}"] = up.clone()
        if alpha is not None:
            tensors[f"{spelled(module)}.alpha"] = torch.tensor(alpha)
    return tensors


def same(lora: Lora, updates: Mapping[str, Tensor]) -> None:
    assert lora.modules.keys() == updates.keys()
    for module, weights in lora.modules.items():
        torch.testing.assert_close(weights.scale * weights.up @ weights.down, updates[module], rtol=0, atol=1e-6)


AB, DOWN_UP = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")
BY_WEIGHT = [
    ("kohya", lambda name: "lora_unet_" + name.replace(".", "_"), DOWN_UP, ALPHA),
    ("BFL", lambda name: f"diffusion_model.{name}", AB, None),
    ("BFL", lambda name: f"diffusion_model.{name}", DOWN_UP, ALPHA),
]
BY_LINEAR = [
    ("kohya", lambda name: "lora_transformer_" + name.replace(".", "_"), DOWN_UP, ALPHA),
    ("kohya", lambda name: "lora_unet_" + name.replace(".", "_"), DOWN_UP, ALPHA),
    ("Diffusers", lambda name: f"transformer.{name}", AB, None),
    ("Diffusers", lambda name: f"transformer.{name}", AB, ALPHA),
    ("Diffusers", lambda name: name, AB, None),
    ("Diffusers", lambda name: f"base_model.model.{name}", AB, ALPHA),
    ("Diffusers", lambda name: f"transformer.{name}", ("lora.down.weight", "lora.up.weight"), ALPHA),
]


@pytest.mark.parametrize(("naming", "spelled", "halves", "alpha"), BY_WEIGHT)
def test_fused_weights_are_cut_into_their_linears(
    model: Model,
    tmp_path: Path,
    naming: str,
    spelled: Callable[[str], str],
    halves: tuple[str, str],
    alpha: float | None,
) -> None:
    pairs, path = by_weight(model), tmp_path / "a.safetensors"
    save_file(written(pairs, spelled, halves, alpha), path)
    lora = read_lora(str(path), model)
    same(lora, expected(model, pairs, 1.0 if alpha is None else alpha / RANK))
    assert lora.naming == naming
    assert lora.summary == f"{len(by_linear(model))} of {len(by_linear(model))} modules, {naming} names"


@pytest.mark.parametrize(("naming", "spelled", "halves", "alpha"), BY_LINEAR)
def test_linears_by_name_keep_their_updates(
    model: Model,
    tmp_path: Path,
    naming: str,
    spelled: Callable[[str], str],
    halves: tuple[str, str],
    alpha: float | None,
) -> None:
    pairs, path = by_linear(model), tmp_path / "a.safetensors"
    save_file(written(pairs, spelled, halves, alpha), path)
    lora = read_lora(str(path), model)
    same(lora, expected(model, pairs, 1.0 if alpha is None else alpha / RANK))
    assert lora.naming == naming


@pytest.mark.parametrize(
    ("config", "scales"),
    [
        ({"lora_alpha": 8, "r": 4}, (2.0, 2.0)),
        ({"lora_alpha": 8, "r": 4, "alpha_pattern": {"attn.to_q": 2}}, (0.5, 2.0)),
        ({"lora_alpha": 8, "r": 4, "alpha_pattern": {"^transformer_blocks.0.attn.to_q": 2}}, (0.5, 2.0)),
        ({"lora_alpha": 8, "r": 4, "use_rslora": True}, (4.0, 4.0)),
    ],
)
@pytest.mark.parametrize("beside", [False, True])
def test_alpha_is_found_in_a_configuration(
    flux2: Model, tmp_path: Path, config: dict[str, object], scales: tuple[float, float], *, beside: bool
) -> None:
    pairs, path = by_linear(flux2), tmp_path / "adapter_model.safetensors"
    if beside:
        save_file(written(pairs, lambda name: f"base_model.model.{name}", AB), path)
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    else:
        header = json.dumps({f"transformer.{key}": value for key, value in config.items()})
        save_file(written(pairs, lambda name: f"transformer.{name}", AB), path, {"lora_adapter_metadata": header})
    modules = read_lora(str(path), flux2).modules
    found = [modules[f"transformer_blocks.0.attn.to_{part}"].scale for part in "qk"]
    assert found == pytest.approx(scales)


def test_the_last_modulation_has_its_halves_in_bfls_order(flux2: Model, tmp_path: Path) -> None:
    down, up = draw(*shape(flux2, "norm_out.linear"), 0)
    path = tmp_path / "a.safetensors"
    save_file(written({"final_layer.adaLN_modulation.1": (down, up)}, lambda name: f"diffusion_model.{name}", AB), path)
    shift, scale = up.chunk(2)
    same(read_lora(str(path), flux2), {"norm_out.linear": torch.cat([scale, shift]) @ down})


def test_a_file_of_our_own_is_read_as_it_was_trained(flux2: Model, transformer: nn.Module, tmp_path: Path) -> None:
    attach(transformer, "flux2", AdapterSpec(rank=4, alpha=8, targets=["attention", "mlp:2"]), seed=0)
    state = {key: tensor + 0.1 for key, tensor in state_of(transformer).items()}
    adapter = Adapter(state=state, rank=4, alpha=8, targets=["attention", "mlp:2"], family="flux2_small")
    save_adapter(tmp_path / "checkpoints/step-000004" / WEIGHTS, adapter)
    lora = read_lora(str(tmp_path), flux2)
    linears = block_linears(transformer)
    same(lora, {m: 2.0 * state[f"{m}.lora_B.weight"] @ state[f"{m}.lora_A.weight"] for m in linears})
    assert (lora.naming, lora.family) == ("our own", "flux2_small")


@pytest.mark.parametrize("absent", ["", ".to_k"])
def test_our_export_comes_back_as_the_adapter(model: Model, tmp_path: Path, absent: str) -> None:
    trained = {m: p for m, p in by_linear(model).items() if "mod" not in m and "norm" not in m}
    pairs = {m: (a, b) for m, (a, b) in trained.items() if not (absent and m.endswith(absent))}
    odd = next(m for m in pairs if m.endswith("to_v"))
    pairs[odd] = (pairs[odd][0][:2], pairs[odd][1][:, :2])
    path = tmp_path / "a.safetensors"
    architecture = model.family.architecture
    header = {"format": "pt", "modelspec.trigger_phrase": "mystyle"}
    state = {}
    for module, (down, up) in pairs.items():
        state |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
    export_lora(modules_of(state, RANK, ALPHA), path, architecture=architecture, header=header)
    lora = read_lora(str(path), model)
    same(lora, {module: ALPHA / RANK * up @ down for module, (down, up) in pairs.items()})
    assert {m: len(w.down) for m, w in lora.modules.items()} == {m: len(down) for m, (down, _) in pairs.items()}
    assert lora.trigger_word == "mystyle"


# What LoRAs do to a transformer.


def velocity(family: ModelFamily, transformer: nn.Module) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 128, 2, 3, generator=rng)
    conditioning = Conditioning(embeds=torch.randn(2, 5, 24, generator=rng))
    with torch.no_grad():
        return family.velocity(transformer, latents, torch.tensor([0.3, 0.7]), conditioning)


def drawn_lora(model: Model, seed: int, rank: int = RANK) -> Lora:
    """A LoRA on every Linear of the table, at a scale of 0.5."""
    modules = {
        module: LoraWeights(down=down[:rank] + 0.01 * seed, up=up[:, :rank], scale=0.5)
        for module, (down, up) in by_linear(model).items()
    }
    return Lora(modules=modules, naming="kohya", total=len(modules), architecture=model.family.architecture)


def together(model: Model) -> dict[str, Lora]:
    """Two LoRAs of different ranks."""
    return {"a": drawn_lora(model, 0), "b": drawn_lora(model, 1, rank=3)}


def test_attached_loras_start_at_one_and_zero_is_the_base_bit_for_bit(
    family: ModelFamily, flux2: Model, transformer: nn.Module
) -> None:
    quantised(transformer)
    base = velocity(family, transformer)
    names = attach_loras(transformer, together(flux2))
    at_one = velocity(family, transformer)
    set_strengths(transformer, dict.fromkeys(names, 0.0))
    assert torch.equal(velocity(family, transformer), base)
    set_strengths(transformer, dict.fromkeys(names, 1.0))
    assert torch.equal(velocity(family, transformer), at_one)
    assert not torch.allclose(at_one, base, atol=1e-3)


def test_two_loras_at_a_half_equal_the_one_file_of_both(
    family: ModelFamily, flux2: Model, transformer: nn.Module, tmp_path: Path
) -> None:
    whole = deepcopy(transformer)
    loras = together(flux2)
    set_strengths(transformer, dict.fromkeys(attach_loras(transformer, loras), 0.5))
    pairs = {}
    for module, first in loras["a"].modules.items():
        second = loras["b"].modules[module]
        up = torch.cat([0.5 * first.scale * first.up, 0.5 * second.scale * second.up], dim=1)
        pairs[module] = (torch.cat([first.down, second.down]), up)
    save_file(written(pairs, lambda name: f"transformer.{name}", AB), tmp_path / "both.safetensors")
    attach_loras(whole, read_loras([str(tmp_path / "both.safetensors")], flux2))
    torch.testing.assert_close(velocity(family, transformer), velocity(family, whole), rtol=0, atol=1e-5)


@pytest.mark.parametrize("strengths", [(1.0, 0.0), (0.7, -0.4), (0.0, 0.0)])
def test_merged_weights_draw_what_attached_loras_draw(
    family: ModelFamily, flux2: Model, transformer: nn.Module, strengths: tuple[float, float]
) -> None:
    bare = [path for path, _ in transformer.named_modules()]
    names = attach_loras(transformer, together(flux2))
    chosen = dict(zip(names, strengths, strict=True))
    set_strengths(transformer, chosen)
    live = velocity(family, transformer)
    merge_loras(transformer, chosen)
    torch.testing.assert_close(velocity(family, transformer), live, rtol=0, atol=1e-5)
    assert [path for path, _ in transformer.named_modules()] == bare
    assert not hasattr(transformer, "peft_config")
    assert len(attach_loras(transformer, together(flux2))) == 2


@pytest.mark.parametrize("kind", ["fp8", "int8", "nf4"])
def test_a_quantised_base_is_merged_to_the_sum_quantised(flux2: Model, transformer: nn.Module, kind: str) -> None:
    quantised(transformer, kind)
    lora = drawn_lora(flux2, 0)
    wanted = {
        path: transformer.get_submodule(path).weight + 2.0 * weights.scale * weights.up @ weights.down
        for path, weights in lora.modules.items()
    }
    merge_loras(transformer, dict.fromkeys(attach_loras(transformer, {"a": lora}), 2.0))
    for path in block_linears(transformer):
        linear = transformer.get_submodule(path)
        assert isinstance(linear, FrozenLinear)
        assert linear.kind == kind
        again = FrozenLinear(Stored(values=wanted[path]), None, kind, dtype=torch.float32)
        assert (linear.weight - wanted[path]).norm() < 1.01 * (again.weight - wanted[path]).norm()


def test_merging_an_adapter_that_is_not_attached_is_an_error(flux2: Model, transformer: nn.Module) -> None:
    attach_loras(transformer, together(flux2))
    with pytest.raises(KeyError, match="adapter7"):
        merge_loras(transformer, {"adapter7": 1.0})


def test_a_range_of_blocks_changes_these_blocks_and_no_other(
    flux2: Model, transformer: nn.Module, tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    save_file(written(by_linear(flux2), lambda name: f"transformer.{name}", AB), path)
    loras = read_loras([str(path)], flux2, ["single[1:2]", "double.mlp:0.5"])
    before = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    merge_loras(transformer, dict.fromkeys(attach_loras(transformer, loras), 1.0))
    changed = {name for name, tensor in transformer.state_dict().items() if not torch.equal(tensor, before[name])}
    single = {f"single_transformer_blocks.1.attn.{leaf}.weight" for leaf in ("to_qkv_mlp_proj", "to_out")}
    double = {f"transformer_blocks.0.{ff}.linear_{way}.weight" for ff in ("ff", "ff_context") for way in ("in", "out")}
    assert changed == single | double
    assert loras[str(path)].summary.startswith(f"6 of {len(by_linear(flux2))} modules")
    assert loras[str(path)].modules["transformer_blocks.0.ff.linear_in"].scale == 0.5
    assert loras[str(path)].modules["single_transformer_blocks.1.attn.to_out"].scale == 1.0


def test_a_lora_that_is_kept_to_blocks_leaves_other_layers_alone(
    family: ModelFamily, flux2: Model, transformer: nn.Module, tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    save_file(written(by_linear(flux2), lambda name: f"transformer.{name}", AB), path)
    attach_loras(transformer, read_loras([str(path)], flux2, ["single"]))
    assert {name.split(".")[0] for name, _ in lora_layers(transformer)} == {"single_transformer_blocks"}


def test_a_place_that_is_named_twice_is_read_twice(flux2: Model, transformer: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(written(by_linear(flux2), lambda name: f"transformer.{name}", AB), path)
    loras = read_loras([str(path)] * 2, flux2)
    assert list(loras) == [str(path), f"{path} (2)"]
    assert attach_loras(transformer, loras) == ["adapter0", "adapter1"]


# What is refused.

QUERY = "transformer.transformer_blocks.0.attn.to_q"


def unet(tensors: dict[str, Tensor]) -> None:
    tensors.clear()
    name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = torch.ones(4, 640), torch.ones(640, 4)


def renamed(old: str, new: str) -> Callable[[dict[str, Tensor]], None]:
    def damage(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if old in key]:
            tensors[key.replace(old, new)] = tensors.pop(key)

    return damage


def with_key(key: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({key: tensor})


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (unet, r"is a LoRA of a UNet \(SDXL or SD 1.5\), the model is FLUX.2"),
        (renamed("ff.linear_in", "ff.net.0.proj"), "is a LoRA of FLUX.1, the model is FLUX.2"),
        (
            renamed("transformer_blocks.0.ff.", "layers.0.ff."),
            "names that no FLUX.2 .*, 2 of 17: .*layers.0.ff.linear_in",
        ),
        (renamed("single_transformer_blocks.1.", "single_transformer_blocks.9."), "does not have, 2 of 17:"),
        (
            with_key("double_blocks.0.img_attn.qkv.weight", torch.ones(2, 2)),
            "keys that no LoRA has, 1 of 35: .*qkv.weight",
        ),
        (with_key("text_encoder.layers.0.lora_A.weight", torch.ones(2, 2)), "changes text encoders too"),
        (with_key("lora_te1_layers_0.lora_down.weight", torch.ones(2, 2)), "changes text encoders too"),
        (with_key(f"{QUERY}.hada_w1_a", torch.ones(2, 2)), "holds LoHa in 1 of its 35 keys"),
        (with_key(f"{QUERY}.lokr_w1", torch.ones(2, 2)), "holds LoKr in 1 of its 35 keys"),
        (with_key(f"{QUERY}.dora_scale", torch.ones(2, 2)), "holds DoRA in 1 of its 35 keys"),
        (with_key(f"{QUERY}.lora_magnitude_vector", torch.ones(2)), "holds DoRA in 1 of its 35 keys"),
        (with_key(f"{QUERY}.diff_b", torch.ones(2)), "holds whole differences"),
        (with_key(f"{QUERY}.lora_B.bias", torch.ones(2)), "holds LoRA with biases"),
        (lambda tensors: tensors.pop(f"{QUERY}.lora_B.weight"), f"lacks A or B of {QUERY}"),
        (with_key("transformer.proj_out.alpha", torch.ones(())), "lacks A or B of transformer.proj_out"),
        (with_key(f"{QUERY}.lora_A.weight", torch.ones(3, 32)), f"no pair of matrices: {QUERY}"),
        (with_key(f"{QUERY}.lora_A.weight", torch.full((4, 32), torch.nan)), f"not finite in {QUERY}"),
        (with_key(f"{QUERY}.alpha", torch.tensor(torch.inf)), f"not finite in {QUERY}"),
        (with_key(f"{QUERY}.lora_down.weight", torch.ones(4, 32)), f"more than once what it does to {QUERY}"),
        (renamed("transformer.transformer_blocks.0.attn.to_k", "transformer_blocks.0.attn.to_q"), "more than once"),
        (lambda tensors: tensors.clear(), "changes nothing"),
    ],
)
def test_a_file_that_is_not_wholly_of_this_model_is_refused_with_its_cause(
    flux2: Model, tmp_path: Path, damage: Callable[[dict[str, Tensor]], object], text: str
) -> None:
    tensors, path = written(by_linear(flux2), lambda name: f"transformer.{name}", AB), tmp_path / "a.safetensors"
    damage(tensors)
    save_file(tensors, path)
    with pytest.raises(UserError, match=text):
        read_lora(str(path), flux2)


def kohya_of(model: Model, path: Path) -> str:
    _, spelled, halves, alpha = BY_WEIGHT[0]
    tensors = written(by_weight(model), spelled, halves, alpha)
    save_file({key: tensor for key, tensor in tensors.items() if "mod_lin" not in key}, path)
    return str(path)


def test_a_file_of_flux1_is_known_by_its_proportions_where_the_names_are_the_same(
    flux1: Model, flux2: Model, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"is a LoRA of FLUX.1, the model is FLUX.2"):
        read_lora(kohya_of(flux1, tmp_path / "1.safetensors"), flux2)
    with pytest.raises(UserError, match=r"is a LoRA of FLUX.2, the model is FLUX.1"):
        read_lora(kohya_of(flux2, tmp_path / "2.safetensors"), flux1)


def test_a_lora_of_another_size_is_refused_with_both_shapes(flux2: Model, tmp_path: Path) -> None:
    from tests.miniatures import flux2_transformer

    wider = opened(flux2_transformer(48, guidance=False), "flux2_small")
    with pytest.raises(UserError, match=r"of another size, 13 of 21 .*img_attn.qkv \[768 256\] for \[96 32\]") as error:
        read_lora(kohya_of(wider, tmp_path / "a.safetensors"), flux2)
    assert "klein 9B 4096" in error.value.remedy


def test_an_adapter_of_another_family_is_refused_by_name(flux2: Model, tmp_path: Path) -> None:
    other = Adapter(state={"x": torch.zeros(1)}, rank=4, alpha=4, targets=["mlp"], family="flux2_klein")
    save_adapter(tmp_path / WEIGHTS, other)
    with pytest.raises(UserError, match="of the family flux2_klein, the model is of flux2_small"):
        read_lora(str(tmp_path), flux2)


def test_a_truncated_file_and_a_pickle_are_refused(flux2: Model, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    kohya_of(flux2, path)
    path.write_bytes(path.read_bytes()[:-5])
    torch.save({"x": torch.ones(1)}, tmp_path / "a.pt")
    for place in (path, tmp_path / "a.pt"):
        with pytest.raises(UserError, match="is not a whole safetensors file"):
            read_lora(str(place), flux2)


@pytest.mark.parametrize("config", ["{", "[]", '{"lora_alpha": "much"}', '{"alpha_pattern": {"(": 1}}'])
def test_a_configuration_that_cannot_be_read_is_refused(flux2: Model, tmp_path: Path, config: str) -> None:
    path = tmp_path / "a.safetensors"
    tensors = written(by_linear(flux2), lambda name: f"transformer.{name}", AB)
    save_file(tensors, path, {"lora_adapter_metadata": config})
    with pytest.raises(UserError, match="configuration that cannot be read"):
        read_lora(str(path), flux2)


def test_blocks_that_leave_nothing_of_a_file_are_refused(flux2: Model, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    only = {m: p for m, p in by_linear(flux2).items() if m.startswith("single_transformer_blocks.0")}
    save_file(written(only, lambda name: f"transformer.{name}", AB), path)
    with pytest.raises(UserError, match=r"blocks=\[double\] leaves nothing"):
        read_loras([str(path)], flux2, ["double"])
    with pytest.raises(UserError, match=r"blocks names 'single\[7:\]'"):
        read_loras([str(path)], flux2, ["single[7:]"])
