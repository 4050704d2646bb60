"""The page and the sheet of a sweep, from run folders as runs leave them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from flux2_lora.inference.comparison import compare, measured, sheet
from flux2_lora.inference.drawn import Texts, write_texts
from flux2_lora.sweeps import SweptRun

GREY, RED, BLUE = "#808080", "#ff0000", "#0000ff"
MakeRun = Callable[..., SweptRun]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """A run folder: losses by step, the base at 0, and the colours of its previews by step."""

    def make(
        name: str,
        losses: dict[int, float] | None = None,
        previews: dict[int, list[str]] | None = None,
        failure: str | None = None,
        page: str = "",
    ) -> SweptRun:
        folder = tmp_path / "outputs" / name
        folder.mkdir(parents=True)
        rows = [{"step": step, "validation_loss": loss} for step, loss in (losses or {}).items()]
        rows += [{"step": step, "loss": 1.0, "step_s": pace} for step, pace in enumerate((9.0, 0.5, 0.25), start=1)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for step, colours in (previews or {}).items():
            here = folder / f"previews/step-{step:06d}"
            here.mkdir(parents=True)
            for index, colour in enumerate(colours):
                Image.new("RGB", (64, 64), colour).save(here / f"{index:04d}.png")
        if page:
            (folder / "run.yaml").write_text(page)
        return SweptRun(name=name, folder=folder, options={"rank": name}, overrides=(), failure=failure)

    return make


def table_of(folder: Path) -> list[dict[str, str]]:
    """The rows of comparison.md by column."""
    lines = [line for line in (folder / "comparison.md").read_text().splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [dict(zip(header, row, strict=True)) for row in rows]


def colours_of(picture: Path, row: int, columns: int) -> list[tuple[int, ...]]:
    """The colour in the middle of each cell of a row of the sheet."""
    with Image.open(picture) as image:
        y = 44 + 26 + row * 266 + 60  # off the middle, where a cell without a preview has its words
        found = [image.convert("RGB").getpixel((150 + column * 266 + 60, y)) for column in range(columns)]
    return [colour for colour in found if isinstance(colour, tuple)]


def test_runs_are_sorted_by_their_best_loss_and_failed_ones_stand_at_the_end(make_run: MakeRun, tmp_path: Path) -> None:
    good = make_run("good", {0: 2.0, 10: 1.0, 20: 1.2})
    better = make_run("better", {0: 2.0, 10: 0.8})
    broken = make_run("broken", {0: 2.0, 10: 0.1}, failure="the disk is full")
    compare([good, broken, better], tmp_path)
    rows = table_of(tmp_path)
    assert [row["run"] for row in rows] == ["better", "good", "broken"]
    assert [row["failed"] for row in rows] == ["-", "-", "the disk is full"]


def test_a_row_tells_base_last_and_best_loss_and_where_the_best_was(make_run: MakeRun, tmp_path: Path) -> None:
    compare([make_run("one", {0: 2.0, 10: 1.0, 20: 1.2})], tmp_path)
    [row] = table_of(tmp_path)
    told = {"base": "2.0000", "last": "1.2000", "best": "1.0000", "at step": "10", "best / base": "0.500"}
    assert row.items() >= told.items()
    assert row.items() >= {"rank": "one", "s/step": "0.50", "folder": str(tmp_path / "outputs/one")}.items()


def test_a_run_that_got_worse_is_not_as_good_as_its_base(make_run: MakeRun) -> None:
    worse = measured(make_run("worse", {0: 1.0, 10: 1.5}))
    assert (worse.base, worse.best) == (1.0, 1.5)


def test_a_loss_that_is_no_number_is_not_the_best(make_run: MakeRun) -> None:
    assert measured(make_run("nan", {0: 2.0, 10: float("nan"), 20: 1.5})).best == 1.5


def test_a_run_without_validation_or_previews_says_so(make_run: MakeRun, tmp_path: Path) -> None:
    compare([make_run("plain"), make_run("seen", {0: 1.0, 5: 0.5})], tmp_path)
    seen, plain = table_of(tmp_path)
    assert (seen["run"], plain["run"], plain["base"], plain["best"]) == ("seen", "plain", "not validated", "-")
    assert not (tmp_path / "comparison.png").exists()


def test_a_folder_that_was_never_written_is_a_row_too(make_run: MakeRun, tmp_path: Path) -> None:
    refused = SweptRun(name="x", folder=tmp_path / "nowhere", options={}, overrides=(), failure="a | b\nc")
    compare([refused], tmp_path)
    assert "a \\| b c" in (tmp_path / "comparison.md").read_text()


def test_differing_bases_are_pointed_out(make_run: MakeRun, tmp_path: Path) -> None:
    compare([make_run("a", {0: 1.0, 5: 0.5}), make_run("b", {0: 1.1, 5: 0.6})], tmp_path)
    assert "The bases differ" in (tmp_path / "comparison.md").read_text()
    compare([make_run("c", {0: 1.0, 5: 0.5}), make_run("d", {0: 1.0, 5: 0.6})], tmp_path)
    assert "The bases differ" not in (tmp_path / "comparison.md").read_text()


def test_the_sheet_has_the_base_first_and_the_last_preview_of_each_run(make_run: MakeRun, tmp_path: Path) -> None:
    first = make_run("first", {0: 2.0, 5: 1.0}, {0: [GREY, GREY], 5: [GREY, GREY], 10: [RED, BLUE]})
    second = make_run("second", {0: 2.0, 5: 1.5}, {0: [GREY, GREY], 10: [BLUE, RED]})
    compare([second, first], tmp_path)
    grey, red, blue = (128, 128, 128), (255, 0, 0), (0, 0, 255)
    assert colours_of(tmp_path / "comparison.png", 0, 3) == [grey, red, blue]
    assert colours_of(tmp_path / "comparison.png", 1, 3) == [grey, blue, red]


def test_of_many_runs_the_six_best_are_drawn(make_run: MakeRun) -> None:
    runs = [make_run(str(n), {0: 2.0, 5: 1.0 + n / 10}, {0: [GREY], 5: [RED]}) for n in range(8)]
    drawn = sheet(list(map(measured, runs)))
    assert drawn is not None
    assert [head.split(":")[0] for head in drawn.columns] == ["base", "1", "2", "3", "4", "5", "6"]


def test_a_base_that_is_not_that_of_all_runs_says_whose_it_is(make_run: MakeRun) -> None:
    runs = [make_run("a", {}, {0: [GREY], 5: [RED]}), make_run("b", {}, {0: [BLUE], 5: [RED]})]
    drawn = sheet(list(map(measured, runs)))
    assert drawn is not None
    assert drawn.columns[0] == "base of 1"


def test_a_run_that_drew_only_its_base_is_not_in_the_sheet(make_run: MakeRun) -> None:
    assert sheet([measured(make_run("early", {0: 1.0}, {0: [GREY]}))]) is None


def test_a_preview_that_is_missing_or_cut_short_leaves_its_own_cell_without_a_picture(
    make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_run("cut", {0: 2.0, 5: 1.0}, {0: [GREY, GREY, GREY], 5: [RED, RED, BLUE]})
    (run.folder / "previews/step-000000/0001.png").unlink()
    cut = run.folder / "previews/step-000005/0001.png"
    cut.write_bytes(cut.read_bytes()[:40])
    compare([run], tmp_path)
    assert colours_of(tmp_path / "comparison.png", 1, 2) == [(242, 242, 242), (242, 242, 242)]
    assert colours_of(tmp_path / "comparison.png", 2, 2) == [(128, 128, 128), (0, 0, 255)]


def test_an_earlier_sheet_does_not_stay_beside_a_newer_table(make_run: MakeRun, tmp_path: Path) -> None:
    (tmp_path / "comparison.png").touch()
    compare([make_run("blind", {0: 2.0, 5: 1.0})], tmp_path)
    assert not (tmp_path / "comparison.png").exists()


@pytest.mark.parametrize(
    ("page", "label"),
    [
        ("preview: {prompts: [a red kite]}", "a red kite"),
        ("preview: {prompts: []}\ndataset: {folder: PICTURES, trigger_word: mystyle}", "a boat, mystyle"),
        ("preview: {prompts: []}\ndataset: {folder: nowhere}", "preview 1"),
        ("", "preview 1"),
    ],
    ids=["preview.prompts", "prompts.txt", "neither", "no run.yaml"],
)
def test_rows_are_called_by_their_prompts_where_these_can_be_read(
    make_run: MakeRun, tmp_path: Path, page: str, label: str
) -> None:
    (tmp_path / "prompts.txt").write_text("a boat, [trigger]\n")
    run = make_run("run", {}, {0: [GREY], 5: [RED]}, page=page.replace("PICTURES", str(tmp_path)))
    drawn = sheet([measured(run)])
    assert drawn is not None
    assert [text for text, _ in drawn.rows] == [label]


def test_what_a_run_says_of_its_previews_goes_before_what_was_asked_for(make_run: MakeRun) -> None:
    run = make_run("run", {}, {0: [GREY], 5: [RED]}, page="preview: {prompts: [a red kite]}")
    write_texts(run.folder / "previews", Texts(prompts=["a caption"], edited=""))
    drawn = sheet([measured(run)])
    assert drawn is not None
    assert [text for text, _ in drawn.rows] == ["a caption"]
