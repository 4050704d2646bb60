"""How the bundled miniature is made, and what of it can be told without the drawings that it was made from."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from flux2_lora.bundled import share
from flux2_lora.miniature import vae as vaes
from flux2_lora.miniature.examples import KINDS, MAX_TOKENS, Canvas, held_out, prompted, texts_of, weight
from flux2_lora.miniature.icons import STYLES, Row, slug
from flux2_lora.miniature.judge import disturbed
from flux2_lora.miniature.stages import Schedule, train_stage
from flux2_lora.miniature.subjects import COMMON, OTHERS, SUBJECTS
from flux2_lora.miniature.variants import CANVASES, HELD_OUT, INKS, PLACES, SQUARE, Print, printed, prints


class CutError(Exception):
    """A run that ends without warning."""


def trained(checkpoint: Path, *, cut_at: int | None = None) -> torch.Tensor:
    """The averaged weights after 12 steps on random targets, or a run that is cut off before a step."""
    torch.manual_seed(0)
    module = nn.Linear(3, 2)

    def draw(generator: torch.Generator) -> tuple[torch.Tensor]:
        if generator.initial_seed() == cut_at:
            raise CutError
        return (torch.randn(4, 3, generator=generator),)

    def loss_of(x: torch.Tensor) -> torch.Tensor:
        return (module(x) - x[:, :2]).square().mean()

    schedule = Schedule(steps=12, lr=0.05, warmup=2)
    assert train_stage(module, schedule, checkpoint, draw, loss_of, dict, minutes=1, every=5)
    return module.weight.detach()


def test_a_stage_that_was_cut_off_ends_in_the_weights_of_one_that_was_not(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole.pt")
    with pytest.raises(CutError):
        trained(tmp_path / "cut.pt", cut_at=8)
    assert torch.equal(trained(tmp_path / "cut.pt"), whole)


def test_a_stage_without_time_does_no_step_and_says_that_it_is_not_complete(tmp_path: Path) -> None:
    module = nn.Linear(1, 1)
    before = module.weight.clone()
    schedule = Schedule(steps=3, lr=1.0)
    assert not train_stage(module, schedule, tmp_path / "a.pt", lambda _: [torch.ones(1)], module, dict, minutes=0)
    assert torch.equal(module.weight, before)


def test_only_pictures_that_have_a_weight_are_drawn_each_with_its_own_prompts() -> None:
    latents = torch.arange(4.0).view(4, 1, 1, 1)
    tokens = torch.arange(4).view(4, 1, 1).expand(4, len(KINDS), MAX_TOKENS)
    canvas = Canvas(latents=latents, tokens=tokens, often=torch.tensor([1.0, 0.0, 2.0, 1.0]))
    drawn, said = canvas.draw(4000, torch.Generator().manual_seed(0))
    times = torch.bincount(drawn.flatten().long(), minlength=4) / 4000
    assert torch.allclose(times, torch.tensor([0.25, 0.0, 0.5, 0.25]), atol=0.03)
    assert torch.equal(drawn.flatten(), said[:, 0].float())


def test_prints_hold_every_drawing_once_as_it_is_and_so_many_times_but_in_no_pair_that_is_held_out() -> None:
    every = list(prints(100, SQUARE, 30, random.Random(0)))
    assert [i for one in every[:2] for i in one.drawings] == list(range(100))
    assert {(one.place, one.ink) for one in every[:2]} == {("", "")}
    assert Counter(i for one in every for i in one.drawings) == dict.fromkeys(range(100), 31)
    assert not {(one.place, one.ink) for one in every} & set(HELD_OUT)
    assert len(list(prints(100, (64, 64), 3, random.Random(0)))) == 6


def test_common_subjects_are_trained_most_and_a_focus_leaves_out_what_is_no_subject() -> None:
    plain, inked = (one_print(place="", ink=ink) for ink in ("", ", in blue"))
    common, other, none = (Row(label=label, style="noto") for label in ("red apple", "tulip", "a word of no meaning"))
    weights = [weight(row, plain, focused=False) for row in (common, other, none)]
    assert weights == sorted(weights, reverse=True)
    assert weight(common, plain, focused=True) > weight(common, inked, focused=True) > 0
    assert weight(common, plain, focused=True) > weight(other, plain, focused=True)


def one_print(*, place: str, ink: str, canvas: tuple[int, int] = SQUARE) -> Print:
    return Print(drawings=[1], canvas=canvas, place=place, ink=ink, where=(0.5, 0.25, 0.75))


def test_every_24th_pair_of_subject_and_style_is_held_out() -> None:
    assert held_out([Row(label=f"subject {i}", style="noto") for i in range(48)]).nonzero().flatten().tolist() == [
        7,
        31,
    ]


@pytest.mark.parametrize("canvas", CANVASES)
@pytest.mark.parametrize("place", PLACES)
def test_a_print_fills_its_canvas_and_keeps_the_whole_drawing(canvas: tuple[int, int], place: str) -> None:
    drawings = torch.ones(2, 3, 128, 128)
    drawings[1, :, :, :64] = -1  # the left half
    [picture] = printed(drawings, one_print(place=place, ink="", canvas=canvas))
    assert picture.shape == (3, *canvas)
    dark, side = picture[0] < 0, min(canvas)
    low, high = (0.45, 0.8) if "small" in place else (1.0, 1.0)
    assert low * side <= dark.any(1).sum() <= high * side
    rows, columns = dark.any(1).nonzero().flatten(), dark.any(0).nonzero().flatten()
    assert columns[-1] - columns[0] == pytest.approx((rows[-1] - rows[0]) / 2, abs=1)


def test_inks_change_colours_and_papers_and_keep_the_shape() -> None:
    picture = torch.ones(1, 3, 8, 8)
    picture[:, 0, 2:6, 2:6] = -1
    papers = {ink: inked(picture)[0, :, 0, 0] for ink, inked in INKS.items()}
    assert len({tuple(paper.tolist()) for paper in papers.values()}) >= 6
    for ink, inked in INKS.items():
        changed = (inked(picture) - papers[ink].view(3, 1, 1)).abs().amax(1)[0] > 0.1
        assert changed[2:6, 2:6].any(), ink
        assert not changed[0].any(), ink
        assert inked(picture).abs().max() <= 1.0001, ink


def test_each_full_prompt_fits_the_bundled_tokenizer_and_one_that_is_too_long_becomes_the_empty_one() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(share() / "data/tiny/tokenizer")
    rows = [Row(label=label, style=style) for label in SUBJECTS for style in STYLES]
    ids, whole = prompted(tokenizer, [texts_of(row) for row in rows])
    assert ids.shape == (len(rows), len(KINDS), MAX_TOKENS)
    assert whole.all()
    assert not (ids == tokenizer.unk_token_id).any()
    long, fits = prompted(tokenizer, [["apple " * 20, "apple", ""]])
    assert not fits.any()
    assert torch.equal(long[0, 0], long[0, 2])
    assert not torch.equal(long[0, 1], long[0, 2])


@pytest.mark.parametrize("demo", ["demo", "demo_poster"])
def test_a_demo_trains_no_subject_that_it_is_judged_by(demo: str) -> None:
    folder = share() / "data" / demo
    learned = {file.stem for file in folder.glob("*.png")}
    assert learned <= {slug(name) for name in OTHERS}
    assert {file.stem for file in (folder / "validation").glob("*.png")} == {slug(name) for name in COMMON}
    assert len(learned) == 28


@pytest.mark.parametrize(("demo", "decibels"), [("demo", 26), ("demo_poster", 28)])
def test_the_bundled_vae_keeps_pictures_of_styles_that_it_never_saw(demo: str, decibels: float) -> None:
    files = sorted((share() / "data" / demo / "validation").glob("*.png"))
    pictures = [np.array(Image.open(file).convert("RGB")) for file in files]
    shown = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 127.5 - 1
    assert vaes.psnr(vaes.load_vae(share() / "data/tiny/vae"), shown) > decibels


def test_augmented_pictures_differ_from_each_other_and_stay_in_range() -> None:
    picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    shown = vaes.augment(picture.expand(64, -1, -1, -1), torch.Generator().manual_seed(0))
    assert shown.shape == (64, 3, 16, 16)
    assert shown.abs().max() <= 1
    as_they_were = (shown == picture).flatten(1).all(1).sum()
    assert (
        5 <= as_they_were <= 20
    )  # half keep their inks, of these two thirds their colours, of these half are mirrored


def test_the_judge_learns_from_pictures_that_move_on_white_paper() -> None:
    picture = torch.ones(64, 3, 64, 64)
    picture[:, :, 24:40, 24:40] = -1
    shown = disturbed(picture, torch.Generator().manual_seed(0))
    corners = shown[:, :, :4, :4].mean((1, 2, 3))
    assert (corners - 1).abs().max() < 0.1
    places = (shown < 0).float().mean(1)
    assert places.std(0).max() > 0.3
