"""What is told of a run in its export: the header field by field, the card, the page; and what is left out."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from flux2_lora import __version__
from flux2_lora.adapters import Lora, LoraWeights
from flux2_lora.bundled import share
from flux2_lora.dataset import Record
from flux2_lora.errors import UserError
from flux2_lora.export.header import RUN_CARD, About, header
from flux2_lora.files import digest
from flux2_lora.inference.drawn import Texts, write_texts
from flux2_lora.publish.learned import differences, learned_from, read_learned, save_learned
from flux2_lora.publish.release import Source, refuse_unknown_formats, release
from flux2_lora.publish.reproduce import from_card
from flux2_lora.publish.run_card import card_of_run, read_card

ABOUT = About(
    title="/home/ana/style",
    model="C:\\models\\Flux.2-klein-4b",
    base="~/klein",
    architecture="flux2",
    date="2026-01-31T10:00:00",
    resolution=(768, 1024),
    trigger_phrase="mystyle",
    licence="apache-2.0",
    pictures=28,
    tags={"rome": {"mystyle": 28, "a fountain": 2}},
)
OPTIONS = {
    "model": {
        "family": "flux2_klein",
        "path": "black-forest-labs/FLUX.2-klein-base-4B",
        "title": "Flux.2 Klein 4B",
        "architecture_name": "Flux.2-klein-4b",
        "licence": "apache-2.0",
    },
    "dataset": {
        "folder": "/home/ana/pictures/rome",
        "masks": None,
        "default_caption": "a view, of Rome",
        "trigger_word": "mystyle",
        "resolution": [512, 768],
        "flip": True,
    },
    "adapter": {"rank": 4, "targets": ["attention", "mlp"]},
    "validation": {"features": str(share() / "data" / "tiny")},
    "optimizer": {"kind": "adamw", "lr": 1e-4},
    "output_dir": "/home/ana/outputs",
    "device": "cuda",
    "name": "rome",
}


def record(name: str, caption: str, content: str = "") -> Record:
    """A picture of a source that lies in somebody's folder."""
    source: Any = SimpleNamespace(name="dataset.folder=/home/ana/pictures/rome", trigger_word="mystyle")
    return Record(
        path=Path(f"/home/ana/pictures/rome/{name}"),
        name=name,
        digest=hashlib.sha256((content or name).encode()).hexdigest(),
        width=64,
        height=64,
        texts=(caption,),
        buckets=((64, 64),),
        repeats=1,
        source=source,
    )


