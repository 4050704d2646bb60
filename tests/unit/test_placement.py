"""Where blocks lie: loaded to memory or to a file on disk, and what becomes of a file that is harmed."""

from __future__ import annotations

import errno
import os
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from flux2_lora import host
from flux2_lora.adapters import attach_loras, merge_loras
from flux2_lora.conditioning import Conditioning
from flux2_lora.errors import RunError
from flux2_lora.families import Model, load_family
from flux2_lora.files import FileDigests
from flux2_lora.host import Packed
from flux2_lora.networks.transformers import block_linears
from flux2_lora.placement import Placement
from flux2_lora.quantize import FrozenLinear, PrecisionSpec, load_frozen
from flux2_lora.stream import spread
from flux2_lora.training.memory import MemorySpec
from flux2_lora.weights import Weights
from tests.streamed import CPU, some_lora


def placed(folder: Path, host: str, resident: int = 2) -> Placement:
    return Placement(resident=spread(resident, 6), slots=2, host=host, folder=folder)


def said(transformer: nn.Module) -> Tensor:
    family, noise = load_family("flux2_small"), torch.Generator().manual_seed(0)
    latents, text = torch.randn(1, 128, 2, 2, generator=noise), torch.randn(1, 3, 128, generator=noise)
    with torch.no_grad():
        once = [family.velocity(transformer, latents, torch.tensor([s]), Conditioning(embeds=text)) for s in (0.9, 0.4)]
    return torch.cat(once)


