"""Captioners say what transformers' own classes say, from whole local folders only; the program writes it beside."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from flux2_lora.bundled import share
from flux2_lora.errors import UserError
from flux2_lora.networks import captioners
from flux2_lora.networks.captioners import Captioner, load_captioner
from tests.conftest import Outcome

CPU = torch.device("cpu")
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<image>")
WORDS = (
    *("what", "does", "the", "image", "describe?", "describe", "in", "detail", "is", "shown", "image.", "with"),
    *("a", "paragraph", "cat", "red", "apple", "on", "of", "photo", "face", "blue", "you", "object"),
)
IDS = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
PIXELS = {"height": 32, "width": 32}
LENGTH = 9


def words() -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *WORDS))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [("<s>", 0), ("</s>", 2)]
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )


@torch.no_grad()
def loud(model: nn.Module) -> nn.Module:
    """Weights so large that the picture and the prompt change the words."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.4)
    return model.eval()


def build_florence2(folder: Path) -> None:
    from transformers import (
        CLIPImageProcessorPil,
        Florence2Config,
        Florence2ForConditionalGeneration,
        Florence2Processor,
    )

    torch.manual_seed(0)
    text = {
        "model_type": "bart",
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "max_position_embeddings": 64,
    }
    narrow = dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 16)
    heads = dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
    vision = {
        "depths": (1, 1),
        "patch_size": (7, 3),
        "patch_stride": (4, 2),
        "patch_padding": (3, 1),
        "patch_prenorm": (False, True),
        "embed_dim": (8, 16),
        "num_heads": (2, 2),
        "num_groups": (2, 2),
        "window_size": 4,
        "projection_dim": 16,
    }
    size = len(SPECIAL) + len(WORDS)
    config = Florence2Config(
        text_config={**text, **narrow, **heads, **IDS, "vocab_size": size, "decoder_start_token_id": 2},
        vision_config=vision,
        image_token_id=4,
    )
    pixels = CLIPImageProcessorPil(size=PIXELS, do_center_crop=False)
    pixels.image_seq_length = 17  # 4 x 4 cells and their mean
    loud(Florence2ForConditionalGeneration(config)).save_pretrained(folder)
    Florence2Processor(pixels, words(), post_processor_config={"pure_text": {}}).save_pretrained(folder)


def build_blip(folder: Path) -> None:
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipImageProcessorPil, BlipProcessor

    torch.manual_seed(0)
    narrow = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "projection_dim": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text = {"vocab_size": len(SPECIAL) + len(WORDS), "encoder_hidden_size": 16, "sep_token_id": 2}
    config = BlipConfig(
        text_config={**narrow, **text, **IDS}, vision_config={**narrow, "image_size": 32, "patch_size": 16}
    )
    loud(BlipForConditionalGeneration(config)).save_pretrained(folder)
    BlipProcessor(BlipImageProcessorPil(size=PIXELS), words()).save_pretrained(folder)


BUILD: dict[str, Callable[[Path], None]] = {"florence2": build_florence2, "blip": build_blip}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of both kinds, by name."""
    root = tmp_path_factory.mktemp("captioners")
    for name, build in BUILD.items():
        build(root / name)
    return root


@pytest.fixture(params=list(BUILD))
def model(request: pytest.FixtureRequest, built: Path, tmp_path: Path) -> Path:
    """A copy of a captioner's folder, to be spoiled."""
    return Path(shutil.copytree(built / request.param, tmp_path / request.param))


def picture(seed: int) -> Image.Image:
    noise = torch.rand(40, 50, 3, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray((noise * 255).byte().numpy())


def load(folder: Path, prompt: str | None = None) -> Captioner:
    return load_captioner(str(folder), CPU, prompt, LENGTH)


def refusal(folder: Path | str, prompt: str | None = None, length: int = LENGTH) -> UserError:
    with pytest.raises(UserError) as caught:
        load_captioner(str(folder), CPU, prompt, length)
    assert "\n" not in caught.value.what + caught.value.remedy
    return caught.value


def edit(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, **changes}))


