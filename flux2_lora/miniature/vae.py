"""The miniature's VAE: `AutoencoderKLFlux2` of 1.3 M parameters, 16 px a token, 32 latent channels."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flux2_lora.miniature.icons import DEMOS, SETS, SIDE_PX, Row, having, load_pictures
from flux2_lora.miniature.stages import Schedule, train_stage

SIDES = {SIDE_PX: 0.6, 96: 0.2, 64: 0.2}  # of its pictures in pixels, and how often


def train_vae(work: Path, start: Path | None, device: torch.device, *, steps: int, batch: int, minutes: float) -> bool:
    """Train on every set but the demo's, and save a folder when the steps are done. start: a VAE to go on from."""
    pictures, rows = load_pictures(work)
    demo, held = having(rows, styles=[s.style for s in DEMOS]), hold_out(rows)
    training = pictures[~held & ~demo].to(device)
    unseen = {"base": pictures[held & ~demo]} | {s.style: pictures[having(rows, styles=[s.style])] for s in DEMOS}
    torch.manual_seed(0)
    vae = (load_vae(start) if start else make_vae()).to(device, memory_format=torch.channels_last)
    vae.train()

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        index = torch.randint(len(training), (batch,), generator=generator, device=device)
        [side] = random.Random(generator.initial_seed()).choices(list(SIDES), list(SIDES.values()))
        sized = F.interpolate(training[index], size=(side, side), mode="bicubic", antialias=True).clamp(-1, 1)
        noise = torch.randn(batch, 32, side // 8, side // 8, generator=generator, device=device)
        return augment(sized, generator), noise

    def loss_of(pictures: Tensor, noise: Tensor) -> Tensor:
        posterior = vae.encode(pictures.to(memory_format=torch.channels_last)).latent_dist
        error = vae.decode(posterior.mean + posterior.std * noise).sample - pictures
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        loss: Tensor = 4 * error.square().mean() + error.abs().mean() + 0.5 * edges + 2e-4 * kl
        return loss

    def report() -> dict[str, float]:
        return {name: psnr(vae, shown[::8]) for name, shown in unseen.items()}

    schedule = Schedule(steps=steps, lr=2e-3, decay=0.9) if start else Schedule(steps=steps, lr=4e-3)
    if not train_stage(vae, schedule, work / "vae.pt", draw, loss_of, report, minutes=minutes):
        return False
    for name, shown in unseen.items():
        print(f"psnr of {len(shown)} pictures never seen, {name}: {psnr(vae, shown):.2f} dB")
    set_latent_statistics(vae, pictures[having(rows, styles=[s.style for s in SETS])])
    vae.save_pretrained(work / "vae")
    return True


def make_vae() -> Any:
    """Residual branches start at zero, and the posterior is quiet: the decoder first meets latents, not noise."""
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
    with torch.no_grad():
        vae.quant_conv.bias[32:] = -6.0  # the log-variances
        vae.quant_conv.weight[32:] *= 0.1
    return vae


def load_vae(folder: Path) -> Any:
    from diffusers import AutoencoderKLFlux2

    return AutoencoderKLFlux2.from_pretrained(folder, torch_dtype=torch.float32)


def augment(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Flips, other inks and papers, grey and two-tone versions: no style may be too far to decode. [n 3 h w]"""
    draws = {"generator": generator, "device": pictures.device}
    flip, kind, level, reprinted = torch.rand(4, len(pictures), 1, 1, 1, **draws)  # type: ignore[call-overload]
    pictures = torch.where(flip < 0.5, pictures.flip(-1), pictures)
    order = torch.rand(len(pictures), 3, **draws).argsort(1)  # type: ignore[call-overload]
    swapped = pictures.gather(1, order[..., None, None].expand_as(pictures))
    grey = pictures.mean(1, keepdim=True).expand_as(pictures)
    # Steep contrast around a random level gives ink on paper.
    ink = ((grey - (level * 1.6 - 0.8)) * 8).clamp(-1, 1)
    for most, version in ((0.5, ink), (0.3, grey), (0.25, swapped)):
        pictures = torch.where(kind < most, version, pictures)
    # Once in three times, black and white of each channel become two random values.
    black, white = torch.rand(2, len(pictures), 3, 1, 1, **draws) * 2 - 1  # type: ignore[call-overload]
    return torch.where(reprinted < 1 / 3, torch.lerp(black, white, (pictures + 1) / 2), pictures)


def hold_out(rows: list[Row]) -> Tensor:
    """Mask [n] of every sixteenth label, the same labels in every style."""
    held = set(sorted({row.label for row in rows})[::16])
    return torch.tensor([row.label in held for row in rows])


def psnr(vae: Any, pictures: Tensor) -> float:
    """Mean over pictures [n 3 h w] of 10 log10(1 / mse), values in [0, 1], decibels."""
    vae.eval()
    values = []
    with torch.no_grad():
        for part in pictures.split(64):
            there = part.to(vae.device)
            decoded = vae.decode(vae.encode(there).latent_dist.mode()).sample.clamp(-1, 1)
            values.append(-10 * torch.log10(((decoded - there) / 2).square().mean((1, 2, 3))))
    vae.train()
    return torch.cat(values).mean().item()


def set_latent_statistics(vae: Any, pictures: Tensor) -> None:
    """Mean and variance of the 128 packed latent channels, into the batch-norm buffers that FLUX.2 normalises with."""
    with torch.no_grad():
        latents = torch.cat([vae.encode(part.to(vae.device)).latent_dist.mode() for part in pictures.split(64)])
        packed = F.pixel_unshuffle(latents, 2)
        vae.bn.running_mean.copy_(packed.mean((0, 2, 3)))
        vae.bn.running_var.copy_(packed.var((0, 2, 3)))
