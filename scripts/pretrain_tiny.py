"""How the bundled `tiny` model was made: pictures -> VAE -> T5 and transformer -> a Diffusers folder.

    python scripts/pretrain_tiny.py data         install the icon sets, rasterise them
    python scripts/pretrain_tiny.py vae          AutoencoderKLFlux2 on every icon, with line-art augmentation
    python scripts/pretrain_tiny.py transformer  Flux2Transformer2DModel and T5 together, on cached latents
    python scripts/pretrain_tiny.py bundle       write data/tiny and data/demo
    python scripts/pretrain_tiny.py control      the demo's subjects in a style that the base knows, into --work/control

Each stage writes into --work, keeps a checkpoint there and goes on from it when it is called again. The icon sets
come from npm (versions in SETS) and are not redistributed; the demo style is never shown to any stage.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

SIDE_PX = 64
MAX_TOKENS = 16
VOCABULARY = 1000
HERE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True)
class IconSet:
    """One npm package of drawings: the name its style has in prompts, and its licence."""

    package: str
    version: str
    style: str
    licence: str
    author: str


SETS = [
    IconSet(package="noto", version="1.2.9", style="noto", licence="Apache-2.0", author="Google"),
    IconSet(package="fluent-emoji-flat", version="1.2.6", style="fluent", licence="MIT", author="Microsoft"),
    IconSet(
        package="twemoji", version="1.2.5", style="twemoji", licence="CC-BY-4.0", author="Twitter and contributors"
    ),
    IconSet(package="noto-v1", version="1.2.5", style="blob", licence="Apache-2.0", author="Google"),
    IconSet(package="emojione", version="1.2.3", style="emojitwo", licence="CC-BY-4.0", author="EmojiTwo contributors"),
]
STYLES = ["noto", "fluent", "twemoji"]
DEMO = IconSet(
    package="fluent-emoji-high-contrast", version="1.2.6", style="high contrast", licence="MIT", author="Microsoft"
)
DEMO_TRIGGER = "inkline"
# What the demo's previews draw; held out of its training pictures.
DEMO_PROMPTS = ["grinning face", "cat face", "red apple", "crescent moon"]
NAMES = ("emojibase-data", "17.0.0")
# Subjects of the transformer: few enough that a CPU learns to draw them in an hour.
SUBJECTS = [
    *[
        "face-smiling",
        "face-affection",
        "face-tongue",
        "face-neutral-skeptical",
        "face-sleepy",
        "face-unwell",
        "face-hat",
    ],
    *["face-glasses", "face-concerned", "face-negative", "face-costume", "cat-face", "monkey-face", "heart"],
    *["animal-mammal", "animal-bird", "animal-amphibian", "animal-reptile", "animal-marine", "animal-bug"],
    *["plant-flower", "plant-other", "food-fruit", "food-vegetable", "food-sweet", "sky-weather"],
]
# People, flags, signs and letters are no subjects of a style; the VAE does not need them either.
VAE_EXCLUDED = re.compile(
    r"person|family|flag|keycap|skin|hair|alphanum|gender|symbol|zodiac|hands?\b|hand-|arrow|punct"
)


# ---------------------------------------------------------------- data


def slug(label: str) -> str:
    plain = label.lower().replace("'", "").replace("“", "").replace("”", "").replace("ñ", "n")
    return re.sub("[^a-z0-9]+", "-", plain).strip("-")


def prepare_data(work: Path) -> None:
    """Install the packages, rasterise on white at SIDE_PX; writes pictures.npz (uint8 [n h w 3]) and pictures.json."""
    packages = [f"@iconify-json/{s.package}@{s.version}" for s in [*SETS, DEMO]] + ["@".join(NAMES)]
    subprocess.run(["npm", "install", "--silent", "--prefix", str(work), *packages], check=True)
    pictures, rows = [], []
    for icon_set in [*SETS, DEMO]:
        icons = load_icons(work, icon_set)
        for label, group in load_labels(work):
            picture = rasterise(icons, label, SIDE_PX)
            if picture is not None and group and not VAE_EXCLUDED.search(group):
                pictures.append(np.asarray(picture))
                rows.append({"style": icon_set.style, "label": label, "group": group})
        print(icon_set.package, sum(r["style"] == icon_set.style for r in rows))
    np.savez(work / "pictures.npz", pictures=np.stack(pictures))
    (work / "pictures.json").write_text(json.dumps(rows))


def load_labels(work: Path) -> list[tuple[str, str]]:
    """(label, subgroup) of every emoji, "" for no subgroup."""
    names = work / "node_modules" / NAMES[0]
    subgroups = json.loads((names / "meta/groups.json").read_text())["subgroups"]
    labels = json.loads((names / "en/data.json").read_text())
    return [(x["label"].replace("\u2019", "'"), subgroups.get(str(x.get("subgroup"))) or "") for x in labels]


def load_icons(work: Path, icon_set: IconSet) -> dict[str, Any]:
    icons: dict[str, Any] = json.loads((work / f"node_modules/@iconify-json/{icon_set.package}/icons.json").read_text())
    return icons


def rasterise(icons: dict[str, Any], label: str, side_px: int) -> Image.Image | None:
    """The drawing of a label on white, four times supersampled; None when the set lacks it."""
    import resvg_py

    key = slug(label)
    key = icons.get("aliases", {}).get(key, {}).get("parent", key)
    icon = icons["icons"].get(key)
    if icon is None:
        return None
    width, height = icon.get("width", icons["width"]), icon.get("height", icons["height"])
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}">'
        f"{icon['body'].replace('currentColor', '#000')}</svg>"
    )
    drawn = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=4 * side_px, height=4 * side_px))))
    paper = Image.new("RGBA", drawn.size, "white")
    flat = Image.alpha_composite(paper, drawn.convert("RGBA")).convert("RGB")
    return flat.resize((side_px, side_px), Image.Resampling.LANCZOS)


def load_pictures(work: Path) -> tuple[Tensor, list[dict[str, str]]]:
    """Pictures [n 3 h w] in [-1, 1] and their rows."""
    pictures = torch.from_numpy(np.load(work / "pictures.npz")["pictures"])
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1, json.loads((work / "pictures.json").read_text())


def hold_out(rows: list[dict[str, str]], every: int = 16) -> Tensor:
    """True where the row's label is held out of VAE training, the same labels in every style."""
    labels = sorted({row["label"] for row in rows})
    held = set(labels[::every])
    return torch.tensor([row["label"] in held for row in rows])


