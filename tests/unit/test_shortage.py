"""Memory that runs out is told with options that need less, and by how much."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flux2_lora.adapters import AdapterSpec
from flux2_lora.errors import RunError
from flux2_lora.families import Model
from flux2_lora.quantize import PrecisionSpec
from flux2_lora.training.memory import MemorySpec
from flux2_lora.training.shortage import Demand, demand_of, is_shortage, knobs, shortage_told

DEMAND = Demand(
    batch_size=4,
    picture_tokens=1024,
    text_tokens=512,
    width_bytes=6144,
    blocks=57,
    plain_blocks=10,
    resident_bytes=3_000_000_000,
    adapter_bytes=700_000_000,
)


def test_options_are_named_with_what_they_free_the_most_first() -> None:
    found = knobs(DEMAND, resolution=512, rank=16)
    unit = 4 * 1536 * 6144
    freed = {knob.option: knob.freed_bytes for knob in found}
    assert list(freed.values()) == sorted(freed.values(), reverse=True)
    assert freed["memory.resident_blocks=0"] == 3_000_000_000
    assert freed["adapter.rank=8"] == 350_000_000
    assert freed["memory.plain_blocks=0"] == 10 * 22 * unit
    assert freed["batch_size=2"] == DEMAND.activation_bytes // 2
    assert (
        freed["dataset.resolution=384"]
        == DEMAND.activation_bytes - replace(DEMAND, picture_tokens=576).activation_bytes
    )


@pytest.mark.parametrize("there", [True, False, None])
def test_inputs_of_blocks_can_leave_where_they_lie_on_a_card(there: bool | None) -> None:  # noqa: FBT001
    found = knobs(replace(DEMAND, inputs_on_host=there), resolution=512, rank=16)
    freed = {knob.option: knob.freed_bytes for knob in found if knob.option.startswith("memory.block_inputs")}
    assert freed == ({"memory.block_inputs=host": (47 - 2) * 4 * 1536 * 6144} if there is False else {})


def test_an_option_that_frees_nothing_is_not_named() -> None:
    small = replace(DEMAND, batch_size=1, plain_blocks=0, resident_bytes=0)
    assert {knob.option.partition("=")[0] for knob in knobs(small, resolution=512, rank=1)} == {"dataset.resolution"}


def test_a_runs_demand_is_read_off_its_model(tiny_model: Model) -> None:
    def of(memory: MemorySpec, rank: int = 4) -> Demand:
        return demand_of(
            tiny_model,
            PrecisionSpec(base="fp8"),
            memory,
            AdapterSpec(rank=rank),
            torch.device("cpu"),
            batch_size=2,
            side_px=64,
            text_tokens=32,
        )

    streamed = of(MemorySpec(resident_blocks=0, plain_blocks=1))
    assert (streamed.blocks, streamed.plain_blocks, streamed.resident_bytes) == (6, 1, 0)
    assert (streamed.picture_tokens, streamed.width_bytes) == (16, 256 * 4)
    resident = of(MemorySpec())
    assert resident.plain_blocks == 6
    linears = [shape for name, shape in tiny_model.weights.shapes.items() if "transformer_blocks" in name]
    numbers = sum(rows * columns for rows, columns in (shape for shape in linears if len(shape) == 2))
    assert resident.resident_bytes == numbers * 4 // 6
    assert of(MemorySpec(), rank=8).adapter_bytes == 2 * resident.adapter_bytes


@pytest.mark.parametrize(
    ("error", "short"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
    ids=repr,
)
def test_only_what_says_that_memory_ran_out_is_a_shortage(error: Exception, short: bool) -> None:  # noqa: FBT001
    assert is_shortage(error) is short


def test_a_real_failure_to_allocate_is_a_shortage() -> None:
    with pytest.raises(RunError, match="memory ran out here"), shortage_told("here", list):
        torch.empty(2**62, dtype=torch.uint8)


def test_the_message_names_the_moment_the_cause_and_the_remedies() -> None:
    remedies = knobs(replace(DEMAND, plain_blocks=0), resolution=512, rank=16)
    with pytest.raises(RunError) as told, shortage_told("in step 3", lambda: remedies):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.\nmore")
    assert "memory ran out in step 3 (CUDA out of memory. Tried to allocate 1 GiB.)" in str(told.value)
    assert "memory.resident_blocks=0 frees about 3 GB, " in told.value.remedy
    assert "adapter.rank=8 frees about 0.35 GB" in told.value.remedy


def test_another_failure_passes_as_it_is() -> None:
    with pytest.raises(RuntimeError, match="another"), shortage_told("here", list):
        raise RuntimeError("another")
