"""ComfyUI workflows that draw a picture of ours: as its server takes them, and as its editor shows them.

Core nodes only. What makes the picture the same: noise is one CPU draw of the seed in latent shape there too;
Flux2Scheduler has FLUX.2's own sigmas, and FLUX.1 gets ours as numbers, since its named schedulers round them to a
table; neither is shifted again, for a model's shift acts in named schedulers alone; T5 is padded to the length that
Diffusers pads to, where ComfyUI would stop at 256. tests/parity/test_comfyui.py has ComfyUI draw them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flux2_lora.inference.comfyui_graph import Graph, Node
from flux2_lora.inference.comfyui_inputs import add_finish, add_references, add_start, differences, input_files
from flux2_lora.inference.levels import levels_of, written
from flux2_lora.inference.settings import Settings, last_part

# Where a released model's file has another name than its folder on the hub.
_FILES = {
    "flux.1-dev": "flux1-dev.safetensors",
    "flux.1-krea-dev": "flux1-krea-dev.safetensors",
    "flux.1-schnell": "flux1-schnell.safetensors",
    "flux.2-dev": "flux2-dev.safetensors",
    "flux.2-klein-4b": "flux-2-klein-4b.safetensors",
    "flux.2-klein-9b": "flux-2-klein-9b.safetensors",
    "flux.2-klein-base-4b": "flux-2-klein-base-4b.safetensors",
    "flux.2-klein-base-9b": "flux-2-klein-base-9b.safetensors",
}
_T5, _LONGEST = "t5xxl_fp16.safetensors", 512


def comfyui_api(settings: Settings) -> dict[str, Any]:
    """The workflow as ComfyUI's /prompt takes it, with its note beside the first node's title."""
    nodes = _drawn(settings).as_api()
    nodes["1"]["_meta"]["note"] = _note(settings)
    return nodes


def comfyui_ui(settings: Settings) -> dict[str, Any]:
    """The workflow as ComfyUI's editor opens and saves it."""
    return _drawn(settings).as_ui(_note(settings))


def _note(settings: Settings) -> str:
    """Which files the workflow looks for, and how near its picture comes."""
    folders = {"unet_name": "diffusion_models", "vae_name": "vae", "lora_name": "loras"}
    files = [
        f"- models/{folders.get(name, 'text_encoders')}/{value}"
        for node in _drawn(settings).nodes
        for name, value in node.inputs.items()
        if isinstance(value, str) and name.rstrip("12").endswith("_name") and name != "sampler_name"
    ]
    return "\n".join(
        [
            f"{settings.model_title}, written by flux2-lora {settings.version}. Looks for these files:",
            "",
            *files,
            *(f"- input/{name}" for name in input_files(settings)),
            "",
            *(["Those of input/ lie in the folder `inputs` beside the picture: copy them."] if settings.inputs else []),
            "Where yours have other names, choose them in the loaders. Weights of lower precision change the picture.",
            *_differences(settings),
            *differences(settings),
        ]
    )


def _differences(settings: Settings) -> list[str]:
    """Why the picture cannot be the same there."""
    found = [RECIPES[settings.family].note]
    length = settings.max_sequence_length or _LONGEST
    if settings.family != "flux1" and length != _LONGEST:
        found.append(
            f"ComfyUI gives FLUX.2 {_LONGEST} tokens of text, and this picture was drawn with {length}: the picture is "
            "alike, and not the same."
        )
    return [note for note in found if note]


def _drawn(settings: Settings) -> Graph:
    recipe, graph = RECIPES[settings.family], Graph()
    model = graph.add("UNETLoader", unet_name=_file_of(settings.model_path), weight_dtype="default")
    for file, strength in settings.active_adapters:
        model = graph.add("LoraLoaderModelOnly", model=model, lora_name=last_part(file), strength_model=strength)
    clip = recipe.text(graph, settings)
    vae = graph.add("VAELoader", vae_name=recipe.vae)
    start = add_start(graph, settings, vae)
    if start is None:
        sigmas, latents = recipe.sigmas(graph, settings), _empty(graph, settings, recipe.latents)
    else:
        sigmas, latents = _our_sigmas(graph, settings), start
    sampled = graph.add(
        "SamplerCustomAdvanced",
        noise=graph.add("RandomNoise", noise_seed=settings.seed),
        guider=_guider(graph, settings, model, clip, add_references(graph, settings, vae)),
        sampler=graph.add("KSamplerSelect", sampler_name=settings.sampler),
        sigmas=sigmas,
        latent_image=latents,
    )
    picture = graph.add("VAEDecode", samples=sampled, vae=vae)
    if start is not None:
        picture = add_finish(graph, settings, picture)
    graph.add("SaveImage", images=picture, filename_prefix="flux2-lora")
    return graph


