"""The encoder phase: what is encoded again and what is not, how damage heals, what a step draws from the caches."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load, load_file, save_file
from torch import Tensor, nn

from flux2_lora.dataset import Scan
from flux2_lora.dataset.spec import SourceSpec
from flux2_lora.families import Model, ModelFamily, family_names, load_family, open_model
from flux2_lora.flow import velocity_error
from flux2_lora.training import encoding
from flux2_lora.training.encoding import CachedSamples, Encoder, encode_samples, items_of
from flux2_lora.training.step import training_loss
from tests.conftest import drawn
from tests.sets import error_of, picture, scanned, spec

CPU = torch.device("cpu")


@dataclass
class Prepared:
    """One preparation of a folder: what it encoded, by kind."""

    samples: CachedSamples
    found: Scan
    made: dict[str, list[str]] = field(default_factory=dict)

    @property
    def counts(self) -> tuple[int, int]:
        return len(self.made["latents"]), len(self.made["texts"])


def prepare(folder: Path, model: Model, **options: Any) -> Prepared:
    """Prepare a folder with the caches beside it."""
    settings = spec(folder, **options)
    encoder = Encoder(model, folder.parent / "cache", CPU, background=settings.background)
    made: dict[str, list[str]] = {"latents": [], "texts": []}
    for cache in (encoder.latents, encoder.texts):
        store = cache.store

        def noted(key: str, tensors: Any, kind: str = cache.kind, store: Callable[..., None] = store) -> None:
            made[kind].append(key)
            store(key, tensors)

        cache.store = noted  # type: ignore[method-assign]
    found = scanned(settings)
    return Prepared(encode_samples(encoder, found.training, settings, seed=0), found, made)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five pictures of different content and caption, one of them half transparent."""
    for number in range(4):
        picture(tmp_path / f"set/{number}.png", f"caption {number}", colour=(60 * number, 99, 9), size=(96, 64))
    Image.new("RGBA", (96, 64), (9, 9, 200, 128)).save(tmp_path / "set/4.png")
    (tmp_path / "set/4.txt").write_text("caption 4")
    return tmp_path / "set"


# --- what is encoded again


def test_a_second_preparation_encodes_nothing_and_loads_no_encoder(
    folder: Path, tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert prepare(folder, tiny_model).counts == (5, 5)
    monkeypatch.setattr(Model, "load_vae", None)
    monkeypatch.setattr(Model, "load_prompt_encoder", None)
    assert prepare(folder, tiny_model).counts == (0, 0)


def touched(folder: Path) -> None:
    for file in folder.iterdir():
        os.utime(file, (1, 1))


def renamed(folder: Path) -> None:
    for kind in ("png", "txt"):
        (folder / f"0.{kind}").rename(folder / f"zero.{kind}")


def moved(folder: Path) -> None:
    (folder / "deep").mkdir()
    renamed(folder)
    for kind in ("png", "txt"):
        (folder / f"zero.{kind}").rename(folder / f"deep/zero.{kind}")


@pytest.mark.parametrize("change", [touched, renamed, moved])
def test_names_and_dates_rebuild_nothing(folder: Path, tiny_model: Model, change: Callable[[Path], None]) -> None:
    prepare(folder, tiny_model)
    change(folder)
    assert prepare(folder, tiny_model).counts == (0, 0)


def replaced(folder: Path) -> None:
    """Another picture of the same name, size and date."""
    file = folder / "0.png"
    state = file.stat()
    picture(file, None, colour="yellow", size=(96, 64))
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))


def recaptioned(folder: Path) -> None:
    (folder / "0.txt").write_text("another caption")


def masked(folder: Path) -> None:
    picture(folder / "0-masklabel.png", None, colour="white", size=(96, 64))


@pytest.mark.parametrize(
    ("change", "counts"), [(replaced, (1, 0)), (recaptioned, (0, 1)), (masked, (1, 0))], ids=lambda c: str(c)[:20]
)
def test_a_changed_file_rebuilds_its_own_entry(
    folder: Path, tiny_model: Model, change: Callable[[Path], None], counts: tuple[int, int]
) -> None:
    prepare(folder, tiny_model)
    change(folder)
    assert prepare(folder, tiny_model).counts == counts
    assert prepare(folder, tiny_model).counts == (0, 0)


