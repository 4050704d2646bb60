"""A small random model of every family, saved as the Diffusers folder that its real models come in.

Real classes throughout and heads of 128, so that layouts, names and shapes are the real ones; widths and depths are as
small as that allows. A new family adds one entry to `MINIATURES`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

WORDS = (
    *("a", "red", "blue", "apple", "cat", "face", "of", "in", "style", "photo", "you", "are", "an", "system", "user"),
    *("assistant", "that", "about", "image", "descriptions", "give", "focusing", "on", "object", "and", "without"),
)
SPECIAL = ("<pad>", "</s>", "<unk>", "<s>", "<|im_start|>", "<|im_end|>", "[SYS]", "[/SYS]", "[INST]", "[/INST]")
CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
VOCABULARY = 64

QWEN_CHAT = (
    "{% for m in messages %}<|im_start|> {{ m.role }} {{ m.content }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant "
    "{% if enable_thinking is defined and not enable_thinking %}without {% endif %}{% endif %}"
)
MISTRAL_CHAT = (
    "<s>{% for m in messages %}{% if m.role == 'system' %}[SYS] {{ m.content[0].text }} [/SYS]"
    "{% else %}[INST] {{ m.content[0].text }} [/INST]{% endif %}{% endfor %}"
)


@dataclass(frozen=True, kw_only=True)
class Miniature:
    """family: its name; model: the page of configs/model it stands in for; build: writes the Diffusers folder.

    modules: how many Linears carry adapters; call: what its Diffusers pipeline is called with besides the prompt.
    """

    family: str
    model: str
    build: Callable[[Path], Any]
    modules: int
    call: Mapping[str, Any] = field(default_factory=dict)


def tokenizer(
    length: int, *, chat: str | None = None, opens: bool = False, clip: bool = False, side: str = "right"
) -> Any:
    """Words and special tokens; opens: puts <s> in front by itself; clip: start and end as CLIP has them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, *WORDS, CLIP_START, CLIP_END]
    vocabulary = {word: index for index, word in enumerate(words)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = f"{CLIP_START} $A {CLIP_END}" if clip else "<s> $A" if opens else "$A </s>"
    if chat is None or opens:
        used = [(word, vocabulary[word]) for word in (CLIP_START, CLIP_END, "<s>", "</s>")]
        made.post_processor = processors.TemplateProcessing(single=template, special_tokens=used)
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        model_max_length=length,
        padding_side=side,
        pad_token=CLIP_END if clip else "<pad>",
        eos_token=CLIP_END if clip else "</s>",
        unk_token="<unk>",
        bos_token="<s>" if opens else None,
        additional_special_tokens=list(SPECIAL[3:]),
        chat_template=chat,
    )


def t5(width: int = 48) -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=width,
        d_kv=16,
        d_ff=64,
        num_layers=3,
        num_heads=3,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config)


def clip(width: int = 40) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    # eos_token_id=2 as in the released models: the end token is then found as the largest id.
    config = CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        eos_token_id=2,
    )
    return CLIPTextModel(config)


def language(layers: int) -> dict[str, Any]:
    """Settings of a small language model."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 1024,
        "initializer_range": 0.2,
    }


def flux2_transformer(text: int, *, guidance: bool) -> nn.Module:
    from diffusers import Flux2Transformer2DModel

    return Flux2Transformer2DModel(
        in_channels=128,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=128,
        num_attention_heads=2,
        joint_attention_dim=text,
        guidance_embeds=guidance,
    )


def flux1_transformer(text: int, pooled: int, *, guidance: bool) -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        num_layers=2,
        num_single_layers=2,
        num_attention_heads=2,
        joint_attention_dim=text,
        pooled_projection_dim=pooled,
        guidance_embeds=guidance,
    )


def flux2_vae() -> nn.Module:
    from diffusers import AutoencoderKLFlux2

    vae = AutoencoderKLFlux2(block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4)
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    return vae


def flux1_vae() -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def scheduler(*, dynamic: bool = True) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=dynamic, shift=3.0 if dynamic else 1.0)


def flux2_small() -> Any:
    from diffusers import Flux2KleinPipeline

    transformer, vae = flux2_transformer(48, guidance=False), flux2_vae()
    return Flux2KleinPipeline(scheduler(), vae, t5(), tokenizer(32), transformer, is_distilled=False)


def flux2_klein() -> Any:
    from diffusers import Flux2KleinPipeline
    from transformers import Qwen3Config, Qwen3ForCausalLM

    encoder = Qwen3ForCausalLM(Qwen3Config(**language(29)))
    words, transformer = tokenizer(1024, chat=QWEN_CHAT), flux2_transformer(3 * 32, guidance=False)
    return Flux2KleinPipeline(scheduler(), flux2_vae(), encoder, words, transformer, is_distilled=False)


def flux2_dev() -> Any:
    from diffusers import Flux2Pipeline
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    config = Mistral3Config(
        text_config={"model_type": "mistral", **language(31)},
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "head_dim": 16,
            "image_size": 32,
            "patch_size": 16,
        },
    )
    words = tokenizer(1024, chat=MISTRAL_CHAT, opens=True, side="left")
    encoder, transformer = Mistral3ForConditionalGeneration(config), flux2_transformer(3 * 32, guidance=True)
    return Flux2Pipeline(scheduler(), flux2_vae(), encoder, words, transformer)


def flux1(*, dev: bool) -> Any:
    from diffusers import FluxPipeline

    transformer = flux1_transformer(48, 40, guidance=dev)
    short, long = tokenizer(77, clip=True), tokenizer(512)
    return FluxPipeline(scheduler(dynamic=dev), flux1_vae(), clip(), short, t5(), long, transformer)


@torch.no_grad()
def amplify(pipeline: Any) -> None:
    """Let text reach the picture and the picture have contrast, or a comparison of pictures would prove little."""
    pipeline.transformer.context_embedder.weight.mul_(20)
    pipeline.transformer.proj_out.weight.mul_(3)
    pipeline.vae.decoder.conv_out.weight.mul_(10)


def saved(make: Callable[[], Any]) -> Callable[[Path], Any]:
    """Build with a fixed seed and save; returns the pipeline, in evaluation mode."""

    def build(folder: Path) -> Any:
        torch.manual_seed(0)
        pipeline = make()
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.eval()
        amplify(pipeline)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.save_pretrained(folder)
        return pipeline

    return build


MINIATURES: Mapping[str, Miniature] = {
    "flux2_small": Miniature(
        family="flux2_small", model="flux2_small", build=saved(flux2_small), modules=28, call={"guidance_scale": 3.0}
    ),
    "flux2_klein": Miniature(
        family="flux2_klein",
        model="flux2_klein_base_4b",
        build=saved(flux2_klein),
        modules=28,
        call={"guidance_scale": 3.0},
    ),
    "flux2_dev": Miniature(
        family="flux2_dev", model="flux2_dev", build=saved(flux2_dev), modules=28, call={"guidance_scale": 3.5}
    ),
    "flux1": Miniature(
        family="flux1",
        model="flux1_dev",
        build=saved(lambda: flux1(dev=True)),
        modules=34,
        call={"guidance_scale": 3.5, "true_cfg_scale": 2.0},
    ),
    "flux1_schnell": Miniature(
        family="flux1",
        model="flux1_schnell",
        build=saved(lambda: flux1(dev=False)),
        modules=34,
        call={"guidance_scale": 0.0},
    ),
}


if __name__ == "__main__":  # python -m tests.miniatures flux2_klein FOLDER
    MINIATURES[sys.argv[1]].build(Path(sys.argv[2]))
