"""The algebra of the exported file, its proof, and the errors."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from flux2_lora.adapters import LoraWeights
from flux2_lora.errors import RunError, UserError
from flux2_lora.export import Proof, export_lora, modules_of, table
from flux2_lora.export.clients import clients_of
from flux2_lora.export.formats import universal
from flux2_lora.export.proof import prove

RANK, WIDTH = 4, 8
BLOCK = {
    **{f"transformer_blocks.0.attn.{name}": (WIDTH, WIDTH) for name in ("to_q", "to_k", "to_v", "to_out.0")},
    **{f"transformer_blocks.0.attn.add_{part}_proj": (WIDTH, WIDTH) for part in "qkv"},
    "transformer_blocks.0.attn.to_add_out": (WIDTH, WIDTH),
    "transformer_blocks.0.ff.linear_in": (6 * WIDTH, WIDTH),
    "transformer_blocks.0.ff.linear_out": (WIDTH, 3 * WIDTH),
    "single_transformer_blocks.11.attn.to_qkv_mlp_proj": (9 * WIDTH, WIDTH),
    "single_transformer_blocks.11.attn.to_out": (WIDTH, 4 * WIDTH),
}
QKV = "lora_unet_double_blocks_0_img_attn_qkv"


def adapter(modules: dict[str, tuple[int, int]] = BLOCK, rank: int = RANK, size: float = 1.0) -> dict[str, Tensor]:
    """Random PEFT tensors for Linears of [out, in]."""
    rng = torch.Generator().manual_seed(0)
    state = {}
    for module, (height, width) in modules.items():
        state[f"{module}.lora_A.weight"] = size * torch.randn(rank, width, generator=rng)
        state[f"{module}.lora_B.weight"] = size * torch.randn(height, rank, generator=rng)
    return state


def update(tensors: dict[str, Tensor], name: str) -> Tensor:
    """alpha / rank * up @ down, as kohya's readers apply it."""
    down, up = tensors[f"{name}.lora_down.weight"].double(), tensors[f"{name}.lora_up.weight"].double()
    return tensors[f"{name}.alpha"].double() / len(down) * up @ down


def exported(
    path: Path, state: dict[str, Tensor], alpha: float = 8.0, dtype: torch.dtype = torch.float32
) -> list[Proof]:
    modules = modules_of(state, RANK, alpha)
    return export_lora(modules, path, architecture="flux2", dtype=dtype, header={"format": "pt"})


@pytest.mark.parametrize("alpha", [1.0, 3.0, 4.0, 8.0])
def test_fused_update_equals_the_separate_ones_at_any_strength(alpha: float) -> None:
    state = adapter()
    tensors = universal(modules_of(state, RANK, alpha), "flux2", torch.float32)
    separate = [
        alpha / RANK * state[f"{m}.lora_B.weight"].double() @ state[f"{m}.lora_A.weight"].double()
        for m in (f"transformer_blocks.0.attn.to_{part}" for part in "qkv")
    ]
    torch.testing.assert_close(update(tensors, QKV), torch.cat(separate), rtol=0, atol=1e-5)


def test_alpha_is_the_rank_of_the_matrix_that_is_written() -> None:
    tensors = universal(modules_of(adapter(), RANK, 8.0), "flux2", torch.bfloat16)
    names = {key.partition(".")[0] for key in tensors}
    assert all(tensors[f"{name}.alpha"] == len(tensors[f"{name}.lora_down.weight"]) for name in names)
    assert tensors[f"{QKV}.alpha"] == 3 * RANK


def test_a_missing_member_leaves_its_rows_as_they_are() -> None:
    state = {key: tensor for key, tensor in adapter().items() if ".to_k." not in key}
    tensors = universal(modules_of(state, RANK, 8.0), "flux2", torch.float32)
    query, key, value = update(tensors, QKV).chunk(3)
    assert not key.any()
    assert query.any()
    assert value.any()


