"""Peak host memory and time of a full-size text encoder that runs layer by layer.

    python scripts/bench_encode.py                       T5-XXL, 4 texts of 64 tokens
    python scripts/bench_encode.py --encoder qwen3_4b --texts 8 --tokens 512

Makes files of random weights in bfloat16 (2 bytes a parameter in --folder, removed at the end), encodes random tokens
in a fresh process on the CPU in float32, and prints one row of a Markdown table. Memory is the largest resident size of
that process (ru_maxrss) above what it held just before; "layer" is the largest layer in float32.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from torch import Tensor, nn

from flux2_lora.devices import largest_resident, resident
from flux2_lora.networks.text import decoder_layers, language_model, t5, t5_encoder, text_config

# The settings of the real encoders' config.json that decide their shapes.
ENCODERS: dict[str, dict[str, Any]] = {
    "t5_xxl": {
        "model_type": "t5",
        "vocab_size": 32128,
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_layers": 24,
        "num_heads": 64,
        "feed_forward_proj": "gated-gelu",
    },
    "qwen3_4b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
}
KEPT = (9, 18, 27)


@dataclass(frozen=True)
class Encoded:
    """What one encoding took; bytes and seconds."""

    peak: int
    layer: int
    states: int
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", choices=ENCODERS, default="t5_xxl")
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--folder", type=Path, help="where the files are made; default: the system's temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as place:
        folder = Path(place)
        write(folder, arguments.encoder)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            took = pool.apply(encode, (folder, arguments.encoder, arguments.texts, arguments.tokens))
    print("| encoder | files | texts | layer | states | peak above start | peak - states, in layers | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    print(
        f"| {arguments.encoder} | {size / 1e9:.2f} GB | {arguments.texts} x {arguments.tokens} "
        f"| {took.layer / 1e9:.2f} GB | {took.states / 1e9:.2f} GB | {took.peak / 1e9:.2f} GB "
        f"| {(took.peak - took.states) / took.layer:.2f} | {took.seconds:.0f} |"
    )


def empty(folder: Path, encoder: str) -> nn.Module:
    build = t5_encoder if encoder == "t5_xxl" else language_model
    with init_empty_weights():
        return build(text_config(folder))


def write(folder: Path, encoder: str) -> None:
    """config.json, and one file of random weights for each layer."""
    (folder / "config.json").write_text(json.dumps(ENCODERS[encoder]))
    pool = (0.02 * torch.randn(1 << 24, generator=torch.Generator().manual_seed(0))).to(torch.bfloat16)
    prefix = "encoder." if encoder == "t5_xxl" else "model."
    shards: dict[str, dict[str, Tensor]] = {}
    for name, parameter in empty(folder, encoder).named_parameters():
        shard = "-".join(name.split(".")[:2]) if name.startswith(("block", "layers")) else name
        values = pool.repeat(-(-parameter.numel() // len(pool)))[: parameter.numel()].reshape(parameter.shape)
        shards.setdefault(shard, {})[prefix + name] = values
        if len(shards) > 1:
            first = next(iter(shards))
            save_file(shards.pop(first), folder / f"{first}.safetensors")
    for shard, tensors in shards.items():
        save_file(tensors, folder / f"{shard}.safetensors")


def encode(folder: Path, encoder: str, texts: int, tokens: int) -> Encoded:
    layers = next(m for m in empty(folder, encoder).modules() if isinstance(m, nn.ModuleList))
    layer = 4 * max(sum(p.numel() for p in one.parameters()) for one in layers)
    ids = torch.randint(3, 30000, (texts, tokens), generator=torch.Generator().manual_seed(1))
    cpu, before, began = torch.device("cpu"), resident(), time.perf_counter()
    if encoder == "t5_xxl":
        states = t5(folder, cpu)(ids)
    else:
        states = decoder_layers(folder, cpu, KEPT)(ids, torch.ones_like(ids))
    seconds = time.perf_counter() - began
    return Encoded(largest_resident() - before, layer, states.numel() * states.element_size(), seconds)


if __name__ == "__main__":
    main()