def _empty(graph: Graph, settings: Settings, kind: str) -> Node:
    return graph.add(kind, width=settings.drawn_width, height=settings.drawn_height, batch_size=1)


def _guider(graph: Graph, settings: Settings, model: Node, clip: Node, references: Sequence[Node]) -> Node:
    """Both prompts get the embedded guidance, as in Diffusers' FluxPipeline, and look at all references."""

    def conditioning(text: str, title: str) -> Node:
        made = graph.add("CLIPTextEncode", title=title, clip=clip, text=_plain(text))
        if settings.guidance is not None:
            made = graph.add("FluxGuidance", conditioning=made, guidance=settings.guidance)
        for reference in references:
            made = graph.add("ReferenceLatent", conditioning=made, latent=reference)
        return made

    positive = conditioning(settings.prompt, "Prompt")
    if settings.negative is None:
        return graph.add("BasicGuider", model=model, conditioning=positive)
    negative = conditioning(settings.negative, "Negative prompt")
    return graph.add("CFGGuider", model=model, positive=positive, negative=negative, cfg=settings.cfg_scale)


def _qwen(graph: Graph, settings: Settings) -> Node:
    size = "8b" if "9b" in f"{settings.model_path} {settings.model_title}".lower() else "4b"
    return graph.add("CLIPLoader", clip_name=f"qwen_3_{size}.safetensors", type="flux2", device="default")


def _mistral(graph: Graph, settings: Settings) -> Node:  # noqa: ARG001
    name = "mistral_3_small_flux2_bf16.safetensors"
    return graph.add("CLIPLoader", clip_name=name, type="flux2", device="default")


def _t5(graph: Graph, settings: Settings) -> Node:
    """Type sd3 is the one that hands on T5's last states alone and unmasked."""
    return _padded(graph, settings, graph.add("CLIPLoader", clip_name=_T5, type="sd3", device="default"))


def _t5_clip(graph: Graph, settings: Settings) -> Node:
    files = {"clip_name1": "clip_l.safetensors", "clip_name2": _T5}
    return _padded(graph, settings, graph.add("DualCLIPLoader", **files, type="flux", device="default"))


def _padded(graph: Graph, settings: Settings, clip: Node) -> Node:
    length = settings.max_sequence_length or _LONGEST
    return graph.add("T5TokenizerOptions", clip=clip, min_padding=0, min_length=length)


def _flux2_sigmas(graph: Graph, settings: Settings) -> Node:
    width, height = settings.drawn_width, settings.drawn_height
    return graph.add("Flux2Scheduler", steps=settings.steps, width=width, height=height)


def _our_sigmas(graph: Graph, settings: Settings) -> Node:
    """Our own numbers, which ManualSigmas takes without an exponent."""
    return graph.add("ManualSigmas", sigmas=", ".join(written(levels_of(settings))))


@dataclass(frozen=True, kw_only=True)
class _Recipe:
    """What a family needs, FLUX.2 unless said: text encoders, file of the VAE, empty latents, sigmas.

    note: what a user should know.
    """

    text: Callable[[Graph, Settings], Node]
    vae: str = "flux2-vae.safetensors"
    latents: str = "EmptyFlux2LatentImage"
    sigmas: Callable[[Graph, Settings], Node] = _flux2_sigmas
    note: str = ""


RECIPES: Mapping[str, _Recipe] = {
    "flux1": _Recipe(
        text=_t5_clip,
        vae="ae.safetensors",
        latents="EmptySD3LatentImage",
        sigmas=_our_sigmas,
        note="The sigmas are those of this size and these steps; for others, draw a picture of that size here.",
    ),
    "flux2_dev": _Recipe(
        text=_mistral,
        note="ComfyUI fills short prompts up with zeros where Diffusers and flux2-lora use the states of padding: the "
        "picture is alike, and not the same.",
    ),
    "flux2_klein": _Recipe(text=_qwen),
    "flux2_small": _Recipe(
        text=_t5, note="ComfyUI knows T5-XXL and no smaller T5: these nodes cannot load the bundled miniature."
    ),
}


def _file_of(model: str) -> str:
    name = last_part(model)
    return name if name.endswith((".safetensors", ".gguf")) else _FILES.get(name.lower(), f"{name}.safetensors")


def _plain(text: str) -> str:
    """Brackets are emphasis to ComfyUI unless escaped."""
    return re.sub(r"([()])", r"\\\1", text)
