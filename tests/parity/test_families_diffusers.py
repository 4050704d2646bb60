"""Every family against Diffusers' own pipeline, on random weights: embeddings, velocity, pictures, gradients."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from flux2_lora import quantize
from flux2_lora.adapters import AdapterSpec, attach, lora_layers
from flux2_lora.conditioning import Conditioning, stack
from flux2_lora.families import Model, ModelSpec, family_names, open_model
from flux2_lora.inference.sampling import Prompted, velocity_of
from flux2_lora.latents import pack, unpack
from flux2_lora.networks import text
from flux2_lora.quantize import PrecisionSpec, load_frozen
from flux2_lora.training.memory import compile_blocks, recompute_blocks
from flux2_lora.training.step import Sample, training_loss
from tests.conftest import Command, drawn
from tests.miniatures import MINIATURES, Miniature

CPU = torch.device("cpu")
PROMPTS = ["a red apple in photo style", "blue cat [IMG] face", ""]
NEGATIVE = "a blue face"
HEIGHT, WIDTH, SEED, STEPS = 96, 64, 7, 3


@dataclass(frozen=True)
class Pair:
    """The same weights twice: Diffusers' pipeline, and our model opened from its folder."""

    miniature: Miniature
    pipeline: Any
    folder: Path
    model: Model

    @property
    def length(self) -> int | None:
        return self.model.spec.max_sequence_length

    def cfg_scale(self) -> float:
        call = self.miniature.call
        distilled = self.model.empty_transformer().config.guidance_embeds  # type: ignore[union-attr]
        return float(call.get("true_cfg_scale", 1.0 if distilled else max(call["guidance_scale"], 1.0)))

    def reference_embeds(self, prompts: list[str]) -> Conditioning:
        """What the pipeline's own code encodes; T5 alone, which no pipeline reads, as FluxPipeline reads T5."""
        with torch.no_grad():
            if self.miniature.family == "flux2_small":
                from diffusers import FluxPipeline

                parts = {"text_encoder_2": self.pipeline.text_encoder, "tokenizer_2": self.pipeline.tokenizer}
                absent = dict.fromkeys(["scheduler", "vae", "text_encoder", "tokenizer", "transformer"])
                t5_only = FluxPipeline(**parts, **absent)
                return Conditioning(
                    embeds=t5_only._get_t5_prompt_embeds(
                        prompts, max_sequence_length=32, device=CPU, dtype=torch.float32
                    )
                )
            if self.miniature.family == "flux1":
                embeds, pooled, _ = self.pipeline.encode_prompt(prompts, max_sequence_length=self.length or 512)
                return Conditioning(embeds=embeds, pooled=pooled)
            return Conditioning(embeds=self.pipeline.encode_prompt(prompts)[0])

    def call(self, prompt: str, **options: Any) -> Any:
        """The pipeline on one prompt, with the miniature's guidance and, where it has one, the negative prompt."""
        given: dict[str, Any] = {**self.miniature.call, **options}
        if self.miniature.family in ("flux2_small", "flux2_klein"):
            given["negative_prompt_embeds"] = self.reference_embeds([NEGATIVE]).embeds
        if self.miniature.family == "flux2_small":
            given["prompt_embeds"] = self.reference_embeds([prompt]).embeds
        else:
            given["prompt"] = prompt
        if "true_cfg_scale" in given:
            given["negative_prompt"] = NEGATIVE
        if self.length:
            given["max_sequence_length"] = self.length
        return self.pipeline(**given, height=HEIGHT, width=WIDTH, generator=torch.Generator().manual_seed(SEED))


