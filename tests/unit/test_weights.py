"""Single files in every spelling that people have, against the Diffusers folder of the same weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flux2_lora.errors import UserError
from flux2_lora.families import Model, ModelSpec, open_model
from flux2_lora.networks.transformers import block_linears
from flux2_lora.quantize import FrozenLinear, PrecisionSpec, load_frozen
from flux2_lora.weights import open_file, open_folder
from tests.miniatures import MINIATURES, flux1_transformer
from tests.single_file import fused

CPU = torch.device("cpu")
E4M3 = torch.float8_e4m3fn
FAMILIES = ("flux2_klein", "flux2_dev", "flux1", "flux1_schnell")
File = tuple[dict[str, Tensor], dict[str, str]]


@dataclass(frozen=True)
class Original:
    """A miniature's folder, its transformer's tensors in bfloat16, and the same in BFL's names."""

    family: str
    folder: Path
    diffusers: Mapping[str, Tensor]
    bfl: Mapping[str, Tensor]

    def open(self, path: Path) -> Model:
        spec = ModelSpec(
            family=self.family, path=str(path), components=str(self.folder), title="", architecture_name=""
        )
        return open_model(spec)


@pytest.fixture(scope="module", params=FAMILIES)
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Original:
    folder = tmp_path_factory.mktemp(request.param)
    MINIATURES[request.param].build(folder)
    whole = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    noise = torch.Generator().manual_seed(5)
    # Norms start as ones: other values, or a swap of two norms would pass unseen.
    tensors = {
        key: (t + 0.1 * torch.randn(t.shape, generator=noise) if ".norm_" in key else t).to(torch.bfloat16)
        for key, t in whole.items()
    }
    family = MINIATURES[request.param].family
    return Original(family, folder, tensors, fused(tensors))


def is_matrix(key: str, tensor: Tensor) -> bool:
    """What released fp8 files store in fp8: the matrices of the blocks."""
    return tensor.ndim == 2 and "blocks." in key


def scaled(bfl: Mapping[str, Tensor], *, rows: bool, name: str, dtype: torch.dtype = E4M3) -> dict[str, Tensor]:
    """Scaled fp8, one scale a tensor or a row, under a suffix."""
    made: dict[str, Tensor] = {}
    for key, tensor in bfl.items():
        made[key] = tensor
        if is_matrix(key, tensor):
            largest = tensor.float().abs().amax(dim=1) if rows else tensor.float().abs().amax()
            scale = largest / torch.finfo(dtype).max
            made[key] = (tensor.float() / (scale[:, None] if rows else scale)).to(dtype)
            made[key.removesuffix("weight") + name] = scale
    return made


def bf16(o: Original) -> File:
    return dict(o.bfl), {}


def prefixed(prefix: str) -> Callable[[Original], File]:
    return lambda o: ({prefix + key: tensor for key, tensor in o.bfl.items()}, {})


def norms_as_weight(o: Original) -> File:
    return {key.replace("_norm.scale", "_norm.weight"): tensor for key, tensor in o.bfl.items()}, {}


def diffusers_names(o: Original) -> File:
    return dict(o.diffusers), {}


def plain_fp8(o: Original) -> File:
    return {key: tensor.to(E4M3) if is_matrix(key, tensor) else tensor for key, tensor in o.bfl.items()}, {}


def old_scaled(o: Original) -> File:
    tensors = scaled(o.bfl, rows=False, name="scale_weight")
    inputs = {f"{key.removesuffix('scale_weight')}scale_input": torch.ones(()) for key in tensors if "scale_w" in key}
    marked = {**tensors, **inputs, "scaled_fp8": torch.zeros(2, dtype=E4M3)}
    return {f"model.diffusion_model.{key}": tensor for key, tensor in marked.items()}, {}


def new_scaled(o: Original) -> File:
    tensors = scaled(o.bfl, rows=False, name="weight_scale")
    told = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    scales = [key for key in tensors if key.endswith("weight_scale")]
    for key in scales:
        tensors[f"{key.removesuffix('weight_scale')}comfy_quant"] = told.clone()
        tensors[f"{key.removesuffix('weight_scale')}input_scale"] = torch.tensor(0.5)
    return tensors, {}