@pytest.mark.parametrize("missing", [[], ["to_q"], ["to_q", "to_v"], ["add_k_proj"]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_clients_read_all_modules(tmp_path: Path, dtype: torch.dtype, missing: list[str]) -> None:
    state = {key: t for key, t in adapter(size=0.1).items() if not any(f".{name}." in key for name in missing)}
    proofs = exported(tmp_path / "a.safetensors", state, alpha=3.0, dtype=dtype)
    assert [proof.client for proof in proofs] == clients_of("flux2")
    assert all(proof.matched == proof.total == len(BLOCK) - len(missing) for proof in proofs)
    assert all(proof.worst < (1e-6 if dtype == torch.float32 else 1e-2) for proof in proofs)


def test_the_scale_is_folded_before_the_cast() -> None:
    state = adapter()
    folded = universal(modules_of(state, RANK, 3.0), "flux2", torch.bfloat16)
    name = "single_transformer_blocks.11.attn.to_out"
    up = folded["lora_unet_single_blocks_11_linear2.lora_up.weight"]
    assert torch.equal(up, (0.75 * state[f"{name}.lora_B.weight"]).to(torch.bfloat16))


def change_one(tensors: dict[str, Tensor]) -> None:
    tensors[f"{QKV}.lora_up.weight"][1, 1] += 1e-3


def rename_one(tensors: dict[str, Tensor]) -> None:
    tensors["lora_unet_double_blocks_0_img_attn.qkv.alpha"] = tensors.pop(f"{QKV}.alpha")


def rename_module(tensors: dict[str, Tensor]) -> None:
    for part in ("lora_down.weight", "lora_up.weight", "alpha"):
        tensors[f"{QKV}_.{part}"] = tensors.pop(f"{QKV}.{part}")


def halve_alpha(tensors: dict[str, Tensor]) -> None:
    tensors["lora_unet_single_blocks_11_linear1.alpha"] /= 2


def forget_module(tensors: dict[str, Tensor]) -> None:
    for part in ("lora_down.weight", "lora_up.weight", "alpha"):
        del tensors[f"{QKV}.{part}"]


def add_module(tensors: dict[str, Tensor]) -> None:
    for part in ("lora_down.weight", "lora_up.weight", "alpha"):
        tensors[f"lora_unet_double_blocks_1_img_attn_qkv.{part}"] = tensors[f"{QKV}.{part}"].clone()


def swap_key_and_value(tensors: dict[str, Tensor]) -> None:
    query, key, value = tensors[f"{QKV}.lora_up.weight"].chunk(3)
    tensors[f"{QKV}.lora_up.weight"] = torch.cat([query, value, key])


def poison_one(tensors: dict[str, Tensor]) -> None:
    tensors[f"{QKV}.lora_down.weight"][0, 0] = torch.nan


def cut_one(tensors: dict[str, Tensor]) -> None:
    tensors[f"{QKV}.lora_up.weight"] = tensors[f"{QKV}.lora_up.weight"][:-1].clone()


DAMAGES = [
    change_one,
    rename_one,
    rename_module,
    halve_alpha,
    forget_module,
    add_module,
    swap_key_and_value,
    poison_one,
    cut_one,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_found_and_removed(tmp_path: Path, damage: Callable[[dict[str, Tensor]], None]) -> None:
    path, state = tmp_path / "a.safetensors", adapter()
    exported(path, state)
    tensors = load_file(path)
    damage(tensors)
    save_file(tensors, path)
    with pytest.raises(RunError, match="did not carry the adapter"):
        prove(path, modules_of(state, RANK, 8.0), "flux2", dtype=torch.float32)
    assert not path.exists()


def test_a_file_that_is_no_safetensors_is_found_and_removed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"not a file of tensors")
    with pytest.raises(RunError):
        prove(path, modules_of(adapter(), RANK, 8.0), "flux2", dtype=torch.float32)
    assert not path.exists()


def test_half_strength_is_found_however_small_the_adapter(tmp_path: Path) -> None:
    path, state = tmp_path / "a.safetensors", adapter(size=1e-4)
    exported(path, state, dtype=torch.bfloat16)
    with pytest.raises(RunError):
        prove(path, modules_of(state, RANK, 4.0), "flux2", dtype=torch.bfloat16)


def test_a_failed_proof_keeps_the_earlier_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    exported(path, adapter())
    before = path.read_bytes()
    with pytest.raises(RunError):
        exported(path, adapter(size=1e-6), dtype=torch.float16)
    assert path.read_bytes() == before
    assert {file.name for file in tmp_path.iterdir()} == {"a.safetensors", "a.proof.json"}


def test_the_hash_is_of_the_tensors_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    exported(path, adapter())
    raw = path.read_bytes()
    after_header = raw[8 + int.from_bytes(raw[:8], "little") :]
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["modelspec.hash_sha256"] == "0x" + hashlib.sha256(after_header).hexdigest()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s: s.update({"base.weight": torch.ones(1)}), "other tensors than .* base.weight"),
        (lambda s: s.pop(f"{next(iter(BLOCK))}.lora_B.weight"), "only one of lora_A and lora_B of transformer_blocks"),
        (lambda s: s.update({f"{next(iter(BLOCK))}.lora_A.weight": torch.ones(3, 8)}), r"other than \[rank in\]"),
        (lambda s: s.update({f"{next(iter(BLOCK))}.lora_A.weight": torch.full((4, 8), torch.inf)}), "not finite"),
        (lambda s: s.clear(), "holds no tensors"),
    ],
)
def test_a_broken_adapter_is_refused_by_name(change: Callable[[dict[str, Tensor]], object], text: str) -> None:
    state = adapter()
    change(state)
    with pytest.raises(UserError, match=text):
        modules_of(state, RANK, 8.0)


