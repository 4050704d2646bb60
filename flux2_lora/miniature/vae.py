"""The miniature's VAE: `AutoencoderKLFlux2` of 1.3 M parameters, 16 px a token, 32 latent channels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flux2_lora.miniature.icons import DEMOS, SETS, SIDE_PX, Row, having, load_pictures
from flux2_lora.miniature.stages import Schedule, train_stage

BATCH = 16
FROM_NOTHING = Schedule(steps=4200, lr=4e-3)
GOING_ON = Schedule(steps=2000, lr=2e-3, decay=0.9)


def train_vae(work: Path, start: Path | None, device: torch.device, minutes: float) -> bool:
    """Train on every set but the demo's, and save a folder when the steps are done. start: a VAE to go on from."""
    pictures, rows = load_pictures(work)
    demo, held = having(rows, styles=[s.style for s in DEMOS]), hold_out(rows)
    training = pictures[~held & ~demo]
    unseen = {"base": pictures[held & ~demo]} | {s.style: pictures[having(rows, styles=[s.style])] for s in DEMOS}
    torch.manual_seed(0)
    vae = (load_vae(start) if start else make_vae()).to(device, memory_format=torch.channels_last)
    vae.train()

    def loss_at(generator: torch.Generator) -> Tensor:
        batch = augment(training[torch.randint(len(training), (BATCH,), generator=generator)], generator)
        batch = batch.to(device, memory_format=torch.channels_last)
        posterior = vae.encode(batch).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        error = vae.decode(posterior.mean + posterior.std * noise).sample - batch
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        loss: Tensor = 4 * error.square().mean() + error.abs().mean() + 0.5 * edges + 2e-4 * kl
        return loss

    def report() -> dict[str, float]:
        return {name: psnr(vae, shown[::8]) for name, shown in unseen.items()}

    schedule = GOING_ON if start else FROM_NOTHING
    if not train_stage(vae, schedule, work / "vae.pt", loss_at, report, minutes=minutes):
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
    return torch.stack([_reprinted(_augmented(picture, generator), generator) for picture in pictures])


def _reprinted(picture: Tensor, generator: torch.Generator) -> Tensor:
    """Black and white of each channel become two random values, once in three times."""
    often = torch.rand((), generator=generator)
    black, white = torch.rand(2, 3, 1, 1, generator=generator) * 2 - 1
    return torch.lerp(black, white, (picture + 1) / 2) if often < 1 / 3 else picture


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