def in_metadata(o: Original) -> File:
    tensors = scaled(o.bfl, rows=False, name="weight_scale")
    layers = {key.removesuffix(".weight_scale"): {"format": "float8_e4m3fn"} for key in tensors if "weight_s" in key}
    return tensors, {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}


def by_row(o: Original) -> File:
    return scaled(o.bfl, rows=True, name="weight_scale"), {}


def by_row_as_column(o: Original) -> File:
    tensors, told = by_row(o)
    return {k: t[:, None].contiguous() if k.endswith("weight_scale") else t for k, t in tensors.items()}, told


def e5m2(o: Original) -> File:
    return scaled(o.bfl, rows=False, name="weight_scale", dtype=torch.float8_e5m2), {}


EXACT = [bf16, prefixed("model.diffusion_model."), prefixed("diffusion_model."), norms_as_weight, diffusers_names]
QUANTISED = [plain_fp8, old_scaled, new_scaled, in_metadata, by_row, by_row_as_column, e5m2]


def written(path: Path, file: File) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in file[0].items()}, path, metadata=file[1] or None)
    return path


def dense(file: File) -> dict[str, Tensor]:
    """BFL's names -> scale * values in float32."""
    tensors = {key.removeprefix("model.diffusion_model."): tensor for key, tensor in file[0].items()}
    made = {}
    for key, tensor in tensors.items():
        if key.endswith((".weight", "_norm.scale", ".bias")):
            stem = key.removesuffix("weight")
            scale = tensors.get(f"{stem}weight_scale", tensors.get(f"{stem}scale_weight", torch.ones(())))
            made[key] = tensor.float() * (scale.reshape(-1, 1) if scale.ndim else scale)
    return made


def loaded(model: Model, kind: str) -> dict[str, Tensor]:
    """BFL's names -> the tensors of the loaded transformer, frozen Linears rebuilt."""
    transformer = load_frozen(model, PrecisionSpec(base=kind), CPU)
    tensors = {k: t for k, t in transformer.state_dict().items() if not k.endswith((".values", ".scale"))}
    for path in block_linears(transformer):
        weight = transformer.get_submodule(path).weight
        assert isinstance(weight, Tensor)
        tensors[f"{path}.weight"] = weight
    return fused(tensors)


def test_every_name_and_row_is_where_diffusers_finds_it(tmp_path: Path) -> None:
    """At FLUX.1's real height, which its converter has written into it, and two columns."""
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers as convert

    heights = {"img_attn.qkv": 9216, "txt_attn.qkv": 9216, "linear1": 21504, "adaLN_modulation.1": 6144}
    names = fused(flux1_transformer(48, 40, guidance=True).state_dict())
    tensors = {}
    for index, name in enumerate(sorted(names)):
        height = next((h for part, h in heights.items() if f"{part}." in name), 8)
        tensors[name] = index + torch.arange(float(height))[:, None].expand(-1, 2 if "weight" in name else 1) / 2**16
        tensors[name] = tensors[name].squeeze(1) if tensors[name].shape[1] == 1 else tensors[name]
    ours = open_file(written(tmp_path / "model.safetensors", (tensors, {})), "flux1")
    theirs = convert(dict(tensors))
    assert ours.shapes.keys() == theirs.keys()
    assert all(torch.equal(ours.read(name).values, tensor) for name, tensor in theirs.items())


@pytest.mark.parametrize("original", ["flux2_klein", "flux2_dev"], indirect=True)
def test_our_hand_written_form_of_flux2_is_what_diffusers_converts(original: Original) -> None:
    from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers as convert

    theirs = convert({key: tensor.clone() for key, tensor in original.bfl.items()})
    assert theirs.keys() == original.diffusers.keys()
    assert all(torch.equal(theirs[key], tensor) for key, tensor in original.diffusers.items())


@pytest.mark.parametrize("spelling", EXACT)
def test_unquantised_files_give_the_tensors_of_the_folder_bit_for_bit(
    original: Original, spelling: Callable[[Original], File], tmp_path: Path
) -> None:
    model = original.open(written(tmp_path / "model.safetensors", spelling(original)))
    transformer = load_frozen(model, PrecisionSpec(base="bf16"), CPU)
    state = transformer.state_dict()
    assert state.keys() == original.diffusers.keys()
    assert all(torch.equal(state[key], tensor) for key, tensor in original.diffusers.items())


