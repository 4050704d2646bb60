"""LoRA files of all namings, read for FLUX.1 and FLUX.2: each means the update that it was written from."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from flux2_lora.adapters import WEIGHTS, Adapter, AdapterSpec, Lora, attach, save_adapter, state_of
from flux2_lora.export import export_lora, modules_of
from flux2_lora.families import Model
from flux2_lora.lora_files import read_lora
from flux2_lora.networks.transformers import block_linears
from tests.namings import (
    AB,
    ALPHA,
    BY_LINEAR,
    BY_WEIGHT,
    RANK,
    by_linear,
    by_weight,
    draw,
    expected,
    flux1_model,
    opened,
    shape,
    written,
)


@pytest.fixture
def flux1() -> Model:
    return flux1_model()


@pytest.fixture
def flux2(transformer: nn.Module) -> Model:
    return opened(transformer, "flux2_small")


@pytest.fixture(params=["flux1", "flux2"])
def model(request: pytest.FixtureRequest) -> Model:
    found: Model = request.getfixturevalue(request.param)
    return found


def same(lora: Lora, updates: Mapping[str, Tensor]) -> None:
    assert lora.modules.keys() == updates.keys()
    for module, weights in lora.modules.items():
        torch.testing.assert_close(weights.scale * weights.up @ weights.down, updates[module], rtol=0, atol=1e-6)


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