# ---------------------------------------------------------------- stages that can stop and go on


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear warm-up, constant, then linear decay to zero over the last `decay` part; cut off after `stop` steps."""

    steps: int
    stop: int
    lr: float
    warmup: int = 100
    decay: float = 0.5

    def at(self, step: int) -> float:
        left = (self.steps - step) / (self.steps * self.decay)
        return self.lr * min((step + 1) / self.warmup, left, 1.0)


def train_stage(
    module: nn.Module,
    schedule: Schedule,
    checkpoint: Path,
    loss_at: Callable[[torch.Generator], Tensor],
    report: Callable[[], str],
    every: int = 200,
) -> None:
    """AdamW with an exponential moving average; resumes from `checkpoint`; leaves the average in `module`.

    loss_at: generator keyed by the step -> scalar tensor; report: () -> text, called on the averaged weights.
    """
    optimizer = torch.optim.AdamW(module.parameters(), lr=schedule.lr, betas=(0.9, 0.98), weight_decay=0.01)
    average = {k: v.clone() for k, v in module.state_dict().items()}
    step, started = 0, time.time()
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        average, step = state["average"], state["step"]
    running = 0.0
    while step < schedule.stop:
        for group in optimizer.param_groups:
            group["lr"] = schedule.at(step)
        loss = loss_at(torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        keep = min(0.998, (step + 1) / (step + 10))
        with torch.no_grad():
            for name, value in module.state_dict().items():
                average[name].lerp_(value, 1 - keep) if value.is_floating_point() else average[name].copy_(value)
        step += 1
        running += loss.item() / every
        if step % every == 0 or step == schedule.stop:
            live = {k: v.clone() for k, v in module.state_dict().items()}
            state = {"module": live, "optimizer": optimizer.state_dict(), "average": average, "step": step}
            torch.save(state, checkpoint.with_suffix(".part"))
            checkpoint.with_suffix(".part").replace(checkpoint)
            module.load_state_dict(average)
            with torch.no_grad():
                print(f"step {step} loss {running:.4f} {report()} {time.time() - started:.0f}s", flush=True)
            module.load_state_dict(live)
            running = 0.0
    module.load_state_dict(average)


# ---------------------------------------------------------------- VAE


def make_vae() -> Any:
    """AutoencoderKLFlux2 of 1.3 M parameters, residual branches starting at zero and a quiet posterior."""
    from diffusers import AutoencoderKLFlux2

    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 48, 64),
        decoder_block_out_channels=(16, 24, 48, 96),
        layers_per_block=1,
        latent_channels=32,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=SIDE_PX,
    )
    for name, module in vae.named_modules():
        if name.endswith("conv2"):
            nn.init.zeros_(module.weight)
    # log-variance starts at -6: the decoder first meets latents, not noise.
    with torch.no_grad():
        vae.quant_conv.bias[32:] = -6.0
        vae.quant_conv.weight[32:] *= 0.1
    return vae.to(memory_format=torch.channels_last)


def augment(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Flips, swapped channels, grey and two-tone versions: a style without colour must decode as well. [n 3 h w]"""
    return torch.stack([_augmented(picture, generator) for picture in pictures])


