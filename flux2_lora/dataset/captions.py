"""What a picture is called: caption files in any usual encoding, trigger words, and the texts that training draws from.

Law: every text that a run may need is known before it starts, shuffled and dropped ones included, so each is encoded
once and cached. Which of them a step sees is a function of (seed, epoch, picture), drawn elsewhere.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import torch

from flux2_lora.flow import generator

TRIGGER = "[trigger]"
LONGEST_FILE = 64 << 10
"""Bytes; what is longer is no caption, and encoders read some 2,000 characters of it anyway."""


def read_text(file: Path) -> str:
    """A caption file's text, undivided; raises OSError, and ValueError for more than LONGEST_FILE."""
    size = file.stat().st_size
    if size > LONGEST_FILE:
        raise ValueError(f"its caption has {size:,} bytes, a caption has at most {LONGEST_FILE:,}")
    return decoded(file.read_bytes())


def decoded(raw: bytes) -> str:
    """UTF-8; UTF-16 where a byte-order mark or every second byte says so; else what older Windows editors write."""
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        return raw.decode("utf-16", errors="replace")
    if len(raw) >= 4 and raw.count(0) >= 0.4 * len(raw):
        low_first = raw[1::2].count(0) >= raw[::2].count(0)
        return raw.decode("utf-16-le" if low_first else "utf-16-be", errors="replace")
    for encoding in ("utf-8-sig", "cp1252"):
        try:
            return raw.decode(encoding)
        except UnicodeDecodeError:
            continue
    return raw.decode("latin-1")


def clean(text: str) -> str:
    """On one line, without control characters, and without halves of characters that no encoder takes."""
    printable = "".join(" " if unicodedata.category(mark) == "Cc" else mark for mark in text)
    return " ".join(printable.encode("utf-8", "replace").decode().split())


def captions_in(text: str, *, lines: bool) -> tuple[str, ...]:
    """The captions in a file's text: one, or one a line; none where it is blank."""
    parts = [clean(part) for part in (text.splitlines() if lines else [text])]
    return tuple(dict.fromkeys(part for part in parts if part))


def with_trigger(caption: str, trigger: str | None) -> str:
    """The caption with the trigger word in it: in place of [trigger], else in front unless it is there as a word."""
    if not trigger:
        return caption
    caption = caption.replace(TRIGGER, trigger)
    if re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption):
        return caption
    return f"{trigger}, {caption}" if caption else trigger


def without_trigger(caption: str, trigger: str | None, instead: str = "") -> str:
    """The caption with `instead` where the trigger word stands as a word; commas that it leaves behind go with it."""
    if not trigger:
        return caption
    replaced = re.sub(rf"(?<!\w){re.escape(trigger)}(?!\w)", lambda _: instead, caption)
    return ", ".join(part for part in (clean(part) for part in replaced.split(",")) if part)


def shuffled(caption: str, orders: int, keep: int) -> tuple[str, ...]:
    """At most `orders` different orders of a caption's tags (between commas), as it is written first.

    The first `keep` tags stay in their places. A function of the caption alone: the same orders in every run, so they
    are encoded once. 0 orders are the caption itself.
    """
    tags = [tag for tag in (part.strip() for part in caption.split(",")) if tag]
    kept, moving = tags[:keep], tags[keep:]
    if orders == 0 or len(moving) < 2:
        return (caption,)
    stream = generator("tags", caption)
    drawn = {", ".join(tags): None}
    for _ in range(8 * orders):  # a few tags have few orders, and a draw may repeat one
        if len(drawn) == orders:
            break
        order = torch.randperm(len(moving), generator=stream).tolist()
        drawn[", ".join([*kept, *(moving[place] for place in order)])] = None
    return tuple(drawn)


def texts_of(captions: Sequence[str], *, trigger: str | None, orders: int, keep: int) -> tuple[str, ...]:
    """All texts that may stand for a picture: each caption in each order of its tags, with the trigger word."""
    ordered = [text for caption in captions for text in shuffled(caption, orders, keep)]
    return tuple(dict.fromkeys(with_trigger(text, trigger) for text in ordered))
