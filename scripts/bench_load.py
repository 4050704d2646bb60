"""Peak host memory and time of loading a full-size transformer from one file, quantised while it is read.

    python scripts/bench_load.py                          FLUX.2 klein 4B, bf16 file -> fp8
    python scripts/bench_load.py --stored fp8             a scaled fp8 file, kept as it is
    python scripts/bench_load.py --model klein_9b --base int8

Makes a file of random weights in BFL's names (2 bytes a parameter in --folder, removed at the end), loads it in a fresh
process, and prints one row of a Markdown table. Memory is the largest resident size of that process (ru_maxrss), given
in full and above what it held just before; time is given in full and as a multiple of reading the same file once.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from flux2_lora.devices import largest_resident, resident
from flux2_lora.families import Model, ModelSpec, load_family
from flux2_lora.keys import bfl_of
from flux2_lora.networks.components import on_meta
from flux2_lora.quantize import PrecisionSpec, load_frozen, stored_bytes
from flux2_lora.sources import ModelFiles
from flux2_lora.weights import open_file

Result = TypeVar("Result")
# Double and single blocks, heads of 128, channels of the text.
SIZES = {"klein_4b": (5, 20, 24, 7680), "klein_9b": (8, 24, 32, 12288)}


@dataclass(frozen=True)
class Loaded:
    """What one load took; bytes and seconds."""

    before: int
    peak: int
    quantised: int
    load_s: float
    read_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SIZES, default="klein_4b")
    parser.add_argument("--stored", choices=("bf16", "fp8"), default="bf16", help="number format of the file")
    parser.add_argument("--base", choices=("fp8", "int8", "nf4", "bf16"), default="fp8", help="precision.base")
    parser.add_argument("--folder", type=Path, help="where the file is made; default: the system's temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = Path(folder) / "model.safetensors"
        in_a_process(write, path, arguments.model, arguments.stored)
        size = path.stat().st_size
        took = in_a_process(load, path, arguments.base)
    print("| model | file | base | quantised | peak above start | ratio | peak in all | seconds | x reading it |")
    print("|---|---|---|---|---|---|---|---|---|")
    grown = took.peak - took.before
    print(
        f"| {arguments.model} | {arguments.stored}, {size / 1e9:.2f} GB | {arguments.base} "
        f"| {took.quantised / 1e9:.2f} GB | {grown / 1e9:.2f} GB | {grown / took.quantised:.2f} "
        f"| {took.peak / 1e9:.2f} GB ({took.peak / took.quantised:.2f}) | {took.load_s:.1f} "
        f"| {took.load_s / took.read_s:.1f} |"
    )


def in_a_process(work: Callable[..., Result], *arguments: object) -> Result:
    """Run in a fresh interpreter, so that its memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)


def write(path: Path, model: str, stored: str) -> None:
    """Random weights of about the size of trained ones, in BFL's names."""
    double, single, heads, text = SIZES[model]
    transformer = on_meta(
        "Flux2Transformer2DModel",
        {
            "num_layers": double,
            "num_single_layers": single,
            "num_attention_heads": heads,
            "joint_attention_dim": text,
            "guidance_embeds": False,
        },
        "random weights",
    )
    pool = 0.02 * torch.randn(1 << 24, generator=torch.Generator().manual_seed(0))
    tensors: dict[str, Tensor] = {}
    for name, parameter in transformer.named_parameters():
        module, _, _ = name.rpartition(".")
        place = bfl_of("flux2", module)
        rows = parameter.shape[0] * place.parts // (place.stop - place.start)
        key = f"{place.module}.{'scale' if '.norm_' in module else 'weight'}"
        if key not in tensors:
            tensors |= drawn(key, (rows, *parameter.shape[1:]), pool, stored)
    save_file(tensors, path)


def drawn(key: str, shape: tuple[int, ...], pool: Tensor, stored: str) -> dict[str, Tensor]:
    """One tensor cut from a pool of normal numbers, with its scale where the file is scaled fp8."""
    count = torch.Size(shape).numel()
    values = pool.repeat(-(-count // len(pool)))[:count].reshape(shape)
    if stored == "fp8" and "blocks." in key and len(shape) == 2:
        scale = values.abs().amax() / 448
        return {key: (values / scale).to(torch.float8_e4m3fn), f"{key.removesuffix('weight')}weight_scale": scale}
    return {key: values.to(torch.bfloat16)}


def load(path: Path, base: str) -> Loaded:
    """Load as the programs do, on a CPU in bfloat16, and measure."""
    began = time.perf_counter()
    with path.open("rb") as file:
        while file.read(1 << 24):
            pass
    read_s = time.perf_counter() - began
    family = load_family("flux2_klein")
    spec = ModelSpec(family="flux2_klein", path=str(path), title="random", architecture_name="random")
    files = ModelFiles(transformer=path, components=path.parent, option="model.path=random")
    model = Model(spec, family, files, open_file(path, family.architecture))
    model.empty_transformer()
    before = resident()
    began = time.perf_counter()
    transformer = load_frozen(model, PrecisionSpec(base=base), torch.device("cpu"))
    return Loaded(before, largest_resident(), stored_bytes(transformer), time.perf_counter() - began, read_s)


if __name__ == "__main__":
    main()
