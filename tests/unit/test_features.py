"""Features are what transformers' own classes compute, from whole local folders only."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flux2_lora.errors import UserError
from flux2_lora.networks import features
from flux2_lora.networks.features import Features, load_features

CPU = torch.device("cpu")
NARROW = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**NARROW, "image_size": 32, "patch_size": 8}
TEXT = {**NARROW, "vocab_size": 8, "bos_token_id": 0, "eos_token_id": 1}
CROPPED = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}
WIDTH = {"clip": 12, "projected": 12, "vision": 16, "dinov2": 16, "dinov3": 16}
KINDS = list(WIDTH)


def loud(model: nn.Module) -> nn.Module:
    """Weights so large that pictures differ in their features."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.3, generator=generator)
    return model.eval()


def network(kind: str) -> Any:
    import transformers as t

    if kind == "clip":
        return t.CLIPModel(t.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=12))
    if kind == "projected":
        return t.CLIPVisionModelWithProjection(t.CLIPVisionConfig(**VISION, projection_dim=12))
    if kind == "vision":
        return t.CLIPVisionModel(t.CLIPVisionConfig(**VISION))
    if kind == "dinov2":
        narrow = {name: size for name, size in VISION.items() if name != "intermediate_size"}
        return t.Dinov2Model(t.Dinov2Config(**narrow, mlp_ratio=1))
    return t.DINOv3ViTModel(t.DINOv3ViTConfig(**VISION, num_register_tokens=2))


