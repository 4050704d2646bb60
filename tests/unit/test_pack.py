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

import numpy as np
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
from flux2_lora.inference.pack import read_settings, save_inputs, save_picture, write_pack
from flux2_lora.inference.sampling import start_and_noise
from flux2_lora.inference.settings import Inputs, Settings, a1111_text, from_mapping, public, to_json
from flux2_lora.inference.starts import of_size, under_mask
from flux2_lora.latents import Posterior
from flux2_lora.samplers import empirical_mu, from_level, from_strength, schedule

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
    "LoadImage": ({"image": "file"}, ("IMAGE", "MASK")),
    "LoadImageMask": ({"image": "file", "channel": "choice"}, ("MASK",)),
    "VAEEncode": ({"pixels": "IMAGE", "vae": "VAE"}, ("LATENT",)),
    "RepeatLatentBatch": ({"samples": "LATENT", "amount": "int"}, ("LATENT",)),
    "LatentFromBatch": ({"samples": "LATENT", "batch_index": "int", "length": "int"}, ("LATENT",)),
    "SetLatentNoiseMask": ({"samples": "LATENT", "mask": "MASK"}, ("LATENT",)),
    "ReferenceLatent": ({"conditioning": "CONDITIONING", "latent": "LATENT"}, ("CONDITIONING",)),
    "ImageCrop": ({"image": "IMAGE", "width": "int", "height": "int", "x": "int", "y": "int"}, ("IMAGE",)),
    "ImageScale": (
        {"image": "IMAGE", "upscale_method": "choice", "width": "int", "height": "int", "crop": "choice"},
        ("IMAGE",),
    ),
    "ImageCompositeMasked": (
        {"destination": "IMAGE", "source": "IMAGE", "x": "int", "y": "int", "resize_source": "bool", "mask": "MASK"},
        ("IMAGE",),
    ),
    "SamplerCustomAdvanced": (
        {"noise": "NOISE", "guider": "GUIDER", "sampler": "SAMPLER", "sigmas": "SIGMAS", "latent_image": "LATENT"},
        ("LATENT", "LATENT"),
    ),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, ("IMAGE",)),
    "SaveImage": ({"images": "IMAGE", "filename_prefix": "text"}, ()),
}
PYTHON = {"file": str, "choice": str, "text": str, "int": int, "float": float, "bool": bool}

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

REDRAWN = Inputs(key="0a1b2c3d", height=1000, width=520)
FROM_PICTURES = {
    "image to image": replace(KLEIN, mode="image to image", strength=0.6, inputs=REDRAWN),
    "whole tokens": replace(
        ALL["dev"], mode="image to image", strength=0.6, inputs=replace(REDRAWN, height=1008, width=528)
    ),
    "inpaint": replace(
        ALL["flux1 dev"], mode="inpaint", strength=1.0, inputs=replace(REDRAWN, box=(0, 0, 520, 1000)), references=0
    ),
    "inpaint around a mask": replace(
        KLEIN, mode="inpaint", strength=0.8, references=1, inputs=replace(REDRAWN, box=(30, 40, 290, 540))
    ),
    "upscale": replace(ALL["flux1 schnell"], mode="upscale", strength=0.35, steps=20, inputs=replace(REDRAWN, tile=64)),
    "references": replace(KLEIN, references=2, inputs=Inputs(key="0a1b2c3d")),
    "blocks": replace(KLEIN, blocks=("double:0.5",)),
}


@pytest.fixture(params=ALL.values(), ids=ALL)
def settings(request: pytest.FixtureRequest) -> Settings:
    found: Settings = request.param
    return found


@pytest.fixture(params=[*ALL.values(), *FROM_PICTURES.values()], ids=[*ALL, *FROM_PICTURES])
def every(request: pytest.FixtureRequest) -> Settings:
    """Of all modes."""
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


def test_every_link_of_the_server_s_form_fits_the_nodes_at_its_ends(every: Settings) -> None:
    nodes = comfyui_api(every)
    for node in nodes.values():
        declared, _ = NODES[node["class_type"]]
        assert node["inputs"].keys() == declared.keys()
        for name, value in node["inputs"].items():
            if declared[name] in PYTHON:
                assert type(value) is PYTHON[declared[name]], (node["class_type"], name)
            else:
                source, slot = value
                assert NODES[nodes[source]["class_type"]][1][slot] == declared[name]


