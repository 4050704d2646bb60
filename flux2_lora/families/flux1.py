"""flux1: T5 states and CLIP's pooled state -> FluxTransformer2DModel -> AutoencoderKL of 16 channels.

FLUX.1 dev and Krea have a guidance embedding and a shift that grows with the picture; schnell, distilled to 4 steps,
has neither. Latents are handled in the form of FLUX.2, 2 x 2 patches as channels, but noise is drawn as Diffusers'
FluxPipeline draws it, before the patches are made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from flux2_lora import latents as geometry
from flux2_lora.conditioning import Conditioning
from flux2_lora.flow import linear_mu
from flux2_lora.networks.prompts import T5ClipText
from flux2_lora.networks.transformers import Shapes, compute_type, embedded_guidance, shape_of, stacks_of


@dataclass(frozen=True, kw_only=True)
class Flux1:
    """See `ModelFamily`. latents: [b 64 H/16 W/16]; embeds [b s 4096], pooled [b 768]."""

    name: str = "flux1"
    architecture: str = "flux1"
    transformer_class: str = "FluxTransformer2DModel"
    vae_class: str = "AutoencoderKL"
    latent_channels: int = 64
    pixels_per_token: int = 16
    samples_posterior: bool = True
    takes_references: bool = False
    text: T5ClipText = field(default_factory=T5ClipText)

    def configuration(self, shapes: Shapes) -> dict[str, Any]:
        """The configuration that a transformer of these tensors has."""
        return {
            **stacks_of(shapes),
            "pooled_projection_dim": shape_of(shapes, "time_text_embed.text_embedder.linear_1.weight")[1],
            "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in shapes,
        }

    def encode_pixels(self, vae: nn.Module, pixels: Tensor) -> geometry.Posterior:
        config: Any = vae.config
        posterior = vae.encode(pixels).latent_dist  # type: ignore[operator]
        return geometry.Posterior(
            mean=geometry.patchify((posterior.mode() - config.shift_factor) * config.scaling_factor),
            std=geometry.patchify(posterior.std * config.scaling_factor),
        )

    def decode_latents(self, vae: nn.Module, latents: Tensor) -> Tensor:
        config: Any = vae.config
        restored = geometry.unpatchify(latents) / config.scaling_factor + config.shift_factor
        pixels: Tensor = vae.decode(restored, return_dict=False)[0]  # type: ignore[operator]
        return pixels.clamp(-1, 1)

    def draw_noise(self, height: int, width: int, stream: torch.Generator) -> Tensor:
        return geometry.patchify(torch.randn(1, self.latent_channels // 4, 2 * height, 2 * width, generator=stream))

    def velocity(
        self,
        transformer: nn.Module,
        latents: Tensor,
        sigmas: Tensor,
        conditioning: Conditioning,
        guidance: float | None = None,
        references: Sequence[Tensor] = (),
    ) -> Tensor:
        assert not references
        dtype, (height, width) = compute_type(transformer), latents.shape[2:]
        assert conditioning.pooled is not None
        packed = transformer(
            hidden_states=geometry.pack(latents).to(dtype),
            encoder_hidden_states=conditioning.embeds.to(dtype),
            pooled_projections=conditioning.pooled.to(dtype),
            timestep=sigmas.to(dtype),
            guidance=embedded_guidance(transformer, latents, guidance),
            img_ids=geometry.image_ids(height, width, latents.device)[:, :3],
            txt_ids=torch.zeros(conditioning.embeds.shape[1], 3, dtype=torch.long, device=latents.device),
            return_dict=False,
        )[0]
        return geometry.unpack(packed, height, width).to(latents.dtype)

    def training_mu(self, tokens: int) -> float:
        return linear_mu(tokens)

    def inference_mu(self, transformer: nn.Module, tokens: int, steps: int) -> float:  # noqa: ARG002
        config: Any = transformer.config
        return linear_mu(tokens) if config.guidance_embeds else 0.0


FAMILY = Flux1()
