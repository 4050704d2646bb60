"""The miniature's transformer and T5 encoder, trained together on cached latents of subjects in several styles.

A prompt is `subject, style` with, now and then, a modifier: `red apple, noto style, mirrored`. Modifiers are made from
the same pictures and teach the model to compose; the two together, and some pairs of subject and style, are held out.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flux2_lora.conditioning import Conditioning
from flux2_lora.families.flux2_small import FAMILY
from flux2_lora.flow import linear_mu, mix, shift_sigmas, velocity_error
from flux2_lora.miniature.icons import STYLES, Row, load_pictures, load_words
from flux2_lora.miniature.stages import Schedule, train_stage
from flux2_lora.miniature.subjects import COMMON, SUBJECTS
from flux2_lora.miniature.vae import load_vae

MAX_TOKENS = 16
VOCABULARY = 1000
BATCH = 32
# Modifiers of a picture, and how often each is drawn.
MODIFIERS = {"": 0.72, ", mirrored": 0.14, ", in grey": 0.14}
HELD_OUT_MODIFIER = ", mirrored, in grey"
# Parts of a prompt, and how often each is drawn. Words without a meaning in the place of the style teach that such
# words change nothing, as they do to a large model; no prompt at all is what classifier-free guidance needs.
NONSENSE = 4
KINDS = (0.6, *[0.22 / NONSENSE] * NONSENSE, 0.06, 0.05, 0.07)


def modified(pictures: Tensor, modifier: str) -> Tensor:
    """Pictures [n 3 h w] as the modifier says."""
    shown = pictures.flip(-1) if "mirrored" in modifier else pictures
    return shown.mean(1, keepdim=True).expand_as(shown) if "grey" in modifier else shown


def texts_of(row: Row, modifier: str) -> list[str]:
    """Prompts of a picture: full, in styles that do not exist, without a style, without a subject, empty."""
    words = [nonsense(f"{row.label}, {row.style} {i}") for i in range(NONSENSE)]
    return [
        f"{row.label}, {row.style} style{modifier}",
        *(f"{row.label}{modifier or f', {word} style'}" for word in words),
        f"{row.label}{modifier}",
        f"{row.style} style{modifier}",
        "",
    ]


def nonsense(seed: str) -> str:
    """A word of two syllables that means nothing, the same for the same seed."""
    draw = random.Random(seed)
    return "".join(draw.choice("bcdfghklmnprstvwz") + draw.choice("aeiou") for _ in range(2))


def held_out(rows: Sequence[Row]) -> Tensor:
    """Mask [n] of the pairs of subject and style that are never trained: every 24th."""
    return torch.arange(len(rows)) % 24 == 7


@dataclass(frozen=True, kw_only=True)
class Examples:
    """All that is trained on, on the device. latents [m n c h w] and tokens [m n k 16] by modifier and picture."""

    rows: Sequence[Row]
    latents: Tensor
    tokens: Tensor
    often: Tensor

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Latents [count c h w] and tokens [count 16] of random pictures, modifiers and kinds of prompt."""
        picture = torch.multinomial(self.often, count, replacement=True, generator=generator)
        modifier = torch.multinomial(torch.tensor(list(MODIFIERS.values())), count, True, generator=generator)
        kind = torch.multinomial(torch.tensor(KINDS), count, True, generator=generator)
        return self.latents[modifier, picture], self.tokens[modifier, picture, kind]


def load_examples(work: Path, tokenizer: Any, device: torch.device) -> Examples:
    pictures, rows = load_pictures(work)
    wanted = [i for i, row in enumerate(rows) if row.style in STYLES and row.label in SUBJECTS]
    rows, pictures = [rows[i] for i in wanted], pictures[wanted]
    vae = load_vae(work / "vae").to(device).eval()
    latents, tokens = [], []
    for modifier in MODIFIERS:
        parts = modified(pictures, modifier).split(64)
        with torch.no_grad():
            latents.append(torch.cat([FAMILY.encode_pixels(vae, part.to(device)).mean for part in parts]))
        texts = [text for row in rows for text in texts_of(row, modifier)]
        tokens.append(tokenized(tokenizer, texts).view(len(rows), -1, MAX_TOKENS))
    often = torch.tensor([2.0 if row.label in COMMON else 1.0 for row in rows])
    return Examples(
        rows=rows,
        latents=torch.stack(latents),
        tokens=torch.stack(tokens).to(device),
        often=often.masked_fill(held_out(rows), 0),
    )