@pytest.mark.parametrize("spelling", QUANTISED)
def test_fp8_files_keep_their_bytes_and_scales(
    original: Original, spelling: Callable[[Original], File], tmp_path: Path
) -> None:
    file = spelling(original)
    model = original.open(written(tmp_path / "model.safetensors", file))
    found, expected = loaded(model, "fp8"), dense(file)
    assert found.keys() == expected.keys()
    assert [key for key, tensor in expected.items() if not torch.equal(found[key], tensor)] == []
    transformer = load_frozen(model, PrecisionSpec(), CPU)
    linears = [transformer.get_submodule(path) for path in block_linears(transformer)]
    assert all(isinstance(linear, FrozenLinear) for linear in linears)
    assert {linear.values.dtype for linear in linears} == {torch.float8_e5m2 if spelling is e5m2 else E4M3}


@pytest.mark.parametrize(("kind", "error"), [("int8", 0.012), ("nf4", 0.11), ("bf16", 0.003)])
def test_fp8_files_can_be_loaded_into_other_precisions(
    original: Original, kind: str, error: float, tmp_path: Path
) -> None:
    file = by_row(original)
    found, expected = loaded(original.open(written(tmp_path / "model.safetensors", file)), kind), dense(file)
    for key, tensor in expected.items():
        assert (found[key].float() - tensor).norm() <= error * tensor.norm(), key


def test_scales_that_were_dropped_are_noticed(original: Original, tmp_path: Path) -> None:
    tensors, _ = by_row(original)
    bare = {key: tensor for key, tensor in tensors.items() if not key.endswith("weight_scale")}
    model = original.open(written(tmp_path / "bare.safetensors", (bare, {})))
    with pytest.raises(UserError, match="as only scaled weights are, but without its scale"):
        load_frozen(model, PrecisionSpec(), CPU)
    declared, told = in_metadata(original)
    lost = {key: tensor for key, tensor in declared.items() if not key.endswith("1.img_attn.proj.weight_scale")}
    with pytest.raises(UserError, match=r"no scale for double_blocks\.1\.img_attn\.proj\.weight"):
        original.open(written(tmp_path / "declared.safetensors", (lost, told)))
    marked, _ = old_scaled(original)
    lost = {key: tensor for key, tensor in marked.items() if not key.endswith("0.img_attn.proj.scale_weight")}
    with pytest.raises(UserError, match=r"no scale for double_blocks\.0\.img_attn\.proj\.weight"):
        original.open(written(tmp_path / "marked.safetensors", (lost, {})))


def _gone(key: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(key)


def _set(key: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({key: tensor})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            _gone("double_blocks.1.img_attn.proj.weight"),
            r"1 missing \(transformer_blocks\.1\.attn\.to_out\.0\.weight\)",
        ),
        (_set("extra.weight", torch.ones(2)), r"1 unexpected \(extra\.weight\)"),
        (
            _set("double_blocks.1.img_attn.proj.weight", torch.ones(3, 256)),
            r"mis-shaped .*to_out\.0\.weight \[3, 256\]",
        ),
        (_gone("img_in.weight"), r"lacks x_embedder\.weight"),
        (_set("double_blocks.0.img_mlp.0.weight_scale_2", torch.ones(1)), r"format other than FP8"),
        (_set("double_blocks.0.img_mlp.0.weight_scale", torch.ones(7)), r"scales that fit no weight.*\[7\]"),
        (_set("double_blocks.0.nothing.weight_scale", torch.ones(())), r"scales that fit no weight"),
        (_set("double_blocks.0.img_mlp.0.weight", torch.ones(8, 8, dtype=torch.int8)), r"as I8, which is no number"),
        (
            _set(
                "double_blocks.0.img_mlp.0.comfy_quant", torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)
            ),
            "img_mlp.0: nvfp4",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    original: Original, change: Callable[[dict[str, Tensor]], object], text: str, tmp_path: Path
) -> None:
    tensors = dict(original.bfl)
    change(tensors)
    with pytest.raises(UserError, match=text):
        original.open(written(tmp_path / "model.safetensors", (tensors, {})))