@pytest.mark.parametrize(
    ("name", "prompt", "text"),
    [
        ("florence2", None, "<DETAILED_CAPTION>"),
        ("florence2", "more_detailed_caption", "<MORE_DETAILED_CAPTION>"),
        ("florence2", "<CAPTION>", "<CAPTION>"),
        ("blip", None, None),
        ("blip", "a photo of", "a photo of"),
    ],
)
def test_a_caption_is_what_transformers_says(name: str, prompt: str | None, text: str | None, built: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(built / name)
    network = AutoModelForImageTextToText.from_pretrained(built / name, attn_implementation="eager").eval()
    caption = load(built / name, prompt)
    said = []
    for seed in range(3):
        inputs = processor(images=picture(seed), text=text, return_tensors="pt")
        ids = network.generate(**inputs, num_beams=3, do_sample=False, max_new_tokens=LENGTH)
        expected = " ".join(processor.decode(ids[0], skip_special_tokens=True).split())
        if name == "florence2":
            whole = processor.decode(ids[0], skip_special_tokens=False)
            parsed = processor.post_process_generation(whole, task=text)[text]
            assert " ".join(parsed.split()) == expected
        said.append(caption(picture(seed)))
        assert said[-1] == expected != ""
        assert said[-1] == caption(picture(seed))
    assert len(set(said)) > 1
    if name == "blip" and text:
        assert all(each.startswith(text) for each in said)


def test_half_precision_as_on_a_gpu(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captioners, "compute_dtype", lambda device: torch.bfloat16)
    assert load(model)(picture(0))


def test_the_prompt_reaches_florence(built: Path) -> None:
    short, long = load(built / "florence2", "CAPTION"), load(built / "florence2", "MORE_DETAILED_CAPTION")
    assert any(short(picture(seed)) != long(picture(seed)) for seed in range(4))


def test_a_folder_that_is_not_there_says_what_to_download() -> None:
    nowhere = refusal("nowhere/at/all")
    assert nowhere.what.startswith("captioner.path=nowhere/at/all: ")
    assert "hf download florence-community/Florence-2-base --local-dir FOLDER" in nowhere.remedy
    assert "hf download owner/name " in refusal("owner/name").remedy
    assert "florence-community/Florence-2-large-ft" in refusal("microsoft/Florence-2-large-ft").remedy


def test_other_classes_are_refused_with_what_is_supported(model: Path) -> None:
    edit(model / "config.json", architectures=["LlavaForConditionalGeneration"])
    error = refusal(model)
    assert "LlavaForConditionalGeneration" in error.what
    assert "Florence-2" in error.remedy
    assert "BLIP" in error.remedy
    edit(model / "config.json", architectures=["Moondream"], auto_map={"AutoModel": "hf_moondream.Moondream"})
    assert "is not run" in refusal(model).what
    (model / "config.json").unlink()
    assert "config.json" in refusal(model).what


@pytest.mark.parametrize(
    "old", [{"auto_map": {"AutoConfig": "x.Y"}}, {"text_config": {"model_type": "florence2_language"}}]
)
def test_florence_in_its_first_form_names_the_native_repository(
    old: dict[str, Any], built: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(built / "florence2", tmp_path / "old"))
    edit(folder / "config.json", **old)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    error = refusal(folder)
    assert "first form" in error.what
    assert "florence-community/Florence-2-base" in error.remedy


def test_code_in_the_folder_is_never_run(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for place in (model / "evil.py", model / "custom_generate" / "generate.py"):
        place.parent.mkdir(exist_ok=True)
        place.write_text(f"open({str(model / 'ran')!r}, 'w').write('ran')\nclass It: pass\ngenerate = It\n")
    auto = {
        "auto_map": {"AutoTokenizer": ["evil.It", None], "AutoProcessor": "evil.It", "AutoImageProcessor": "evil.It"}
    }
    edit(model / "tokenizer_config.json", tokenizer_class="It", **auto)
    edit(model / "processor_config.json", **auto)
    assert load(model)(picture(0))
    assert not (model / "ran").exists()
    assert capsys.readouterr().out == ""


def test_pickles_are_refused(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    error = refusal(model)
    assert "pickled" in error.what
    assert "model.safetensors" in error.remedy


def test_quantised_weights_and_adapters_are_refused(model: Path) -> None:
    (model / "adapter_config.json").write_text("{}")
    assert "adapter" in refusal(model).what
    (model / "adapter_config.json").unlink()
    edit(model / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    assert "quantised" in refusal(model).what


@pytest.mark.parametrize(("file", "what"), [("processor_config.json", "processor"), ("tokenizer.json", "tokenizer")])
def test_missing_and_damaged_files_are_named(file: str, what: str, model: Path) -> None:
    (model / file).write_text("{}")
    assert "cannot be read" in refusal(model).what
    (model / file).unlink()
    assert f"its {what} is missing ({file}" in refusal(model).what.replace("preprocessor_config.json or ", "")


def test_damaged_weights_are_refused(model: Path) -> None:
    whole = load_file(model / "model.safetensors")
    name = next(key for key in whole if key.endswith("fc1.weight"))
    for spoiled in ({name: whole[name][:1].contiguous()}, {}):
        rest = {key: value for key, value in whole.items() if key != name}
        save_file({**rest, **spoiled}, model / "model.safetensors", {"format": "pt"})
        assert name in refusal(model).what
    (model / "model.safetensors").write_bytes(b"nothing")
    assert "model.safetensors" in refusal(model).what
    (model / "model.safetensors").unlink()
    assert "lacks safetensors" in refusal(model).what


def test_a_configuration_of_wrong_values_is_refused(model: Path) -> None:
    edit(model / "config.json", vision_config={"hidden_size": "wide", "depths": "deep"})
    assert "cannot be read" in refusal(model).what


def test_prompts_that_cannot_be_taken(built: Path) -> None:
    typo = refusal(built / "florence2", "<DETAILD_CAPTION>")
    assert typo.what.startswith("captioner.prompt=<DETAILD_CAPTION> ")
    assert typo.remedy == "did you mean DETAILED_CAPTION?"
    assert "captioner.max_new_tokens=256" in refusal(built / "blip", "a photo of " * 100, 256).what


Run = Callable[..., Outcome]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, built: Path) -> Run:
    """data/caption.py on `pictures` with the miniature BLIP, in this process."""
    monkeypatch.chdir(tmp_path)

    def call(*options: str) -> Outcome:
        program = share() / "data" / "caption.py"
        given = (
            "dataset.folder=pictures",
            f"captioner.path={built / 'blip'}",
            "captioner.max_new_tokens=8",
            "device=cpu",
        )
        monkeypatch.setattr(sys, "argv", [str(program), *given, *options])
        capfd.readouterr()
        code = 0
        try:
            runpy.run_path(str(program), run_name="__main__")
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        streams = capfd.readouterr()
        return Outcome(code, streams.out, streams.err)

    return call


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Five pictures, one of them broken, one with a caption; a mask; one below; one in a hidden folder."""
    folder = tmp_path / "pictures"
    for seed, name in enumerate(("a.png", "b.jpg", "blank.png", "sub/[c] d.webp", "a-masklabel.png", ".hidden/e.png")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(seed).save(folder / name)
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "b.caption").write_text("a cat")
    (folder / "blank.txt").write_text(" \n")
    return folder


def texts(folder: Path) -> dict[str, str]:
    files = [file for file in folder.rglob("*") if file.suffix in (".txt", ".caption")]
    return {file.relative_to(folder).as_posix(): file.read_text() for file in files}


def test_pictures_without_a_caption_get_one(run: Run, pictures: Path, built: Path) -> None:
    done = run("captioner.prompt=a photo of")
    assert (done.code, done.err) == (0, "")
    written = texts(pictures)
    assert set(written) == {"a.txt", "b.caption", "blank.txt", "sub/[c] d.txt"}
    assert written["b.caption"] == "a cat"
    expected = load_captioner(str(built / "blip"), CPU, "a photo of", 8)
    for name in ("a.png", "sub/[c] d.webp"):
        text = expected(Image.open(pictures / name).convert("RGB"))
        assert written[str(Path(name).with_suffix(".txt"))] == f"{text}\n"
        assert f"{name}: {text}" in done.out
    *lines, last = done.out.splitlines()
    assert len(lines) == 4
    assert "3/4 broken.png skipped: not a picture" in done.out
    assert last.startswith("captions: 3 written, 1 kept, 1 skipped; next: flux2-lora inspect dataset.folder=")
    again = run("captioner.prompt=a photo of").out
    assert "captions: 0 written, 4 kept, 1 skipped" in again
    assert texts(pictures) == written


def test_overwriting_goes_over_the_caption_that_counts(run: Run, pictures: Path) -> None:
    assert run("overwrite=true", "suffix=.caption").code == 0
    written = texts(pictures)
    assert set(written) == {"a.caption", "b.caption", "blank.txt", "blank.caption", "sub/[c] d.caption"}
    assert written["b.caption"] != "a cat"


def test_a_dry_run_writes_nothing(run: Run, pictures: Path) -> None:
    before = texts(pictures)
    done = run("dry_run=true")
    assert "a.png: " in done.out
    assert "captions: 3 would be written" in done.out
    assert texts(pictures) == before


def test_links_are_not_written_through(run: Run, pictures: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    picture(7).save(outside / "far.png")
    (outside / "words.txt").write_text("private")
    picture(8).save(pictures / "own.png")
    (pictures / "own.txt").symlink_to(outside / "words.txt")
    (pictures / "near.png").symlink_to(outside / "far.png")
    (pictures / "folder").symlink_to(outside)
    assert run("overwrite=true").code == 0
    assert texts(outside) == {"words.txt": "private"}
    assert not (pictures / "own.txt").is_symlink()
    assert (pictures / "near.txt").read_text()


def test_pictures_of_one_stem_share_a_caption(run: Run, pictures: Path) -> None:
    picture(9).save(pictures / "a.webp")
    assert "captions: 3 written, 2 kept" in run().out


def test_nothing_to_do_loads_nothing(run: Run, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.txt", "blank.txt", "broken.txt", "sub/[c] d.txt"):
        (pictures / name).write_text("a cat")
    monkeypatch.delattr(captioners, "_checked")
    assert "captions: 0 written, 5 kept, 0 skipped" in run().out


def test_refusals_of_the_program(run: Run, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for options, what in (
        (("dataset.folder=picture",), "dataset.folder=picture"),
        (("dataset.folder=empty",), "dataset.folder=empty holds no pictures"),
        (("captioner.path=nowhere",), "captioner.path=nowhere: there is no such folder"),
        (("captioner.max_new_tokens=0",), "captioner.max_new_tokens=0"),
        (("suffix=.md",), "suffix=.md"),
    ):
        refused = run(*options)
        assert refused.code == 2
        assert refused.err.startswith(f"error: {what}")
        assert len(refused.err.splitlines()) == 2
    assert "b.caption" in texts(pictures)
    assert len(texts(pictures)) == 2