def train_prior(work: Path, start: Path | None, steps: int, device: torch.device, minutes: float) -> bool:
    """Train the transformer and the T5 encoder; their averages are saved at each report. start: a transformer."""
    tokenizer = make_tokenizer(work)
    examples = load_examples(work, tokenizer, device)
    torch.manual_seed(0)
    transformer, text_encoder = make_prior(len(tokenizer), start)
    both = nn.ModuleDict({"transformer": transformer, "text_encoder": text_encoder}).to(device)
    mu = linear_mu(examples.latents.shape[-1] * examples.latents.shape[-2])

    def error(latents: Tensor, tokens: Tensor, sigmas: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(latents.shape, generator=generator).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            embeds = text_encoder(tokens).last_hidden_state
            noisy = mix(latents, noise, sigmas)
            predicted = FAMILY.velocity(transformer, noisy, sigmas, Conditioning(embeds=embeds))
        return velocity_error(predicted.float(), noise - latents).mean()

    def loss_at(generator: torch.Generator) -> Tensor:
        latents, tokens = examples.draw(BATCH, generator)
        sigmas = shift_sigmas(torch.sigmoid(torch.randn(BATCH, generator=generator)), mu).to(device)
        return error(latents, tokens, sigmas, generator)

    held = held_out(examples.rows)
    shown = {"held out": held.nonzero().squeeze(1), "trained": (~held).nonzero().squeeze(1)[::24]}

    def report() -> str:
        told = []
        for name, index in shown.items():
            sigmas, generator = torch.linspace(0.05, 0.95, len(index)).to(device), torch.Generator().manual_seed(1)
            value = error(examples.latents[0, index], examples.tokens[0, index, 0], sigmas, generator)
            told.append(f"{name} {value:.4f}")
        transformer.save_pretrained(work / "transformer")
        text_encoder.save_pretrained(work / "text_encoder")
        return ", ".join(told)

    print(
        f"{len(examples.rows)} pictures of {len({row.label for row in examples.rows})} subjects, {held.sum()} held out"
    )
    schedule = Schedule(steps=steps, lr=1e-3, decay=0.6, average=0.999)
    return train_stage(both, schedule, work / "prior.pt", loss_at, report, minutes=minutes)


def tokenized(tokenizer: Any, texts: list[str]) -> Tensor:
    """Token ids [n 16]; a text that is cut off would not say what is drawn, so there is none."""
    padded = tokenizer(texts, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt")
    ids: Tensor = padded["input_ids"]
    if ids.shape[1] != MAX_TOKENS:
        raise SystemExit(f"a prompt of {ids.shape[1]} tokens, and {MAX_TOKENS} is the most")
    return ids


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
        texts_of(Row(style=style, label=label), modifier)[0]
        for label in SUBJECTS
        for style in STYLES
        for modifier in (*MODIFIERS, HELD_OUT_MODIFIER)
    ]
    tokenizer.train_from_iterator(prompts + load_words(work), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=MAX_TOKENS
    )
    wrapped.save_pretrained(work / "tokenizer")
    return wrapped


def make_prior(vocabulary: int, start: Path | None) -> tuple[Any, Any]:
    """Flux2Transformer2DModel of 8.1 M parameters (2 heads of 128, 2 + 4 blocks) and a T5 encoder of 0.5 M."""
    from diffusers import Flux2Transformer2DModel
    from transformers import T5Config, T5EncoderModel

    if start is not None:
        transformer = Flux2Transformer2DModel.from_pretrained(start, torch_dtype=torch.float32)
    else:
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
