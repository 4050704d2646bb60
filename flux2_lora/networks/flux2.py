"""Everything of FLUX.2 but its text: Flux2Transformer2DModel and AutoencoderKLFlux2, for any family's text encoder.

Four facts that trainers get wrong are kept here: the transformer takes t = sigma in [0, 1] and multiplies by 1000
itself; the text has one padded length in training and sampling alike (padding is attended to); the shift counts packed
tokens, 16 x 16 pixels each; and a picture's latents are the posterior's mean, as the authors' own encoder has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flux2_lora import latents as geometry
from flux2_lora.conditioning import Conditioning
from flux2_lora.flow import linear_mu
from flux2_lora.networks.components import TextEncoders
from flux2_lora.networks.transformers import Shapes, compute_type, embedded_guidance, shape_of, stacks_of
from flux2_lora.samplers import empirical_mu


@dataclass(frozen=True, kw_only=True)
class Flux2:
    """A family of FLUX.2 by its text encoder; see `ModelFamily`. latents: [b 128 H/16 W/16]."""

    name: str
    text: TextEncoders
    architecture: str = "flux2"
    transformer_class: str = "Flux2Transformer2DModel"
    vae_class: str = "AutoencoderKLFlux2"
    latent_channels: int = 128
    pixels_per_token: int = 16
    samples_posterior: bool = False
    takes_references: bool = True

    def configuration(self, shapes: Shapes) -> dict[str, Any]:
        """The configuration that a transformer of these tensors has; a SwiGLU's first layer is twice as wide."""
        width = shape_of(shapes, "x_embedder.weight")[0]
        return {
            **stacks_of(shapes),
            "timestep_guidance_channels": shape_of(shapes, "time_guidance_embed.timestep_embedder.linear_1.weight")[1],
            "mlp_ratio": shape_of(shapes, "transformer_blocks.0.ff.linear_in.weight")[0] / (2 * width),
            "guidance_embeds": "time_guidance_embed.guidance_embedder.linear_1.weight" in shapes,
        }

    def encode_pixels(self, vae: nn.Module, pixels: Tensor) -> geometry.Posterior:
        posterior = vae.encode(pixels).latent_dist  # type: ignore[operator]
        mean, var, eps = _statistics(vae)
        return geometry.Posterior(
            mean=geometry.normalise(geometry.patchify(posterior.mode()), mean, var, eps),
            std=geometry.normalise(geometry.patchify(posterior.std), torch.zeros_like(mean), var, eps),
        )

    def decode_latents(self, vae: nn.Module, latents: Tensor) -> Tensor:
        restored = geometry.unpatchify(geometry.denormalise(latents, *_statistics(vae)))
        pixels: Tensor = vae.decode(restored, return_dict=False)[0]  # type: ignore[operator]
        return pixels.clamp(-1, 1)

    def draw_noise(self, height: int, width: int, stream: torch.Generator) -> Tensor:
        return torch.randn(1, self.latent_channels, height, width, generator=stream)

    def velocity(
        self,
        transformer: nn.Module,
        latents: Tensor,
        sigmas: Tensor,
        conditioning: Conditioning,
        guidance: float | None = None,
        references: Sequence[Tensor] = (),
    ) -> Tensor:
        """References are more image tokens, of times 10, 20, ...; what the transformer says of them is dropped."""
        dtype, (height, width) = compute_type(transformer), latents.shape[2:]
        shown = [reference.expand(len(latents), -1, -1, -1) for reference in references]
        ids = [geometry.image_ids(height, width, latents.device)]
        for number, one in enumerate(shown, start=1):
            ids.append(geometry.image_ids(one.shape[2], one.shape[3], latents.device, t=10 * number))
        packed = transformer(
            hidden_states=torch.cat([geometry.pack(one) for one in (latents, *shown)], dim=1).to(dtype),
            encoder_hidden_states=conditioning.embeds.to(dtype),
            timestep=sigmas.to(dtype),
            guidance=embedded_guidance(transformer, latents, guidance),
            img_ids=torch.cat(ids).expand(len(latents), -1, -1),
            txt_ids=geometry.text_ids(conditioning.embeds.shape[1], latents.device).expand(len(latents), -1, -1),
            return_dict=False,
        )[0]
        return geometry.unpack(packed[:, : height * width], height, width).to(latents.dtype)

    def training_mu(self, tokens: int) -> float:
        return linear_mu(tokens)

    def inference_mu(self, transformer: nn.Module, tokens: int, steps: int) -> float:  # noqa: ARG002
        return empirical_mu(tokens, steps)


def _statistics(vae: nn.Module) -> tuple[Tensor, Tensor, float]:
    """Running mean and variance [128] of the packed latents, and the epsilon beside the variance."""
    config: Any = vae.config
    norm = vae.get_submodule("bn")
    mean, var = norm.running_mean, norm.running_var
    assert isinstance(mean, Tensor)
    assert isinstance(var, Tensor)
    return mean, var, float(config.batch_norm_eps)