@pytest.fixture(scope="module", params=MINIATURES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    miniature = MINIATURES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    pipeline = miniature.build(folder)
    length = 256 if miniature.model == "flux1_schnell" else None
    spec = ModelSpec(
        family=miniature.family, path=str(folder), title="", architecture_name="", max_sequence_length=length
    )
    return Pair(miniature, pipeline, folder, open_model(spec))


def test_every_family_has_a_miniature() -> None:
    assert {miniature.family for miniature in MINIATURES.values()} == set(family_names())


def test_text_is_embedded_as_the_pipeline_embeds_it(pair: Pair) -> None:
    ours = stack(list(pair.model.load_prompt_encoder(CPU)(PROMPTS)))
    theirs = pair.reference_embeds(PROMPTS)
    torch.testing.assert_close(ours.embeds, theirs.embeds, atol=1e-5, rtol=0)
    assert (ours.pooled is None) == (theirs.pooled is None)
    if theirs.pooled is not None:
        torch.testing.assert_close(ours.pooled, theirs.pooled, atol=1e-5, rtol=0)
    assert (ours.embeds[0] - ours.embeds[1]).abs().max() > 1e-3


@pytest.mark.parametrize("sigma", [0.9, 0.35])
def test_the_velocity_is_that_of_the_pipeline(pair: Pair, sigma: float) -> None:
    """One Euler step of the pipeline from sigma to 0 is x - sigma v, so v can be read off it."""
    family, flux1 = pair.model.family, pair.miniature.family == "flux1"
    x = torch.randn(1, family.latent_channels, HEIGHT // 16, WIDTH // 16, generator=torch.Generator().manual_seed(1))
    start = pack(x) if flux1 else x
    out = pair.call(PROMPTS[0], num_inference_steps=1, sigmas=[sigma], latents=start, output_type="latent").images
    after = unpack(out, HEIGHT // 16, WIDTH // 16) if out.ndim == 3 else _normalised(pair, out)
    shifted = float(pair.pipeline.scheduler.sigmas[0])
    theirs = (x - after) / shifted
    positive, negative = pair.model.load_prompt_encoder(CPU)([PROMPTS[0], NEGATIVE])
    guidance = pair.miniature.call["guidance_scale"]
    prompted = Prompted(positive=positive, negative=negative, cfg_scale=pair.cfg_scale(), guidance=guidance)
    transformer = load_frozen(pair.model, PrecisionSpec(base="fp32"), CPU)
    with torch.no_grad():
        ours = velocity_of(family, transformer, prompted)(x, shifted)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_sample_draws_the_picture_of_the_pipeline(pair: Pair, command: Command, tmp_path: Path) -> None:
    theirs = [pair.call(prompt, num_inference_steps=STEPS, output_type="np").images[0] * 255 for prompt in PROMPTS[:2]]
    outcome = command(
        "sample",
        *(f"model={pair.miniature.model}", f"model.path={pair.folder}", "precision=fp32", "device=cpu"),
        *(f"height={HEIGHT}", f"width={WIDTH}", f"steps={STEPS}", f"seed={SEED}", "output=out"),
        *(f"cfg_scale={pair.cfg_scale()}", f"guidance={pair.miniature.call['guidance_scale']}"),
        *([f"negative_prompt={NEGATIVE}"] if pair.cfg_scale() > 1 else []),
        f"prompts={PROMPTS[:2]}",
    )
    assert outcome.code == 0, outcome.err
    for index, expected in enumerate(theirs):
        ours = np.asarray(Image.open(tmp_path / "out" / f"{index:04d}.png")).astype(float)
        assert ours.shape == expected.shape
        assert (np.abs(ours - expected) <= 2).mean() >= 0.999
    assert np.abs(theirs[0] - theirs[1]).max() > 2


@pytest.mark.parametrize(("kind", "least"), [("fp8", 0.99), ("int8", 0.999), ("nf4", 0.97)])
def test_gradients_on_a_quantised_base_point_where_those_of_float32_do(pair: Pair, kind: str, least: float) -> None:
    exact = gradients(pair.model, "fp32", checkpointing=False)
    plain, recomputed = (gradients(pair.model, kind, checkpointing=on) for on in (False, True))
    torch.testing.assert_close(plain, recomputed, atol=1e-7, rtol=1e-5)
    cosine = torch.nn.functional.cosine_similarity(exact.double(), plain.double(), dim=0).item()
    assert cosine >= least
    assert not torch.equal(exact, plain)


@pytest.mark.parametrize("kind", ["fp8", "int8", "nf4", "bf16"])
def test_a_base_in_bfloat16_trains_as_it_does_on_a_gpu(pair: Pair, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The types of a GPU run (bfloat16 base, float32 adapters) on the CPU.

    Diffusers' FLUX.2 rounds 1000 sigma to bfloat16, up to 2 of 1000, which random weights feel more than trained ones.
    """
    exact = gradients(pair.model, "fp32", checkpointing=True)
    monkeypatch.setattr(quantize, "compute_dtype", lambda _: torch.bfloat16)
    rounded = gradients(pair.model, kind, checkpointing=True)
    assert rounded.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(exact, rounded, dim=0) > 0.85


def test_text_in_bfloat16_is_near_that_in_float32(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = stack(list(pair.model.load_prompt_encoder(CPU)(PROMPTS)))
    monkeypatch.setattr(text, "compute_dtype", lambda _: torch.bfloat16)
    rounded = stack(list(pair.model.load_prompt_encoder(CPU)(PROMPTS)))
    assert rounded.embeds.dtype == torch.bfloat16
    assert (rounded.embeds.float() - exact.embeds).norm() / exact.embeds.norm() < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("pair", ["flux1", "flux2_klein"], indirect=True)  # the other families have these blocks
@pytest.mark.parametrize(("kind", "checkpointing"), [("fp8", True), ("fp8", False), ("nf4", True)])
def test_compiled_blocks_have_one_graph_and_the_same_gradients(pair: Pair, kind: str, checkpointing: bool) -> None:  # noqa: FBT001
    torch.compiler.reset()
    plain = gradients(pair.model, kind, checkpointing=checkpointing)
    compiled = gradients(pair.model, kind, checkpointing=checkpointing, backend="aot_eager")
    torch.testing.assert_close(compiled, plain, atol=1e-6, rtol=1e-4)


def test_the_posterior_is_the_autoencoders(pair: Pair) -> None:
    """One standard deviation off the mean, decoded by either side."""
    family, vae = pair.model.family, pair.model.load_vae(CPU)
    pixels = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        theirs = vae.encode(pixels).latent_dist  # type: ignore[operator]
        decoded = vae.decode(theirs.mode() + theirs.std).sample.clamp(-1, 1)  # type: ignore[operator]
        ours = family.encode_pixels(vae, pixels)
        torch.testing.assert_close(family.decode_latents(vae, ours.mean + ours.std), decoded, atol=1e-4, rtol=1e-4)
    assert ours.std.min() > 0


def gradients(model: Model, kind: str, *, checkpointing: bool, backend: str | None = None) -> Tensor:
    """One step's LoRA gradients as one vector; up matrices have values, so that all factors receive some."""
    transformer = load_frozen(model, PrecisionSpec(base=kind), CPU)
    assert attach(transformer, model.family.architecture, AdapterSpec(rank=4), seed=0) == len(model.projections())
    noise = torch.Generator().manual_seed(3)
    for _, layer in lora_layers(transformer):
        up = layer.lora_B["default"].weight
        with torch.no_grad():
            up.copy_(0.02 * torch.randn(up.shape, generator=noise))
    if checkpointing:
        recompute_blocks(transformer, ())
    if backend:
        compile_blocks(transformer, backend, fullgraph=True)
    texts = stack(list(model.load_prompt_encoder(CPU)(PROMPTS[:2])))
    latents = torch.randn(2, model.family.latent_channels, 4, 4, generator=noise)
    samples = [
        Sample(latents=one, conditioning=texts[place : place + 1], mask=torch.ones(1, 4, 4), key=str(place))
        for place, one in enumerate(latents)
    ]
    loss = training_loss(model.family, transformer, drawn(model.family, samples))
    loss.backward()
    found = [p.grad for p in transformer.parameters() if p.requires_grad]
    assert all(g is not None and g.abs().max() > 0 for g in found)
    return torch.cat([g.flatten() for g in found if g is not None])


def _normalised(pair: Pair, vae_latents: Tensor) -> Tensor:
    """FLUX.2's pipelines hand out latents of the VAE: back to what the transformer sees."""
    vae: nn.Module = pair.pipeline.vae
    mean, std = vae.bn.running_mean, torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps)
    patches = pair.pipeline._patchify_latents(vae_latents) if vae_latents.shape[1] == 32 else vae_latents
    return (patches - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)
