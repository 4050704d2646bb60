"""The exported file in Diffusers' own loader: every merged weight is the base plus the trained update."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel, FluxPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flux2_lora.adapters import Lora, attach_loras
from flux2_lora.export import FORMATS, export_lora, modules_of
from flux2_lora.keys import is_target

RANK, ALPHA = 4, 8.0


def transformer() -> Flux2Transformer2DModel:
    torch.manual_seed(0)
    return Flux2Transformer2DModel(
        attention_head_dim=128,
        num_attention_heads=2,
        num_layers=1,
        num_single_layers=2,
        in_channels=128,
        joint_attention_dim=64,
        guidance_embeds=False,
    )


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Linear -> a copy of its weight [out in]."""
    return {name: m.weight.detach().clone() for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def adapter(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A random PEFT state for every Linear of the blocks, with updates of about the size of the weights."""
    rng = torch.Generator().manual_seed(1)
    state = {}
    for name, weight in weights.items():
        if is_target("flux2", name):
            height, width = weight.shape
            state[f"{name}.lora_A.weight"] = 0.1 * torch.randn(RANK, width, generator=rng)
            state[f"{name}.lora_B.weight"] = 0.1 * torch.randn(height, RANK, generator=rng)
    return state


def merged(path: Path) -> dict[str, Tensor]:
    """The weights after Flux2KleinPipeline has loaded `path` and fused it."""
    pipeline = Flux2KleinPipeline(None, None, None, None, transformer())
    pipeline.load_lora_weights(path.parent, weight_name=path.name, local_files_only=True)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    return weights_of(pipeline.transformer)


def differences(path: Path, state: Mapping[str, Tensor]) -> dict[str, float]:
    """Linear -> largest |merged - (base + alpha / rank * B A)|."""
    base, result = weights_of(transformer()), merged(path)
    assert base.keys() == result.keys()
    errors = {}
    for name, weight in base.items():
        down, up = state.get(f"{name}.lora_A.weight"), state.get(f"{name}.lora_B.weight")
        update = ALPHA / RANK * up @ down if down is not None and up is not None else torch.zeros(())
        errors[name] = (result[name] - (weight + update)).abs().max().item()
    return errors


@pytest.fixture(params=list(FORMATS))
def exported(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    path, state = tmp_path / "style.safetensors", adapter(weights_of(transformer()))
    modules = modules_of(state, RANK, ALPHA)
    export_lora(modules, path, architecture="flux2", header={"format": "pt"}, format=request.param)
    return path, state


def test_every_merged_weight_is_the_base_plus_the_update(exported: tuple[Path, dict[str, Tensor]]) -> None:
    path, state = exported
    assert max(differences(path, state).values()) < 1e-6


def test_every_linear_of_the_blocks_is_updated_and_no_other(exported: tuple[Path, dict[str, Tensor]]) -> None:
    base, result = weights_of(transformer()), merged(exported[0])
    updated = {name for name in base if not torch.equal(base[name], result[name])}
    assert updated == {name for name in base if is_target("flux2", name)}


def test_a_missing_member_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "style.safetensors"
    state = {key: t for key, t in adapter(weights_of(transformer())).items() if ".to_q." not in key}
    export_lora(modules_of(state, RANK, ALPHA), path, architecture="flux2", header={"format": "pt"})
    assert max(differences(path, state).values()) < 1e-6


@torch.no_grad()
def test_the_adapted_model_of_diffusers_and_ours_have_equal_outputs(exported: tuple[Path, dict[str, Tensor]]) -> None:
    path, state = exported
    pipeline = Flux2KleinPipeline(None, None, None, None, transformer())
    pipeline.load_lora_weights(path.parent, weight_name=path.name, local_files_only=True)
    ours, modules = transformer(), modules_of(state, RANK, ALPHA)
    attach_loras(ours, {"": Lora(modules=modules, naming="", total=len(modules), architecture="flux2")})
    rng = torch.Generator().manual_seed(3)
    call = {
        "hidden_states": torch.randn(1, 6, 128, generator=rng),
        "encoder_hidden_states": torch.randn(1, 4, 64, generator=rng),
        "timestep": torch.tensor([0.4]),
        "img_ids": torch.cartesian_prod(*(torch.arange(n) for n in (1, 2, 3, 1)))[None],
        "txt_ids": torch.cartesian_prod(*(torch.arange(n) for n in (1, 1, 1, 4)))[None],
        "guidance": None,
        "return_dict": False,
    }
    expected, base = ours(**call)[0], transformer()(**call)[0]
    torch.testing.assert_close(pipeline.transformer(**call)[0], expected, rtol=0, atol=1e-5)
    assert (expected - base).abs().max() > 1e-2


@pytest.mark.parametrize("exported", ["universal"], indirect=True)
def test_a_wrong_alpha_fails_this_comparison(exported: tuple[Path, dict[str, Tensor]]) -> None:
    path, state = exported
    tensors = load_file(path)
    tensors["lora_unet_double_blocks_0_img_attn_qkv.alpha"] *= RANK / ALPHA
    save_file(tensors, path)
    wrong = {name for name, error in differences(path, state).items() if error > 1e-6}
    assert wrong == {f"transformer_blocks.0.attn.to_{part}" for part in "qkv"}


FLUX1 = {
    **{f"transformer_blocks.3.attn.{leaf}": 3072 for leaf in ("to_q", "to_k", "to_v", "to_out.0", "to_add_out")},
    **{f"transformer_blocks.3.attn.add_{part}_proj": 3072 for part in "qkv"},
    **{f"transformer_blocks.3.{ff}.net.{leaf}": 3072 for ff in ("ff", "ff_context") for leaf in ("0.proj", "2")},
    **{f"single_transformer_blocks.7.attn.to_{part}": 3072 for part in "qkv"},
    "single_transformer_blocks.7.proj_mlp": 4 * 3072,
    "single_transformer_blocks.7.proj_out": 3072,
}


@pytest.mark.parametrize(
    ("ranks", "absent"),
    [({}, ""), ({"proj_mlp": 8}, ""), ({"to_q": 2, "to_k": 6}, ""), ({}, "proj_mlp"), ({}, ".to_k")],
    ids=["one rank", "a rank for mlp", "three ranks", "no proj_mlp", "no to_k"],
)
def test_diffusers_reads_every_update_of_flux1(ranks: dict[str, int], absent: str, tmp_path: Path) -> None:
    """At FLUX.1's real heights, which its converter has written into it, and five columns."""
    rng = torch.Generator().manual_seed(2)
    state: dict[str, Tensor] = {}
    for name, height in FLUX1.items():
        rank = next((r for part, r in ranks.items() if name.endswith(part)), RANK)
        if not absent or not name.endswith(absent):
            state[f"{name}.lora_A.weight"] = 0.1 * torch.randn(rank, 5, generator=rng)
            state[f"{name}.lora_B.weight"] = 0.1 * torch.randn(height, rank, generator=rng)
    path = tmp_path / "style.safetensors"
    proofs = export_lora(modules_of(state, RANK, ALPHA), path, architecture="flux1", header={"format": "pt"})
    assert all(proof.matched == proof.total > 0 for proof in proofs)
    read = FluxPipeline.lora_state_dict(tmp_path, weight_name=path.name, local_files_only=True)
    found = {key.removeprefix("transformer."): tensor for key, tensor in read.items()}
    for name, height in FLUX1.items():
        down, up = (found[f"{name}.lora_{half}.weight"] for half in "AB")
        trained = f"{name}.lora_A.weight" in state
        wanted = ALPHA / RANK * state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"] if trained else 0.0
        assert up.shape[0] == height
        assert (up @ down - wanted).abs().max() < 1e-6, name