def test_other_models_in_the_same_file_are_passed_over(original: Original, tmp_path: Path) -> None:
    """A ComfyUI checkpoint holds text encoders and VAE too, in formats of their own."""
    tensors, _ = prefixed("model.diffusion_model.")(original)
    tensors["text_encoders.clip_l.position_ids"] = torch.arange(77)[None]
    tensors["text_encoders.t5.block.0.weight"] = torch.ones(4, 4, dtype=torch.int8)
    tensors["text_encoders.t5.block.0.comfy_quant"] = torch.tensor(list(b'{"format": "int8"}'), dtype=torch.uint8)
    told = {"_quantization_metadata": json.dumps({"layers": {"text_encoders.t5.block.1": {"format": "nvfp4"}}})}
    model = original.open(written(tmp_path / "model.safetensors", (tensors, told)))
    assert model.weights.shapes.keys() == original.diffusers.keys()


def test_an_unknown_format_in_the_header_is_refused(original: Original, tmp_path: Path) -> None:
    told = {"_quantization_metadata": json.dumps({"layers": {"double_blocks.0.img_attn.qkv": {"format": "mxfp8"}}})}
    with pytest.raises(UserError, match=r"img_attn\.qkv: mxfp8"):
        open_file(written(tmp_path / "model.safetensors", (dict(original.bfl), told)), "flux2")


@pytest.mark.parametrize("length", [0, 5, 1000, -1])
def test_a_file_that_is_cut_short_is_refused(original: Original, length: int, tmp_path: Path) -> None:
    path = written(tmp_path / "model.safetensors", bf16(original))
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match="is not a whole safetensors file"):
        original.open(path)


@pytest.mark.parametrize(("name", "text"), [("model.ckpt", "is a pickle"), ("model.gguf", "is a GGUF file")])
def test_other_kinds_of_file_are_not_opened(original: Original, name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04K\x00.")
    with pytest.raises(UserError, match=text):
        original.open(tmp_path / name)


def test_shards_are_read_as_their_index_says(original: Original, tmp_path: Path) -> None:
    names = sorted(original.diffusers)
    halves = {"a-1.safetensors": names[::2], "a-2.safetensors": names[1::2]}
    for file, keys in halves.items():
        save_file({key: original.diffusers[key].contiguous() for key in keys}, tmp_path / file)
    index = {"weight_map": {key: file for file, keys in halves.items() for key in keys}}
    (tmp_path / "a.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "other.fp16.safetensors").write_bytes(b"not read")
    weights = open_folder(tmp_path)
    assert all(torch.equal(weights.read(name).dense(torch.bfloat16), original.diffusers[name]) for name in names)
    (tmp_path / "a-2.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks a-2\.safetensors"):
        open_folder(tmp_path)


def test_a_folder_of_pickles_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04K\x00.")
    with pytest.raises(UserError, match="lacks safetensors files") as error:
        open_folder(tmp_path)
    assert "pickled weights are not opened" in error.value.remedy


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
@pytest.mark.parametrize("kind", ["fp8", "bf16"])
def test_a_loaded_transformer_holds_no_mapping_of_its_file(original: Original, kind: str, tmp_path: Path) -> None:
    path = written(tmp_path / "model.safetensors", by_row(original))
    model = original.open(path)
    view = model.weights.read("proj_out.weight")
    assert str(path) in Path("/proc/self/maps").read_text()
    del view
    transformer = load_frozen(model, PrecisionSpec(base=kind), CPU)
    assert str(path) not in Path("/proc/self/maps").read_text()
    assert transformer.training is False


def test_frozen_transformers_hold_no_trainable_parameter(original: Original) -> None:
    transformer: nn.Module = load_frozen(original.open(original.folder), PrecisionSpec(), CPU)
    assert not any(parameter.requires_grad for parameter in transformer.parameters())
    assert not any(t.is_meta for t in (*transformer.parameters(), *transformer.buffers()))
