"""The script beside a grid, run as it is, draws our pictures: every family, with an adapter and without."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from flux2_lora.adapters import Adapter, Lora, attach_loras, set_strengths
from flux2_lora.export import export_lora, modules_of
from flux2_lora.families import Model, ModelSpec, open_model
from flux2_lora.inference.diffusers_script import diffusers_script
from flux2_lora.inference.pictures import decoded
from flux2_lora.inference.sampling import Prompted, generate, initial_noise
from flux2_lora.inference.settings import Settings
from flux2_lora.quantize import PrecisionSpec, load_frozen
from flux2_lora.samplers import SAMPLERS
from tests import miniatures

CPU = torch.device("cpu")
PROMPTS = ["a red apple in photo style", "blue cat face"]
RANK, ALPHA = 4, 8.0


def t5_with_guidance() -> Any:
    """flux2_small with a guidance embedding, as its 12B profile has."""
    from diffusers import Flux2KleinPipeline

    transformer = miniatures.flux2_transformer(48, guidance=True)
    parts = (miniatures.scheduler(), miniatures.flux2_vae(), miniatures.t5(), miniatures.tokenizer(32), transformer)
    return Flux2KleinPipeline(*parts, is_distilled=False)


def distilled() -> Any:
    pipeline = miniatures.flux2_klein()
    pipeline.register_to_config(is_distilled=True)
    return pipeline


BUILD = {
    **{name: miniature.build for name, miniature in miniatures.MINIATURES.items()},
    "flux2_small_guidance": miniatures.saved(t5_with_guidance),
    "flux2_klein_distilled": miniatures.saved(distilled),
}
CASES: Mapping[str, Mapping[str, Any]] = {
    "flux2_small": {"family": "flux2_small", "cfg_scale": 3.0, "negative_prompt": "a blue face"},
    "flux2_small_guidance": {"family": "flux2_small", "guidance": 3.5},
    "flux2_klein": {"family": "flux2_klein", "cfg_scale": 3.0, "negative_prompt": "a blue face"},
    "flux2_klein_distilled": {"family": "flux2_klein", "cfg_scale": 1.5},
    "flux2_dev": {"family": "flux2_dev", "guidance": 3.5},
    "flux1": {"family": "flux1", "guidance": 3.5, "cfg_scale": 2.0, "negative_prompt": "a blue face"},
    "flux1_schnell": {"family": "flux1", "max_sequence_length": 256},
}


@pytest.fixture(autouse=True)
def one_thread(two_threads: None) -> None:
    """Pictures this small are drawn faster by one."""
    torch.set_num_threads(1)


@dataclass(frozen=True)
class Case:
    """A miniature in a folder, the settings of a picture of it, and an adapter that is not attached yet."""

    settings: Settings
    adapter: Adapter
    file: Path


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp(request.param)
    BUILD[request.param](folder)
    settings = Settings(
        **CASES[request.param],
        model_title="miniature",
        model_path=str(folder),
        prompt=PROMPTS[0],
        height=100,
        width=64,
        steps=3,
        seed=7,
    )
    adapter = random_adapter(_model(settings))
    return Case(settings, adapter, written(adapter, folder / "style.v1.safetensors"))


def random_adapter(model: Model) -> Adapter:
    """Every Linear that may carry one, with updates that are seen."""
    rng = torch.Generator().manual_seed(1)
    state: dict[str, Tensor] = {}
    for name in model.projections():
        height, width = model.weights.shapes[f"{name}.weight"]
        state[f"{name}.lora_A.weight"] = 0.1 * torch.randn(RANK, width, generator=rng)
        state[f"{name}.lora_B.weight"] = 0.1 * torch.randn(height, RANK, generator=rng)
    return Adapter(state=state, rank=RANK, alpha=ALPHA, targets=["attention", "mlp"], family=model.family.name)


def written(adapter: Adapter, path: Path) -> Path:
    """Our exported file; FLUX.1's in Diffusers' own names, since its reader of the others knows the real width only."""
    if adapter.family == "flux1":
        scale = {"A": 1.0, "B": ALPHA / RANK}
        save_file({f"transformer.{k}": scale[k.split(".lora_")[1][0]] * v for k, v in adapter.state.items()}, path)
    else:
        export_lora(modules_of(adapter.state, RANK, ALPHA), path, architecture="flux2", header={"format": "pt"})
    return path


def _model(settings: Settings) -> Model:
    spec = ModelSpec(
        family=settings.family,
        path=settings.model_path,
        title="",
        architecture_name="",
        max_sequence_length=settings.max_sequence_length,
    )
    return open_model(spec)


@torch.no_grad()
def ours(settings: Settings, adapter: Adapter, prompts: list[str]) -> list[np.ndarray[Any, Any]]:
    """What our sampler draws; the adapter as it was trained."""
    model = _model(settings)
    family, transformer = model.family, load_frozen(model, PrecisionSpec(base="fp32"), CPU)
    modules = modules_of(adapter.state, adapter.rank, adapter.alpha)
    strengths = [strength for _, strength in settings.active_adapters]
    loras = {
        str(place): Lora(modules=modules, naming="", total=len(modules), architecture=model.family.architecture)
        for place in range(len(strengths))
    }
    set_strengths(transformer, dict(zip(attach_loras(transformer, loras), strengths, strict=True)))
    *positives, negative = model.load_prompt_encoder(CPU)([*prompts, settings.negative_prompt])
    pictures = []
    for positive in positives:
        prompted = Prompted(
            positive=positive, negative=negative, cfg_scale=settings.cfg_scale, guidance=settings.guidance
        )
        noise = initial_noise(family, settings.height, settings.width, [settings.seed])
        latents = generate(family, transformer, prompted, noise, settings.steps, sampler=SAMPLERS[settings.sampler])
        pictures.append(np.asarray(decoded(family, model.load_vae(CPU), latents)[0]).astype(float))
    return pictures


def theirs(
    settings: Settings, prompts: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> list[np.ndarray[Any, Any]]:
    """What the script saves, run in `folder`; gradients are as before afterwards."""
    monkeypatch.chdir(folder)
    with torch.no_grad():
        exec(
            compile(
                diffusers_script(*(replace(settings, prompt=prompt) for prompt in prompts)), "with_diffusers.py", "exec"
            ),
            {},
        )
        torch.set_grad_enabled(True)
    files = sorted(folder.glob("diffusers-*.png"))
    assert len(files) == len(prompts)
    return [np.asarray(Image.open(file)).astype(float) for file in files]


def same(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> bool:
    """Within 2 of 255 in 99.9 % of values."""
    assert one.shape == other.shape
    return float((np.abs(one - other) <= 2).mean()) >= 0.999


def test_the_script_draws_our_pictures(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = theirs(case.settings, PROMPTS, tmp_path, monkeypatch)
    expected = ours(case.settings, case.adapter, PROMPTS)
    assert same(first, expected[0])
    assert same(second, expected[1])
    assert np.abs(first - second).max() > 2


def test_the_script_draws_our_pictures_with_an_adapter(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(case.settings, adapters=((str(case.file), 0.7),))
    [found] = theirs(settings, PROMPTS[:1], tmp_path, monkeypatch)
    assert same(found, ours(settings, case.adapter, PROMPTS[:1])[0])
    assert not same(found, ours(replace(settings, adapters=()), case.adapter, PROMPTS[:1])[0])


@pytest.mark.parametrize("case", ["flux2_small", "flux1"], indirect=True)
def test_the_script_s_heun_is_ours(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(case.settings, sampler="heun")
    [found] = theirs(settings, PROMPTS[:1], tmp_path, monkeypatch)
    assert same(found, ours(settings, case.adapter, PROMPTS[:1])[0])
    assert not same(found, ours(case.settings, case.adapter, PROMPTS[:1])[0])
