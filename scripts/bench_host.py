"""Host memory of a base that is streamed from memory and from a file, and whether it grows with the model.

    python scripts/bench_host.py                    6 and 12 blocks of FLUX.2 klein 4B, in fp8: files of 2 and 3.8 GB
    python scripts/bench_host.py --blocks 1 5 5 20  other pairs of double and single blocks; 5 20 is the whole model

Random weights are written tensor by tensor (2 bytes a parameter, and 1 for the file of blocks, in --folder, removed at
the end). A fresh process loads them as the programs do, with every block streamed through two slots, and draws two
forward passes over a few tokens. Counted is what the process alone holds, RssAnon and RssShmem of /proc/self/status at
their largest (Linux), above what it held with its libraries; pages of files that are mapped, which the system takes
back when it needs them, stand beside it. On a CPU the slots, what is in no block, and a weight that is rebuilt in
float32 lie in host memory too: the last columns are without them, as where a card holds them.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from flux2_lora.conditioning import Conditioning
from flux2_lora.families import Model, ModelSpec, load_family
from flux2_lora.files import write_in_turn
from flux2_lora.networks.components import on_meta
from flux2_lora.networks.transformers import blocks_in
from flux2_lora.placement import Placement
from flux2_lora.quantize import FrozenLinear, PrecisionSpec, load_frozen, stored_bytes
from flux2_lora.sources import ModelFiles
from flux2_lora.weights import open_file

Result = TypeVar("Result")
FAMILY, HEADS, TEXT, SLOTS = "flux2_klein", 24, 7680, 2
# Name, memory.host, whether the file of blocks is there already.
WAYS = (("memory", "staged"), ("disk, first start", "disk"), ("disk, later starts", "disk"))


@dataclass
class Held:
    """Bytes at their largest; own: anonymous and shared memory, mapped: pages of files."""

    own: int = 0
    mapped: int = 0

    def look(self) -> None:
        own, mapped = held_now()
        self.own, self.mapped = max(self.own, own), max(self.mapped, mapped)


@dataclass(frozen=True, kw_only=True)
class Took:
    """Bytes. blocks: all that are streamed; elsewhere: what a card would hold; before: of the libraries."""

    before: int
    own: int
    mapped: int
    blocks: int
    largest: int
    elsewhere: int

    @property
    def host(self) -> int:
        """What streaming itself takes of the host."""
        return self.own - self.before - self.elsewhere


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", nargs="+", type=int, default=[1, 5, 2, 10], help="pairs: double and single blocks")
    parser.add_argument("--heads", type=int, default=HEADS, help="of 128 channels")
    parser.add_argument("--folder", type=Path, help="where files are made; default: the system's temporary folder")
    asked = parser.parse_args()
    heading = (
        "blocks",
        "in fp8",
        "host",
        "own, peak",
        "above start",
        "mapped files",
        "streaming",
        "/ memory",
        "in blocks",
    )
    print(f"| {' | '.join(heading)} |\n|{'---|' * len(heading)}")
    for double, single in zip(asked.blocks[::2], asked.blocks[1::2], strict=True):
        with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
            path = Path(folder) / "model.safetensors"
            in_a_process(write, path, double, single, asked.heads)
            found = [(name, in_a_process(stream, path, host)) for name, host in WAYS]
        for name, took in found:
            print(f"| {double} + {single} | {' | '.join(cells(name, took, found[0][1]))} |", flush=True)


def cells(name: str, took: Took, memory: Took) -> tuple[str, ...]:
    sizes = (took.own, took.own - took.before, took.mapped, took.host)
    own, above, mapped, host = (f"{size / 1e9:.2f} GB" for size in sizes)
    ratio, in_blocks = f"{took.host / memory.host:.2f}", f"{took.host / took.largest:.1f}"
    return f"{took.blocks / 1e9:.2f} GB", name, own, above, mapped, host, ratio, in_blocks


def in_a_process(work: Callable[..., Result], *arguments: object) -> Result:
    """Run in a fresh interpreter, so that its memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)


def write(path: Path, double: int, single: int, heads: int) -> None:
    """Random weights of about the size of trained ones, in Diffusers' names and bfloat16, one tensor at a time."""
    sizes: dict[str, Any] = {"num_layers": double, "num_single_layers": single, "num_attention_heads": heads}
    more = {"joint_attention_dim": TEXT, "guidance_embeds": False}
    transformer = on_meta(load_family(FAMILY).transformer_class, {**sizes, **more}, "random weights")
    shapes = {name: tuple(parameter.shape) for name, parameter in transformer.named_parameters()}
    pool = (0.02 * torch.randn(1 << 24, generator=torch.Generator().manual_seed(0))).bfloat16()
    write_in_turn(path, shapes, torch.bfloat16, partial(drawn, shapes, pool), {})


def drawn(shapes: dict[str, tuple[int, ...]], pool: Tensor, name: str) -> Tensor:
    """One tensor cut from a pool of numbers."""
    count = torch.Size(shapes[name]).numel()
    return pool.repeat(-(-count // len(pool)))[:count].view(shapes[name])


def stream(path: Path, host: str) -> Took:
    """Load as the programs do and draw two passes; what that took."""
    family = load_family(FAMILY)
    spec = ModelSpec(family=FAMILY, path=str(path), title="random", architecture_name="random")
    files = ModelFiles(transformer=path, components=path.parent, option="model.path=random")
    model = Model(spec, family, files, open_file(path, family.architecture))
    model.empty_transformer()
    before, _ = held_now()
    place = Placement(resident=frozenset(), slots=SLOTS, host=host, folder=path.parent / "blocks")
    with watched() as held:
        transformer = load_frozen(model, PrecisionSpec(), torch.device("cpu"), place)
        text = torch.zeros(1, 16, TEXT)
        with torch.no_grad():
            for sigma in (0.9, 0.4):
                latents = torch.zeros(1, family.latent_channels, 2, 2)
                family.velocity(transformer, latents, torch.tensor([sigma]), Conditioning(embeds=text))
    sizes = [streamed_bytes(block) for block in blocks_in(transformer).values()]
    outside = stored_bytes(transformer) - sum(sizes)
    linears = [one for one in transformer.modules() if isinstance(one, FrozenLinear)]
    rebuilt = max(4 * one.in_features * one.out_features for one in linears)
    return Took(
        before=before,
        own=held.own,
        mapped=held.mapped,
        blocks=sum(sizes),
        largest=max(sizes),
        elsewhere=outside + SLOTS * max(sizes) + rebuilt,
    )


def streamed_bytes(block: nn.Module) -> int:
    """Of the quantised weights."""
    values = [buffer for name, buffer in block.named_buffers() if name.endswith("values")]
    return sum(one.numel() * one.element_size() for one in values)


def held_now() -> tuple[int, int]:
    """Anonymous and shared memory of this process, and pages of files that it has mapped, in bytes."""
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    kib = {line[0]: int(line[1]) for line in lines if line[0].startswith("Rss")}
    return 1024 * (kib["RssAnon:"] + kib["RssShmem:"]), 1024 * kib["RssFile:"]


@contextmanager
def watched() -> Iterator[Held]:
    """What is held meanwhile, looked at every hundredth of a second."""
    held, over = Held(), threading.Event()

    def watch() -> None:
        while not over.wait(0.01):
            held.look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield held
    finally:
        over.set()
        thread.join()


if __name__ == "__main__":
    main()