def test_every_node_leads_to_the_saved_picture(every: Settings) -> None:
    nodes = comfyui_api(every)
    [end] = [number for number, node in nodes.items() if node["class_type"] == "SaveImage"]
    reached, open_ = set(), [end]
    while open_:
        number = open_.pop()
        reached.add(number)
        open_ += [value[0] for value in nodes[number]["inputs"].values() if isinstance(value, list)]
    assert reached == nodes.keys()


def test_every_link_of_the_editor_s_form_fits_the_nodes_at_its_ends(every: Settings) -> None:
    page = comfyui_ui(every)
    nodes = {node["id"]: node for node in page["nodes"]}
    for number, source, slot, target, place, kind in page["links"]:
        out, into = nodes[source]["outputs"][slot], nodes[target]["inputs"][place]
        assert NODES[nodes[source]["type"]][1][slot] == NODES[nodes[target]["type"]][0][into["name"]] == kind
        assert number in out["links"]
        assert into["link"] == number
    assert len({link[0] for link in page["links"]}) == len(page["links"]) == page["last_link_id"]
    assert max(nodes) == page["last_node_id"]


def test_both_forms_are_the_same_graph(every: Settings) -> None:
    page, server = comfyui_ui(every), comfyui_api(every)
    links = {number: [str(source), slot] for number, source, slot, *_ in page["links"]}
    for node in page["nodes"][:-1]:
        linked = {into["name"]: links[into["link"]] for into in node["inputs"]}
        typed = [name for name, kind in NODES[node["type"]][0].items() if kind in PYTHON]
        values = [re.sub(r"\\([{}])", r"\1", v) if isinstance(v, str) else v for v in node["widgets_values"]]
        assert {**linked, **dict(zip(typed, values, strict=False))} == server[str(node["id"])]["inputs"]


def test_no_nodes_overlap_in_the_editor(every: Settings) -> None:
    boxes = [(*node["pos"], *node["size"]) for node in comfyui_ui(every)["nodes"]]
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


def test_a_script_is_python_whatever_its_texts_hold(every: Settings) -> None:
    nasty = 'say "hi" \\ {x} """ \n ünï ☃'
    script = diffusers_script(*(replace(every, prompt=prompt, model_title=nasty) for prompt in (nasty, "b")))
    found: dict[str, Any] = {}
    exec(re.search(r"^prompts = \[.*?^\]$", script, re.MULTILINE | re.DOTALL)[0], found)  # type: ignore[index]
    assert found["prompts"] == [nasty, "b"]
    compile(script, "script", "exec")


def test_a_picture_gives_its_settings_back(tmp_path: Path, every: Settings) -> None:
    picture = Image.new("RGB", (16, 16), (1, 2, 3))
    save_picture(picture, tmp_path / "a.png", every)
    assert read_settings(tmp_path / "a.png") == every
    with Image.open(tmp_path / "a.png") as saved:
        assert saved.convert("RGB").tobytes() == picture.tobytes()


@pytest.mark.parametrize("lost", [{"mode": "inpaint", "strength": 1.0}, {"references": 1}])
def test_without_what_it_was_drawn_from_a_picture_has_no_workflow(tmp_path: Path, lost: dict[str, Any]) -> None:
    save_picture(Image.new("RGB", (16, 16)), tmp_path / "a.png", replace(KLEIN, **lost))
    assert read_settings(tmp_path / "a.png") == replace(KLEIN, **lost)
    with Image.open(tmp_path / "a.png") as saved:
        assert not saved.info.keys() & {"workflow", "prompt"}


def test_settings_from_before_inputs_were_kept_are_read() -> None:
    values = json.loads(to_json(KLEIN))
    del values["inputs"]
    assert from_mapping(values) == KLEIN


