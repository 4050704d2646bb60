"""Caption files as people have them, and the texts that training draws from."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flux2_lora.dataset.captions import LONGEST_FILE, captions_in, clean, decoded, shuffled, texts_of, with_trigger
from tests.sets import captions, error_of, picture, scanned, skipped, spec

WORDS = st.text(alphabet="abc ,.[]", max_size=30)
TAGS = st.lists(st.text(alphabet="abcde ", min_size=1, max_size=6).filter(str.strip), max_size=7)


@pytest.mark.parametrize(
    "raw",
    [
        "un café".encode(),
        "un café".encode("utf-8-sig"),
        "un café".encode("utf-16"),
        b"\xfe\xff" + "un café".encode("utf-16-be"),
        "un café".encode("latin-1"),
        "  un\r\n\tcafé \n".encode(),
        "un\0café".encode(),
        "un café".encode("utf-16-le"),
        "un café".encode("utf-16-be"),
    ],
)
def test_a_caption_is_read_in_any_usual_encoding_onto_one_line(tmp_path: Path, raw: bytes) -> None:
    picture(tmp_path / "a.png", raw)
    assert captions(tmp_path) == ["un café"]


def test_curly_quotes_of_old_windows_editors_are_read(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", b"the cat\x92s tail")
    assert captions(tmp_path) == ["the cat\u2019s tail"]


@given(st.binary(max_size=200))
def test_any_bytes_become_clean_text(raw: bytes) -> None:
    text = clean(decoded(raw))
    assert text == " ".join(text.split())
    assert text.isprintable() or all(mark.isprintable() or ord(mark) > 0x9F for mark in text)
    text.encode()


def test_a_thousand_mutated_captions_are_read_or_named(tmp_path: Path) -> None:
    """All in one folder: each picture has a caption afterwards, or a reason why it has none."""
    rng = random.Random(0)
    wholes = [
        "a red apple, [trigger], flat".encode(e) for e in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "latin-1")
    ]
    wholes += ["日本語の説明 🎨, ﷽".encode(), b"", b" \r\n\t ", b"\0" * 40, b"x," * 40_000, b"{}[]\\\"'%$" * 30]
    for number in range(1000):
        raw = bytearray(rng.choice(wholes))
        for _ in range(rng.choice((0, 1, 3, 20))):
            match rng.randrange(4) if raw else 2:
                case 0:
                    raw[rng.randrange(len(raw))] = rng.randrange(256)
                case 1:
                    del raw[rng.randrange(len(raw)) :]
                case 2:
                    raw += rng.randbytes(rng.randrange(9))
                case 3:
                    place = rng.randrange(len(raw))
                    raw[place:place] = rng.choice((b"\r\n", b"\xff\xfe", b"\xef\xbb\xbf", b"\x1b[2J", b"[trigger]"))
        picture(tmp_path / f"{number:04}.bmp", bytes(raw), size=(16, 16))
    found = scanned(spec(tmp_path, default_caption="x", trigger_word="sks", resolution=[16]))
    assert len(found.training) + len(found.skipped) == 1000
    assert all("sks" in record.caption and "\x1b" not in record.caption for record in found.training)
    assert all("bytes, a caption has at most" in reason for _, reason in found.skipped)
    assert len(found.skipped) > 20


def test_a_file_too_long_for_a_caption_is_named(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", b"x" * (LONGEST_FILE + 1))
    picture(tmp_path / "b.png", b"x" * LONGEST_FILE)
    assert skipped(tmp_path) == {"a.png": "its caption has 65,537 bytes, a caption has at most 65,536"}


def test_a_terminals_commands_in_a_caption_are_taken_out() -> None:
    assert clean("a \x1b[31mred\x07 cat") == "a [31mred cat"


def test_halves_of_surrogates_are_taken_out() -> None:
    assert clean("a \ud800cat") == "a ?cat"


def test_joined_emoji_stay_whole() -> None:
    assert clean("a 👩‍🎨 paints") == "a 👩‍🎨 paints"


def test_a_caption_file_may_end_in_caption(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", None).with_suffix(".caption").write_text("of kohya's kind")
    assert captions(tmp_path) == ["of kohya's kind"]


def test_the_default_caption_stands_in_for_absent_and_blank_ones_only(tmp_path: Path) -> None:
    for name, text in (("a", None), ("b", " \n"), ("c", "own")):
        picture(tmp_path / f"{name}.png", text)
    assert captions(tmp_path, default_caption="a photo") == ["a photo", "a photo", "own"]


def test_a_missing_caption_names_the_pictures_and_the_remedy(tmp_path: Path) -> None:
    for number in range(7):
        picture(tmp_path / f"{number}.png", None if number else "there")
    error = error_of(lambda: scanned(spec(tmp_path)))
    listed = "1.png, 2.png, 3.png, 4.png, 5.png and 1 more"
    wanted = f"dataset.folder={tmp_path} holds 7 images but 6 have no caption: {listed}"
    assert error.what == f"{wanted}; the full list is in {tmp_path.parent}/skipped.txt"
    assert error.remedy == 'write 1.txt beside the image, or set dataset.default_caption="a photo in mystyle"'


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a dog", "sks, a dog"),
        ("a dog in [trigger] style, [trigger]", "a dog in sks style, sks"),
        ("sks, a dog", "sks, a dog"),
        ("he asks a dog", "sks, he asks a dog"),
        ("", "sks"),
    ],
)
def test_the_trigger_word_is_in_each_caption(caption: str, expected: str) -> None:
    assert with_trigger(caption, "sks") == expected


@given(WORDS, st.sampled_from(["sks", "my style", "st(yle"]))
def test_adding_the_trigger_word_twice_is_adding_it_once(caption: str, trigger: str) -> None:
    once = with_trigger(caption, trigger)
    assert trigger in once
    assert with_trigger(once, trigger) == once


def test_a_trigger_mark_without_a_trigger_word_is_an_error(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", "in [trigger] style")
    error = error_of(lambda: scanned(spec(tmp_path)))
    assert "dataset.trigger_word is not set: a.png" in error.what


# --- several captions, shuffled tags


def test_the_lines_of_a_file_may_be_captions_of_their_own(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", "one\n\n two \none")
    (record,) = scanned(spec(tmp_path, caption_lines=True)).training
    assert record.texts == ("one", "two")
    assert captions(tmp_path) == ["one two one"]


def test_lines_are_divided_as_any_system_writes_them() -> None:
    assert captions_in("a\rb\r\nc\nd", lines=True) == ("a", "b", "c", "d")


@given(TAGS, st.integers(0, 5), st.integers(0, 7))
def test_shuffled_tags_are_the_same_tags_with_the_first_ones_in_place(tags: list[str], orders: int, keep: int) -> None:
    caption = ", ".join(tag.strip() for tag in tags)
    wanted = [tag.strip() for tag in tags]
    for text in shuffled(caption, orders, keep):
        found = text.split(", ") if text else []
        assert sorted(found) == sorted(wanted)
        assert found[:keep] == wanted[:keep]


def test_the_first_order_is_the_one_that_is_written() -> None:
    assert shuffled("d, c, b, a", 3, 0)[0] == "d, c, b, a"


def test_as_many_orders_are_drawn_as_asked_for_and_there_are() -> None:
    assert len(shuffled("a, b, c, d, e", 4, 0)) == 4
    assert set(shuffled("a, b, c", 50, 1)) == {"a, b, c", "a, c, b"}
    assert shuffled("a, b, c", 0, 0) == ("a, b, c",)


def test_orders_are_the_same_in_every_run() -> None:
    assert shuffled("a, b, c, d, e", 3, 0) == shuffled("a, b, c, d, e", 3, 0)


def test_the_trigger_word_stays_in_front_of_shuffled_tags() -> None:
    texts = texts_of(["a, b, c, d"], trigger="sks", orders=4, keep=0)
    assert len(texts) == 4
    assert all(text.startswith("sks, ") for text in texts)
