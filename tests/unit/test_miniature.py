"""How the bundled miniature is made, and what of it can be told without the drawings that it was made from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from flux2_lora.bundled import share
from flux2_lora.miniature import vae as vaes
from flux2_lora.miniature.icons import STYLES, Row, slug
from flux2_lora.miniature.judge import disturbed, pixels
from flux2_lora.miniature.prior import KINDS, MAX_TOKENS, MODIFIERS, Examples, held_out, modified, texts_of, tokenized
from flux2_lora.miniature.stages import Schedule, train_stage
from flux2_lora.miniature.subjects import COMMON, OTHERS, SUBJECTS


class CutError(Exception):
    """A run that ends without warning."""


def trained(checkpoint: Path, *, cut_at: int | None = None) -> torch.Tensor:
    """The averaged weights after 12 steps on random targets, or a run that is cut off before a step."""
    torch.manual_seed(0)
    module = nn.Linear(3, 2)

    def loss_at(generator: torch.Generator) -> torch.Tensor:
        if generator.initial_seed() == cut_at:
            raise CutError
        x = torch.randn(4, 3, generator=generator)
        return (module(x) - x[:, :2]).square().mean()

    schedule = Schedule(steps=12, lr=0.05, warmup=2)
    assert train_stage(module, schedule, checkpoint, loss_at, lambda: "", minutes=1, every=5)
    return module.weight.detach()


def test_a_stage_that_was_cut_off_ends_in_the_weights_of_one_that_was_not(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole.pt")
    with pytest.raises(CutError):
        trained(tmp_path / "cut.pt", cut_at=8)
    assert torch.equal(trained(tmp_path / "cut.pt"), whole)


def test_a_stage_without_time_does_no_step_and_says_that_it_is_not_complete(tmp_path: Path) -> None:
    module = nn.Linear(1, 1)
    before = module.weight.clone()
    loss = lambda generator: module(torch.ones(1)).sum()  # noqa: E731
    assert not train_stage(module, Schedule(steps=3, lr=1.0), tmp_path / "a.pt", loss, lambda: "", minutes=0)
    assert torch.equal(module.weight, before)


def test_pairs_that_are_held_out_are_never_drawn() -> None:
    rows = [Row(label=f"subject {i}", style="noto") for i in range(48)]
    held = held_out(rows)
    pictures = torch.arange(48.0).repeat(len(MODIFIERS), 1)
    tokens = torch.zeros(len(MODIFIERS), 48, len(KINDS), MAX_TOKENS, dtype=torch.long)
    often = torch.ones(48).masked_fill(held, 0)
    drawn, _ = Examples(rows=rows, latents=pictures, tokens=tokens, often=often).draw(
        4000, torch.Generator().manual_seed(0)
    )
    assert set(drawn.long().tolist()) == {i for i in range(48) if not held[i]}
    assert held.sum() == 2


def test_modifiers_mirror_a_picture_and_take_its_colour() -> None:
    picture = torch.rand(1, 3, 2, 4, generator=torch.Generator().manual_seed(0))
    both = modified(picture, ", mirrored, in grey")
    assert torch.equal(both[:, 0], both[:, 1])
    assert torch.equal(both[:, 2], both[:, 0])
    assert torch.equal(both.flip(-1)[:, 0], picture.mean(1))
    assert torch.equal(modified(picture, ""), picture)


def test_each_prompt_that_was_trained_fits_the_bundled_tokenizer_and_a_longer_one_is_refused() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(share() / "data/tiny/tokenizer")
    rows = [Row(label=label, style=style) for label in SUBJECTS for style in STYLES]
    texts = [text for row in rows for modifier in MODIFIERS for text in texts_of(row, modifier)]
    assert len(texts) == len(rows) * len(MODIFIERS) * len(KINDS)
    ids = tokenized(tokenizer, texts)
    assert ids.shape == (len(texts), MAX_TOKENS)
    assert not (ids == tokenizer.unk_token_id).any()
    with pytest.raises(SystemExit, match="16 is the most"):
        tokenized(tokenizer, ["apple " * 20])


@pytest.mark.parametrize("demo", ["demo", "demo_clay"])
def test_a_demo_trains_no_subject_that_it_is_judged_by(demo: str) -> None:
    folder = share() / "data" / demo
    learned = {file.stem for file in folder.glob("*.png")}
    assert learned <= {slug(name) for name in OTHERS}
    assert {file.stem for file in (folder / "validation").glob("*.png")} == {slug(name) for name in COMMON}
    assert len(learned) == 28


@pytest.mark.parametrize(("demo", "decibels"), [("demo", 24), ("demo_clay", 24)])
def test_the_bundled_vae_keeps_pictures_of_styles_that_it_never_saw(demo: str, decibels: float) -> None:
    files = sorted((share() / "data" / demo / "validation").glob("*.png"))
    vae = vaes.load_vae(share() / "data/tiny/vae")
    assert vaes.psnr(vae, torch.stack([pixels(Image.open(file)) for file in files])) > decibels


def test_the_judge_learns_from_pictures_that_move_on_white_paper() -> None:
    picture = torch.ones(64, 3, 64, 64)
    picture[:, :, 24:40, 24:40] = -1
    shown = disturbed(picture, torch.Generator().manual_seed(0))
    corners = shown[:, :, :4, :4].mean((1, 2, 3))
    assert (corners - 1).abs().max() < 0.1
    places = (shown < 0).float().mean(1)
    assert places.std(0).max() > 0.3
