"""The pictures that the miniature is made from: sets of emoji drawings out of npm packages, rasterised on white.

The sets are not redistributed. Two of them, `DEMOS`, are the demo styles: no stage that trains the base sees them.
"""

from __future__ import annotations

import io
import json
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

SIDE_PX = 128


@dataclass(frozen=True, kw_only=True)
class IconSet:
    """One npm package of drawings: what its style is called, and who has drawn it under which licence.

    inks: colours (red, green, blue) for black, middle grey and white; none leaves the drawings as they are.
    """

    package: str
    version: str
    style: str
    licence: str
    author: str
    inks: tuple[tuple[int, int, int], ...] = ()


SETS = (
    IconSet(package="@iconify-json/noto", version="1.2.9", style="noto", licence="Apache-2.0", author="Google"),
    IconSet(
        package="@iconify-json/fluent-emoji-flat", version="1.2.6", style="fluent", licence="MIT", author="Microsoft"
    ),
    IconSet(
        package="@iconify-json/twemoji",
        version="1.2.5",
        style="twemoji",
        licence="CC-BY-4.0",
        author="Twitter and others",
    ),
    IconSet(package="@iconify-json/noto-v1", version="1.2.5", style="blob", licence="Apache-2.0", author="Google"),
    IconSet(
        package="@iconify-json/emojione", version="1.2.3", style="emojitwo", licence="CC-BY-4.0", author="EmojiTwo"
    ),
)
# The styles that can be asked for in a prompt; the other sets serve the VAE and the judge.
STYLES = ("noto", "fluent", "twemoji")
INK = IconSet(
    package="@iconify-json/fluent-emoji-high-contrast",
    version="1.2.6",
    style="ink",
    licence="MIT",
    author="Microsoft",
    inks=((18, 16, 24), (136, 110, 47), (255, 205, 70)),
)
POSTER = IconSet(
    package="@lobehub/fluent-emoji-3d",
    version="1.1.0",
    style="poster",
    licence="MIT",
    author="Microsoft",
    inks=((40, 10, 70), (220, 60, 120), (205, 185, 255)),
)
DEMOS = (INK, POSTER)
NAMES = ("emojibase-data", "17.0.0")
# People, flags, signs and letters are no subjects of a style; the VAE does not need them either.
EXCLUDED = re.compile(r"person|family|flag|keycap|skin|hair|alphanum|gender|symbol|zodiac|hands?\b|hand-|arrow|punct")


@dataclass(frozen=True, kw_only=True)
class Label:
    """An emoji's English name, its code point in hexadecimal, and Unicode's subgroup ("" for none)."""

    name: str
    code: str
    group: str


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one picture shows, and in which style."""

    style: str
    label: str


def install(work: Path) -> None:
    """Fetch the packages, at exactly these versions, into work/node_modules."""
    work.mkdir(parents=True, exist_ok=True)
    (work / "package.json").write_text("{}")  # else npm installs into a project above
    packages = [f"{s.package}@{s.version}" for s in (*SETS, *DEMOS)] + ["@".join(NAMES)]
    subprocess.run(["npm", "install", "--silent", "--prefix", str(work), *packages], check=True)


def rasterise(work: Path) -> None:
    """Write pictures.npz (uint8 [n h w 3]) and pictures.json (their rows) of every set."""
    pictures, rows = [], []
    for icon_set in (*SETS, *DEMOS):
        drawings = Drawings(work, icon_set)
        for label in load_labels(work):
            picture = drawings.drawn(label, SIDE_PX)
            if picture is not None and label.group and not EXCLUDED.search(label.group):
                pictures.append(np.asarray(picture))
                rows.append({"style": icon_set.style, "label": label.name})
        print(f"{icon_set.package}: {sum(r['style'] == icon_set.style for r in rows)} pictures", flush=True)
    np.savez(work / "pictures.npz", pictures=np.stack(pictures))
    (work / "pictures.json").write_text(json.dumps(rows))


def load_labels(work: Path) -> list[Label]:
    names = work / "node_modules" / NAMES[0]
    subgroups = json.loads((names / "meta/groups.json").read_text())["subgroups"]
    return [
        Label(
            name=entry["label"].replace("\u2019", "'"),
            code=entry["hexcode"].lower(),
            group=subgroups.get(str(entry.get("subgroup"))) or "",
        )
        for entry in json.loads((names / "en/data.json").read_text())
    ]


def load_words(work: Path) -> list[str]:
    """Names and keywords of all emoji: what a tokenizer for them should know."""
    entries = json.loads((work / "node_modules" / NAMES[0] / "en/data.json").read_text())
    return [entry["label"] for entry in entries] + [" ".join(entry.get("tags", [])) for entry in entries]


def load_pictures(work: Path) -> tuple[Tensor, list[Row]]:
    """Pictures [n 3 h w] in [-1, 1] and their rows."""
    pictures = torch.from_numpy(np.load(work / "pictures.npz")["pictures"])
    rows = [Row(**row) for row in json.loads((work / "pictures.json").read_text())]
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1, rows


def having(rows: Sequence[Row], *, styles: Sequence[str]) -> Tensor:
    """Mask [n] of the rows in these styles."""
    return torch.tensor([row.style in styles for row in rows])


class Drawings:
    """A set's drawings by label, whatever form the package has: one JSON of SVG bodies, or a file a code point."""

    def __init__(self, work: Path, icon_set: IconSet) -> None:
        self.package = work / "node_modules" / icon_set.package
        self.inks = icon_set.inks
        whole = self.package / "icons.json"
        self.icons: dict[str, Any] | None = json.loads(whole.read_text()) if whole.is_file() else None

    def drawn(self, label: Label, side_px: int) -> Image.Image | None:
        """The drawing on its paper, side_px square; None where the set lacks it."""
        found = self._from_svg(label, 4 * side_px) if self.icons is not None else self._from_file(label)
        if found is None:
            return None
        paper = Image.new("RGBA", found.size, "white")
        flat = Image.alpha_composite(paper, found.convert("RGBA")).convert("RGB")
        small = flat.resize((side_px, side_px), Image.Resampling.LANCZOS)
        return printed(small, self.inks) if self.inks else small

    def _from_file(self, label: Label) -> Image.Image | None:
        # Names may or may not end in the sign that asks for the coloured form.
        files = [self.package / "assets" / f"{code}.webp" for code in (label.code, f"{label.code}-fe0f")]
        return next((Image.open(file) for file in files if file.is_file()), None)

    def _from_svg(self, label: Label, side_px: int) -> Image.Image | None:
        import resvg_py

        icons = self.icons or {}
        key = slug(label.name)
        key = icons.get("aliases", {}).get(key, {}).get("parent", key)
        icon = icons["icons"].get(key)
        if icon is None:
            return None
        width, height = icon.get("width", icons["width"]), icon.get("height", icons["height"])
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}">'
            f"{icon['body'].replace('currentColor', '#000')}</svg>"
        )
        drawn = resvg_py.svg_to_bytes(svg_string=svg, width=side_px, height=side_px)
        return Image.open(io.BytesIO(bytes(drawn)))


def printed(picture: Image.Image, inks: Sequence[tuple[int, int, int]]) -> Image.Image:
    """The picture in inks for black, middle grey and white, by its brightness."""
    black, middle, white = inks
    return ImageOps.colorize(picture.convert("L"), black=black, mid=middle, white=white)


def slug(label: str) -> str:
    """The name of an icon and of a file: red-apple."""
    plain = label.lower().replace("'", "").replace("“", "").replace("”", "").replace("ñ", "n")
    return re.sub("[^a-z0-9]+", "-", plain).strip("-")
