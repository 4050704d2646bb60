"""ComfyUI itself runs our workflows and loads our LoRA files: its server, its validation, its nodes, on random weights.

Left out unless FLUX2_LORA_COMFYUI names a checkout of it, and FLUX2_LORA_COMFYUI_PYTHON a Python with its packages
where that is not ours. The graphs go there as they are written. All is ComfyUI's own but the states of text.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from flux2_lora.adapters import Adapter
from flux2_lora.export import FORMATS, export_lora, modules_of
from flux2_lora.families import Model, ModelSpec, open_model
from flux2_lora.inference import starts
from flux2_lora.inference.comfyui import comfyui_api, comfyui_ui
from flux2_lora.inference.pack import save_inputs
from flux2_lora.inference.pipeline import Pipeline
from flux2_lora.inference.sampling import Recipe
from flux2_lora.inference.settings import TEXT_TO_IMAGE, Settings
from flux2_lora.inference.starts import Start
from flux2_lora.latents import Posterior
from flux2_lora.quantize import PrecisionSpec
from tests.comfyui import CHECKOUT, RefusedError, Server, served
from tests.parity.test_pack_diffusers import ALPHA, BUILD, CASES, RANK, ours, random_adapter, same
from tests.parity.test_pack_modes_diffusers import hole, photo
from tests.single_file import fused
from tests.unit.test_pack import ALL, FROM_PICTURES

pytestmark = pytest.mark.skipif(CHECKOUT not in os.environ, reason=f"{CHECKOUT} names no checkout of ComfyUI")
CPU = torch.device("cpu")
# Long, since all states are 512, and those of padding say little; with all signs that ComfyUI could take for its own.
PROMPT, OTHER = (
    8 * words for words in (r"a (red) apple [photo] {style|face} (of:1.3) \(cat\) ", "blue cat face on object ")
)
NOT_LOADED = "lora key not loaded"
EVERY = {**ALL, **FROM_PICTURES}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with served(tmp_path_factory.mktemp("comfyui")) as started:
        yield started


@dataclass(frozen=True)
class Case:
    """A miniature that lies before the server under the names its workflow asks for, and an adapter of it."""

    settings: Settings
    model: Model
    adapter: Adapter
    server: Server
    drawn: dict[Settings, np.ndarray[Any, Any]] = field(default_factory=dict)

    @property
    def architecture(self) -> str:
        return self.model.family.architecture

    def ours(self, **changes: Any) -> np.ndarray[Any, Any]:
        settings = replace(self.settings, **changes)
        if settings not in self.drawn:
            [self.drawn[settings]] = ours(settings, self.adapter, [settings.prompt])
        return self.drawn[settings]

    def theirs(self, **changes: Any) -> np.ndarray[Any, Any]:
        drawn = self.server.draw(comfyui_api(replace(self.settings, **changes)))
        assert NOT_LOADED not in drawn.log
        return drawn.picture

    @property
    def lora(self) -> Path:
        return self.server.folder / "models" / "loras" / "style.v1.safetensors"


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, server: Server) -> Case:
    folder = tmp_path_factory.mktemp("models") / request.param
    BUILD[request.param](folder)
    _widen(folder, tmp_path_factory.getbasetemp())
    settings = Settings(
        **CASES[request.param],
        model_title="miniature",
        model_path=str(folder),
        prompt=PROMPT,
        height=100,
        width=64,
        steps=4,
        seed=7,
    )
    spec = ModelSpec(
        family=settings.family,
        path=str(folder),
        title="",
        architecture_name="",
        max_sequence_length=settings.max_sequence_length,
    )
    model = open_model(spec)
    _lay_before(server, settings, model, folder)
    return Case(settings, model, random_adapter(model), server)


def _widen(folder: Path, shared: Path) -> None:
    """What ComfyUI knows in one size alone: an autoencoder of the real width, and T5 with prompts of 512 tokens."""
    flux1 = json.loads((folder / "vae" / "config.json").read_text())["latent_channels"] == 16
    wide = shared / f"vae_{'flux1' if flux1 else 'flux2'}"
    if not wide.exists():
        _autoencoder(flux1=flux1).save_pretrained(wide)  # type: ignore[operator]
    shutil.rmtree(folder / "vae")
    (folder / "vae").symlink_to(wide)
    config = folder / "tokenizer" / "tokenizer_config.json"
    told = json.loads(config.read_text())
    if told["model_max_length"] == 32:
        config.write_text(json.dumps({**told, "model_max_length": 512}))


@torch.no_grad()
def _autoencoder(*, flux1: bool) -> nn.Module:
    from diffusers import AutoencoderKL, AutoencoderKLFlux2

    torch.manual_seed(0)
    if flux1:
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=16,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    else:
        vae = AutoencoderKLFlux2()
        vae.bn.running_mean.normal_()
        vae.bn.running_var.uniform_(0.5, 2.0)
    vae.decoder.conv_out.weight.mul_(10)
    made: nn.Module = vae
    return made


def _lay_before(server: Server, settings: Settings, model: Model, folder: Path) -> None:
    tensors = fused(load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors"))
    prompts = [PROMPT, OTHER, settings.negative_prompt]
    states = {}
    for place, found in enumerate(model.load_prompt_encoder(CPU)(prompts)):
        states[f"embeds.{place}"] = found.embeds.contiguous()
        if found.pooled is not None:
            states[f"pooled.{place}"] = found.pooled.contiguous()
    models = server.folder / "models"
    for node in comfyui_api(settings).values():
        inputs = node["inputs"]
        if "unet_name" in inputs:
            whole = {key: tensor.contiguous() for key, tensor in tensors.items()}
            save_file(whole, models / "diffusion_models" / inputs["unet_name"])
        if "vae_name" in inputs:
            link = models / "vae" / inputs["vae_name"]
            link.unlink(missing_ok=True)
            link.symlink_to((folder / "vae" / "diffusion_pytorch_model.safetensors").resolve())
        for name in ("clip_name", "clip_name1", "clip_name2"):
            if name in inputs:
                save_file(states, models / "text_encoders" / inputs[name], {"texts": json.dumps(prompts)})


def test_comfyui_draws_our_picture(case: Case) -> None:
    found = case.theirs()
    assert same(found, case.ours())
    assert found.std() > 20
    assert not same(found, case.theirs(seed=8))
    assert not same(found, case.theirs(prompt=OTHER))


def test_comfyui_s_heun_is_ours(case: Case) -> None:
    found = case.theirs(sampler="heun")
    assert same(found, case.ours(sampler="heun"))
    assert not same(found, case.ours())


def write(case: Case, form: str) -> None:
    modules = modules_of(case.adapter.state, RANK, ALPHA)
    export_lora(modules, case.lora, architecture=case.architecture, header={"format": "pt"}, format=form)


@pytest.mark.parametrize("form", list(FORMATS))
def test_comfyui_loads_all_of_an_adapter(case: Case, form: str) -> None:
    write(case, form)
    adapters = ((str(case.lora), 0.7),)
    found = case.theirs(adapters=adapters)
    assert same(found, case.ours(adapters=adapters))
    assert not same(found, case.ours())


def test_comfyui_says_which_of_an_adapter_it_cannot_load(case: Case) -> None:
    """Or the silence of the tests above would prove nothing."""
    write(case, "universal")
    save_file({key.replace("_0_", "_9_"): tensor for key, tensor in load_file(case.lora).items()}, case.lora)
    drawn = case.server.draw(comfyui_api(replace(case.settings, adapters=((str(case.lora), 0.7),))))
    assert NOT_LOADED in drawn.log


# From pictures. What ComfyUI does not have is taken off our side: the membranes at seams, and FLUX.1's posterior.


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = starts.encoded

    def certain(*given: Any) -> Posterior:
        found = encoded(*given)
        return Posterior(mean=found.mean, std=torch.zeros_like(found.std))

    monkeypatch.setattr(starts, "encoded", certain)
    monkeypatch.setattr(starts, "lay_over", lambda original, painted, mask: Image.composite(painted, original, mask))


def from_pictures(
    case: Case, to_start: Callable[[Pipeline], Start] | None, mode: str, strength: float, *references: Image.Image
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """(ours, theirs) of what is redrawn, or of a new picture that looks at references."""
    known = case.settings
    model = open_model(replace(case.model.spec, resolution=64))
    pipeline = Pipeline.open(model, PrecisionSpec(base="fp32"), {}, CPU, prompts=[PROMPT, known.negative_prompt])
    guided = {"cfg_scale": known.cfg_scale, "guidance": known.guidance, "negative_prompt": known.negative_prompt}
    pipeline.recipe = Recipe(steps=4, seed=7, **guided)  # type: ignore[arg-type]
    start = to_start(pipeline) if to_start else None
    if start is None:
        drawn = pipeline.generate(PROMPT, height=64, width=48, references=references)
    else:
        [drawn] = pipeline.draw_from(start, [PROMPT], strength=strength, references=references)
    inputs = save_inputs(case.server.folder, start, references)
    shutil.copytree(case.server.folder / "inputs", case.server.folder / "input", dirs_exist_ok=True)
    told = {"mode": mode, "strength": strength, "references": len(references), "inputs": inputs}
    settings = replace(known, height=drawn.height, width=drawn.width, **told)  # type: ignore[arg-type]
    return np.asarray(drawn).astype(float), case.server.draw(comfyui_api(settings)).picture


HOLE = hole(96, 120, 50, 40, 70, 61).point(lambda value: 255 * (value > 0))  # grey tokens are mixed otherwise there
STARTS: Mapping[str, tuple[Callable[[Pipeline], Start], float]] = {
    "image to image": (lambda pipeline: pipeline.to_redraw(photo(60, 72)), 0.6),
    "inpaint": (lambda pipeline: pipeline.to_inpaint(photo(64, 64), hole(64, 64, 10, 5, 40, 50), crop="never"), 1.0),
    "inpaint around a mask": (lambda pipeline: pipeline.to_inpaint(photo(96, 120), HOLE, padding_px=8), 0.8),
}


@pytest.mark.parametrize("mode", STARTS)
@pytest.mark.parametrize("case", ["flux2_klein", "flux1"], indirect=True)
def test_comfyui_redraws_as_we_do(case: Case, mode: str, plain: None) -> None:
    to_start, strength = STARTS[mode]
    expected, found = from_pictures(case, to_start, mode.partition(" around")[0], strength)
    assert same(found, expected)
    if mode == "inpaint around a mask":
        kept = np.asarray(HOLE) == 0
        assert np.array_equal(found[kept], np.asarray(photo(96, 120))[kept])


@pytest.mark.parametrize("case", ["flux2_klein"], indirect=True)
def test_comfyui_looks_at_references_as_we_do(case: Case, plain: None) -> None:
    expected, found = from_pictures(case, None, TEXT_TO_IMAGE, 1.0, photo(64, 80), photo(64, 64, seed=4))
    assert same(found, expected)


@pytest.mark.parametrize("settings", EVERY.values(), ids=EVERY)
def test_of_a_real_model_s_workflow_comfyui_misses_its_files_alone(server: Server, settings: Settings) -> None:
    graph = comfyui_api(settings)
    with pytest.raises(RefusedError) as refused:
        server.draw(graph)
    wrong = {
        (number, error["extra_info"]["input_name"]): error["type"]
        for number, errors in refused.value.nodes.items()
        for error in errors
    }
    files = {
        (number, name)
        for number, node in graph.items()
        for name, value in node["inputs"].items()
        if str(value).endswith((".safetensors", ".png"))
    }
    assert wrong.keys() <= files
    assert set(wrong.values()) <= {"value_not_in_list", "custom_validation_failed"}  # models, pictures


@cache
def _declared(server: Server) -> Mapping[str, Any]:
    found: Mapping[str, Any] = server.ask("object_info")
    return found


def _kind(declared: list[Any]) -> str:
    """Older nodes give the list of choices where newer ones say COMBO."""
    return "COMBO" if isinstance(declared[0], list) else str(declared[0])


def _typed(declared: Mapping[str, list[Any]], values: list[Any]) -> dict[str, Any]:
    """Fields in the order of their declaration, as the editor does: one more behind seeds, one at the end for files."""
    names: list[str | None] = []
    for name, found in declared.items():
        if _kind(found) in {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}:
            names.append(name)
            names += [None] if found[1:] and found[1].get("control_after_generate") else []
    names += [None for found in declared.values() if found[1:] and found[1].get("image_upload")]
    read = [re.sub(r"\\([{}])", r"\1", value) if isinstance(value, str) else value for value in values]
    return {name: value for name, value in zip(names, read, strict=True) if name}


@pytest.mark.parametrize("settings", EVERY.values(), ids=EVERY)
def test_the_editor_s_form_is_the_server_s_by_comfyui_s_own_declarations(server: Server, settings: Settings) -> None:
    page, declared = comfyui_ui(settings), _declared(server)
    nodes = {node["id"]: node for node in page["nodes"] if node["type"] != "MarkdownNote"}  # the editor's own
    links = {link[0]: link for link in page["links"]}
    read: dict[str, Any] = {}
    for number, node in nodes.items():
        kind = declared[node["type"]]
        inputs = {**kind["input"]["required"], **kind["input"].get("optional", {})}
        read[str(number)] = _typed(inputs, node["widgets_values"])
        for place, socket in enumerate(node["inputs"]):
            _, source, slot, *target, type_ = links[socket["link"]]
            assert target == [number, place]
            assert _kind(inputs[socket["name"]]) == declared[nodes[source]["type"]]["output"][slot] == type_
            read[str(number)][socket["name"]] = [str(source), slot]
        outputs = [(out["name"], out["type"]) for out in node["outputs"]]
        assert outputs == list(zip(kind["output_name"], kind["output"], strict=True))
    assert read == {number: node["inputs"] for number, node in comfyui_api(settings).items()}