@pytest.mark.parametrize(
    ("options", "counts"),
    [
        ({"resolution": [48]}, (5, 0)),
        ({"resolution": [64, 48]}, (5, 0)),
        ({"crop": "random"}, (5, 0)),
        ({"crop": "random", "crop_variants": 3}, (15, 0)),
        ({"flip": True}, (5, 0)),
        ({"background": "black"}, (1, 0)),
        ({"alpha": "mask"}, (1, 0)),
        ({"trigger_word": "sks"}, (0, 5)),
        ({"caption_dropout": 0.5}, (0, 1)),
        ({"unmasked_weight": 0.5}, (0, 0)),
        ({"posterior": "sample"}, (0, 0)),
        ({"max_upscale": 4.0}, (0, 0)),
    ],
    ids=str,
)
def test_an_option_rebuilds_what_depends_on_it(
    folder: Path, tiny_model: Model, options: dict[str, Any], counts: tuple[int, int]
) -> None:
    prepare(folder, tiny_model)
    assert prepare(folder, tiny_model, **options).counts == counts
    assert prepare(folder, tiny_model).counts == (0, 0)


def test_another_version_of_the_code_rebuilds_everything(
    folder: Path, tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(folder, tiny_model)
    monkeypatch.setattr("flux2_lora.caches.FORMAT", "another")
    assert prepare(folder, tiny_model).counts == (5, 5)


def test_a_longer_text_rebuilds_the_texts(folder: Path, tiny_model: Model) -> None:
    prepare(folder, tiny_model)
    longer = replace(tiny_model, spec=replace(tiny_model.spec, max_sequence_length=40))
    assert prepare(folder, longer).counts == (0, 5)


@pytest.mark.parametrize(("part", "counts"), [("vae", (5, 0)), ("text_encoder", (0, 5))])
def test_other_weights_rebuild_what_they_encoded(
    folder: Path, tiny_model: Model, tiny: Path, tmp_path: Path, part: str, counts: tuple[int, int]
) -> None:
    """Weights of the same name, size and date."""
    copy = tmp_path / "model"
    shutil.copytree(tiny, copy)
    model = open_model(replace(tiny_model.spec, path=str(copy)))
    prepare(folder, model)
    file = next((copy / part).glob("*.safetensors"))
    state, weights = file.stat(), load_file(file)
    name = next(name for name, tensor in weights.items() if tensor.is_floating_point() and tensor.dim() > 1)
    weights[name] = weights[name] * 1.01
    save_file(weights, file, {"format": "pt"})
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert prepare(folder, open_model(model.spec)).counts == counts


def test_equal_pictures_and_captions_are_encoded_once(tmp_path: Path, tiny_model: Model) -> None:
    for number in range(3):
        picture(tmp_path / f"set/{number}.png", "the same")
    assert prepare(tmp_path / "set", tiny_model).counts == (1, 1)


def test_a_picture_that_changes_while_it_is_read_stops_the_run(folder: Path, tiny_model: Model) -> None:
    found = scanned(spec(folder))
    replaced(folder)
    encoder = Encoder(tiny_model, folder.parent / "cache", CPU)
    error = error_of(lambda: encode_samples(encoder, found.training, spec(folder), seed=0))
    assert error.what == f"{folder}/0.png changed while it was being read"


# --- what heals


def test_two_hundred_damaged_entries_are_found_and_made_again(tmp_path: Path, tiny_model: Model) -> None:
    rng = random.Random(0)
    for number in range(110):
        noise = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        (tmp_path / "set").mkdir(exist_ok=True)
        Image.fromarray(noise).save(tmp_path / f"set/{number:03}.png")
        (tmp_path / f"set/{number:03}.txt").write_text(f"caption {number}")
    options: dict[str, Any] = {"resolution": [16]}
    first = prepare(tmp_path / "set", tiny_model, **options)
    files = sorted((tmp_path / "cache").rglob("*.safetensors"))
    whole, contents = {file: file.read_bytes() for file in files}, {file: load(file.read_bytes()) for file in files}
    samples = [first.samples[index, 0] for index in range(20)]
    assert len(files) == 220
    chosen = rng.sample(files, 200)
    for file in chosen[:100]:
        raw = bytearray(whole[file])
        raw[rng.randrange(8 + int.from_bytes(raw[:8], "little"), len(raw))] ^= 1 << rng.randrange(8)
        file.write_bytes(raw)
    for file in chosen[100:150]:
        file.write_bytes(whole[file][: rng.randrange(1, len(whole[file]))])
    for file in chosen[150:180]:
        file.write_bytes(b"")
    for one, other in zip(chosen[180:200:2], chosen[181:200:2], strict=True):
        one.write_bytes(whole[other])
        other.write_bytes(whole[one])

    again = prepare(tmp_path / "set", tiny_model, **options)
    again.samples.encoder.verify()
    assert again.samples.encoder.healed == 200
    keys = {file.stem for file in chosen}
    assert {*again.made["latents"], *again.made["texts"]} == keys
    assert all(same(load_file(file), tensors) for file, tensors in contents.items())
    for index, sample in enumerate(samples):
        assert torch.equal(again.samples[index, 0].latents, sample.latents)
        assert torch.equal(again.samples[index, 0].conditioning.embeds, sample.conditioning.embeds)


def test_an_entry_damaged_while_training_is_made_again_alone(
    folder: Path, tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "HELD_BYTES", 0)  # as where a set is larger than what is held in memory
    prepared = prepare(folder, tiny_model)
    wanted = [prepared.samples[index, 3] for index in range(5)]
    for kind in ("latents", "texts"):
        file = next((folder.parent / "cache" / kind).rglob("*.safetensors"))
        raw = bytearray(file.read_bytes())
        raw[-1] ^= 1
        file.write_bytes(raw)
    prepared.made["latents"].clear()
    prepared.made["texts"].clear()
    found = [prepared.samples[index, 3] for index in range(5)]
    assert prepared.counts == (1, 1)
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(found, wanted, strict=True))


