"""From the options to the pictures of a run: every source listed, every picture looked at, the validation set apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flux2_lora.dataset.captions import TRIGGER, clean, read_text, texts_of
from flux2_lora.dataset.crops import Box, Crop, buckets_of, crops_of
from flux2_lora.dataset.folders import (
    VALIDATION,
    Entry,
    Refusal,
    contents,
    existing,
    list_folder,
    shown,
    suffixes,
)
from flux2_lora.dataset.imports import read_import
from flux2_lora.dataset.pictures import check_colour
from flux2_lora.dataset.seen import Memory, Seen
from flux2_lora.dataset.spec import DatasetSpec, Source, SourceSpec, resolved, source_specs
from flux2_lora.errors import UserError, listed
from flux2_lora.files import digest, write_text


@dataclass(frozen=True)
class Mask:
    """What of a picture is trained: a mask's file, None for the picture's own alpha; box: where it is not black."""

    path: Path | None
    digest: str
    box: Box


@dataclass(frozen=True)
class Record:
    """One readable picture: its size in px as seen (after EXIF orientation), and the digest of its file.

    texts: all that may stand for it, trigger word included, the first being the one that it is known by; buckets: the
    (height, width) it is trained at; repeats: how often an epoch sees it at each.
    """

    path: Path
    name: str
    digest: str
    width: int
    height: int
    texts: tuple[str, ...]
    buckets: tuple[tuple[int, int], ...]
    repeats: int
    source: Source
    mask: Mask | None = None
    transparent: bool = False
    moving: bool = False

    @property
    def caption(self) -> str:
        return self.texts[0]

    def crops(self, bucket: tuple[int, int], seed: int) -> tuple[Crop, ...]:
        """Every crop that a run may draw in that bucket."""
        return crops_of(
            (self.width, self.height),
            bucket,
            how=self.source.crop,
            variants=self.source.crop_variants,
            flip=self.source.flip,
            mask=self.mask.box if self.mask else None,
            key=self.digest,
            seed=seed,
        )


@dataclass(frozen=True)
class Scan:
    """The pictures to train on and to validate with, in the order of sources and names, and what to tell the user."""

    training: tuple[Record, ...]
    validation: tuple[Record, ...]
    skipped: tuple[Refusal, ...]
    notes: tuple[str, ...]

    def report(self, file: Path) -> list[str]:
        """Lines to print; where pictures were skipped, all of them are written to `file`."""
        lines = list(self.notes)
        if self.skipped:
            _write_refusals(file, self.skipped)
            lines += [f"skipped {name}: {reason}" for name, reason in self.skipped[:5]]
            lines.append(f"{len(self.skipped)} skipped in all, the full list is in {file}")
        else:
            file.unlink(missing_ok=True)  # of an earlier run
        return lines


@dataclass(frozen=True)
class _Found:
    """A picture that a source lists, not yet looked at."""

    source: Source
    entry: Entry
    name: str


def scan(spec: DatasetSpec, *, seed: int, step: int, memory: Memory, cache: Path, report: Path) -> Scan:
    """Read all pictures and captions of all sources, and hold out the validation set.

    seed chooses what is held out; step is the multiple of bucket sides in px; `cache` takes what hub datasets hold.
    Raises UserError for sources without pictures, without one usable picture, or with pictures without a caption, and
    for an unreadable picture in a validation folder: a set chosen by hand must not shrink unseen. Where more than five
    pictures are refused and none is left, `report` lists them all.
    """
    check_colour(spec.background)
    imported = read_import(spec.import_) if spec.import_ else None
    specs = source_specs(spec, imported.sources if imported else [])
    sources = _sources(spec, specs, cache)
    found: list[_Found] = []
    refused: dict[bool, list[Refusal]] = {False: [], True: []}  # by whether the source is for validation
    for source in sources:
        others = [other.folder for other in sources if other is not source]
        listing = list_folder(source, others)
        many = len({other.folder for other in sources if not other.validation}) > 1
        before = f"{VALIDATION}/" if source.validation else f"{source.folder.name}/" if many else ""
        found += [_Found(source, entry, before + entry.name) for entry in listing.entries]
        refused[source.validation] += [(before + name, reason) for name, reason in listing.refused]
        if not listing.entries and not listing.refused:
            raise UserError(
                f"{source.name} holds no pictures{contents(source.folder)}", f"put {suffixes()} files there"
            )
    _check_captions(found, refused[False], report)
    records = _look(spec, found, step, memory, refused)
    training = [record for record in records if not record.source.validation]
    validation = [record for record in records if record.source.validation]
    if refused[True]:
        names = listed([source.name for source in sources if source.validation])
        raise UserError(
            f"{names} has unreadable pictures: {_reasons(refused[True])}{_all_in(report, refused[True])}",
            "replace or remove them",
        )
    if all(record.source.regularisation for record in training):
        raise _nothing_left(sources, refused[False], report)
    if not any(source.validation for source in sources):
        training, validation = hold_out(training, spec.holdout, seed)
    training, twice = _apart(training, validation)
    notes = [*(imported.notes if imported else []), *_notes(found, records), *twice]
    return Scan(tuple(training), tuple(validation), tuple(refused[False]), tuple(notes))


def _apart(training: list[Record], validation: Sequence[Record]) -> tuple[list[Record], list[str]]:
    """The training records that are not validated too, and a note; all of them where none would be left."""
    validated = {record.digest for record in validation}
    twice = [record.name for record in training if record.digest in validated]
    left = [record for record in training if record.digest not in validated]
    if not twice:
        return training, []
    if all(record.source.regularisation for record in left):
        return training, ["every picture is validated with as well: the validation loss says nothing here"]
    return left, [f"{len(twice)} not trained on, being held out for validation as well: {listed(twice)}"]


def hold_out(records: Sequence[Record], part: float, seed: int) -> tuple[list[Record], list[Record]]:
    """(training, validation) records, chosen by content: other file names or another order give the same choice.

    Validation has round(part * n) different pictures, at least 1 of 8 and more; one always stays for training, copies
    of a picture stay together, and pictures for regularisation are none of this.
    """
    ours = {record.digest: record for record in records if not record.source.regularisation}
    count = round(part * len(ours))
    if part > 0 and len(ours) >= 8:
        count = max(count, 1)
    ranked = sorted(ours, key=lambda content: digest("hold out", str(seed), content))
    held = set(ranked[: min(count, len(ours) - 1)] if ours else [])
    is_held = [record.digest in held and not record.source.regularisation for record in records]
    pairs = list(zip(records, is_held, strict=True))
    return [record for record, out in pairs if not out], [record for record, out in pairs if out]


def preview_prompts(spec: DatasetSpec) -> list[str]:
    """The lines of prompts.txt in the first folder that has one, for previews; empty ones and those with # left out."""
    imported = read_import(spec.import_).sources if spec.import_ else []
    specs = [one for one in source_specs(spec, imported) if one.folder and not one.regularisation]
    files = {Path(one.folder or "").expanduser() / "prompts.txt": one.trigger_word for one in specs}
    inside = [file for file in files if spec.follow_links or not file.is_symlink()]
    file = next((file for file in inside if file.is_file()), None)
    try:
        lines = read_text(file).splitlines() if file else []
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read", "write one prompt a line, or set preview.prompts") from error
    prompts = [clean(line) for line in lines if clean(line) and not line.lstrip().startswith("#")]
    word = (files[file] if file else None) or spec.trigger_word or TRIGGER
    return [prompt.replace(TRIGGER, word) for prompt in prompts]