@given(prompt=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_prompt_survives(tmp_path_factory: pytest.TempPathFactory, prompt: str) -> None:
    path = tmp_path_factory.getbasetemp() / "prompt.png"
    save_picture(Image.new("RGB", (16, 16)), path, replace(KLEIN, prompt=prompt))
    assert read_settings(path).prompt == prompt


def test_a_dropped_picture_opens_its_workflow(tmp_path: Path, every: Settings) -> None:
    save_picture(Image.new("RGB", (16, 16)), tmp_path / "a.png", every)
    with Image.open(tmp_path / "a.png") as saved:
        assert json.loads(saved.info["workflow"]) == comfyui_ui(every)
        assert json.loads(saved.info["prompt"]) == comfyui_api(every)


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


def test_a_pack_lies_beside_its_grid(tmp_path: Path, every: Settings) -> None:
    second = replace(every, prompt="second")
    paths = write_pack(tmp_path / "out", every, second)
    assert [path.name for path in paths[:3]] == ["workflow.api.json", "workflow.json", "with_diffusers.py"]
    assert json.loads(paths[0].read_text()) == comfyui_api(every)
    assert json.loads(paths[1].read_text()) == comfyui_ui(every)
    assert paths[2].read_text() == diffusers_script(every, second)


@pytest.mark.parametrize(
    ("mode", "module"), [("inpaint", "seams"), ("inpaint around a mask", "seams"), ("upscale", "tiles")]
)
def test_what_a_script_imports_of_ours_lies_beside_it_and_needs_no_more_of_ours(
    tmp_path: Path, mode: str, module: str
) -> None:
    paths = write_pack(tmp_path, FROM_PICTURES[mode])
    assert paths[-1] == tmp_path / f"{module}.py"
    assert f"from {module} import " in paths[2].read_text()
    assert "flux2_lora" not in paths[-1].read_text()


def test_a_picture_whose_inputs_were_not_kept_has_no_pack(tmp_path: Path) -> None:
    write_pack(tmp_path, KLEIN)
    assert write_pack(tmp_path, replace(KLEIN, mode="inpaint")) == []
    assert list(tmp_path.iterdir()) == []


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype="uint8"))


def test_inputs_are_what_the_model_got_and_named_by_their_content(tmp_path: Path) -> None:
    mask = Image.fromarray(np.random.default_rng(1).integers(0, 3, (40, 50), dtype="uint8"))
    start = under_mask(photo(40, 50), mask, 16, box=(5, 6, 35, 26), scale=2.0)
    inputs = save_inputs(tmp_path, start, [photo(32, 32)])
    settings = replace(KLEIN, mode="inpaint", strength=1.0, references=1, inputs=inputs)
    assert sorted(file.name for file in (tmp_path / "inputs").iterdir()) == sorted(
        map(inputs.file, settings.input_roles)
    )
    assert (inputs.height, inputs.width, inputs.box) == (40, 60, (5, 6, 35, 26))
    saved = {role: np.asarray(Image.open(tmp_path / "inputs" / inputs.file(role))) for role in settings.input_roles}
    assert np.array_equal(saved["picture"], np.asarray(start.picture))
    assert saved["picture"].shape == (settings.drawn_height, settings.drawn_width, 3) == (48, 64, 3)
    assert saved["mask"].shape == (40, 60)
    assert np.array_equal(saved["original"], np.asarray(photo(40, 50)))
    assert np.array_equal(saved["original-mask"], 255 * (np.asarray(mask)[6:26, 5:35] > 0))
    assert save_inputs(tmp_path, start, [photo(32, 32)]) == inputs
    assert save_inputs(tmp_path, start, [photo(32, 32, 1)]).key != inputs.key


def test_the_latents_mask_survives_being_reduced_to_latents(tmp_path: Path) -> None:
    """ComfyUI reduces it to a pixel a latent, which are of 8 px in FLUX.1 and of 16 in FLUX.2."""
    mask = Image.fromarray(np.random.default_rng(1).integers(0, 256, (48, 64), dtype="uint8"))
    start = under_mask(photo(48, 64), mask, 16, box=(0, 0, 64, 48))
    assert start.region is not None
    inputs = save_inputs(tmp_path, start)
    saved = torch.from_numpy(np.array(Image.open(tmp_path / "inputs" / inputs.file("latent-mask"))))[None, None].float()
    most = torch.nn.functional.max_pool2d(torch.from_numpy(np.array(mask))[None, None].float(), 16)
    assert torch.equal(torch.nn.functional.interpolate(saved, size=(3, 4), mode="bilinear"), most)
    twice = most.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.equal(torch.nn.functional.interpolate(saved, size=(6, 8), mode="bilinear"), twice)


