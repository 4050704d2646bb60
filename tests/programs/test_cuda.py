"""What only a card can show: copies beside computing, bitsandbytes' kernels, bits that come twice."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import Command

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")

QUICK = ("device=cuda", "preview.every=0", "validation.every=4", "batch_size=4", "max_steps=4")
RESIDENT = ("memory=resident", "memory.plain_blocks=2")
STREAMED = ("memory=stream", "memory.plain_blocks=2", "memory.host=pinned")


def run(command: Command, name: str, *options: str) -> Path:
    outcome = command("train", *QUICK, f"name={name}", *options)
    assert outcome.code == 0, outcome.err
    return Path("outputs") / name


def adapter(run: Path) -> bytes:
    return (run / "checkpoints/step-000004/adapter.safetensors").read_bytes()


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row[key] for row in rows for key in ("loss", "validation_loss") if key in row]


@pytest.mark.parametrize("base", ["fp8", "int8", "bf16"])
@pytest.mark.parametrize("inputs", ["device", "host"])
def test_a_streamed_run_leaves_the_bytes_of_a_resident_one(command: Command, base: str, inputs: str) -> None:
    resident = run(command, "resident", *RESIDENT, f"precision.base={base}")
    streamed = run(command, "streamed", *STREAMED, f"precision.base={base}", f"memory.block_inputs={inputs}")
    assert adapter(streamed) == adapter(resident)
    assert losses(streamed) == losses(resident)


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(command: Command) -> None:
    whole = run(command, "whole")
    run(command, "parted", "max_steps=2")
    assert adapter(run(command, "parted")) == adapter(whole)


@pytest.mark.parametrize("precision", ["bf16", "fp8", "int8", "nf4"])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "paged_adamw8bit"])
def test_every_precision_trains_with_every_kind_of_adamw(command: Command, precision: str, optimizer: str) -> None:
    told = losses(run(command, "any", f"precision={precision}", f"optimizer={optimizer}", "max_steps=12"))
    assert all(map(math.isfinite, told))
    assert min(told[-3:]) < told[0]


@pytest.mark.parametrize("matmul", ["fp8", "int8"])
def test_products_in_eight_bits_train_like_those_in_sixteen(command: Command, matmul: str) -> None:
    exact = losses(run(command, "exact", f"precision.base={matmul}"))
    quick = losses(run(command, "quick", f"precision.base={matmul}", f"precision.matmul={matmul}"))
    assert quick == pytest.approx(exact, rel=0.1)


def test_compiled_blocks_train_like_others(command: Command) -> None:
    plain = losses(run(command, "plain"))
    assert losses(run(command, "compiled", "memory.compile=true")) == pytest.approx(plain, rel=0.05)


def test_a_card_draws_the_pictures_of_a_cpu(command: Command) -> None:
    drawn = {}
    for device in ("cpu", "cuda"):
        assert command("sample", "prompts=[red apple]", f"device={device}", f"output={device}").code == 0
        drawn[device] = np.asarray(Image.open(f"{device}/0000.png")).astype(float)
    assert np.abs(drawn["cpu"] - drawn["cuda"]).mean() < 8