RECORDS = [record("a.png", "mystyle, a fountain"), record("b.png", "mystyle, a fountain, night")]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run of 40 steps, drawn at 0 and 20."""
    folder = tmp_path / "rome"
    (folder / "previews").mkdir(parents=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(OPTIONS))
    rows = [(0, 1.5), (20, 1.2), (40, 1.3)]
    (folder / "metrics.jsonl").write_text("".join(f'{{"step": {s}, "validation_loss": {v}}}\n' for s, v in rows))
    save_learned(folder, learned_from(RECORDS, RECORDS[:1]))
    write_texts(folder / "previews", Texts(prompts=["mystyle, a fountain", "mystyle, a cat"], edited=""))
    for step, colour in ((0, "white"), (20, "red")):
        place = folder / "previews" / f"step-{step:06d}"
        place.mkdir()
        for row in range(2):
            Image.new("RGB", (320, 160), colour).save(place / f"{row:04d}.png")
    return folder


@pytest.fixture
def source(run: Path) -> Source:
    rng = torch.Generator().manual_seed(0)
    module = "single_transformer_blocks.0.attn.to_out"
    pair = LoraWeights(down=torch.randn(4, 8, generator=rng), up=torch.randn(8, 4, generator=rng), scale=0.5)
    lora = Lora(modules={module: pair}, naming="", total=1, architecture="flux2", trigger_word="mystyle")
    return Source(lora=lora, path=run, run=run, step=40)


def header_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def test_a_header_has_modelspec_and_what_forge_and_managers_read() -> None:
    assert header(ABOUT, rank=48) == {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "Flux.2-klein-4b/lora",
        "modelspec.implementation": "https://github.com/black-forest-labs/flux2",
        "modelspec.title": "style",
        "modelspec.date": "2026-01-31T10:00:00",
        "modelspec.resolution": "1024x768",
        "modelspec.trigger_phrase": "mystyle",
        "modelspec.usage_hint": "Write mystyle in the prompt. Strength 1 is as trained.",
        "modelspec.license": "apache-2.0",
        "ss_output_name": "style",
        "ss_base_model_version": "klein",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "48",
        "ss_network_alpha": "48.0",
        "ss_resolution": "(1024, 768)",
        "ss_num_train_images": "28",
        "ss_tag_frequency": '{"rome": {"mystyle": 28, "a fountain": 2}}',
    }


def test_what_is_not_known_is_left_out_of_a_header() -> None:
    little = About(title="a", model="flux-1-dev", base="Flux.1 D", architecture="flux1", date="2026-01-31")
    made = header(little, rank=4)
    assert made["modelspec.implementation"] == "https://github.com/black-forest-labs/flux"
    assert not made.keys() & {"modelspec.trigger_phrase", "modelspec.license", "ss_tag_frequency", RUN_CARD}


def test_the_cover_is_a_small_jpeg_in_both_places() -> None:
    made = header(replace(ABOUT, cover=Image.new("RGB", (1000, 500), "red")), rank=4)
    [cover] = json.loads(made["ssmd_cover_images"])
    assert made["modelspec.thumbnail"] == f"data:image/jpeg;base64,{cover}"
    picture = Image.open(BytesIO(base64.b64decode(cover)))
    assert (picture.format, picture.size) == ("JPEG", (256, 128))


def test_the_export_of_a_run_tells_what_the_run_knew(source: Source, run: Path) -> None:
    [released] = release(source, {"universal": run / "export" / "rome.safetensors"})
    told = header_of(released.path)
    assert told["modelspec.architecture"] == "Flux.2-klein-4b/lora"
    assert told["ss_base_model_version"] == "Flux.2 Klein 4B"
    assert told["modelspec.resolution"] == "768x768"
    assert told["modelspec.trigger_phrase"] == "mystyle"
    assert told["ss_num_train_images"] == "2"
    assert told["flux2_lora.version"] == __version__
    assert json.loads(told["ss_tag_frequency"]) == {"rome": {"mystyle": 2, "a fountain": 2, "night": 1}}
    assert all(proof.whole for proof in released.proofs)
    cover = Image.open(BytesIO(base64.b64decode(json.loads(told["ssmd_cover_images"])[0])))
    red, green, _ = cover.getpixel((10, 10))  # type: ignore[misc]
    assert red > 200 > 60 > green


def test_no_export_names_a_folder_of_the_machine(source: Source, run: Path) -> None:
    [released] = release(source, {"universal": run / "export" / "rome.safetensors"})
    everything = json.dumps(header_of(released.path)) + (run / "export" / "README.md").read_text()
    assert "ana" not in everything.replace("banana", "")
    assert str(share()) not in everything


def test_privacy_leaves_out_captions_folder_names_and_cover(source: Source, run: Path) -> None:
    [released] = release(source, {"universal": run / "export" / "private.safetensors"}, strict=True)
    told = header_of(released.path)
    everything = json.dumps(told) + (run / "export" / "README.md").read_text()
    assert not any(
        word in everything for word in ("fountain", "rome", "view", "night", digest("mystyle, a fountain")[:12])
    )
    assert json.loads(told["ss_tag_frequency"]) == {"mystyle": {"mystyle": 2}}
    assert "ssmd_cover_images" not in told
    assert not (run / "export" / "samples").exists()


def test_a_card_comes_back_as_it_was_written(source: Source, run: Path) -> None:
    [released] = release(source, {"universal": run / "export" / "rome.safetensors"})
    card = read_card(released.path)
    assert card == card_of_run(run, 40, private=False)
    assert card.losses == {"base": 1.5, "exported": 1.3, "best": 1.2, "best_step": 20}
    assert card.options["dataset"]["folder"] == ".../rome"
    assert card.options["validation"]["features"] == "${share:data/tiny}"
    assert not card.options.keys() & {"output_dir", "device"}
    assert card.versions["torch"] == torch.__version__.partition("+")[0] or card.versions["torch"]


def test_a_card_becomes_options_and_what_is_typed_goes_before_it(source: Source, run: Path) -> None:
    [released] = release(source, {"universal": run / "export" / "rome.safetensors"})
    typed = [f"from={released.path}", "dataset.folder=/new/place", "adapter.rank=8"]
    made = from_card(typed)
    assert made[-3:] == typed
    assert "++dataset.default_caption='a view, of Rome'" in made
    assert "++adapter.targets=['attention','mlp']" in made
    assert "++dataset.resolution=[512,768]" in made
    assert "++dataset.flip=true" in made
    assert "++optimizer.lr=0.0001" in made
    assert "++validation.features=${share:data/tiny}" in made
    assert [
        argument for argument in made if argument.lstrip("+").startswith(("adapter.rank", "dataset.folder"))
    ] == typed[1:][::-1][::-1]


def test_a_group_that_is_typed_replaces_all_of_the_card_s(source: Source, run: Path) -> None:
    [released] = release(source, {"universal": run / "export" / "rome.safetensors"})
    made = from_card([f"from={released.path}", "dataset.folder=/new/place", "optimizer=lion"])
    assert not any(argument.startswith("++optimizer.") for argument in made)


def test_a_folder_of_another_machine_must_be_given(source: Source, run: Path) -> None:
    [released] = release(source, {"universal": run / "export" / "rome.safetensors"})
    with pytest.raises(UserError, match=r"dataset.folder=\.\.\./rome") as refusal:
        from_card([f"from={released.path}"])
    assert "add dataset.folder=" in refusal.value.remedy


def test_arguments_without_a_card_stay_as_they_are() -> None:
    assert from_card(["name=a", "from=null"]) == ["name=a", "from=null"]


@pytest.mark.parametrize("text", [None, "no json", "{}", '{"learned": {"pictures": 3}}'])
def test_a_file_without_a_sound_card_is_refused(tmp_path: Path, text: str | None) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors", {} if text is None else {RUN_CARD: text})
    with pytest.raises(UserError, match="run card"):
        read_card(tmp_path / "a.safetensors")


def test_what_was_learned_comes_back_and_names_no_file(run: Path) -> None:
    assert read_learned(run) == learned_from(RECORDS, RECORDS[:1])
    assert "a.png" not in (run / "learned.json").read_text()


def test_differences_in_the_data_are_told(run: Path) -> None:
    then = learned_from(RECORDS, [])
    assert differences(then, RECORDS[::-1], []) == []
    other = [RECORDS[0], record("b.png", "mystyle, a fountain at night"), record("c.png", "mystyle, a cat")]
    assert differences(then, other, []) == ["1 pictures are new: c.png", "1 have another caption: b.png"]
    assert differences(then, RECORDS[:1], []) == ["1 of the 2 pictures of then are not here"]
    renamed = [record("z.png", "mystyle, a fountain", "a.png"), RECORDS[1]]
    assert differences(then, renamed, []) == []


def test_the_page_has_what_the_hub_reads(source: Source, run: Path) -> None:
    release(source, {"universal": run / "export" / "rome.safetensors"})
    page = (run / "export" / "README.md").read_text()
    _, head, body = page.split("---\n", 2)
    values = yaml.safe_load(head)
    assert values["base_model"] == "black-forest-labs/FLUX.2-klein-base-4B"
    assert values["license"] == "apache-2.0"
    assert values["instance_prompt"] == "mystyle"
    assert [entry["output"]["url"] for entry in values["widget"]] == ["samples/0000.png", "samples/0001.png"]
    assert all((run / "export" / f"samples/{row:04d}.png").is_file() for row in range(2))
    assert "| learning rate | 0.0001 |" in body
    assert "| validation loss | 1.500 (base), 1.300 |" in body
    assert "ComfyUI    1 of 1" in body


def test_a_licence_that_the_hub_does_not_know_is_named_as_other(source: Source, run: Path) -> None:
    options = {**OPTIONS, "model": {**OPTIONS["model"], "licence": "flux-1-dev-non-commercial-license"}}  # type: ignore[dict-item]
    (run / "run.yaml").write_text(yaml.safe_dump(options))
    release(source, {"universal": run / "export" / "rome.safetensors"})
    values = yaml.safe_load((run / "export" / "README.md").read_text().split("---\n")[1])
    assert (values["license"], values["license_name"]) == ("other", "flux-1-dev-non-commercial-license")


def test_an_export_into_another_folder_leaves_no_page_there(source: Source, tmp_path: Path) -> None:
    release(source, {"universal": tmp_path / "loras" / "rome.safetensors"})
    assert {file.name for file in (tmp_path / "loras").iterdir()} == {"rome.safetensors", "rome.proof.json"}


@pytest.mark.parametrize(
    "options",
    [
        {"hydra": {"callbacks": {"x": {"_target_": "pathlib.Path"}}}},
        {"output_dir": "elsewhere"},
        {"resume": "never"},
        {"dataset": {"trigger_word": "${oc.env:HOME}"}},
        {"dataset": {"sources": [{"folder": "${oc.env:HOME}"}]}},
        {"gone": {"option": 1}},
    ],
)
def test_of_a_stranger_s_card_nothing_but_options_is_taken(tmp_path: Path, options: dict[str, Any]) -> None:
    card = {"options": {"seed": 3, **options}, "step": 1, "learned": None}
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors", {RUN_CARD: json.dumps(card)})
    typed = [f"from={tmp_path / 'a.safetensors'}", "dataset.folder=mine"]
    assert from_card(typed) == ["++seed=3", *typed]


def test_a_card_that_hides_its_pictures_asks_for_a_folder(source: Source, run: Path) -> None:
    [released] = release(source, {"universal": run / "export" / "private.safetensors"}, strict=True)
    with pytest.raises(UserError, match="does not tell which pictures"):
        from_card([f"from={released.path}"])


def test_a_private_export_leaves_no_samples_of_an_open_one(source: Source, run: Path) -> None:
    release(source, {"universal": run / "export" / "rome.safetensors"})
    assert (run / "export" / "samples").is_dir()
    release(source, {"universal": run / "export" / "rome.safetensors"}, strict=True)
    assert not (run / "export" / "samples").exists()


def test_a_private_card_knows_the_pictures_and_not_the_captions() -> None:
    then = learned_from(RECORDS, []).strict("mystyle")
    assert differences(then, RECORDS, []) == []
    other = [RECORDS[0], record("b.png", "mystyle, a cat")]
    assert differences(then, other, []) == ["the same pictures, with other captions or repeats"]


def test_no_format_is_refused() -> None:
    with pytest.raises(UserError, match="asks for no file"):
        refuse_unknown_formats([])
