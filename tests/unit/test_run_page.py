"""What the report of a run says, shows and keeps to itself, from run folders as runs leave them."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flux2_lora.inference.drawn import Texts, edit_files, write_texts, write_thumbnails
from flux2_lora.inference.run_page import _BUDGET_PX, _SMALLEST_PX, _side_px, write_report

NASTY = """<script>alert("1")</script> 'a' & \\ b"""


class Page(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    @property
    def images(self) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == "img"]


def noise(side: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype="uint8"))


def make_run(
    folder: Path, losses: dict[int, float | None], previews: tuple[int, ...] = (), side: int = 32, last: int = 20
) -> Path:
    """A run of `last` steps with two prompts, an inpaint row and three training pictures."""
    run = folder / "outputs" / "mine"
    run.mkdir(parents=True)
    rows: list[dict[str, float | None]] = [{"step": step, "loss": 1 / step, "step_s": 0.5} for step in range(1, last)]
    rows += [{"step": step, "validation_loss": loss, "nearest": 0.1} for step, loss in losses.items()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "run.yaml").write_text(
        f"model: {{family: flux2_klein, path: {folder}/klein, title: Flux.2 Klein 4B}}\nmax_steps: 20\n"
        f"output_dir: {folder}/outputs\ndataset: {{folder: {folder}/photos, sources: [{{folder: ~/more/cats}}]}}\n"
    )
    for step in previews:
        here = run / f"previews/step-{step:06d}"
        here.mkdir(parents=True)
        for name in ("0000", "0001", "inpaint"):
            noise(side, step).save(here / f"{name}.png")
    if previews:
        write_texts(run / "previews", Texts(prompts=[NASTY, "a red kite"], edited=NASTY))
        write_thumbnails(run / "previews", [noise(64, seed) for seed in range(3)])
        for file in edit_files(run / "previews", "inpaint"):
            noise(side, 1).save(file)
    return run


def read(run: Path) -> Page:
    return Page(write_report(run).read_text(encoding="utf-8"))


def opened(image: dict[str, str | None]) -> Image.Image:
    raw = base64.b64decode((image["src"] or "").removeprefix("data:image/webp;base64,"))
    return Image.open(BytesIO(raw))


def test_the_page_is_written_into_the_folder_and_is_the_same_each_time(tmp_path: Path) -> None:
    run = make_run(tmp_path, {0: 2.0, 10: 1.0}, (0, 10))
    first = write_report(run).read_bytes()
    assert write_report(run) == run / "report.html"
    assert (run / "report.html").read_bytes() == first


def test_what_a_user_wrote_is_text_and_never_markup(tmp_path: Path) -> None:
    page = read(make_run(tmp_path, {0: 2.0, 10: 1.0}, (0, 10)))
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert NASTY in page.text
    assert any(image["alt"] == f"the base: {NASTY}" for image in page.images)


def test_nothing_on_the_page_comes_from_elsewhere(tmp_path: Path) -> None:
    run = make_run(tmp_path, {0: 2.0, 10: 1.0}, (0, 10))
    page, html = read(run), (run / "report.html").read_text(encoding="utf-8")
    sources = [attributes[key] or "" for _, attributes in page.tags for key in ("src", "href") if key in attributes]
    assert sources
    assert all(source.startswith("data:image/webp;base64,") for source in sources)
    assert not re.search(r"https?://|url\(|@import", html)
    assert "default-src 'none'" in html


def test_of_paths_only_the_last_part_is_told(tmp_path: Path) -> None:
    run = make_run(tmp_path, {0: 2.0, 10: 1.0}, (0, 10))
    (run / "export").mkdir()
    (run / "export/mine.safetensors").touch()
    page, html = read(run), (run / "report.html").read_text(encoding="utf-8")
    assert str(tmp_path) not in html
    assert "~/more" not in html
    assert "dataset.folderphotos" in page.text
    assert "dataset.sources.0.foldercats" in page.text


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ({0: 2.0, 5: 1.5, 10: 1.0}, "Step 10 is bestvalidation loss 1.000, the base has 2.000 (0.50 times as much)"),
        ({0: 2.0, 5: 1.0, 10: 1.5}, "Step 5 is bestvalidation loss 1.000"),
        ({0: 2.0, 5: 1.0, 10: 1.1, 15: 1.2, 20: 1.3}, "Step 5 is best: stop now"),
        ({0: 1.0, 5: 1.5}, "No step is better than the base"),
        ({0: 2.0, 5: None, 10: 1.5}, "Step 10 is best"),
        ({}, "No verdict"),
    ],
    ids=["still better", "once worse", "stop", "worse than the base", "a loss that is no number", "no validation"],
)
def test_the_verdict_is_that_of_the_ranking(tmp_path: Path, losses: dict[int, float | None], words: str) -> None:
    assert words in read(make_run(tmp_path, losses)).text


def test_the_base_stands_beside_every_step_and_the_last_step_is_shown_first(tmp_path: Path) -> None:
    images = read(make_run(tmp_path, {0: 2.0, 10: 1.0, 20: 1.5}, (0, 10, 20))).images
    kite = [image for image in images if "a red kite" in (image["alt"] or "")]
    assert [image["alt"] for image in kite] == [
        "the base: a red kite",
        "base: a red kite",
        "step 10 (best): a red kite",
        "step 20: a red kite",
    ]
    assert ["hidden" in image for image in kite] == [False, True, True, False]
    assert [image.get("data-at") for image in kite] == [None, "0", "1", "2"]


def test_every_picture_has_a_text_for_those_who_do_not_see_it(tmp_path: Path) -> None:
    images = read(make_run(tmp_path, {}, (0, 10))).images
    assert len(images) == 2 * 3 + 2 + 2 + 3
    assert all(image["alt"] for image in images)


def test_small_pictures_come_through_to_the_pixel_and_large_ones_are_made_smaller(tmp_path: Path) -> None:
    small = read(make_run(tmp_path / "a", {}, (0, 10), side=32)).images[0]
    assert small["class"] == "pixels"
    assert np.array_equal(np.asarray(opened(small).convert("RGB")), np.asarray(noise(32, 0)))
    large = read(make_run(tmp_path / "b", {}, (0, 10), side=640)).images[0]
    assert "class" not in large
    assert opened(large).size == (512, 512)


@pytest.mark.parametrize("count", [1, 44, 100, 400, 542])
def test_many_pictures_are_made_smaller_so_that_the_page_stays_small(count: int) -> None:
    assert count * _side_px(count) ** 2 <= _BUDGET_PX
    assert _side_px(count) >= _SMALLEST_PX


def test_a_picture_that_is_missing_or_cut_short_is_said(tmp_path: Path) -> None:
    run = make_run(tmp_path, {}, (0, 10))
    (run / "previews/step-000010/0001.png").unlink()
    cut = run / "previews/step-000000/0001.png"
    cut.write_bytes(cut.read_bytes()[:90])
    assert read(run).text.count("no picture") == 3


def test_previews_of_a_run_that_was_replaced_are_left_out(tmp_path: Path) -> None:
    images = read(make_run(tmp_path, {0: 2.0, 10: 1.0}, (0, 10, 500), last=10)).images
    assert not any("500" in (image["alt"] or "") for image in images)


def test_a_run_without_previews_says_so_and_has_no_slider(tmp_path: Path) -> None:
    page = read(make_run(tmp_path, {0: 2.0, 10: 1.0}))
    assert "drew no previews" in page.text
    assert "input" not in [tag for tag, _ in page.tags]
    assert "Validation loss" in page.text


def test_a_folder_in_which_nothing_happened_yet_gives_a_page_too(tmp_path: Path) -> None:
    page = read(tmp_path)
    assert tmp_path.name in page.text
    assert "No verdict" in page.text
    assert "Curves" not in page.text


def test_the_command_draws_with_the_run_and_a_prompt_of_its_own(tmp_path: Path) -> None:
    run = make_run(tmp_path, {}, (0, 10))
    (run / "checkpoints/step-000010").mkdir(parents=True)
    write_texts(run / "previews", Texts(prompts=['it\'s a "kite"'], edited=""))
    assert (
        "flux2-lora sample model=flux2_klein_4b model.path=klein 'adapters=[outputs/mine]' "
        """'prompts=["it'"'"'s a \\"kite\\""]'"""
    ) in read(run).text


def test_the_curves_have_a_mark_at_the_best_step_and_name_first_and_last_values(tmp_path: Path) -> None:
    page = read(make_run(tmp_path, {0: 2.0, 10: 1.0, 20: 1.5}, (0,)))
    assert "best: step 10" in page.text
    assert "validation 2.000 → 1.500" in page.text