def test_inputs_of_earlier_pictures_go_and_other_files_stay(tmp_path: Path) -> None:
    save_inputs(tmp_path, of_size(photo(32, 32), 32, 32))
    (tmp_path / "inputs" / "mine-picture.png").write_text("of the user")
    inputs = save_inputs(tmp_path, of_size(photo(32, 32, 1), 32, 32))
    write_pack(tmp_path, replace(KLEIN, mode="image to image", strength=0.5, inputs=inputs))
    names = sorted(file.name for file in (tmp_path / "inputs").iterdir())
    assert names == sorted([inputs.file("picture"), "mine-picture.png"])


def test_a_workflow_loads_the_files_that_its_note_names_and_no_others() -> None:
    for settings in FROM_PICTURES.values():
        loaded = {
            node["inputs"]["image"]
            for node in comfyui_api(settings).values()
            if node["class_type"].startswith("LoadImage")
        }
        note = comfyui_ui(settings)["nodes"][-1]["widgets_values"][0]
        assert set(re.findall(r"- input/(.+)", note)) == loaded
        assert bool(loaded) == (settings.inputs is not None)
        assert loaded <= {settings.inputs.file(role) for role in settings.input_roles if settings.inputs}


@pytest.mark.parametrize("mode", ["image to image", "inpaint", "inpaint around a mask", "upscale"])
def test_a_workflow_starts_at_our_noise_level(mode: str) -> None:
    settings = FROM_PICTURES[mode]
    tokens, flux1 = (1008 // 16) * (528 // 16), settings.family == "flux1"
    assert settings.strength is not None
    ours = from_strength(schedule(28, linear_mu(tokens) if flux1 else empirical_mu(tokens, 28)), settings.strength)
    if mode == "upscale":
        ours = from_level(20, 0.35)
    torch.testing.assert_close(sigmas_of(comfyui_api(settings)), ours, atol=5e-10, rtol=0)
    script = diffusers_script(settings)
    numbers = re.findall(r"\d\.\d{9}", script)
    torch.testing.assert_close(torch.tensor([float(number) for number in numbers]), ours, atol=5e-10, rtol=0)


def test_flux1_s_noise_for_a_picture_is_the_second_draw_of_the_seed() -> None:
    """ComfyUI draws one element of a batch after the other, and takes those that the batch's numbers say."""
    nodes = comfyui_api(FROM_PICTURES["inpaint"])
    index = only(nodes, "LatentFromBatch")["batch_index"]
    assert only(nodes, "RepeatLatentBatch")["amount"] == index + 1
    torch.manual_seed(only(nodes, "RandomNoise")["noise_seed"])
    theirs = [torch.randn(1, 16, 8, 6) for _ in range(index + 1)][-1]
    posterior = Posterior(mean=torch.zeros(1, 64, 4, 3), std=torch.ones(1, 64, 4, 3))
    _, ours = start_and_noise(load_family("flux1"), posterior, KLEIN.seed)
    assert torch.equal(torch.nn.functional.pixel_unshuffle(theirs, 2), ours)


def test_a_painting_is_laid_into_its_place_and_a_whole_one_is_not_scaled() -> None:
    around, whole = (comfyui_api(FROM_PICTURES[mode]) for mode in ("inpaint around a mask", "inpaint"))
    assert {key: only(around, "ImageScale")[key] for key in ("width", "height")} == {"width": 260, "height": 500}
    laid = [node["inputs"] for node in around.values() if node["class_type"] == "ImageCompositeMasked"]
    assert [(node["x"], node["y"], node["resize_source"]) for node in laid] == [(0, 0, False), (30, 40, False)]
    masks = [around[node["mask"][0]]["inputs"]["image"] for node in laid]
    assert masks == ["0a1b2c3d-mask.png", "0a1b2c3d-original-mask.png"]
    assert "ImageScale" not in {node["class_type"] for node in whole.values()}
    assert "ImageCrop" not in {node["class_type"] for node in comfyui_api(FROM_PICTURES["whole tokens"]).values()}


def test_both_prompts_look_at_all_references() -> None:
    kinds = [node["class_type"] for node in comfyui_api(FROM_PICTURES["references"]).values()]
    assert (kinds.count("VAEEncode"), kinds.count("ReferenceLatent")) == (2, 4)


@pytest.mark.parametrize(
    ("mode", "said"),
    [("upscale", "refines overlapping tiles"), ("inpaint", "takes the seam off"), ("upscale", "latents' mean")],
)
def test_the_note_says_what_core_nodes_cannot_do(mode: str, said: str) -> None:
    assert said in comfyui_ui(FROM_PICTURES[mode])["nodes"][-1]["widgets_values"][0]
