"""flux2_small: T5 states -> Flux2Transformer2DModel -> AutoencoderKLFlux2.

Three facts that trainers get wrong are kept here: the transformer takes t = sigma in [0, 1] and multiplies by 1000
itself; text is padded to one fixed length, without a mask, in training and in sampling alike (padding is attended to);
and the shift counts packed tokens, 16 x 16 pixels each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flux2_lora import latents as geometry
from flux2_lora.conditioning import Conditioning
from flux2_lora.errors import UserError, did_you_mean, listed
from flux2_lora.families import PromptEncoder
from flux2_lora.flow import linear_mu
from flux2_lora.samplers import empirical_mu

LONGEST_PROMPT = 512

# Single blocks fuse q, k, v and the MLP's first layer (and both last layers), so they belong to both groups.
_FUSED = r"single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
_TARGETS = {
    "attention": r"transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)",
    "mlp": r"transformer_blocks\.\d+\.ff(_context)?\.linear_(in|out)",
}


@dataclass(frozen=True)
class Flux2Small:
    """See `ModelFamily`; shapes: embeds [b s 4096] for T5-XXL, latents [b 128 H/16 W/16]."""

    name: str = "flux2_small"
    architecture: str = "flux2"
    latent_channels: int = 128
    pixels_per_token: int = 16

    def check(self, folder: Path) -> None:
        parts = {
            "transformer": "Flux2Transformer2DModel",
            "vae": "AutoencoderKLFlux2",
            "text_encoder": "T5EncoderModel",
            "tokenizer": "",
        }
        if not folder.is_dir():
            raise UserError(
                f"model.path={folder} is not a folder",
                "give the Diffusers folder of a flux2_small model, or model=tiny",
            )
        absent = [part for part in parts if not (folder / part).is_dir()]
        absent += [
            f"{part}/*.safetensors"
            for part, kind in parts.items()
            if kind and part not in absent and not any((folder / part).glob("*.safetensors"))
        ]
        if absent:
            raise UserError(
                f"model.path={folder} lacks {listed(absent)}",
                f"a {self.name} folder holds transformer/, vae/, text_encoder/ and tokenizer/ with safetensors weights",
            )

    def target_modules(self, targets: Sequence[str]) -> str:
        for group in targets:
            if group not in _TARGETS:
                raise UserError(
                    f"adapter.targets names {group!r}, which is no group of {self.name}",
                    did_you_mean(group, list(_TARGETS)),
                )
        if not targets:
            raise UserError("adapter.targets=[] leaves nothing to train", "use adapter.targets=[attention,mlp]")
        return "|".join([_FUSED, *(_TARGETS[group] for group in targets)])

    def load_transformer(self, folder: Path, dtype: torch.dtype) -> nn.Module:
        from diffusers import Flux2Transformer2DModel

        _no_progress_bars()
        transformer: nn.Module = Flux2Transformer2DModel.from_pretrained(
            folder, subfolder="transformer", dtype=dtype, local_files_only=True
        )
        return transformer.eval()

    def load_vae(self, folder: Path, device: torch.device) -> nn.Module:
        from diffusers import AutoencoderKLFlux2

        _no_progress_bars()
        vae: nn.Module = AutoencoderKLFlux2.from_pretrained(
            folder, subfolder="vae", dtype=torch.float32, local_files_only=True
        )
        return vae.requires_grad_(False).eval().to(device)

    def load_prompt_encoder(self, folder: Path, device: torch.device) -> PromptEncoder:
        from transformers import AutoTokenizer, T5EncoderModel

        _no_progress_bars()
        tokenizer: Any = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        encoder: Any = T5EncoderModel.from_pretrained(folder / "text_encoder", dtype=dtype, local_files_only=True)
        encoder = encoder.requires_grad_(False).eval().to(device)
        length = min(tokenizer.model_max_length, LONGEST_PROMPT)

        @torch.no_grad()
        def encode(prompts: Sequence[str]) -> Conditioning:
            tokens = tokenizer(
                list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
            )
            states = encoder(tokens.input_ids.to(device)).last_hidden_state
            return Conditioning(embeds=states.float().cpu())

        return encode

    def encode_pixels(self, vae: nn.Module, pixels: Tensor) -> Tensor:
        posterior = vae.encode(pixels).latent_dist  # type: ignore[operator]
        return geometry.normalise(geometry.patchify(posterior.mode()), *_statistics(vae))

    def decode_latents(self, vae: nn.Module, latents: Tensor) -> Tensor:
        restored = geometry.unpatchify(geometry.denormalise(latents, *_statistics(vae)))
        pixels: Tensor = vae.decode(restored, return_dict=False)[0]  # type: ignore[operator]
        return pixels.clamp(-1, 1)

    def velocity(
        self,
        transformer: nn.Module,
        latents: Tensor,
        sigmas: Tensor,
        conditioning: Conditioning,
        guidance: float | None = None,
    ) -> Tensor:
        config: Any = transformer.config
        height, width = latents.shape[2:]
        dtype = transformer.get_submodule("x_embedder").weight.dtype
        assert isinstance(dtype, torch.dtype)
        embedded = None
        if config.guidance_embeds:
            embedded = torch.full((len(latents),), 1.0 if guidance is None else guidance, device=latents.device)
        packed = transformer(
            hidden_states=geometry.pack(latents).to(dtype),
            encoder_hidden_states=conditioning.embeds.to(dtype),
            timestep=sigmas.to(dtype),
            guidance=embedded,
            img_ids=geometry.image_ids(height, width, latents.device).expand(len(latents), -1, -1),
            txt_ids=geometry.text_ids(conditioning.embeds.shape[1], latents.device).expand(len(latents), -1, -1),
            return_dict=False,
        )[0]
        return geometry.unpack(packed, height, width).to(latents.dtype)

    def training_mu(self, tokens: int) -> float:
        return linear_mu(tokens)

    def inference_mu(self, tokens: int, steps: int) -> float:
        return empirical_mu(tokens, steps)


def _no_progress_bars() -> None:
    """Loading is quick here; the bars of both libraries would stand between the lines of a run."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def _statistics(vae: nn.Module) -> tuple[Tensor, Tensor, float]:
    """Running mean and variance [128] of the packed latents, and the epsilon beside the variance."""
    config: Any = vae.config
    norm = vae.get_submodule("bn")
    mean, var = norm.running_mean, norm.running_var
    assert isinstance(mean, Tensor)
    assert isinstance(var, Tensor)
    return mean, var, float(config.batch_norm_eps)


FAMILY = Flux2Small()
