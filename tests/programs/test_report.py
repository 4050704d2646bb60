"""The report of a real run, in a real browser."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.conftest import Command
from tests.programs.conftest import SHORT

CHROMIUM = next(
    filter(None, map(shutil.which, (os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome"))),
    None,
)
SHOWN = "Array.from(document.querySelectorAll('[data-at]')).filter(i => i.checkVisibility()).map(i => i.src)"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine; install one, or name it in the environment variable CHROMIUM")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


def visit(browser: Any, report: Path, width: int, scheme: str = "light") -> Any:
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.set_default_timeout(10_000)
    page.errors, page.asked = [], []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("console", lambda message: page.errors.append(message.text))
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto(report.as_uri())
    return page


def test_a_run_leaves_its_texts_its_edits_and_thumbnails_of_what_it_learned_from(trained: Path) -> None:
    previews = trained / "previews"
    texts = json.loads((previews / "prompts.json").read_text())
    assert texts["prompts"][0] == "grinning face, inkline style"
    for name in ("inpaint", "outpaint"):
        with (
            Image.open(previews / f"step-000004/{name}.png") as result,
            Image.open(previews / f"{name}-mask.png") as mask,
        ):
            assert result.size == mask.size == (128, 128)
    with Image.open(previews / "outpaint-picture.png") as left:
        assert left.size == (64, 128)
    assert len(list((previews / "training").glob("*.webp"))) == 24


def test_a_run_ends_by_naming_its_report(trained: Path, command: Command) -> None:
    quick = ("max_steps=1", "batch_size=1", "validation.every=0", "checks=false", "name=quick")
    done = command("train", *SHORT, *quick, f"cache.folder={trained.parent / 'cache'}")
    assert done.code == 0
    assert "report    outputs/quick/report.html" in done.out
    assert "No verdict" in Path("outputs/quick/report.html").read_text(encoding="utf-8")


def test_the_keyboard_moves_the_slider_and_every_picture_follows(browser: Any, trained: Path) -> None:
    page = visit(browser, trained / "report.html", 1280)
    last = page.evaluate(SHOWN)
    assert len(last) == 4 + 2
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "at"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Home")
    first = page.evaluate(SHOWN)
    assert len(first) == 4 + 2
    assert not set(first) & set(last)
    assert page.text_content("output") == "base"
    assert page.get_attribute("#at", "aria-valuetext") == "base"
    page.keyboard.press("ArrowRight")
    assert page.evaluate(SHOWN) == last
    assert "step 4" in page.text_content("output")
    assert page.errors == []
    page.close()


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_window_and_no_request_leaves_the_file(
    browser: Any, trained: Path, width: int
) -> None:
    page = visit(browser, trained / "report.html", width)
    page.click("summary")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("Array.from(document.images).every(i => i.hidden || (i.complete && i.naturalWidth > 0))")
    assert [url for url in page.asked if not url.startswith("data:")] == [(trained / "report.html").as_uri()]
    assert page.errors == []
    page.close()


def test_the_page_is_dark_where_the_reader_wants_it_dark(browser: Any, trained: Path) -> None:
    light, dark = (
        page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
        for page in (visit(browser, trained / "report.html", 390, scheme) for scheme in ("light", "dark"))
    )
    assert min(light) > 200
    assert max(dark) < 50