def trigger_words(records: Sequence[Record]) -> str | None:
    """The trigger words of all sources, with commas; None where there is none."""
    words = dict.fromkeys(record.source.trigger_word for record in records if record.source.trigger_word)
    return ", ".join(words) or None


def _sources(spec: DatasetSpec, specs: Sequence[SourceSpec], cache: Path) -> list[Source]:
    """Every source with its folder, hub datasets fetched, and the folders that are held out as a whole."""
    found: list[Source] = []
    for source in specs:
        name = f"dataset.hub={source.hub}" if source.hub else f"dataset.folder={source.folder}"
        folder = _fetch(source, spec, cache) if source.hub else existing(source.folder or "", name)
        found.append(resolved(spec, source, folder, name))
        held = folder / VALIDATION
        held_out = held.is_dir() and (spec.follow_links or not held.is_symlink())
        if held_out and not source.regularisation and held not in [own.folder for own in found]:
            name = f"{name}/{VALIDATION}"
            found.append(resolved(spec, source, held, name, validation=True))
    if spec.validation:
        name = f"dataset.validation={spec.validation}"
        chosen = SourceSpec(folder=spec.validation)
        found.append(resolved(spec, chosen, existing(spec.validation, name), name, validation=True))
    return [_with_masks(own) for own in found]