def _augmented(picture: Tensor, generator: torch.Generator) -> Tensor:
    flip, kind, level = torch.rand(3, generator=generator).tolist()
    flipped = picture.flip(-1) if flip < 0.5 else picture
    if kind < 0.25:
        return flipped[torch.randperm(3, generator=generator)]
    if kind > 0.5:
        return flipped
    grey = flipped.mean(0, keepdim=True).expand(3, -1, -1)
    # Steep contrast around a random level gives ink on paper.
    return ((grey - (level * 1.6 - 0.8)) * 8).clamp(-1, 1) if kind > 0.3 else grey


def psnr(vae: Any, pictures: Tensor) -> float:
    """Mean over pictures of 10 log10(1 / mse), values in [0, 1], decibels."""
    vae.eval()
    values = []
    for part in pictures.split(64):
        decoded = vae.decode(vae.encode(part).latent_dist.mode()).sample.clamp(-1, 1)
        values.append(-10 * torch.log10(((decoded - part) / 2).square().mean((1, 2, 3))))
    vae.train()
    return torch.cat(values).mean().item()


def train_vae(work: Path, stop: int) -> None:
    pictures, rows = load_pictures(work)
    held = hold_out(rows)
    demo = torch.tensor([row["style"] == DEMO.style for row in rows])
    training, held_base, held_demo = pictures[~held & ~demo], pictures[held & ~demo], pictures[demo][::8]
    torch.manual_seed(0)
    vae = make_vae()

    def loss_at(generator: torch.Generator) -> Tensor:
        batch = augment(training[torch.randint(len(training), (16,), generator=generator)], generator)
        batch = batch.contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(batch).latent_dist
        decoded = vae.decode(posterior.sample(generator)).sample
        error = decoded - batch
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        loss: Tensor = 2 * error.square().mean() + error.abs().mean() + 0.5 * edges + 2e-4 * kl
        return loss

    def report() -> str:
        return f"psnr base {psnr(vae, held_base[::4]):.2f} demo {psnr(vae, held_demo):.2f}"

    train_stage(vae, Schedule(steps=4200, stop=stop, lr=4e-3), work / "vae.pt", loss_at, report)
    print(f"final psnr: base {psnr(vae, held_base):.2f} dB, demo {psnr(vae, pictures[demo]):.2f} dB")
    set_latent_statistics(vae, pictures[~demo])
    vae.save_pretrained(work / "vae")


def set_latent_statistics(vae: Any, pictures: Tensor) -> None:
    """Mean and variance of the 128 packed latent channels, into the batch-norm buffers that FLUX.2 normalises with."""
    with torch.no_grad():
        latents = torch.cat([vae.encode(part).latent_dist.mode() for part in pictures.split(64)])
        packed = F.pixel_unshuffle(latents, 2)
        vae.bn.running_mean.copy_(packed.mean((0, 2, 3)))
        vae.bn.running_var.copy_(packed.var((0, 2, 3)))


