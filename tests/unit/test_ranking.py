"""What is read off the rows of a run: the best step, when to stop, the table, and likeness to training pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flux2_lora.training.memorisation import latent_features, likeness
from flux2_lora.training.ranking import ranked_table, verdict


def rows(*losses: float) -> list[dict[str, float]]:
    """An evaluation every ten steps, the base first, between rows of steps."""
    measured = [
        {
            "step": 10 * number,
            "validation_loss": loss,
            "validation_loss_sigma_0.1": loss,
            "base_style_loss": 0.2 + loss / 10,
        }
        for number, loss in enumerate(losses)
    ]
    return [*measured, {"step": 10, "loss": 0.001}]


def test_the_best_step_is_the_lowest_evaluation_and_never_the_base() -> None:
    found = verdict(rows(0.5, 1.0, 0.8, 0.9))
    assert found is not None
    assert (found.best, found.loss, found.since) == (20, 0.8, 1)


def test_of_equal_evaluations_the_earlier_is_best() -> None:
    found = verdict(rows(2.0, 1.0, 1.0))
    assert found is not None
    assert (found.best, found.since) == (10, 1)


def test_a_run_is_told_to_stop_after_three_evaluations_without_a_new_best() -> None:
    words = [found.words for found in (verdict(rows(2, 1, *([1.5] * count))) for count in range(4)) if found]
    assert words[0] == "best so far"
    assert words[2] == "best was step 10"
    assert words[3].endswith("stop now")


def test_before_the_first_evaluation_there_is_no_verdict() -> None:
    assert verdict(rows(1.0)) is None
    assert verdict([]) is None


def test_the_table_is_ranked_and_marks_the_checkpoints_that_are_kept(tmp_path: Path) -> None:
    (tmp_path / "checkpoints/step-000020").mkdir(parents=True)
    lines = ranked_table([*rows(2.0, 1.0, 0.5), {"step": 20, "nearest": 0.75}], tmp_path).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["*", "10", "base"]
    assert lines[1].split() == ["*", "20", "0.500", "0.500", "-", "-", "0.625", "0.750"]


def test_a_copy_is_as_near_as_can_be_and_another_picture_is_not() -> None:
    noise = torch.Generator().manual_seed(0)
    pictures = [torch.randn(16, 4, 6, generator=noise) for _ in range(8)]
    known = likeness(latent_features(pictures))
    near = known.nearest(latent_features([pictures[3], torch.randn(16, 4, 6, generator=noise)]))
    assert near[0].item() == pytest.approx(1, abs=1e-5)
    assert near[1].item() < 0.5


def test_pictures_of_other_sizes_can_be_compared() -> None:
    noise = torch.Generator().manual_seed(0)
    rows_ = latent_features([torch.randn(16, 4, 6, generator=noise), torch.randn(16, 64, 64, generator=noise)])
    assert rows_.shape == (2, 16 * 64)
