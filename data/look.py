"""Look at a folder before training on it: what will be cropped, skipped, held out, and what is odd in the captions.

Nothing is trained or encoded; what is written is a contact sheet of the very crops that training would see, the list of
what cannot be used, and a note of what was decoded, so that training need not decode it to look at it again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from statistics import mean

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from rich.console import Console
from rich.table import Table
from torch import Tensor

from flux2_lora.buckets import crop_loss, upscale
from flux2_lora.caches import CacheSpec
from flux2_lora.config import program
from flux2_lora.dataset import DatasetSpec, Record, Scan, scan
from flux2_lora.dataset.crops import Crop
from flux2_lora.dataset.pictures import crop_mask, crop_to, open_mask, open_picture
from flux2_lora.dataset.seen import Memory
from flux2_lora.errors import listed
from flux2_lora.families import ModelSpec, load_family
from flux2_lora.files import write_bytes
from flux2_lora.options import option

LONGEST_CAPTION = 350
"""Words. Text encoders read 512 tokens and English takes about 1.4 tokens a word: what comes later is cut off."""
SHEET_PICTURES, LABEL_CHARACTERS = 60, 400
CELL_PX, GAP_PX, TEXT_PX, TEXT_LINES = 288, 20, 16, 4
PAPER, INK, GREY, TAG = "#ffffff", "#111111", "#666666", "#0b57d0"
DIMMED = 0.25
"""How much of the picture still shows where its mask is black."""


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """configs/inspect.yaml. output: the contact sheet, a PNG file."""

    model: ModelSpec
    dataset: DatasetSpec
    cache: CacheSpec
    name: str
    output_dir: str = "outputs"
    seed: int = option(0, at_least=0)
    output: str = "outputs/inspect.png"


@program("inspect")
def main(config: InspectConfig) -> None:
    """Print the report and write the contact sheet."""
    # File names and captions hold brackets and colons, which are not meant as rich's markup.
    console = Console(markup=False, emoji=False, highlight=False)
    cache, skipped = config.cache.place, Path(config.output_dir).expanduser() / config.name / "skipped.txt"
    memory, step = Memory(cache / "pictures.json"), load_family(config.model.family).pixels_per_token
    found = scan(config.dataset, seed=config.seed, step=step, memory=memory, cache=cache, report=skipped)
    memory.save()
    counts = f"{len(found.training)} pictures to train on, {len(found.validation)} for validation"
    console.print(f"{config.name}: {counts}", soft_wrap=True)
    console.print(source_table(found))
    console.print(bucket_table(found.training))
    for line in [*found.report(skipped), *caption_problems(found), *same_pictures(found)]:
        console.print(line, style="yellow", soft_wrap=True)
    sheet_file = Path(config.output).expanduser()
    write_sheet(sheet_file, found, config.dataset.background, config.seed)
    console.print(f"contact sheet: {sheet_file}", soft_wrap=True)


def source_table(found: Scan) -> Table:
    """One row a source: its pictures, what an epoch sees of them, how they are trained."""
    table = Table(title="sources", title_justify="left")
    table.add_column("source", overflow="fold")
    for heading in ("pictures", "an epoch sees", "texts", "weight", "masks"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("for", no_wrap=True)
    for use, records in (("training", found.training), ("validation", found.validation)):
        groups: dict[tuple[str, bool], list[Record]] = defaultdict(list)
        for record in records:
            groups[record.source.name, record.source.regularisation].append(record)
        for (name, regularisation), group in groups.items():
            table.add_row(
                name,
                str(len(group)),
                str(sum(record.repeats * len(record.buckets) for record in group)),
                str(len({text for record in group for text in record.texts})),
                f"{group[0].source.weight:g}",
                str(sum(record.mask is not None for record in group) or "-"),
                "regularisation" if regularisation else use,
            )
    return table


def bucket_table(records: Sequence[Record]) -> Table:
    """One row a bucket: pictures in it, how much of them a crop cuts off, how many must be enlarged."""
    members: dict[tuple[int, int], list[Record]] = defaultdict(list)
    for record in records:
        for bucket in record.buckets:
            members[bucket].append(record)
    table = Table(title="buckets", title_justify="left")
    for heading in ("height x width", "pictures", "an epoch sees", "cropped away", "enlarged"):
        table.add_column(heading, justify="right")
    for bucket, group in sorted(members.items()):
        loss = mean(crop_loss(record.width, record.height, bucket) for record in group)
        enlarged = [times for record in group if (times := upscale(record.width, record.height, bucket)) > 1]
        table.add_row(
            f"{bucket[0]} x {bucket[1]}",
            str(len(group)),
            str(sum(record.repeats for record in group)),
            f"{loss:.1%}",
            f"{len(enlarged)}, to {max(enlarged):.2f} x" if enlarged else "-",
        )
    return table


def caption_problems(found: Scan) -> list[str]:
    """One line a problem: empty captions, captions that encoders will cut off, captions shared by pictures."""
    records, lines = [*found.training, *found.validation], []
    if empty := [record.name for record in records if not record.caption]:
        lines.append(f"empty caption: {listed(empty)}")
    if long := [record.name for record in records if len(record.caption.split()) > LONGEST_CAPTION]:
        lines.append(f"caption of more than {LONGEST_CAPTION} words, its end may be cut off: {listed(long)}")
    for caption, names in shared(records, lambda record: record.caption):
        lines.append(f'one caption for {len(names)} pictures, "{caption[:60]}": {listed(names)}')
    return lines


def same_pictures(found: Scan) -> list[str]:
    records = [*found.training, *found.validation]
    return [f"the same picture {len(n)} times: {listed(n)}" for _, n in shared(records, lambda record: record.digest)]


def shared(records: Iterable[Record], of: Callable[[Record], str]) -> list[tuple[str, list[str]]]:
    """Values, not empty, that several records have, with the names of these records."""
    names: dict[str, list[str]] = defaultdict(list)
    for record in records:
        names[of(record)].append(record.name)
    return [(value, group) for value, group in names.items() if value and len(group) > 1]


def write_sheet(path: Path, found: Scan, background: str, seed: int) -> None:
    """A PNG of the crops with their captions; of a large set, a spread of SHEET_PICTURES."""
    every = [
        (record, crop, record in found.validation)
        for record in sorted((*found.training, *found.validation), key=lambda record: (record.source.name, record.name))
        for bucket in record.buckets
        for crop in record.crops(bucket, seed)
        if not crop.mirrored
    ]
    count = min(len(every), SHEET_PICTURES)
    chosen = [every[position * len(every) // count] for position in range(count)]
    cells = [cell(record, crop, background, held_out=held_out) for record, crop, held_out in chosen]
    content = BytesIO()
    sheet(f"{len(chosen)} of {len(every)} crops as training sees them", cells).save(content, "PNG")
    write_bytes(path, content.getvalue())


def sheet(title: str, cells: Sequence[Image.Image]) -> Image.Image:
    """Cells in rows below a title; each row is as high as its highest cell."""
    columns = next(count for count in (1, 2, 3, 4, 5, 6) if count == 6 or count * count >= len(cells))
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    heights = [max(each.height for each in row) for row in rows]
    width = max(columns * (CELL_PX + GAP_PX), 2 * CELL_PX) + GAP_PX
    page = Image.new("RGB", (width, sum(heights) + GAP_PX * (len(rows) + 3)), PAPER)
    ImageDraw.Draw(page).text((GAP_PX, GAP_PX), title, INK, ImageFont.load_default(TEXT_PX + 2))
    top = 3 * GAP_PX
    for row, height in zip(rows, heights, strict=True):
        for column, each in enumerate(row):
            page.paste(each, (GAP_PX + column * (CELL_PX + GAP_PX), top))
        top += height + GAP_PX
    return page


def cell(record: Record, crop: Crop, background: str, *, held_out: bool) -> Image.Image:
    """The crop as large as the cell allows, dimmed where its mask is black, above its label."""
    picture = ImageOps.contain(to_image(crop_pixels(record, crop, background)), (CELL_PX, CELL_PX))
    below = label(record, crop, held_out=held_out)
    made = Image.new("RGB", (CELL_PX, picture.height + below.height), PAPER)
    made.paste(picture, ((CELL_PX - picture.width) // 2, 0))
    made.paste(below, (0, picture.height))
    return made


def crop_pixels(record: Record, crop: Crop, background: str) -> Tensor:
    """Pixels [3 h w] in [-1, 1]."""
    opened = open_picture(record.path, background=background)
    pixels = crop_to(opened.image, crop.height, crop.width, crop.centering)
    painted = opened.alpha
    if record.mask is None or (record.mask.path is None and painted is None):
        return pixels
    if record.mask.path is not None:
        painted = open_mask(record.mask.path)
    assert painted is not None
    kept = crop_mask(painted, crop.height, crop.width, crop.centering)
    return pixels * (DIMMED + (1 - DIMMED) * kept) + (1 - DIMMED) * (1 - kept)


def label(record: Record, crop: Crop, *, held_out: bool) -> Image.Image:
    """The file's name, what became of the picture, and the first lines of its caption."""
    font, small, pitch = ImageFont.load_default(TEXT_PX), ImageFont.load_default(TEXT_PX - 3), TEXT_PX + 5
    loss = crop_loss(record.width, record.height, (crop.height, crop.width))
    notes = ["validation"] * held_out + [f"x{record.repeats}"] * (record.repeats > 1)
    notes += [f"{loss:.0%} cut off"] * (loss >= 0.05) + [f"{crop.height} x {crop.width}"]
    right = ", ".join(notes)
    name = wrapped(record.name, small, CELL_PX - int(small.getlength(right)) - 12, 1)[0]
    lines = wrapped(record.caption[:LABEL_CHARACTERS] or "(empty caption)", font, CELL_PX, TEXT_LINES)
    made = Image.new("RGB", (CELL_PX, 10 + pitch * (len(lines) + 1)), PAPER)
    draw = ImageDraw.Draw(made)
    draw.text((0, 6), name, GREY, small)
    draw.text((CELL_PX, 6), right, TAG if held_out else GREY, small, anchor="ra")
    for number, line in enumerate(lines, start=1):
        draw.text((0, 6 + number * pitch), line, INK if record.caption else GREY, font)
    return made


def to_image(pixels: Tensor) -> Image.Image:
    """Pixels [3 h w] in [-1, 1] as 8-bit RGB."""
    values = ((pixels + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).numpy())


def wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, most: int) -> list[str]:
    """At most `most` lines of at most `width` px, broken between words where possible, cut short with dots."""
    lines: list[str] = []
    while text and len(lines) < most:
        end = next(n for n in range(len(text), 0, -1) if n == 1 or font.getlength(text[:n]) <= width)
        space = text.rfind(" ", 0, end + 1)
        end = space if end < len(text) and space > 0 else end
        lines.append(text[:end])
        text = text[end:].lstrip()
    if text:
        while font.getlength(f"{lines[-1]}...") > width:
            lines[-1] = lines[-1][:-1]
        lines[-1] += "..."
    return lines


if __name__ == "__main__":
    main()
