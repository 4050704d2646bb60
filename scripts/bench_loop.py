"""What the training loop costs beside its mathematics: seconds a step and memory, ours against others.

    python scripts/bench_loop.py
    python scripts/bench_loop.py --model KLEIN_FOLDER --official train_dreambooth_lora_flux2_klein.py

`bare` is a plain PyTorch loop of the same mathematics (draw, mix, forward, backward, clip, AdamW) over tensors that lie
in memory; it logs nothing and saves nothing. `kept` is the same with freed memory kept for the next step, as the
program does. `official` is the example script of Diffusers, given as a file, on the
same folder of pictures and with adapters on the same projections; it needs torchvision. A klein folder to try it on is
what `python -m tests.miniatures flux2_klein FOLDER` writes.

Each loop is a process of its own, and only one of them runs at a time: it stops itself after a few steps until it is
its turn again. So what else the machine does slows them alike. A ratio is the median over the turns of the median steps
of two turns that follow each other.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file

from flux2_lora import cli
from flux2_lora.bundled import share
from flux2_lora.devices import keep_free_memory, largest_resident

TURN, WARM, CAPTION = 12, 3, "a drawing"
PROJECTIONS = (
    *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out", "to_qkv_mlp_proj"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=20, help=f"of {TURN} steps; the first does not count")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--model", help="a Diffusers folder of FLUX.2 klein; the bundled model where there is none")
    parser.add_argument("--official", help="Diffusers' example script, which trains klein")
    parser.add_argument("--only", choices=RUNS, help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    if wanted.only:
        RUNS[wanted.only](wanted)
        return
    with tempfile.TemporaryDirectory() as folder:
        names = ["ours", "bare", "kept", *(["official"] if wanted.official else [])]
        loops = [Loop(name, Path(folder) / name) for name in names]
        for _ in range(wanted.turns):
            for loop in loops:
                loop.turn()
        results = [json.loads(loop.told.read_text().splitlines()[-1]) for loop in loops]
    print(f"{wanted.turns} turns of {TURN} steps of {wanted.batch}, {torch.get_num_threads()} threads\n")
    print("| loop | seconds a step | peak memory, GB | ours / it |")
    print("|---|---|---|---|")
    for loop, result in zip(loops, results, strict=True):
        ratios = [mine / its for mine, its in zip(results[0]["steps"], result["steps"], strict=True)]
        print(f"| {loop.name} | {median(result['steps']):.4f} | {result['peak'] / 1e9:.2f} | {median(ratios):.3f} |")


class Loop:
    """A loop in a process of its own, called as this script was, that runs only when it is given its turn."""

    def __init__(self, name: str, folder: Path) -> None:
        folder.mkdir()
        self.name, self.told = name, folder / "told"
        with self.told.open("w") as told:
            self.process = subprocess.Popen(
                [sys.executable, Path(__file__).resolve(), *sys.argv[1:], "--only", name],
                cwd=folder,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
                stdout=told,
                stderr=subprocess.STDOUT,
            )
        self.wait()

    def turn(self) -> None:
        """Let it run until it stops itself or ends."""
        self.process.send_signal(signal.SIGCONT)
        self.wait()

    def wait(self) -> None:
        _, status = os.waitpid(self.process.pid, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            self.process.returncode = os.waitstatus_to_exitcode(status)
        if self.process.returncode:
            raise SystemExit(self.told.read_text()[-6000:])


class Turns:
    """The moments at which a loop's steps ended, turn by turn; `step` stops the process at the end of a turn."""

    def __init__(self) -> None:
        self.moments: list[list[float]] = [[]]

    def step(self) -> None:
        self.moments[-1].append(time.perf_counter())
        if len(self.moments[-1]) == TURN:
            os.kill(os.getpid(), signal.SIGSTOP)
            self.moments.append([])

    def tell(self) -> None:
        """The median step of each turn but the first, without those in which a turn still warms up; and the peak."""
        told = []
        for turn in self.moments[1:-1]:
            steps = [after - before for before, after in zip(turn[WARM:], turn[WARM + 1 :], strict=False)]
            told.append(median(steps))
        print("\n" + json.dumps({"steps": told, "peak": largest_resident()}))


def pictures() -> Path:
    """The demo's pictures without their captions: all loops train them under CAPTION."""
    folder = Path("pictures").resolve()
    folder.mkdir()
    for file in sorted((share() / "data" / "demo").glob("*.png")):
        shutil.copy(file, folder)
    return folder


def options(wanted: argparse.Namespace, folder: Path) -> list[str]:
    """Of a run that does nothing but train; a checkpoint only at its end."""
    model = ["model=flux2_klein_base_4b", f"model.path={wanted.model}"] if wanted.model else []
    return [
        *(*model, f"dataset.folder={folder}", f"dataset.default_caption={CAPTION}", "dataset.holdout=0"),
        *("dataset.resolution=64", "name=bench", "device=cpu"),
        *(f"max_steps={TURN * wanted.turns}", f"batch_size={wanted.batch}", "precision.base=fp32", "adapter.rank=16"),
        *("checkpoint_every=100000", "validation.every=0", "preview.every=0", "checks=false"),
    ]


