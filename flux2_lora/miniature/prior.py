"""The miniature's transformer and T5 encoder, trained together on cached latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flux2_lora.conditioning import Conditioning
from flux2_lora.families.flux2_small import FAMILY
from flux2_lora.flow import linear_mu, mix, shift_sigmas, velocity_error
from flux2_lora.miniature.examples import MAX_TOKENS, load_examples, texts_of
from flux2_lora.miniature.icons import STYLES, Row, load_words
from flux2_lora.miniature.stages import Schedule, train_stage
from flux2_lora.miniature.subjects import SUBJECTS
from flux2_lora.miniature.variants import INKS, PLACES

VOCABULARY = 1000
# Mean and deviation of the logit of the noise level. What a drawing shows is decided at high levels, of which the usual
# mean of 0 and deviation of 1 draw too few: at 128 px little noise leaves every shape to be seen. How crisp it is, is
# decided at the low ones.
LEVEL = (1.0, 1.7)


def train_prior(
    work: Path, start: Path | None, device: torch.device, *, steps: int, batch: int, focused: bool, minutes: float
) -> bool:
    """Train the transformer and the T5 encoder; their averages are saved at each report. start: a Diffusers folder."""
    tokenizer = begin_tokenizer(work, start)
    examples = load_examples(work, tokenizer, device, focused=focused)
    torch.manual_seed(0)
    transformer, text_encoder = load_prior(start) if start else make_prior(len(tokenizer))
    both = nn.ModuleDict({"transformer": transformer, "text_encoder": text_encoder}).to(device)

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        latents, tokens = examples.draw(batch, generator)
        mu = linear_mu(latents.shape[-1] * latents.shape[-2])
        mean, deviation = LEVEL
        logits = mean + deviation * torch.randn(batch, generator=generator, device=device)
        sigmas = shift_sigmas(torch.sigmoid(logits), mu)
        return latents, tokens, sigmas, torch.randn(latents.shape, generator=generator, device=device)

    def loss_of(latents: Tensor, tokens: Tensor, sigmas: Tensor, noise: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            embeds = text_encoder(tokens).last_hidden_state
            noisy = mix(latents, noise, sigmas)
            predicted = FAMILY.velocity(transformer, noisy, sigmas, Conditioning(embeds=embeds))
        return velocity_error(predicted.float(), noise - latents).mean()

    def report() -> dict[str, float]:
        transformer.save_pretrained(work / "transformer")
        text_encoder.save_pretrained(work / "text_encoder")
        told = {}
        for name, (latents, tokens) in examples.told.items():
            generator = torch.Generator(device).manual_seed(1)
            sigmas = torch.linspace(0.05, 0.95, len(latents), device=device)
            noise = torch.randn(latents.shape, generator=generator, device=device)
            told[name] = loss_of(latents, tokens, sigmas, noise).item()
        return told

    schedule = Schedule(steps=steps, lr=6e-4 if start else 1e-3, decay=1.0 if start else 0.6, average=0.998)
    return train_stage(both, schedule, work / "prior.pt", draw, loss_of, report, minutes=minutes, every=400)


def begin_tokenizer(work: Path, start: Path | None) -> Any:
    """The tokenizer of the model that is trained further, or the one in work, or a new one; saved in work."""
    from transformers import AutoTokenizer

    folder = (start or work) / "tokenizer"
    tokenizer = AutoTokenizer.from_pretrained(folder) if folder.is_dir() else make_tokenizer(work)
    tokenizer.save_pretrained(work / "tokenizer")
    return tokenizer


def make_tokenizer(work: Path) -> Any:
    """A unigram tokenizer with T5's special tokens, learned from the prompts and from the names of all emoji."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        initial_alphabet=[chr(code) for code in range(33, 127)],
        show_progress=False,
    )
    prompts = [
        texts_of(Row(style=style, label=label), place, ink)[0]
        for label in SUBJECTS
        for style in STYLES
        for place in PLACES
        for ink in INKS
    ]
    tokenizer.train_from_iterator(prompts + load_words(work), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=MAX_TOKENS
    )


def load_prior(start: Path) -> tuple[Any, Any]:
    from diffusers import Flux2Transformer2DModel
    from transformers import T5EncoderModel

    transformer = Flux2Transformer2DModel.from_pretrained(start / "transformer", torch_dtype=torch.float32)
    return transformer, T5EncoderModel.from_pretrained(start / "text_encoder", torch_dtype=torch.float32)


def make_prior(vocabulary: int) -> tuple[Any, Any]:
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
    return transformer, T5EncoderModel(config)
