"""Pictures carry their settings, and the workflows beside them are whole: every link fits the nodes at its ends."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from flux2_lora.errors import UserError
from flux2_lora.families import family_names, load_family
from flux2_lora.flow import linear_mu
from flux2_lora.inference.comfyui import comfyui_api, comfyui_ui
from flux2_lora.inference.diffusers_script import diffusers_script
from flux2_lora.inference.pack import read_settings, save_picture, write_pack
from flux2_lora.inference.settings import MODES, Settings, a1111_text, public
from flux2_lora.samplers import empirical_mu, schedule

# As ComfyUI declares them: name -> (inputs, types of outputs). Capitals are links, the rest is typed in.
NODES: Mapping[str, tuple[Mapping[str, str], tuple[str, ...]]] = {
    "UNETLoader": ({"unet_name": "file", "weight_dtype": "choice"}, ("MODEL",)),
    "LoraLoaderModelOnly": ({"model": "MODEL", "lora_name": "file", "strength_model": "float"}, ("MODEL",)),
    "CLIPLoader": ({"clip_name": "file", "type": "choice", "device": "choice"}, ("CLIP",)),
    "DualCLIPLoader": (
        {"clip_name1": "file", "clip_name2": "file", "type": "choice", "device": "choice"},
        ("CLIP",),
    ),
    "T5TokenizerOptions": ({"clip": "CLIP", "min_padding": "int", "min_length": "int"}, ("CLIP",)),
    "VAELoader": ({"vae_name": "file"}, ("VAE",)),
    "CLIPTextEncode": ({"clip": "CLIP", "text": "text"}, ("CONDITIONING",)),
    "FluxGuidance": ({"conditioning": "CONDITIONING", "guidance": "float"}, ("CONDITIONING",)),
    "BasicGuider": ({"model": "MODEL", "conditioning": "CONDITIONING"}, ("GUIDER",)),
    "CFGGuider": (
        {"model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING", "cfg": "float"},
        ("GUIDER",),
    ),
    "RandomNoise": ({"noise_seed": "int"}, ("NOISE",)),
    "KSamplerSelect": ({"sampler_name": "choice"}, ("SAMPLER",)),
    "Flux2Scheduler": ({"steps": "int", "width": "int", "height": "int"}, ("SIGMAS",)),
    "ManualSigmas": ({"sigmas": "text"}, ("SIGMAS",)),
    "EmptyFlux2LatentImage": ({"width": "int", "height": "int", "batch_size": "int"}, ("LATENT",)),
    "EmptySD3LatentImage": ({"width": "int", "height": "int", "batch_size": "int"}, ("LATENT",)),
    "SamplerCustomAdvanced": (
        {"noise": "NOISE", "guider": "GUIDER", "sampler": "SAMPLER", "sigmas": "SIGMAS", "latent_image": "LATENT"},
        ("LATENT", "LATENT"),
    ),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, ("IMAGE",)),
    "SaveImage": ({"images": "IMAGE", "filename_prefix": "text"}, ()),
}
PYTHON = {"file": str, "choice": str, "text": str, "int": int, "float": float}

KLEIN = Settings(
    family="flux2_klein",
    model_title="Flux.2 Klein 4B",
    model_path="black-forest-labs/FLUX.2-klein-base-4B",
    prompt="a (red) {apple|pear}, photo",
    negative_prompt="blue",
    height=1000,
    width=528,
    steps=28,
    seed=7,
    cfg_scale=4.0,
    adapters=(("outputs/mine/export/mine.safetensors", 0.8), ("other.safetensors", 0.5), ("off.safetensors", 0.0)),
)
ALL = {
    "klein": KLEIN,
    "klein without cfg": replace(KLEIN, cfg_scale=1.0, adapters=()),
    "klein heun": replace(KLEIN, sampler="heun", model_title="Flux.2 Klein 9B"),
    "small": replace(KLEIN, family="flux2_small", model_path="models/small"),
    "small with guidance": replace(KLEIN, family="flux2_small", guidance=3.5, cfg_scale=1.0),
    "dev": replace(KLEIN, family="flux2_dev", guidance=4.0, cfg_scale=1.0),
    "flux1 dev": replace(KLEIN, family="flux1", guidance=3.5, cfg_scale=2.0),
    "flux1 schnell": replace(KLEIN, family="flux1", cfg_scale=1.0, max_sequence_length=256, steps=4),
}


@pytest.fixture(params=ALL.values(), ids=ALL)
def settings(request: pytest.FixtureRequest) -> Settings:
    found: Settings = request.param
    return found


def only(nodes: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The inputs of the one node of a class."""
    [inputs] = [node["inputs"] for node in nodes.values() if node["class_type"] == kind]
    found: dict[str, Any] = inputs
    return found


