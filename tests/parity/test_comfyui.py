"""ComfyUI itself runs our workflows and loads our LoRA files: its server, its validation, its nodes, on random weights.

Left out unless FLUX2_LORA_COMFYUI names a checkout of it, and FLUX2_LORA_COMFYUI_PYTHON a Python with its packages
where that is not ours. The graphs go there as they are written. All is ComfyUI's own but the states of text.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from flux2_lora.adapters import Adapter
from flux2_lora.export import FORMATS, export_lora, modules_of
from flux2_lora.families import Model, ModelSpec, open_model
from flux2_lora.inference.comfyui import comfyui_api, comfyui_ui
from flux2_lora.inference.settings import Settings
from tests.comfyui import CHECKOUT, RefusedError, Server, served
from tests.parity.test_pack_diffusers import ALPHA, BUILD, CASES, RANK, ours, random_adapter, same
from tests.single_file import fused
from tests.unit.test_pack import ALL

pytestmark = pytest.mark.skipif(CHECKOUT not in os.environ, reason=f"{CHECKOUT} names no checkout of ComfyUI")
CPU = torch.device("cpu")
# Long, since all states are 512, and those of padding say little; with all signs that ComfyUI could take for its own.
PROMPT, OTHER = (
    8 * words for words in (r"a (red) apple [photo] {style|face} (of:1.3) \(cat\) ", "blue cat face on object ")
)
NOT_LOADED = "lora key not loaded"


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


@pytest.mark.parametrize("settings", ALL.values(), ids=ALL)
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
        if str(value).endswith(".safetensors")
    }
    assert wrong.keys() <= files
    assert set(wrong.values()) == {"value_not_in_list"}


@cache
def _declared(server: Server) -> Mapping[str, Any]:
    found: Mapping[str, Any] = server.ask("object_info")
    return found


def _kind(declared: list[Any]) -> str:
    """Older nodes give the list of choices where newer ones say COMBO."""
    return "COMBO" if isinstance(declared[0], list) else str(declared[0])


def _typed(declared: Mapping[str, list[Any]], values: list[Any]) -> dict[str, Any]:
    """Fields filled in the order of their declaration, as the editor fills them; it adds one behind a seed."""
    names: list[str | None] = []
    for name, found in declared.items():
        if _kind(found) in {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}:
            names.append(name)
            names += [None] if found[1:] and found[1].get("control_after_generate") else []
    read = [re.sub(r"\\([{}])", r"\1", value) if isinstance(value, str) else value for value in values]
    return {name: value for name, value in zip(names, read, strict=True) if name}


@pytest.mark.parametrize("settings", ALL.values(), ids=ALL)
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