@pytest.mark.parametrize("kind", ["fp8", "nf4", "bf16"])
def test_a_model_is_loaded_to_memory_or_disk_block_by_block_and_says_the_same(
    tiny_model: Model, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flux2_lora.quantize.compute_dtype", lambda _: torch.float32)
    spec = PrecisionSpec(base=kind)
    expected = said(load_frozen(tiny_model, spec, CPU))
    assert torch.equal(said(load_frozen(tiny_model, spec, CPU, placed(tmp_path, "pinned"))), expected)
    assert torch.equal(said(load_frozen(tiny_model, spec, CPU, placed(tmp_path, "disk"))), expected)
    read, names = Weights.read, []
    monkeypatch.setattr(Weights, "read", lambda self, name: names.append(name) or read(self, name))
    again = load_frozen(tiny_model, spec, CPU, placed(tmp_path, "disk", resident=0))
    assert torch.equal(said(again), expected)
    assert names
    assert not [name for name in names if "transformer_blocks" in name and "norm" not in name]
    assert len(list(tmp_path.glob("*/blocks.bin"))) == 1


def test_what_is_merged_on_disk_leaves_the_shared_file_as_it_is(tiny_model: Model, tmp_path: Path) -> None:
    results = []
    for placement in (None, placed(tmp_path, "disk")):
        transformer = load_frozen(tiny_model, PrecisionSpec(), CPU, placement)
        before = [file.read_bytes() for file in tmp_path.glob("*/blocks.bin")]
        merge_loras(transformer, dict.fromkeys(attach_loras(transformer, {"a": some_lora(transformer)}), 1.0))
        results.append(said(transformer))
    assert torch.equal(*results)
    assert [file.read_bytes() for file in tmp_path.glob("*/blocks.bin")] == before


def test_a_file_of_blocks_is_made_with_one_block_in_memory(
    tiny_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive = weakref.WeakSet[FrozenLinear]()
    most, made = 0, host.pack

    def packed(block: nn.Module) -> Packed:
        nonlocal most
        alive.update(module for module in block.modules() if isinstance(module, FrozenLinear))
        most = max(most, len(alive))
        return made(block)

    monkeypatch.setattr(host, "pack", packed)
    load_frozen(tiny_model, PrecisionSpec(), CPU, placed(tmp_path, "disk"))
    of_a_block = [
        sum(".0." in path for path in block_linears(tiny_model.empty_transformer()) if path.startswith(kind))
        for kind in ("transformer_blocks", "single_transformer_blocks")
    ]
    assert most == max(of_a_block)


def test_a_file_of_blocks_that_was_not_finished_is_made_again(tiny_model: Model, tmp_path: Path) -> None:
    load_frozen(tiny_model, PrecisionSpec(), CPU, placed(tmp_path, "disk"))
    place = next(tmp_path.glob("*/blocks.bin")).parent
    whole = (place / "blocks.bin").read_bytes()
    place.rename(tmp_path / f".{place.name}.part")
    (tmp_path / f".{place.name}.part" / "blocks.bin").write_bytes(b"half")
    load_frozen(tiny_model, PrecisionSpec(), CPU, placed(tmp_path, "disk"))
    assert (place / "blocks.bin").read_bytes() == whole


def cut_in_half(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("name", ["blocks.bin", "scales.safetensors"])
@pytest.mark.parametrize("harm", [Path.unlink, cut_in_half])
def test_a_file_of_blocks_that_was_harmed_is_made_again(
    tiny_model: Model, tmp_path: Path, name: str, harm: Callable[[Path], None]
) -> None:
    load_frozen(tiny_model, PrecisionSpec(), CPU, placed(tmp_path, "disk"))
    (file,) = tmp_path.glob(f"*/{name}")
    whole = file.read_bytes()
    harm(file)
    load_frozen(tiny_model, PrecisionSpec(), CPU, placed(tmp_path, "disk"))
    assert file.read_bytes() == whole


def test_a_file_of_blocks_that_fails_while_it_is_read_is_told(tiny_model: Model, tmp_path: Path) -> None:
    transformer = load_frozen(tiny_model, PrecisionSpec(), CPU, placed(tmp_path, "disk"))
    (file,) = tmp_path.glob("*/blocks.bin")
    os.truncate(file, 4096)
    with pytest.raises(RunError, match=r"memory.host=disk: .*blocks.bin cannot be read .*ends before its last block"):
        said(transformer)


def test_a_disk_that_is_full_keeps_nothing_of_the_file(
    tiny_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("flux2_lora.host._write_at", full)
    with pytest.raises(RunError, match="the disk is full"):
        load_frozen(tiny_model, PrecisionSpec(), CPU, placed(tmp_path, "disk"))
    assert not [path for path in tmp_path.rglob("*") if path.is_dir()]


def test_memory_options_come_before_a_choice_and_a_choice_before_what_is_usual() -> None:
    class Chosen:
        resident_blocks, slots, plain_blocks, inputs_on_host, host = 3, 4, 1, False, "memory"

    cuda = torch.device("cuda")
    assert MemorySpec().placement(6) is None
    assert (MemorySpec().plain(6, CPU), MemorySpec().plain(6, cuda)) == (frozenset(range(6)), frozenset())
    chosen = MemorySpec().placement(6, Chosen())
    assert chosen is not None
    assert (len(chosen.resident), chosen.slots, len(MemorySpec().plain(6, cuda, Chosen()))) == (3, 4, 1)
    given = MemorySpec(resident_blocks=1, slots=2, plain_blocks=0).placement(6, Chosen())
    assert given is not None
    assert (len(given.resident), given.slots) == (1, 2)
    assert (chosen.host, given.host) == ("memory", "memory")
    asked = MemorySpec(host="disk").placement(6, Chosen())
    assert asked is not None
    assert asked.host == "disk"
    assert MemorySpec(resident_blocks=1000).placement(6, Chosen()) is None


def test_auto_takes_the_disk_where_host_memory_does_not_hold_the_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flux2_lora.placement.host_bytes", lambda: 10_000)
    auto = placed(tmp_path, "auto")
    assert auto.host_for(8_001, CPU) == "disk"
    assert auto.host_for(8_000, CPU) == "staged"
    assert auto.host_for(8_000, torch.device("cuda")) == "pinned"


def test_a_plan_that_counted_on_memory_gets_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flux2_lora.placement.host_bytes", lambda: 10_000)
    planned = placed(tmp_path, "memory")
    assert planned.host_for(9_000, CPU) == "staged"
    assert planned.host_for(9_000, torch.device("cuda")) == "pinned"


def test_a_single_files_digest_is_that_of_its_bytes(tmp_path: Path) -> None:
    one, same, other = (tmp_path / name for name in ("one.safetensors", "same.safetensors", "other.safetensors"))
    for file, content in ((one, b"a"), (same, b"a"), (other, b"b")):
        file.write_bytes(content)
    digests = FileDigests(tmp_path / "files.json")
    assert digests.of(one) == digests.of(same) != digests.of(other)