def test_a_worker_does_not_encode(folder: Path, tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepare(folder, tiny_model)
    shutil.rmtree(folder.parent / "cache/latents")
    monkeypatch.setattr("flux2_lora.training.encoding.get_worker_info", lambda: "one of the workers")
    with pytest.raises(RuntimeError, match="loader_workers=0"):
        prepared.samples[0, 0]


# --- what a step draws


def test_each_epoch_draws_the_latents_anew_around_the_mean(folder: Path, tiny_model: Model) -> None:
    samples = prepare(folder, tiny_model, posterior="sample").samples
    posterior, _ = samples.encoder.posterior(next(iter(samples.crop_keys.values()))[0])
    drawn = torch.stack([samples[0, epoch].latents for epoch in range(200)])
    assert len({tensor.sum().item() for tensor in drawn}) == 200
    assert torch.equal(samples[0, 7].latents, drawn[7])
    distance = (drawn.mean(dim=0) - posterior.mean) / (posterior.std / 200**0.5)
    assert distance.abs().mean() == pytest.approx(0.8, abs=0.1)  # of a standard normal


@pytest.mark.parametrize("how", ["auto", "mean"])
def test_the_mean_is_trained_on_where_the_base_was(folder: Path, tiny_model: Model, how: str) -> None:
    samples = prepare(folder, tiny_model, posterior=how).samples
    assert torch.equal(samples[0, 0].latents, samples[0, 1].latents)
    assert torch.equal(samples[0, 0].latents, samples.still(0).latents)


def test_only_flux1_was_trained_on_draws() -> None:
    assert {name for name in family_names() if load_family(name).samples_posterior} == {"flux1"}


def test_validation_sees_the_first_crop_the_first_caption_and_the_mean(folder: Path, tiny_model: Model) -> None:
    (folder / "0.txt").write_text("one\ntwo")
    options = {"flip": True, "crop": "random", "caption_lines": True, "caption_dropout": 1.0}
    samples = prepare(folder, tiny_model, **options).samples
    posterior, _ = samples.encoder.posterior(samples.crop_keys[samples.items[0].record, samples.items[0].bucket][0])
    still = samples.still(0)
    assert torch.equal(still.latents, posterior.mean)
    assert torch.equal(still.conditioning.embeds, samples.encoder.conditioning([samples.text_keys["one"]]).embeds)


def shares(samples: CachedSamples, of: Callable[[Any], Any]) -> dict[Any, float]:
    """How often each value is drawn, over 400 epochs."""
    drawn = [of(samples[0, epoch]) for epoch in range(400)]
    return {value: drawn.count(value) / 400 for value in set(drawn)}


def test_both_sides_of_a_flip_are_drawn_evenly(folder: Path, tiny_model: Model) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "0.png")
    samples = prepare(folder, tiny_model, flip=True, posterior="mean").samples
    found = shares(samples, lambda sample: sample.latents.sum().item())
    assert sorted(found.values()) == [pytest.approx(0.5, abs=0.07)] * 2