def test_a_linear_outside_the_blocks_is_refused(tmp_path: Path) -> None:
    state = adapter({"proj_out": (WIDTH, WIDTH)})
    with pytest.raises(UserError, match=r"some clients drop .*: proj_out"):
        exported(tmp_path / "a.safetensors", state)
    assert not any(tmp_path.iterdir())


def test_members_of_one_weight_must_agree_in_shape() -> None:
    names = [f"transformer_blocks.0.attn.to_{part}" for part in "qkv"]
    odd = adapter({names[0]: (8, 8), names[1]: (16, 8), names[2]: (8, 8)})
    with pytest.raises(UserError, match="differ in shape"):
        universal(modules_of(odd, RANK, 8.0), "flux2", torch.float32)


def test_invokeai_is_noted_where_it_would_take_the_file_for_flux1(tmp_path: Path) -> None:
    attention = {name: (8, 3072) for name in BLOCK if name.endswith("to_out.0")}
    both = {**attention, "transformer_blocks.0.ff.linear_in": (8, 3072)}
    notes = [
        next(p.note for p in exported(tmp_path / "a.safetensors", adapter(modules)) if p.client == "InvokeAI")
        for modules in (attention, both, BLOCK)
    ]
    assert [bool(note) for note in notes] == [True, False, False]


def test_the_table_is_aligned_text() -> None:
    proofs = [
        Proof(client="ComfyUI", matched=22, total=22, worst=1.2e-7),
        Proof(client="Forge Neo", matched=9, total=22, worst=0.5, note="a note"),
    ]
    assert table(proofs).splitlines() == [
        "client     modules   worst difference",
        "ComfyUI    22 of 22  1.2e-07",
        "Forge Neo  9 of 22   5.0e-01",
        "Forge Neo: a note",
    ]


@pytest.mark.parametrize(("code", "kind"), [(errno.ENOSPC, RunError), (errno.EACCES, UserError)])
def test_a_disk_that_takes_nothing_is_named_and_left_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, kind: type[Exception]
) -> None:
    path = tmp_path / "a.safetensors"
    exported(path, adapter())
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("flux2_lora.files.os.fsync", fail)
    with pytest.raises(kind, match=r"a\.safetensors"):
        exported(path, adapter(size=2.0))
    assert path.read_bytes() == before
    assert {file.name for file in tmp_path.iterdir()} == {"a.safetensors", "a.proof.json"}


def test_what_rounding_would_drown_is_refused(tmp_path: Path) -> None:
    """Two updates that all but cancel each other leave less than the last digits of bfloat16."""
    down, up = torch.randn(4, WIDTH), torch.randn(WIDTH, 4)
    name = "single_transformer_blocks.11.attn.to_out"
    pair = LoraWeights(down=torch.cat([down, down]), up=torch.cat([up, -0.999 * up], dim=1), scale=1.0)
    with pytest.raises(RunError, match="did not carry") as refusal:
        export_lora({name: pair}, tmp_path / "a.safetensors", architecture="flux2", dtype=torch.bfloat16, header={})
    assert "dtype=fp32" in refusal.value.remedy
    export_lora({name: pair}, tmp_path / "a.safetensors", architecture="flux2", header={})


def test_the_header_tells_the_rank_of_the_largest_matrix(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    told = {"ss_network_dim": "4", "ss_network_alpha": "4.0"}
    export_lora(modules_of(adapter(), RANK, 8.0), path, architecture="flux2", header=told)
    with safe_open(path, framework="pt") as file:
        found = file.metadata()
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("12", "12.0")


def test_the_last_layer_goes_to_comfyui_with_its_halves_exchanged(tmp_path: Path) -> None:
    path, modules = tmp_path / "a.safetensors", modules_of(adapter({"norm_out.linear": (2 * WIDTH, WIDTH)}), RANK, 8.0)
    proofs = {p.client: p for p in export_lora(modules, path, architecture="flux2", header={}, format="comfyui")}
    assert proofs["ComfyUI"].whole
    assert not proofs["Diffusers"].whole
    up = load_file(path)["diffusion_model.final_layer.adaLN_modulation.1.lora_B.weight"]
    assert torch.equal(up, torch.cat((2.0 * modules["norm_out.linear"].up).chunk(2)[::-1]))
