"""Laws of export over all formats and both architectures, and what becomes of files that were damaged."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from flux2_lora.adapters import Lora, LoraWeights, summed
from flux2_lora.errors import UserError
from flux2_lora.export import FORMATS, export_lora, export_peft
from flux2_lora.export.formats import comfyui
from flux2_lora.export.header import WRITTEN_BY
from flux2_lora.export.proof import norm, relative_difference
from flux2_lora.export.resize import resized
from flux2_lora.keys import ARCHITECTURES
from flux2_lora.lora_files import read_any

HIDDEN = 6


def drawn(architecture: str, seed: int, *, most: int = 5) -> dict[str, LoraWeights]:
    """Some of the Linears of two double and two single blocks, each at a rank and with a scale of its own."""
    chance, rng = random.Random(seed), torch.Generator().manual_seed(seed)
    names = [(n.replace("*", b), place) for n, place in ARCHITECTURES[architecture].blocks.items() for b in "01"]
    modules = {}
    for name, place in chance.sample(names, chance.randint(1, len(names))):
        height = HIDDEN * (place.stop - place.start) * (1 if place.parts > 1 else place_height(architecture, name))
        rank = chance.randint(1, most)
        down, up = torch.randn(rank, 8, generator=rng), torch.randn(height, rank, generator=rng)
        modules[name] = LoraWeights(down=down, up=up, scale=chance.choice([0.5, 1.0, 3 / 7, 2.0]))
    return modules


def place_height(architecture: str, name: str) -> int:
    """Rows in units of HIDDEN, so that FLUX.1's 7 and FLUX.2's 9 of a fused weight are told apart."""
    return 9 if name.endswith("to_qkv_mlp_proj") and architecture == "flux2" else 1


def written(modules: dict[str, LoraWeights], architecture: str, form: str, path: Path) -> Path:
    if form == "peft":
        lora = Lora(modules=modules, naming="", total=len(modules), architecture=architecture)
        export_peft(lora, path, family=architecture, targets=["attention"])
    else:
        told = {"modelspec.architecture": f"{architecture}/lora", WRITTEN_BY: "1"}
        export_lora(modules, path, architecture=architecture, header=told, format=form)
    return path


def same(one: dict[str, LoraWeights], other: dict[str, LoraWeights]) -> bool:
    names = one.keys() | other.keys()
    return max(relative_difference(one.get(name), other.get(name)) for name in names) < 1e-6


@pytest.mark.parametrize("form", [*FORMATS, "peft"])
@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
@given(seed=st.integers(0, 2**16))
@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_an_export_comes_back_with_equal_updates(tmp_path: Path, architecture: str, form: str, seed: int) -> None:
    modules = drawn(architecture, seed)
    lora = read_any(str(written(modules, architecture, form, tmp_path / "a.safetensors")))
    assert lora.architecture == architecture
    assert same(lora.modules, modules)


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
@pytest.mark.parametrize("first", list(FORMATS))
def test_a_file_of_one_naming_goes_through_all_others_and_back(tmp_path: Path, architecture: str, first: str) -> None:
    modules = drawn(architecture, 3)
    lora = read_any(str(written(modules, architecture, first, tmp_path / "first.safetensors")))
    for form in (*FORMATS, "peft"):
        lora = read_any(str(written(lora.modules, architecture, form, tmp_path / f"{form}.safetensors")))
    assert same(lora.modules, modules)


def test_a_file_whose_trainer_adapts_fused_weights_keeps_its_rank(tmp_path: Path) -> None:
    down, up = torch.randn(4, 8), torch.randn(3 * HIDDEN, 4)
    name = "diffusion_model.double_blocks.0.img_attn.qkv"
    tensors = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    save_file(tensors, tmp_path / "a.safetensors", {"modelspec.architecture": "Flux.2-klein-4b/lora"})
    again = comfyui(read_any(str(tmp_path / "a.safetensors")).modules, "flux2", torch.float32)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)


def test_a_sum_has_the_weighted_updates_of_all() -> None:
    one, other = drawn("flux2", 1), drawn("flux2", 2)
    loras = [Lora(modules=m, naming="", total=len(m), architecture="flux2") for m in (one, other)]
    total = summed(loras, [0.5, -2.0])
    assert total.keys() == one.keys() | other.keys()
    for name, pair in total.items():
        parts = [w * m[name].scale * m[name].up @ m[name].down for m, w in ((one, 0.5), (other, -2.0)) if name in m]
        assert torch.allclose(pair.scale * pair.up @ pair.down, torch.stack(parts).sum(0), atol=1e-5)


def test_a_lower_rank_is_the_best_one_and_its_error_is_what_is_lost() -> None:
    name = "single_transformer_blocks.0.attn.to_out"
    modules = {name: LoraWeights(down=torch.randn(6, 20), up=torch.randn(30, 6), scale=0.5)}
    smaller, error = resized(modules, 2, "flux2")
    whole = 0.5 * modules[name].up.double() @ modules[name].down.double()
    values = torch.linalg.svdvals(whole)
    assert len(smaller[name].down) == 2
    assert error == pytest.approx(float(values[2:].norm() / values.norm()), rel=1e-6)
    assert relative_difference(modules[name], smaller[name]) == pytest.approx(error, rel=1e-4)


def test_a_rank_that_is_low_already_stays() -> None:
    pair = LoraWeights(down=torch.randn(2, 20), up=torch.randn(30, 2), scale=0.5)
    modules = {"single_transformer_blocks.0.attn.to_out": pair}
    assert resized(modules, 2, "flux2") == (modules, 0.0)


def test_linears_that_share_a_factor_are_resized_as_one() -> None:
    down = torch.randn(6, 20)
    names = [f"transformer_blocks.0.attn.to_{part}" for part in "qkv"]
    modules = {name: LoraWeights(down=down, up=torch.randn(HIDDEN, 6), scale=0.5) for name in names}
    smaller, error = resized(modules, 4, "flux2")
    tensors = comfyui(smaller, "flux2", torch.float32)
    assert tensors["diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight"].shape == (4, 20)
    assert 0 < error < 1


def test_the_norm_of_a_product_is_that_of_the_whole_matrix() -> None:
    pair = LoraWeights(down=torch.randn(3, 20), up=torch.randn(30, 3), scale=-0.7)
    assert norm(pair) == pytest.approx(float((-0.7 * pair.up @ pair.down).norm()), rel=1e-5)


# Damaged files.


def flipped_number(raw: bytearray, chance: random.Random, start: int) -> None:
    raw[chance.randrange(start, len(raw))] ^= 1 << chance.randrange(8)


def flipped_length(raw: bytearray, chance: random.Random, start: int) -> None:
    raw[chance.randrange(8)] ^= 1 << chance.randrange(8)


def flipped_name(raw: bytearray, chance: random.Random, start: int) -> None:
    """One bit of the table of tensors, behind the metadata."""
    table = raw.index(b'"lora_unet_')
    raw[chance.randrange(table, start - 8)] ^= 1 << chance.randrange(5)


def cut(raw: bytearray, chance: random.Random, start: int) -> None:
    del raw[chance.randrange(len(raw)) :]


def cut_header(raw: bytearray, chance: random.Random, start: int) -> None:
    at = chance.randrange(8, start - 1)
    del raw[at : chance.randrange(at + 1, start)]


def rewritten(
    raw: bytearray, start: int, change: Callable[[dict[str, dict[str, object]], str], None], key: str
) -> None:
    head = json.loads(raw[8:start])
    change(head, key)
    text = json.dumps(head).encode()
    raw[:start] = len(text).to_bytes(8, "little") + text


def wrong_shape(raw: bytearray, chance: random.Random, start: int) -> None:
    def change(head: dict[str, dict[str, object]], key: str) -> None:
        shape = list(head[key]["shape"])  # type: ignore[call-overload]
        head[key]["shape"] = chance.choice([shape[::-1] if len(set(shape)) > 1 else [1, *shape], [*shape, 2], []])

    rewritten(raw, start, change, chance.choice([k for k in json.loads(raw[8:start]) if k.endswith("weight")]))


def absurd_size(raw: bytearray, chance: random.Random, start: int) -> None:
    def change(head: dict[str, dict[str, object]], key: str) -> None:
        head[key]["shape"] = [2 ** chance.randrange(20, 62), 8]
        if chance.random() < 0.5:
            head[key]["data_offsets"] = [0, 2 ** chance.randrange(20, 62)]

    rewritten(raw, start, change, chance.choice([k for k in json.loads(raw[8:start]) if k.endswith("weight")]))


def wrong_type(raw: bytearray, chance: random.Random, start: int) -> None:
    def change(head: dict[str, dict[str, object]], key: str) -> None:
        head[key]["dtype"] = chance.choice(["I32", "U32", "F64", "I8", "BOOL", "nonsense"])

    rewritten(raw, start, change, chance.choice([k for k in json.loads(raw[8:start]) if k.endswith("weight")]))


def header_of_gigabytes(raw: bytearray, chance: random.Random, start: int) -> None:
    raw[:8] = (2 ** chance.randrange(31, 63)).to_bytes(8, "little")


KINDS = [
    flipped_number,
    flipped_length,
    flipped_name,
    cut,
    cut_header,
    wrong_shape,
    absurd_size,
    wrong_type,
    header_of_gigabytes,
]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("sound") / "a.safetensors"
    return written(drawn("flux2", 5), "flux2", "universal", path).read_bytes()


def test_three_hundred_damaged_files_are_refused_by_name_at_once(sound: bytes, tmp_path: Path) -> None:
    chance, path, process = random.Random(0), tmp_path / "damaged.safetensors", psutil.Process(os.getpid())
    start = 8 + int.from_bytes(sound[:8], "little")
    before, slowest = process.memory_info().rss, 0.0
    for number in range(300):
        raw, kind = bytearray(sound), KINDS[number % len(KINDS)]
        kind(raw, chance, start)
        path.write_bytes(raw)
        began = time.process_time()
        with pytest.raises(UserError, match="damaged"):
            read_any(str(path))
        slowest = max(slowest, time.process_time() - began)
    assert slowest < 1
    assert process.memory_info().rss - before < 200e6


def test_the_file_that_was_damaged_is_sound_itself(sound: bytes, tmp_path: Path) -> None:
    (tmp_path / "damaged.safetensors").write_bytes(sound)
    assert read_any(str(tmp_path / "damaged.safetensors")).modules


def test_a_hash_of_another_program_is_no_reason_to_refuse(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = load_file(written(drawn("flux2", 5), "flux2", "universal", path))
    save_file(tensors, path, {"modelspec.architecture": "Flux.2/lora", "modelspec.hash_sha256": "0x00"})
    assert read_any(str(path)).modules