def sigmas_of(nodes: Mapping[str, Any]) -> torch.Tensor:
    """The noise levels that the workflow's scheduler node gives, by that node's own arithmetic."""
    kinds = {node["class_type"] for node in nodes.values()}
    if "ManualSigmas" in kinds:
        numbers = re.findall(r"[-+]?(?:\d*\.*\d+)", only(nodes, "ManualSigmas")["sigmas"])
        return torch.tensor([float(number) for number in numbers])
    inputs = only(nodes, "Flux2Scheduler")
    mu = empirical_mu(round(inputs["width"] * inputs["height"] / 256), inputs["steps"])
    return math.exp(mu) / (math.exp(mu) + (1 / torch.linspace(1, 0, inputs["steps"] + 1) - 1))


def test_every_family_has_a_workflow_and_a_script() -> None:
    assert {found.family for found in ALL.values()} == set(family_names())


def test_every_link_of_the_server_s_form_fits_the_nodes_at_its_ends(settings: Settings) -> None:
    nodes = comfyui_api(settings)
    for node in nodes.values():
        declared, _ = NODES[node["class_type"]]
        assert node["inputs"].keys() == declared.keys()
        for name, value in node["inputs"].items():
            if declared[name] in PYTHON:
                assert type(value) is PYTHON[declared[name]], (node["class_type"], name)
            else:
                source, slot = value
                assert NODES[nodes[source]["class_type"]][1][slot] == declared[name]


def test_every_node_leads_to_the_saved_picture(settings: Settings) -> None:
    nodes = comfyui_api(settings)
    [end] = [number for number, node in nodes.items() if node["class_type"] == "SaveImage"]
    reached, open_ = set(), [end]
    while open_:
        number = open_.pop()
        reached.add(number)
        open_ += [value[0] for value in nodes[number]["inputs"].values() if isinstance(value, list)]
    assert reached == nodes.keys()


def test_every_link_of_the_editor_s_form_fits_the_nodes_at_its_ends(settings: Settings) -> None:
    page = comfyui_ui(settings)
    nodes = {node["id"]: node for node in page["nodes"]}
    for number, source, slot, target, place, kind in page["links"]:
        out, into = nodes[source]["outputs"][slot], nodes[target]["inputs"][place]
        assert NODES[nodes[source]["type"]][1][slot] == NODES[nodes[target]["type"]][0][into["name"]] == kind
        assert number in out["links"]
        assert into["link"] == number
    assert len({link[0] for link in page["links"]}) == len(page["links"]) == page["last_link_id"]
    assert max(nodes) == page["last_node_id"]


def test_both_forms_are_the_same_graph(settings: Settings) -> None:
    page, server = comfyui_ui(settings), comfyui_api(settings)
    links = {number: [str(source), slot] for number, source, slot, *_ in page["links"]}
    for node in page["nodes"][:-1]:
        linked = {into["name"]: links[into["link"]] for into in node["inputs"]}
        typed = [name for name, kind in NODES[node["type"]][0].items() if kind in PYTHON]
        values = [re.sub(r"\\([{}])", r"\1", v) if isinstance(v, str) else v for v in node["widgets_values"]]
        assert {**linked, **dict(zip(typed, values, strict=False))} == server[str(node["id"])]["inputs"]


def test_no_nodes_overlap_in_the_editor(settings: Settings) -> None:
    boxes = [(*node["pos"], *node["size"]) for node in comfyui_ui(settings)["nodes"]]
    for (x, y, w, h), (x2, y2, w2, h2) in itertools.combinations(boxes, 2):
        title_px = 30  # drawn above a node's place
        assert x + w <= x2 or x2 + w2 <= x or y + h <= y2 - title_px or y2 + h2 <= y - title_px