def test_a_mirrored_crop_is_the_mirrored_picture(folder: Path, tiny_model: Model) -> None:
    """Its latents are those of the picture that was mirrored on disk."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "0.png")
    samples = prepare(folder, tiny_model, flip=True).samples
    mirrored = samples.encoder.posterior(samples.crop_keys[samples.items[0].record, samples.items[0].bucket][1])[0]
    Image.fromarray(noise[:, ::-1]).save(folder / "0.png")
    turned = prepare(folder, tiny_model).samples.still(0).latents
    torch.testing.assert_close(mirrored.mean, turned, atol=1e-5, rtol=1e-5)


def test_captions_are_dropped_as_often_as_asked_and_drawn_evenly(folder: Path, tiny_model: Model) -> None:
    (folder / "0.txt").write_text("one\ntwo")
    samples = prepare(folder, tiny_model, caption_lines=True, caption_dropout=0.3).samples
    names = {samples.encoder.conditioning([key]).embeds.sum().item(): text for text, key in samples.text_keys.items()}
    found = shares(samples, lambda sample: names[sample.conditioning.embeds.sum().item()])
    assert found == pytest.approx({"": 0.3, "one": 0.35, "two": 0.35}, abs=0.07)


def test_an_epoch_has_each_picture_at_each_resolution_as_often_as_its_repeats(tmp_path: Path) -> None:
    picture(tmp_path / "3_a/a.png", size=(200, 200))
    picture(tmp_path / "b/b.png", size=(20, 20))
    found = scanned(spec(tmp_path, resolution=[64, 128]))
    items = [(item.record.name, item.bucket, item.repeat) for item in items_of(found.training)]
    large = [("3_a/a.png", (side, side), repeat) for side in (64, 128) for repeat in range(3)]
    assert items == [*large, ("b/b.png", (16, 16), 0)]


def test_repeats_of_a_picture_are_drawn_apart(tmp_path: Path, tiny_model: Model) -> None:
    picture(tmp_path / "set/2_a/a.png")
    samples = prepare(tmp_path / "set", tiny_model, posterior="sample").samples
    assert not torch.equal(samples[0, 0].latents, samples[1, 0].latents)


def test_the_weight_of_a_source_reaches_its_samples(folder: Path, tiny_model: Model) -> None:
    options = {"sources": [SourceSpec(folder=str(folder), weight=0.25)]}
    samples = prepare(folder, tiny_model, **options).samples
    assert [samples[index, 0].weight for index in (0, 9)] == [1.0, 0.25]


# --- masks


@pytest.fixture
def half(tmp_path: Path) -> Path:
    """A picture whose left half is masked out."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    (tmp_path / "set").mkdir()
    Image.fromarray(noise).save(tmp_path / "set/a.png")
    (tmp_path / "set/a.txt").write_text("a")
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[:, 32:] = 255
    Image.fromarray(mask).save(tmp_path / "set/a-masklabel.png")
    return tmp_path / "set"