def build(kind: str, folder: Path) -> None:
    import transformers as t

    loud(network(kind)).save_pretrained(folder)
    if kind == "dinov3":
        nothing = {"crop_size": None, "do_center_crop": None, "do_convert_rgb": None}
        steps = {"do_normalize": True, "do_rescale": True, "do_resize": True, "rescale_factor": 1 / 255}
        numbers = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "resample": 2}
        content = {**nothing, **steps, **numbers, "size": {"height": 32, "width": 32}}
        (folder / "preprocessor_config.json").write_text(json.dumps(content))
    else:
        processor = t.BitImageProcessorPil if kind == "dinov2" else t.CLIPImageProcessorPil
        processor(**CROPPED).save_pretrained(folder)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of all kinds, by name."""
    root = tmp_path_factory.mktemp("features")
    for kind in KINDS:
        build(kind, root / kind)
    return root


@pytest.fixture(scope="module", params=KINDS)
def read(request: pytest.FixtureRequest, built: Path) -> Features:
    """The features of a kind of folder."""
    return load(built / request.param)


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, built: Path, tmp_path: Path) -> Path:
    """A copy of a folder, to be spoiled."""
    return Path(shutil.copytree(built / request.param, tmp_path / request.param))


def picture(seed: int, width: int = 50, height: int = 40) -> Image.Image:
    noise = torch.rand(height, width, 3, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray((noise * 255).byte().numpy())


PICTURES = [picture(0), picture(1, 33, 47), picture(2, 32, 32), picture(3, 7, 90), picture(4, 300, 201)]


def load(folder: Path) -> Features:
    return load_features(str(folder), CPU)


def refusal(folder: Path | str) -> UserError:
    with pytest.raises(UserError) as caught:
        load_features(str(folder), CPU)
    assert caught.value.what.startswith(f"validation.features={folder}: ")
    assert "`hf download " in caught.value.remedy
    assert "\n" not in caught.value.what + caught.value.remedy
    return caught.value


def edit(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, **changes}))


def dinov3_pixels(pictures: list[Image.Image], size: int, method: Image.Resampling) -> Tensor:
    """DINOv3's preprocessing with Pillow's filter on floats, a channel at a time."""
    made = []
    for each in pictures:
        levels = [channel.convert("F").resize((size, size), method) for channel in each.split()]
        pixels = torch.from_numpy(np.stack([np.array(channel) for channel in levels])) / 255
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        made.append((pixels - mean[:, None, None]) / std[:, None, None])
    return torch.stack(made)


@torch.no_grad()
def expected(kind: str, folder: Path, pictures: list[Image.Image]) -> Tensor:
    """By the class that config.json names, and the image processor's Pillow form."""
    import transformers as t

    whole = type(network(kind)).from_pretrained(folder).eval()
    if kind == "dinov3":
        pixels = dinov3_pixels(pictures, 32, Image.Resampling.BILINEAR)
    else:
        processor = t.BitImageProcessorPil if kind == "dinov2" else t.CLIPImageProcessorPil
        pixels = processor.from_pretrained(folder)(images=pictures, return_tensors="pt")["pixel_values"]
    if kind == "clip":
        return whole.get_image_features(pixel_values=pixels).pooler_output
    output = whole(pixel_values=pixels)
    if kind == "projected":
        return output.image_embeds
    return output.pooler_output if kind == "vision" else output.last_hidden_state[:, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_those_of_transformers_class(kind: str, built: Path) -> None:
    seen = load(built / kind)(PICTURES)
    assert (seen.shape, seen.dtype, seen.device) == ((5, WIDTH[kind]), torch.float32, CPU)
    assert not seen.requires_grad
    # Attention may sum in another order, and Pillow's floats are resized along rows first.
    torch.testing.assert_close(seen, expected(kind, built / kind, PICTURES), rtol=1e-4, atol=1e-4)
    assert torch.pdist(seen).min() > 0.1


def test_clip_has_the_direction_of_its_own_image_embeds(built: Path) -> None:
    import transformers as t

    whole = t.CLIPModel.from_pretrained(built / "clip").eval()
    pixels = t.CLIPImageProcessorPil.from_pretrained(built / "clip")(images=PICTURES, return_tensors="pt")
    with torch.no_grad():
        embeds = whole(input_ids=torch.tensor([[0, 1]] * 5), **pixels).image_embeds
    seen = load(built / "clip")(PICTURES)
    torch.testing.assert_close(seen / seen.norm(dim=1, keepdim=True), embeds, rtol=1e-4, atol=1e-5)


def test_the_same_picture_has_the_same_feature(read: Features) -> None:
    once = read([picture(0)])
    assert torch.equal(once, read([picture(0)]))
    among = read([picture(0) if index % 3 == 0 else picture(index) for index in range(18)])
    # A matrix product of more rows may sum in another order.
    torch.testing.assert_close(among[::3], once.expand(6, -1), rtol=1e-4, atol=1e-5)


def test_the_order_of_the_pictures_is_kept_over_batches(read: Features) -> None:
    pictures = [picture(seed, 30 + seed, 40) for seed in range(18)]
    together = read(pictures)
    for index in (0, 7, 16, 17):
        torch.testing.assert_close(together[index], read([pictures[index]])[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together.flip(0), read(pictures[::-1]), rtol=1e-4, atol=1e-5)


def test_a_network_reads_sixteen_pictures_at_most(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Dinov2Model

    read, counts, forward = load(built / "dinov2"), [], Dinov2Model.forward

    def counted(self: Any, pixel_values: Tensor) -> Any:
        counts.append(len(pixel_values))
        return forward(self, pixel_values=pixel_values)

    monkeypatch.setattr(Dinov2Model, "forward", counted)
    assert len(read([picture(seed) for seed in range(37)])) == 37
    assert counts == [16, 16, 5]


def test_transparent_pictures_are_seen_on_white(read: Features) -> None:
    clear = picture(5).convert("RGBA")
    clear.putalpha(picture(6).convert("L"))
    white = Image.new("RGB", clear.size, "white")
    white.paste(clear, mask=clear.getchannel("A"))
    # Pillow's two ways of compositing round up to one of 255 levels apart.
    torch.testing.assert_close(read([clear]), read([white]), rtol=0.05, atol=0.05)
    assert (read([clear]) - read([picture(5)])).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["clip", "dinov2"])
def test_transparency_is_composited_as_transformers_does(kind: str, built: Path) -> None:
    clear = picture(5).convert("RGBA")
    clear.putalpha(picture(6).convert("L"))
    torch.testing.assert_close(load(built / kind)([clear]), expected(kind, built / kind, [clear]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "1", "CMYK", "RGBA"])
def test_pictures_of_every_mode_are_read(mode: str, read: Features) -> None:
    other = picture(0).convert(mode)
    assert torch.equal(read([other]), read([other.convert("RGB")]))


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (3, 3), (4, 31), (257, 33)])
def test_pictures_of_odd_sizes_are_read(size: tuple[int, int], read: Features) -> None:
    assert read([picture(0, *size)]).isfinite().all()


@pytest.mark.parametrize(("resample", "method"), [(2, Image.Resampling.BILINEAR), (3, Image.Resampling.BICUBIC)])
def test_dinov3_is_resized_as_pillow_resizes_floats(
    resample: int, method: Image.Resampling, built: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(built / "dinov3", tmp_path / "dinov3"))
    edit(folder / "preprocessor_config.json", resample=resample)
    pixels = features._dinov3_pixels(folder)(PICTURES)
    torch.testing.assert_close(pixels, dinov3_pixels(PICTURES, 32, method), rtol=1e-4, atol=1e-4)