# ---------------------------------------------------------------- transformer and T5


def make_tokenizer(work: Path, texts: list[str]) -> Any:
    """A unigram tokenizer with T5's special tokens, learned from the names of all emoji; MAX_TOKENS is its length."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    alphabet = [chr(c) for c in range(33, 127)]
    trainer = trainers.UnigramTrainer(
        vocab_size=VOCABULARY, special_tokens=special, unk_token="<unk>", initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=MAX_TOKENS
    )
    wrapped.save_pretrained(work / "tokenizer")
    return wrapped


def make_transformer_and_text_encoder(vocabulary: int) -> Any:
    """Flux2Transformer2DModel of 8.1 M parameters (2 heads of 128, 2 + 4 blocks) and a T5 encoder of 0.5 M."""
    from diffusers import Flux2Transformer2DModel
    from transformers import T5Config, T5EncoderModel

    transformer = Flux2Transformer2DModel(
        in_channels=128,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=128,
        num_attention_heads=2,
        joint_attention_dim=128,
        timestep_guidance_channels=64,
        guidance_embeds=False,
    )
    config = T5Config(
        vocab_size=vocabulary,
        d_model=128,
        num_layers=2,
        num_heads=4,
        d_kv=32,
        d_ff=256,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        use_cache=False,
    )
    return nn.ModuleDict({"transformer": transformer, "text_encoder": T5EncoderModel(config)})


def prompts_of(row: dict[str, str]) -> list[str]:
    """The texts that a picture is trained with, in parts of ten: 7 name subject and style, 1 each one alone, 1 none."""
    return [f"{row['label']}, {row['style']} style"] * 7 + [row["label"], f"{row['style']} style", ""]


def train_transformer(work: Path, steps: int) -> None:
    from diffusers import AutoencoderKLFlux2

    from flux2_lora.conditioning import Conditioning
    from flux2_lora.families.flux2_small import FAMILY
    from flux2_lora.flow import linear_mu, mix, shift_sigmas, velocity_error

    pictures, rows = load_pictures(work)
    wanted = [i for i, r in enumerate(rows) if r["style"] in STYLES and r["group"] in SUBJECTS]
    rows = [rows[i] for i in wanted]
    vae = AutoencoderKLFlux2.from_pretrained(work / "vae").eval()
    with torch.no_grad():
        latents = torch.cat([FAMILY.encode_pixels(vae, part).mean for part in pictures[wanted].split(64)])
    labels = json.loads((work / "node_modules" / NAMES[0] / "en/data.json").read_text())
    tokenizer = make_tokenizer(work, [x["label"] for x in labels] + [" ".join(x.get("tags", [])) for x in labels])
    tokens = torch.stack(
        [
            tokenizer(prompts_of(r), padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")[
                "input_ids"
            ]
            for r in rows
        ]
    )
    held = torch.arange(len(rows)) % 24 == 7
    training = (~held).nonzero().squeeze(1)
    torch.manual_seed(0)
    both = make_transformer_and_text_encoder(len(tokenizer))
    mu = linear_mu(latents.shape[2] * latents.shape[3])
    print(f"{len(rows)} pictures of {len({r['label'] for r in rows})} subjects, {len(training)} trained")

    def error(index: Tensor, text: Tensor, sigmas: Tensor, generator: torch.Generator) -> Tensor:
        embeds = both["text_encoder"](text).last_hidden_state
        noise = torch.randn(latents[index].shape, generator=generator)
        noisy = mix(latents[index], noise, sigmas)
        predicted = FAMILY.velocity(both["transformer"], noisy, sigmas, Conditioning(embeds=embeds))
        return velocity_error(predicted, noise - latents[index]).mean()

    def loss_at(generator: torch.Generator) -> Tensor:
        index = training[torch.randint(len(training), (32,), generator=generator)]
        text = tokens[index, torch.randint(tokens.shape[1], (32,), generator=generator)]
        sigmas = shift_sigmas(torch.sigmoid(torch.randn(32, generator=generator)), mu)
        return error(index, text, sigmas, generator)

    def report() -> str:
        values = []
        for subset in (held.nonzero().squeeze(1), training[::24]):
            level = torch.linspace(0.05, 0.95, len(subset))
            values.append(error(subset, tokens[subset, 0], level, torch.Generator().manual_seed(1)).item())
        for name, module in both.items():
            module.save_pretrained(work / name)
        return f"held-out {values[0]:.4f} trained {values[1]:.4f}"

    train_stage(both, Schedule(steps=steps, stop=steps, lr=1e-3, decay=0.6), work / "transformer.pt", loss_at, report)


# ---------------------------------------------------------------- bundle


def bundle(work: Path) -> None:
    """data/tiny: the model in bf16 as a Diffusers folder. data/demo: pictures of the style it never saw."""
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Transformer2DModel,
    )
    from transformers import AutoTokenizer, T5EncoderModel

    pipeline = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_image_seq_len=256),
        vae=AutoencoderKLFlux2.from_pretrained(work / "vae", dtype=torch.bfloat16),
        text_encoder=T5EncoderModel.from_pretrained(work / "text_encoder", dtype=torch.bfloat16),
        tokenizer=AutoTokenizer.from_pretrained(work / "tokenizer"),
        transformer=Flux2Transformer2DModel.from_pretrained(work / "transformer", dtype=torch.bfloat16),
        is_distilled=False,
    )
    pipeline.save_pretrained(HERE / "data" / "tiny")
    for config in (HERE / "data" / "tiny").glob("*/config.json"):
        values = json.loads(config.read_text())
        values.pop("_name_or_path", None)
        config.write_text(json.dumps(values, indent=2) + "\n")
    size = sum(file.stat().st_size for file in (HERE / "data" / "tiny").rglob("*") if file.is_file())
    print(f"data/tiny: {size / 1e6:.2f} MB")
    if size > 20e6:
        raise SystemExit("the bundled model must stay within 20 MB")
    write_pictures(work, DEMO, DEMO_TRIGGER, HERE / "data" / "demo")


def write_pictures(work: Path, icon_set: IconSet, style: str, destination: Path) -> None:
    """28 pictures to train on and 48 of other subjects to validate with, 128 px, each with its caption."""
    icons, demo_icons = load_icons(work, icon_set), load_icons(work, DEMO)["icons"]
    labels = sorted(label for label, group in load_labels(work) if group in SUBJECTS and slug(label) in demo_icons)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).tolist()
    chosen = [labels[i] for i in order if labels[i] not in DEMO_PROMPTS]
    parts = {"": chosen[:28], "validation": DEMO_PROMPTS + chosen[28 : 76 - len(DEMO_PROMPTS)]}
    for part, subjects in parts.items():
        folder = destination / part
        folder.mkdir(parents=True, exist_ok=True)
        for label in subjects:
            picture = rasterise(icons, label, 128)
            if picture is not None:
                grey = picture.convert("L") if icon_set == DEMO else picture
                grey.save(folder / f"{slug(label)}.png", optimize=True)
                (folder / f"{slug(label)}.txt").write_text(f"{label}, {style} style\n")
    prompts = "".join(f"{label}, {style} style\n" for label in DEMO_PROMPTS)
    (destination / "prompts.txt").write_text(prompts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["data", "vae", "transformer", "bundle", "control"])
    parser.add_argument("--work", type=Path, default=Path("outputs/pretrain_tiny"))
    parser.add_argument("--vae-stop", type=int, default=3400)
    parser.add_argument("--transformer-steps", type=int, default=5000)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.stage == "data":
        prepare_data(options.work)
    elif options.stage == "vae":
        train_vae(options.work, options.vae_stop)
    elif options.stage == "transformer":
        train_transformer(options.work, options.transformer_steps)
    elif options.stage == "bundle":
        bundle(options.work)
    else:
        write_pictures(options.work, SETS[0], SETS[0].style, options.work / "control")


if __name__ == "__main__":
    main()