@pytest.mark.parametrize(("height", "width"), [(512, 512), (1000, 528), (1024, 1024), (1536, 1024)])
@pytest.mark.parametrize("steps", [1, 4, 20, 28, 50])
def test_the_workflow_s_sigmas_are_ours(settings: Settings, height: int, width: int, steps: int) -> None:
    settings = replace(settings, height=height, width=width, steps=steps)
    tokens = (height // 16) * (width // 16)
    flux1_mu = linear_mu(tokens) if settings.guidance else 0.0
    ours = schedule(steps, flux1_mu if settings.family == "flux1" else empirical_mu(tokens, steps))
    torch.testing.assert_close(sigmas_of(comfyui_api(settings)), ours, atol=5e-7, rtol=0)


def test_the_workflow_s_noise_is_ours(settings: Settings) -> None:
    """ComfyUI draws once, on the CPU, in the shape of the empty latents."""
    nodes = comfyui_api(settings)
    flux1 = settings.family == "flux1"
    size = only(nodes, "EmptySD3LatentImage" if flux1 else "EmptyFlux2LatentImage")
    channels, side = (16, 8) if flux1 else (128, 16)
    torch.manual_seed(only(nodes, "RandomNoise")["noise_seed"])
    theirs = torch.randn(1, channels, size["height"] // side, size["width"] // side)
    if flux1:
        theirs = torch.nn.functional.pixel_unshuffle(theirs, 2)
    stream = torch.Generator().manual_seed(settings.seed)
    ours = load_family(settings.family).draw_noise(settings.height // 16, settings.width // 16, stream)
    assert torch.equal(theirs, ours)


def test_brackets_are_no_emphasis_and_braces_no_choice() -> None:
    [prompt] = [n for n in comfyui_ui(KLEIN)["nodes"] if n.get("title") == "Prompt"]
    assert prompt["widgets_values"] == [r"a \(red\) \{apple|pear\}, photo"]
    assert comfyui_api(KLEIN)[str(prompt["id"])]["inputs"]["text"] == r"a \(red\) {apple|pear}, photo"


def test_an_adapter_at_strength_zero_is_left_out() -> None:
    loaded = [n["inputs"] for n in comfyui_api(KLEIN).values() if n["class_type"] == "LoraLoaderModelOnly"]
    assert [(node["lora_name"], node["strength_model"]) for node in loaded] == [
        ("mine.safetensors", 0.8),
        ("other.safetensors", 0.5),
    ]
    assert "off.safetensors" not in diffusers_script(KLEIN)


def test_a_bundled_miniature_s_workflow_says_that_it_cannot_be_loaded() -> None:
    page = comfyui_ui(ALL["small"])
    assert "cannot load the bundled miniature" in page["nodes"][-1]["widgets_values"][0]


@pytest.mark.parametrize(("family", "said"), [("flux2_klein", True), ("flux2_small", True), ("flux1", False)])
def test_a_workflow_says_where_comfyui_gives_a_model_more_tokens(family: str, said: bool) -> None:  # noqa: FBT001
    page = comfyui_ui(replace(KLEIN, family=family, max_sequence_length=256))
    assert ("drawn with 256" in page["nodes"][-1]["widgets_values"][0]) == said
    page = comfyui_ui(replace(KLEIN, family=family, max_sequence_length=512))
    assert "drawn with" not in page["nodes"][-1]["widgets_values"][0]


def test_a_script_is_python_whatever_its_texts_hold(settings: Settings) -> None:
    nasty = 'say "hi" \\ {x} """ \n ünï ☃'
    script = diffusers_script(replace(settings, prompt=nasty, model_title=nasty), prompts=[nasty, "b"])
    found: dict[str, Any] = {}
    exec(re.search(r"^prompts = \[.*?^\]$", script, re.MULTILINE | re.DOTALL)[0], found)  # type: ignore[index]
    assert found["prompts"] == [nasty, "b"]
    compile(script, "script", "exec")


@pytest.mark.parametrize("mode", MODES)
def test_a_picture_gives_its_settings_back(tmp_path: Path, settings: Settings, mode: str) -> None:
    settings = replace(settings, mode=mode, strength=None if mode == MODES[0] else 0.6)
    picture = Image.new("RGB", (16, 16), (1, 2, 3))
    save_picture(picture, tmp_path / "a.png", settings)
    assert read_settings(tmp_path / "a.png") == settings
    with Image.open(tmp_path / "a.png") as saved:
        assert saved.convert("RGB").tobytes() == picture.tobytes()
        assert ("workflow" in saved.info) == ("prompt" in saved.info) == (mode == MODES[0])


@given(prompt=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_prompt_survives(tmp_path_factory: pytest.TempPathFactory, prompt: str) -> None:
    path = tmp_path_factory.getbasetemp() / "prompt.png"
    save_picture(Image.new("RGB", (16, 16)), path, replace(KLEIN, prompt=prompt))
    assert read_settings(path).prompt == prompt


def test_a_dropped_picture_opens_its_workflow(tmp_path: Path, settings: Settings) -> None:
    save_picture(Image.new("RGB", (16, 16)), tmp_path / "a.png", settings)
    with Image.open(tmp_path / "a.png") as saved:
        assert json.loads(saved.info["workflow"]) == comfyui_ui(settings)
        assert json.loads(saved.info["prompt"]) == comfyui_api(settings)


@pytest.mark.parametrize("folder", ["/home/anna/secret/", "~/secret/", "C:\\Users\\anna\\secret\\"])
def test_a_picture_names_no_folder_of_this_machine(tmp_path: Path, settings: Settings, folder: str) -> None:
    private = replace(
        settings,
        model_path=f"{folder}model",
        components=f"{folder}rest",
        adapters=((f"{folder}mine.safetensors", 1.0),),
    )
    save_picture(Image.new("RGB", (16, 16)), tmp_path / "a.png", private)
    content = (tmp_path / "a.png").read_bytes()
    assert b"secret" not in content
    assert b"anna" not in content
    read = read_settings(tmp_path / "a.png")
    assert read == public(private)
    assert (read.model_path, read.components, read.adapters) == ("model", "rest", (("mine.safetensors", 1.0),))


def test_the_web_ui_s_text_is_as_it_writes_it(tmp_path: Path) -> None:
    dev = replace(
        ALL["flux1 dev"], prompt="a cat,\nphoto", model_title="Flux.1 D", adapters=(("runs/mine.safetensors", 0.8),)
    )
    assert a1111_text(dev) == (
        "a cat,\nphoto <lora:mine:0.8>\n"
        "Negative prompt: blue\n"
        "Steps: 28, Sampler: Euler, CFG scale: 2, Distilled CFG Scale: 3.5, Seed: 7, Size: 528x992, Model: Flux.1 D, "
        f"Version: flux2-lora {dev.version}"
    )


def test_the_web_ui_s_text_names_a_lora_by_the_hash_of_its_tensors(tmp_path: Path) -> None:
    for name, header in (("a", {"x": "1"}), ("b", {"x": "another"})):
        save_file({"w": torch.arange(4)}, tmp_path / f"{name}.safetensors", header)
    expected = hashlib.sha256(torch.arange(4).numpy().tobytes()).hexdigest()[:12]
    for name in ("a", "b"):
        text = a1111_text(replace(KLEIN, adapters=((str(tmp_path / f"{name}.safetensors"), 1.0),)))
        assert f'Lora hashes: "{name}: {expected}"' in text


def test_a_picture_of_others_is_refused_with_a_remedy(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no picture")
    for name, what in (("a.png", "carries no settings"), ("b.png", "carries no settings"), ("c.png", "does not exist")):
        with pytest.raises(UserError, match=what):
            read_settings(tmp_path / name)


def test_a_pack_lies_beside_its_grid(tmp_path: Path, settings: Settings) -> None:
    paths = write_pack(tmp_path / "out", settings, prompts=["first", "second"])
    assert [path.name for path in paths] == ["workflow.api.json", "workflow.json", "with_diffusers.py"]
    assert json.loads(paths[0].read_text()) == comfyui_api(settings)
    assert json.loads(paths[1].read_text()) == comfyui_ui(settings)
    assert paths[2].read_text() == diffusers_script(settings, prompts=["first", "second"])


def test_an_edit_has_no_pack(tmp_path: Path) -> None:
    assert write_pack(tmp_path, replace(KLEIN, mode="inpaint")) == []
    assert list(tmp_path.iterdir()) == []