def test_a_mask_comes_to_the_sample_in_tokens(half: Path, tiny_model: Model) -> None:
    sample = prepare(half, tiny_model, unmasked_weight=0.2).samples[0, 0]
    assert sample.mask.shape == (1, 4, 4)
    torch.testing.assert_close(sample.mask[0, 0], torch.tensor([0.2, 0.2, 1, 1]))


def test_a_mask_is_mirrored_with_its_picture(half: Path, tiny_model: Model) -> None:
    samples = prepare(half, tiny_model, flip=True, unmasked_weight=0).samples
    found = {tuple(samples[0, epoch].mask[0, 0].tolist()) for epoch in range(20)}
    assert found == {(0, 0, 1, 1), (1, 1, 0, 0)}


def test_alpha_is_a_mask_on_request(tmp_path: Path, tiny_model: Model) -> None:
    pixels = np.full((64, 64, 4), 255, dtype=np.uint8)
    pixels[:32, :, 3] = 0
    (tmp_path / "set").mkdir()
    Image.fromarray(pixels).save(tmp_path / "set/a.png")
    (tmp_path / "set/a.txt").write_text("a")
    assert prepare(tmp_path / "set", tiny_model).samples[0, 0].mask.min() == 1
    masked_out = prepare(tmp_path / "set", tiny_model, alpha="mask", unmasked_weight=0).samples[0, 0].mask
    assert masked_out[0, :, 0].tolist() == [0, 0, 1, 1]


class Guess(nn.Module):
    """A network that says the same velocity of every place."""

    def __init__(self) -> None:
        super().__init__()
        self.said = nn.Parameter(torch.zeros(1, 128, 4, 4))


def loss_of(samples: CachedSamples, guess: Guess, family: ModelFamily, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    monkeypatch.setattr(type(family), "velocity", lambda _family, network, latents, *_: network.said.expand_as(latents))
    return training_loss(family, guess, drawn(family, [samples[0, 0]]))


def test_no_gradient_comes_from_where_a_mask_weighs_nothing(
    half: Path, tiny_model: Model, family: ModelFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    guess = Guess()
    loss_of(prepare(half, tiny_model, unmasked_weight=0).samples, guess, family, monkeypatch).backward()
    assert guess.said.grad is not None
    assert guess.said.grad[..., :2].abs().max() == 0
    assert guess.said.grad[..., 2:].abs().min() > 0


def test_the_weight_outside_is_the_ratio_of_the_gradients(
    half: Path, tiny_model: Model, family: ModelFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the same picture without a mask, whose gradient is what each place would give alone."""
    masked_, plain = Guess(), Guess()
    loss_of(prepare(half, tiny_model, unmasked_weight=0.25).samples, masked_, family, monkeypatch).backward()
    (half / "a-masklabel.png").unlink()
    loss_of(prepare(half, tiny_model).samples, plain, family, monkeypatch).backward()
    assert masked_.said.grad is not None
    assert plain.said.grad is not None
    ratio = masked_.said.grad / plain.said.grad
    torch.testing.assert_close(ratio[..., :2] / ratio[..., 2:], torch.full((1, 128, 4, 2), 0.25))


@pytest.mark.parametrize("covered", [1, 4, 15])
def test_a_mask_does_not_change_the_scale_of_the_loss(covered: int) -> None:
    """Of an error that is the same everywhere, whatever part of the picture counts."""
    zeros, mask = torch.zeros(2, 128, 4, 4), torch.zeros(2, 1, 16)
    mask[..., :covered] = 1
    error = velocity_error(torch.full_like(zeros, 3), zeros, mask.reshape(2, 1, 4, 4))
    torch.testing.assert_close(error, torch.full((2,), 9.0))


def test_a_mask_of_ones_is_no_mask() -> None:
    one, two = torch.randn(2, 2, 128, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(velocity_error(one, two, torch.ones(2, 1, 4, 4)), velocity_error(one, two))


def test_a_mask_of_zeros_gives_no_loss_and_no_nan() -> None:
    one, two = torch.randn(2, 1, 128, 4, 4, generator=torch.Generator().manual_seed(0))
    assert velocity_error(one, two, torch.zeros(1, 1, 4, 4)).tolist() == [0]
