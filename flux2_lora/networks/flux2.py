"""Everything of FLUX.2 but its text: Flux2Transformer2DModel and AutoencoderKLFlux2, for any family's text encoder.

Three facts that trainers get wrong are kept here: the transformer takes t = sigma in [0, 1] and multiplies by 1000
itself; the text has one padded length in training and sampling alike (padding is attended to); and the shift counts
packed tokens, 16 x 16 pixels each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flux2_lora import latents as geometry
from flux2_lora.conditioning import Conditioning
from flux2_lora.flow import linear_mu
from flux2_lora.networks.components import TextEncoders, check_components, load_autoencoder
from flux2_lora.networks.text import PromptEncoder
from flux2_lora.networks.transformers import Shapes, blocks_of, empty_transformer, open_transformer, shape_of
from flux2_lora.samplers import empirical_mu
from flux2_lora.sources import ModelFiles, check_folders
from flux2_lora.weights import Weights


@dataclass(frozen=True, kw_only=True)
class Flux2:
    """A family of FLUX.2 by its text encoder; see `ModelFamily`. latents: [b 128 H/16 W/16]."""

    name: str
    text: TextEncoders
    architecture: str = "flux2"
    latent_channels: int = 128
    pixels_per_token: int = 16

    @property
    def parts(self) -> Mapping[str, tuple[str, ...]]:
        return {"vae": ("AutoencoderKLFlux2",), **self.text.parts}

    def check(self, files: ModelFiles) -> Weights:
        check_folders(files, list(self.parts), self.name)
        weights = open_transformer(files, "Flux2Transformer2DModel", self.architecture, self.name)
        check_components(files, self.parts, self.name, self.text, weights)
        self.empty_transformer(files, weights)
        return weights

    def empty_transformer(self, files: ModelFiles, weights: Weights) -> nn.Module:
        return empty_transformer(files, "Flux2Transformer2DModel", weights, _read_off)

    def load_vae(self, files: ModelFiles, device: torch.device) -> nn.Module:
        from diffusers import AutoencoderKLFlux2

        return load_autoencoder(AutoencoderKLFlux2, files, device)

    def load_prompt_encoder(self, files: ModelFiles, device: torch.device, length: int | None = None) -> PromptEncoder:
        return self.text.load(files.components, device, length)

    def encode_pixels(self, vae: nn.Module, pixels: Tensor) -> Tensor:
        posterior = vae.encode(pixels).latent_dist  # type: ignore[operator]
        return geometry.normalise(geometry.patchify(posterior.mode()), *_statistics(vae))

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

    def inference_mu(self, transformer: nn.Module, tokens: int, steps: int) -> float:  # noqa: ARG002
        return empirical_mu(tokens, steps)


def _read_off(shapes: Shapes) -> dict[str, Any]:
    """The configuration that a transformer of these tensors has. SwiGLU: the MLP's first layer has gate and value."""
    hidden, channels = shape_of(shapes, "x_embedder.weight")
    head = shape_of(shapes, "transformer_blocks.0.attn.norm_q.weight")[0]
    return {
        "in_channels": channels,
        "num_layers": blocks_of(shapes, "transformer_blocks"),
        "num_single_layers": blocks_of(shapes, "single_transformer_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": hidden // head,
        "joint_attention_dim": shape_of(shapes, "context_embedder.weight")[1],
        "timestep_guidance_channels": shape_of(shapes, "time_guidance_embed.timestep_embedder.linear_1.weight")[1],
        "mlp_ratio": shape_of(shapes, "transformer_blocks.0.ff.linear_in.weight")[0] / (2 * hidden),
        "guidance_embeds": "time_guidance_embed.guidance_embedder.linear_1.weight" in shapes,
    }


def _statistics(vae: nn.Module) -> tuple[Tensor, Tensor, float]:
    """Running mean and variance [128] of the packed latents, and the epsilon beside the variance."""
    config: Any = vae.config
    norm = vae.get_submodule("bn")
    mean, var = norm.running_mean, norm.running_var
    assert isinstance(mean, Tensor)
    assert isinstance(var, Tensor)
    return mean, var, float(config.batch_norm_eps)
