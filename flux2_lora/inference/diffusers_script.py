"""A short Diffusers program that draws a picture of ours: read from top to bottom, and run as it is.

FLUX.2 with T5 has no pipeline of its own there: Flux2KleinPipeline, or Flux2Pipeline for a model with a guidance
embedding, is handed T5's states. Heun's method on these sigmas is not there either; the script brings its scheduler.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from flux2_lora.inference.diffusers_inputs import (
    arguments_of,
    before_offload,
    begin_of,
    behind_offload,
    finish_of,
    imports_of,
    pictures_of,
    redraws,
)
from flux2_lora.inference.settings import Settings

_HEUN = '''
class Heun(FlowMatchEulerDiscreteScheduler):
    """Euler's sigmas, two velocities a step and their mean; the step to 0 is Euler's."""

    order = 2

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None):
        super().set_timesteps(num_inference_steps, device, sigmas, mu)
        self.timesteps, self.calls = self.timesteps.repeat_interleave(2)[1:], 0

    def step(self, velocity, timestep, sample, return_dict=False):
        step, second = divmod(self.calls, 2)
        self.calls += 1
        if second:
            velocity, sample = (self.first + velocity) / 2, self.start
        self.first, self.start = velocity, sample
        return (sample + (self.sigmas[step + 1] - self.sigmas[step]) * velocity,)
'''

_T5 = """
def t5(text):
    length = {length}
    tokens = pipeline.tokenizer(text, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return pipeline.text_encoder(tokens.input_ids.to(pipeline._execution_device))[0]
"""

_LARGE = """\
pipeline.vae.enable_tiling()
pipeline.vae.tile_sample_min_size, pipeline.vae.tile_latent_min_size = 1024, 128"""


def diffusers_script(settings: Settings, *others: Settings) -> str:
    """The program's text, which saves diffusers-0000.png, ... where it is started.

    others: more pictures, which differ in prompt and inputs.
    """
    pipeline, transformer = _pipeline(settings), _transformer(settings)
    parts = [
        f'"""{_quiet(settings.model_title)}: the pictures that flux2-lora {settings.version} drew."""\n',
        _imports(settings, [pipeline, *([transformer] if transformer else [])]),
        f"{_HEUN}\n" if settings.sampler == "heun" else "",
        "torch.set_grad_enabled(False)",
        "dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32",
        _loading(settings, pipeline, transformer),
        _scheduler(settings),
        _adapters(settings),
        _LARGE if max(settings.drawn_height, settings.drawn_width) > 1024 or settings.references else "",
        *before_offload(settings),
        "if torch.cuda.is_available():\n    pipeline.enable_model_cpu_offload()\n",
        f"{_T5.format(length=_length(settings))}\n" if settings.family == "flux2_small" else "",
        *behind_offload(settings),
        _drawing(settings, pipeline, [settings, *others]),
    ]
    return re.sub(r"\n{4,}", "\n\n\n", "\n".join(part for part in parts if part))


def _imports(settings: Settings, classes: Sequence[str]) -> str:
    scheduler = ["FlowMatchEulerDiscreteScheduler"] if settings.sampler == "heun" or redraws(settings) else []
    before, behind = imports_of(settings)
    names = ", ".join(sorted([*classes, *scheduler]))
    return "\n".join([*before, f"import torch\nfrom diffusers import {names}", *behind, ""])


def _scheduler(settings: Settings) -> str:
    """Where a picture is redrawn, one that takes the noise levels as they are."""
    kind = "Heun" if settings.sampler == "heun" else "FlowMatchEulerDiscreteScheduler"
    if redraws(settings):
        return f"pipeline.scheduler = {kind}()  # the sigmas below are shifted already"
    return f"pipeline.scheduler = {kind}.from_config(pipeline.scheduler.config)" if kind == "Heun" else ""


def _pipeline(settings: Settings) -> str:
    if settings.family == "flux1":
        return "FluxPipeline"
    return "Flux2KleinPipeline" if settings.guidance is None else "Flux2Pipeline"


def _transformer(settings: Settings) -> str | None:
    """The class to load a file of the transformer with, None for a folder or hub id."""
    if not settings.model_path.endswith(".safetensors"):
        return None
    return "FluxTransformer2DModel" if settings.family == "flux1" else "Flux2Transformer2DModel"


def _loading(settings: Settings, pipeline: str, transformer: str | None) -> str:
    path, rest = _place(settings.model_path), _place(settings.components or settings.model_path)
    if transformer is None:
        return f"pipeline = {pipeline}.from_pretrained({path}, dtype=dtype)"
    return (
        f'transformer = {transformer}.from_single_file({path}, config={rest}, subfolder="transformer", dtype=dtype)\n'
        f"pipeline = {pipeline}.from_pretrained({rest}, transformer=transformer, dtype=dtype)"
    )


def _adapters(settings: Settings) -> str:
    names = [f"lora_{number}" for number in range(len(settings.active_adapters))]
    lines = []
    for name, (file, _) in zip(names, settings.active_adapters, strict=True):
        folder, weights = _place(str(Path(file).parent)), _text(Path(file).name)
        lines.append(f"pipeline.load_lora_weights({folder}, weight_name={weights}, adapter_name={_text(name)})")
    if names:
        strengths = [strength for _, strength in settings.active_adapters]
        lines.append(f"pipeline.set_adapters({json.dumps(names)}, {strengths})")
    return "\n".join(lines)


def _place(path: str) -> str:
    """A path, which Diffusers does not expand, or a hub id."""
    return _text(str(Path(path).expanduser()) if path.startswith("~") else path)


def _text(text: str) -> str:
    """A literal: JSON's strings are Python's too."""
    return json.dumps(text, ensure_ascii=False)


def _length(settings: Settings) -> str:
    return str(settings.max_sequence_length or "min(pipeline.tokenizer.model_max_length, 512)")


def _drawing(settings: Settings, pipeline: str, drawn: Sequence[Settings]) -> str:
    lines = ["prompts = [", *(f"    {_text(one.prompt)}," for one in drawn), "]"]
    t5 = settings.family == "flux2_small"
    call = {"prompt_embeds": "t5(prompt)"} if t5 else {"prompt": "prompt"}
    if settings.negative is not None:
        before, more = _negative(settings, pipeline)
        lines += before
        call |= more
    if pipeline == "Flux2KleinPipeline":
        call["guidance_scale"] = repr(max(settings.cfg_scale, 1.0))
    elif settings.guidance is not None:
        call["guidance_scale"] = repr(settings.guidance)
    if settings.max_sequence_length and not t5:
        call["max_sequence_length"] = repr(settings.max_sequence_length)
    call |= {"height": repr(settings.drawn_height), "width": repr(settings.drawn_width)}
    if not redraws(settings):
        call["num_inference_steps"] = repr(settings.steps)
        call["generator"] = f'torch.Generator("cpu").manual_seed({settings.seed})'
    call |= arguments_of(settings)
    each = (
        "(prompt, name) in enumerate(zip(prompts, pictures))" if redraws(settings) else "prompt in enumerate(prompts)"
    )
    return "\n".join(
        [
            *lines,
            *pictures_of(drawn),
            f"for number, {each}:",
            *(f"    {line}" for line in begin_of(settings)),
            "    picture = pipeline(",
            *(f"        {name}={value}," for name, value in call.items()),
            "    ).images[0]",
            *(f"    {line}" for line in finish_of(settings)),
            '    picture.save(f"diffusers-{number:04d}.png")\n',
        ]
    )


def _negative(settings: Settings, pipeline: str) -> tuple[list[str], dict[str, str]]:
    """Lines before the loop, and arguments of the call, that make true CFG of the negative prompt."""
    text = _text(settings.negative_prompt)
    if pipeline == "FluxPipeline":
        return [], {"negative_prompt": text, "true_cfg_scale": repr(settings.cfg_scale)}
    if pipeline == "Flux2Pipeline":
        return ["# Flux2Pipeline has no true CFG: here the pictures differ from those of flux2-lora."], {}
    length = f", max_sequence_length={settings.max_sequence_length}" if settings.max_sequence_length else ""
    encoded = f"t5({text})" if settings.family == "flux2_small" else f"pipeline.encode_prompt({text}{length})[0]"
    return [
        "pipeline.register_to_config(is_distilled=False)  # a distilled model would pass over guidance_scale",
        f"negative = {encoded}",
    ], {"negative_prompt_embeds": "negative"}


def _quiet(title: str) -> str:
    """A title that does not end the docstring."""
    return title.replace("\\", "/").replace('"', "'")