def _with_masks(source: Source) -> Source:
    """Check the folder of masks; a validation/ has its own masks/validation where that is there."""
    if source.masks is None:
        return source
    masks = existing(str(source.masks), f"dataset.masks={source.masks}")
    if masks.resolve() == source.folder.resolve():
        raise UserError(f"dataset.masks={masks} is the folder of the pictures", "masks lie in a folder of their own")
    within = masks / VALIDATION
    return replace(source, masks=within if source.validation and within.is_dir() else masks)


def _fetch(source: SourceSpec, spec: DatasetSpec, cache: Path) -> Path:
    from flux2_lora.dataset.hub import fetch_hub

    return fetch_hub(source.hub or "", source.split, cache, source.caption_column or spec.caption_column)


def _check_captions(found: Sequence[_Found], refused: Sequence[Refusal], report: Path) -> None:
    """UserError where a picture has no caption, or needs a trigger word that is not set.

    Before pictures are decoded: captions are read in no time, and are what most users have to mend.
    """
    for source, group in _by_source(found):
        bare = [one for one in group if not one.entry.captions]
        if bare:
            missing = [(one.name, "has no caption") for one in bare]
            metadata = [f"; {name} {reason}" for name, reason in refused if name.startswith("metadata.")][:1]
            raise UserError(
                f"{source.name} holds {len(group)} images but {len(bare)} have no caption: "
                f"{listed([one.name for one in bare])}{''.join(metadata)}{_all_in(report, [*missing, *refused])}",
                f"write {bare[0].entry.path.with_suffix('.txt').name} beside the image, or set "
                'dataset.default_caption="a photo in mystyle"',
            )
        unset = [one.name for one in group if not source.trigger_word and TRIGGER in " ".join(one.entry.captions)]
        if unset:
            what = f"{source.name} has captions with {TRIGGER}, but dataset.trigger_word is not set: {listed(unset)}"
            raise UserError(what, "set dataset.trigger_word=mystyle")


def _by_source(found: Sequence[_Found]) -> Iterator[tuple[Source, list[_Found]]]:
    for source in dict.fromkeys(one.source for one in found):
        yield source, [one for one in found if one.source == source]


def _look(
    spec: DatasetSpec, found: Sequence[_Found], step: int, memory: Memory, refused: dict[bool, list[Refusal]]
) -> list[Record]:
    """The records, decoding what is not known yet; what cannot be used is added to `refused`."""
    masked = [one.entry.mask for one in found if one.entry.mask]
    masks = dict(zip(masked, memory.look_at_all(masked, max_pixels=spec.max_pixels, mask=True), strict=True))
    pictures = memory.look_at_all([one.entry.path for one in found], max_pixels=spec.max_pixels)
    records: list[Record] = []
    for one, seen in zip(found, pictures, strict=True):
        mask = masks[one.entry.mask] if one.entry.mask else None
        made = seen if isinstance(seen, str) else _record(spec, one, seen, mask, step)
        if isinstance(made, str):
            refused[one.source.validation].append((one.name, made))
        else:
            records.append(made)
    return records