def ours(wanted: argparse.Namespace) -> None:
    """The program, from the end of one step to the end of the next: its loader, its log and its bar included."""
    from flux2_lora.training.progress import StepBar

    turns = Turns()
    shown = StepBar.update

    def update(bar: StepBar, step: int, **values: Any) -> None:
        shown(bar, step, **values)
        turns.step()

    StepBar.update = update  # type: ignore[assignment, method-assign]
    cli.main(["train", *options(wanted, pictures())])
    turns.tell()


def bare(wanted: argparse.Namespace) -> None:
    """The same mathematics and nothing else, on the tensors that the program cached."""
    from flux2_lora.adapters import AdapterSpec, attach, trainable
    from flux2_lora.conditioning import Conditioning
    from flux2_lora.families import ModelSpec, open_model
    from flux2_lora.flow import linear_mu
    from flux2_lora.quantize import PrecisionSpec, load_frozen

    latents, embeds = cached(wanted)
    assert len(latents) == len(embeds) > 0
    path = wanted.model or str(share() / "data" / "tiny")
    family = "flux2_klein" if wanted.model else "flux2_small"
    model = open_model(ModelSpec(family=family, path=path, title="bench", architecture_name="bench"))
    transformer = load_frozen(model, PrecisionSpec(base="fp32"), torch.device("cpu"))
    attach(transformer, "flux2", AdapterSpec(rank=16), seed=0)
    parameters = list(trainable(transformer).values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.01)
    stretch = torch.tensor(linear_mu(latents.shape[2] * latents.shape[3])).exp()
    turns = Turns()
    for _ in range(TURN * wanted.turns):
        picked = torch.randint(len(latents), (wanted.batch,))
        z, noise = latents[picked], torch.randn(wanted.batch, *latents.shape[1:])
        sigmas = torch.sigmoid(torch.randn(wanted.batch))
        sigmas = stretch * sigmas / (1 + (stretch - 1) * sigmas)
        level = sigmas.view(-1, 1, 1, 1)
        noisy = (1 - level) * z + level * noise
        predicted = model.family.velocity(transformer, noisy, sigmas, Conditioning(embeds=embeds[picked]))
        (predicted - (noise - z)).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        turns.step()
    turns.tell()


def kept(wanted: argparse.Namespace) -> None:
    """The bare loop under the program's memory policy: what is left is the loop itself."""
    keep_free_memory()
    bare(wanted)


def cached(wanted: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents [n c h w] of the pictures and the states [n s d] of their caption, by the program that prepares them."""
    kept = ("model", "dataset", "name", "device")
    cli.main(["prepare", *(o for o in options(wanted, pictures()) if o.startswith(kept))])
    files = {kind: sorted(Path("outputs/cache", kind).rglob("*.safetensors")) for kind in ("latents", "texts")}
    latents = torch.stack([load_file(file)["mean"] for file in files["latents"]])
    texts = [load_file(file)["embeds"] for file in files["texts"]]
    return latents, torch.stack(texts[:1] * len(latents)).float()


def official(wanted: argparse.Namespace) -> None:
    """Diffusers' example, from one update of its bar to the next."""
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    turns = Turns()
    shown = tqdm.update

    def update(bar: Any, count: int = 1) -> Any:
        if bar.desc.startswith("Steps"):
            turns.step()
        return shown(bar, count)

    tqdm.update = update
    singles = json.loads((Path(wanted.model) / "transformer/config.json").read_text())["num_single_layers"]
    layers = [*PROJECTIONS, *(f"single_transformer_blocks.{number}.attn.to_out" for number in range(singles))]
    sys.argv = [
        *(wanted.official, "--pretrained_model_name_or_path", wanted.model, "--instance_data_dir", str(pictures())),
        *("--instance_prompt", CAPTION, "--resolution", "64", "--output_dir", "out", "--rank", "16"),
        *("--lora_alpha", "16", "--lora_layers", ",".join(layers), "--train_batch_size", str(wanted.batch)),
        *(
            "--max_train_steps",
            str(TURN * wanted.turns),
            "--cache_latents",
            "--mixed_precision",
            "no",
            "--lr_warmup_steps",
            "0",
        ),
        *("--text_encoder_out_layers", "9", "18", "27", "--checkpointing_steps", "100000", "--skip_final_inference"),
        *("--optimizer", "AdamW", "--learning_rate", "1e-4"),
    ]
    runpy.run_path(wanted.official, run_name="__main__")
    turns.tell()


RUNS: dict[str, Callable[[argparse.Namespace], None]] = {"ours": ours, "bare": bare, "kept": kept, "official": official}

if __name__ == "__main__":
    main()