def test_dinov3_keeps_a_picture_of_its_own_size_to_the_bit(built: Path) -> None:
    pixels = features._dinov3_pixels(built / "dinov3")([PICTURES[2]])[0]
    levels = torch.from_numpy(np.array(PICTURES[2])) * (1 / 255)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    assert torch.equal(pixels, ((levels - mean) / std).permute(2, 0, 1))


def test_half_precision_as_on_a_gpu(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = load(model)(PICTURES)
    monkeypatch.setattr(features, "compute_dtype", lambda device: torch.bfloat16)
    rounded = load(model)(PICTURES)
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    assert (rounded - exact).norm() < 0.05 * exact.norm()


def test_loading_and_reading_draw_no_random_numbers(model: Path) -> None:
    before = torch.get_rng_state()
    load(model)([picture(0)])
    assert torch.equal(torch.get_rng_state(), before)


def test_nothing_is_printed(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging as log

    said: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    log.set_verbosity_warning()
    log.add_handler(listener)
    try:
        load(model)([picture(0)])
    finally:
        log.remove_handler(listener)
    assert (said, *capfd.readouterr()) == ([], "", "")


def test_of_a_clip_only_the_vision_half_is_read(built: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(built / "clip", tmp_path / "clip"))
    whole = load_file(folder / "model.safetensors")
    half = {key: value for key, value in whole.items() if key.startswith(("vision_model.", "visual_projection."))}
    assert 0 < len(half) < len(whole)
    save_file(half, folder / "model.safetensors", {"format": "pt"})
    assert torch.equal(load(folder)(PICTURES), load(built / "clip")(PICTURES))


def test_a_vision_model_is_read_under_its_older_names(built: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(built / "vision", tmp_path / "vision"))
    named = {f"vision_model.{key}": value for key, value in load_file(folder / "model.safetensors").items()}
    save_file(named, folder / "model.safetensors", {"format": "pt"})
    assert torch.equal(load(folder)(PICTURES), load(built / "vision")(PICTURES))


def test_sizes_may_be_numbers_as_in_the_first_clips(built: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(built / "clip", tmp_path / "clip"))
    edit(folder / "preprocessor_config.json", size=36, crop_size=32)
    assert torch.equal(load(folder)(PICTURES), load(built / "clip")(PICTURES))


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_folder_leaves_out_is_as_the_class_has_it(kind: str, built: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(built / kind, tmp_path / kind))
    file = folder / "preprocessor_config.json"
    sizes = {name: size for name, size in json.loads(file.read_text()).items() if name in ("size", "crop_size")}
    file.write_text(json.dumps(sizes))
    torch.testing.assert_close(load(folder)(PICTURES), expected(kind, folder, PICTURES), rtol=1e-4, atol=1e-4)


def test_a_path_may_start_at_home(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(built))
    monkeypatch.setenv("USERPROFILE", str(built))
    assert load_features("~/dinov2", CPU)([picture(0)]).shape == (1, 16)


def test_a_folder_that_is_not_there_says_what_to_download() -> None:
    nowhere = refusal("nowhere/at/all")
    assert nowhere.what == "validation.features=nowhere/at/all: there is no such folder"
    assert "`hf download facebook/dinov2-small --local-dir FOLDER`" in nowhere.remedy
    assert "`hf download facebook/dinov2-small " in refusal("models/clip").remedy
    assert "`hf download facebook/dinov2-base " in refusal("facebook/dinov2-base").remedy


def test_other_classes_are_refused_with_what_is_supported(model: Path) -> None:
    edit(model / "config.json", architectures=["SiglipModel"])
    error = refusal(model)
    assert "config.json names SiglipModel" in error.what
    for name in ("CLIPModel", "CLIPVisionModelWithProjection", "Dinov2Model", "DINOv3ViTModel"):
        assert name in error.remedy
    edit(model / "config.json", architectures=["Dream"], auto_map={"AutoModel": "dream.Dream"})
    assert "is not run" in refusal(model).what
    edit(model / "config.json", architectures=None)
    assert "names no class" in refusal(model).what
    (model / "config.json").unlink()
    assert "config.json" in refusal(model).what


def test_code_in_the_folder_is_never_run(model: Path) -> None:
    (model / "evil.py").write_text(f"open({str(model / 'ran')!r}, 'w').write('ran')\nclass It: pass\n")
    edit(model / "config.json", auto_map={"AutoConfig": "evil.It", "AutoModel": "evil.It"})
    edit(model / "preprocessor_config.json", auto_map={"AutoImageProcessor": "evil.It"}, image_processor_type="It")
    assert len(load(model)([picture(0)])) == 1
    assert not (model / "ran").exists()


def test_a_kernel_that_the_folder_names_is_not_fetched(model: Path) -> None:
    before = load(model)(PICTURES)
    edit(model / "config.json", attn_implementation="kernels-community/flash-attn")
    assert torch.equal(load(model)(PICTURES), before)


def test_pickles_are_refused(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    error = refusal(model)
    assert "pickled" in error.what
    assert "model.safetensors" in error.remedy


def test_a_pickle_beside_the_safetensors_is_not_opened(model: Path) -> None:
    (model / "pytorch_model.bin").write_bytes(b"not even a pickle")
    assert len(load(model)([picture(0)])) == 1


def test_quantised_weights_and_adapters_are_refused(model: Path) -> None:
    what = f"validation.features={model}: its weights are quantised or an adapter's"
    (model / "adapter_config.json").write_text("{}")
    assert refusal(model).what == what
    (model / "adapter_config.json").unlink()
    edit(model / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    assert refusal(model).what == what


def test_every_tensor_that_is_missing_is_named(model: Path) -> None:
    whole = load_file(model / "model.safetensors")
    ends = ("fc1.weight", "up_proj.weight", "norm2.bias", "visual_projection.weight", "cls_token", "class_embedding")
    names = [key for key in whole if key.endswith(ends) and not key.startswith("text_model.")]
    assert len(names) >= 3
    for name in names:
        save_file({key: value for key, value in whole.items() if key != name}, model / "model.safetensors")
        tail = name.split(".", 2)[-1]
        assert tail in refusal(model).what
    first = next(name for name in names if name.endswith(ends[:2]))
    save_file({**whole, first: whole[first][:1].contiguous()}, model / "model.safetensors", {"format": "pt"})
    assert first.split(".", 2)[-1] in refusal(model).what


def test_damaged_weights_are_refused(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"nothing")
    assert "model.safetensors is not a whole" in refusal(model).what
    (model / "model.safetensors").unlink()
    assert "lacks safetensors" in refusal(model).what
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1-of-1.safetensors"}}))
    assert "lacks model-1-of-1.safetensors" in refusal(model).what


def test_an_image_processor_that_is_missing_is_named(model: Path) -> None:
    (model / "preprocessor_config.json").write_text("nothing")
    assert "cannot be read" in refusal(model).what
    (model / "preprocessor_config.json").unlink()
    assert "its image processor is missing (preprocessor_config.json" in refusal(model).what


def test_a_configuration_of_wrong_values_is_refused(model: Path) -> None:
    edit(model / "config.json", hidden_size="wide", vision_config={"hidden_size": "wide"})
    assert "cannot be read" in refusal(model).what


@pytest.mark.parametrize("kind", ["clip", "projected", "vision"])
def test_a_size_that_the_network_cannot_take_is_refused(kind: str, built: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(built / kind, tmp_path / kind))
    edit(folder / "preprocessor_config.json", crop_size={"height": 40, "width": 40})
    assert "40*40" in refusal(folder).what


@pytest.mark.parametrize("kind", ["dinov2", "dinov3"])
def test_a_size_below_one_patch_is_refused(kind: str, built: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(built / kind, tmp_path / kind))
    small = {"height": 4, "width": 4}
    edit(folder / "preprocessor_config.json", size=small, crop_size=small)
    assert "cannot be read" in refusal(folder).what


@pytest.mark.parametrize("kind", ["clip", "dinov2"])
def test_sizes_that_differ_from_picture_to_picture_are_refused(kind: str, built: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(built / kind, tmp_path / kind))
    edit(folder / "preprocessor_config.json", do_center_crop=False)
    assert "cannot be read" in refusal(folder).what


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"do_center_crop": True}, "do_center_crop"),
        ({"do_normalize": False}, "do_normalize"),
        ({"size": {"shortest_edge": 32}}, "size"),
        ({"resample": 1}, "resample"),
    ],
)
def test_a_dinov3_of_other_preprocessing_is_refused(
    changes: dict[str, Any], named: str, built: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(built / "dinov3", tmp_path / "dinov3"))
    edit(folder / "preprocessor_config.json", **changes)
    what = f"it preprocesses pictures otherwise than DINOv3 does ({named})"
    assert refusal(folder).what == f"validation.features={folder}: {what}"


def test_memory_that_runs_out_is_not_blamed_on_the_folder(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Dinov2Model

    def full(self: Any, pixel_values: Tensor) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Dinov2Model, "forward", full)
    with pytest.raises(torch.OutOfMemoryError):
        load(built / "dinov2")