def _record(spec: DatasetSpec, one: _Found, seen: Seen, mask: Seen | str | None, step: int) -> Record | str:
    """The record, or why there is none."""
    source, size = one.source, (seen.width, seen.height)
    if not source.resolution:
        raise UserError(f"{source.name} has no resolution", "set dataset.resolution=1024, or a list of several")
    buckets = buckets_of(*size, source.resolution, step, spec.max_upscale)
    if not buckets:
        return f"{size[0]} x {size[1]} px is too small; dataset.max_upscale={spec.max_upscale:g} is the limit"
    kept = _mask(one, seen, mask)
    if isinstance(kept, str):
        return kept
    orders = 0 if source.validation else source.shuffle_tags
    texts = texts_of(one.entry.captions, trigger=source.trigger_word, orders=orders, keep=source.keep_tags)
    if source.validation:
        source = replace(source, flip=False, crop_variants=1)
    return Record(
        path=one.entry.path,
        name=one.name,
        digest=seen.digest,
        width=seen.width,
        height=seen.height,
        texts=texts,
        buckets=buckets,
        repeats=1 if source.validation else source.repeats * one.entry.repeats,
        source=source,
        mask=kept,
        transparent=seen.box is not None,
        moving=seen.moving,
    )


def _mask(one: _Found, seen: Seen, mask: Seen | str | None) -> Mask | str | None:
    """The mask of a picture, None where all of it is trained, or why it cannot be used."""
    if isinstance(mask, str):
        return f"its mask cannot be read: {mask}"
    if mask is not None:
        wide, high = mask.width * seen.height, seen.width * mask.height
        if abs(wide - high) > max(0.02 * high, mask.width, mask.height, seen.width, seen.height):
            return f"its mask is {mask.width} x {mask.height}, the picture {seen.width} x {seen.height}"
        box = mask.box or (0, 0, 0, 0)
        return Mask(one.entry.mask, mask.digest, box) if any(box) else "its mask is black everywhere"
    if one.source.alpha == "mask" and seen.box is not None:
        return Mask(None, "alpha", seen.box) if any(seen.box) else "it is transparent everywhere"
    return None


def _notes(found: Sequence[_Found], records: Sequence[Record]) -> list[str]:
    """What is no fault but should be known, each once."""
    moving = [record.name for record in records if record.moving]
    bare = [record.name for record in records if record.source.masks and record.mask is None]
    repeats = sorted({one.entry.repeats for one in found} - {1})
    notes = [f"{len(moving)} of several frames or pages, the first is used: {listed(moving)}"] if moving else []
    if bare:
        notes.append(f"{len(bare)} without a mask in dataset.masks, trained as a whole: {listed(bare)}")
    if repeats:
        counts = listed([str(count) for count in repeats])
        notes.append(f"folders named like 10_name give their pictures repeats: {counts}")
    return notes


def _nothing_left(sources: Sequence[Source], refused: Sequence[Refusal], report: Path) -> UserError:
    where = listed([source.name for source in sources if not source.validation], 2)
    what = f"{where} holds {len(refused)} images but none can be used: {_reasons(refused)}"
    what += _all_in(report, refused)
    return UserError(
        what, "save them again as PNG or JPEG; where a reason names an option, that is the limit to change"
    )


def _all_in(report: Path, refused: Sequence[Refusal]) -> str:
    """Where a message cannot name them all: write the full list, and say where."""
    if len(refused) <= 5:
        return ""
    _write_refusals(report, refused)
    return f"; the full list is in {report}"


def _reasons(refused: Sequence[Refusal]) -> str:
    return listed([f"{shown(name)} ({reason})" for name, reason in refused])


def _write_refusals(file: Path, refused: Sequence[Refusal]) -> None:
    write_text(file, "".join(f"{shown(name)}: {reason}\n" for name, reason in refused))
