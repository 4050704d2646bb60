"""Export an adapter in every format that is asked for, with all that is known of it: proofs, header, card and page."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from flux2_lora import __version__
from flux2_lora.adapters import WEIGHTS, Lora, LoraWeights, find_adapter
from flux2_lora.errors import RunError, UserError, did_you_mean
from flux2_lora.export.formats import FORMATS
from flux2_lora.export.header import RUN_CARD, About, header
from flux2_lora.export.proof import Proof, relative_difference
from flux2_lora.export.write import drafted, export_lora, export_peft
from flux2_lora.inference.drawn import drawn_steps, picture_files, read_texts, step_folder
from flux2_lora.keys import kinds_of
from flux2_lora.lora_files import read_any
from flux2_lora.lora_origin import origin_of
from flux2_lora.publish.model_card import write_model_card
from flux2_lora.publish.run_card import RunCard, card_of_run, read_options

ALL_FORMATS = (*FORMATS, "peft")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Source:
    """An adapter and where it comes from. run: the folder of its run, and its step there; None for a loose file."""

    lora: Lora
    path: Path
    run: Path | None = None
    step: int | None = None

    @property
    def options(self) -> Mapping[str, Any]:
        """What run.yaml says; empty for a loose file."""
        page = self.run / "run.yaml" if self.run else None
        return read_options(page) if page and page.is_file() else {}

    @property
    def title(self) -> str:
        """The run's name, with the step where that is not its last; of a loose file, its own."""
        if self.run is None or self.step is None:
            return self.path.stem
        last = max(self.run.glob("checkpoints/step-*"), default=None)
        return (
            self.run.name
            if last is None or last.name == f"step-{self.step:06d}"
            else f"{self.run.name}-step-{self.step:06d}"
        )


@dataclass(frozen=True, kw_only=True)
class Released:
    """A file, its format, and what each client makes of it; none for `peft`, which only this program reads."""

    path: Path
    format: str
    proofs: Sequence[Proof] = field(default_factory=list)


def source_of(place: str, architecture: str | None = None) -> Source:
    """The adapter of a run (its last checkpoint), of a checkpoint, or of a file of any naming.

    architecture: where the user says which.
    """
    path, lora = find_adapter(place), read_any(place, architecture)
    folder = path.resolve().parent
    step = re.fullmatch(r"step-(\d+)", folder.name)
    if path.name != WEIGHTS or folder.parent.name != "checkpoints" or step is None:
        return Source(lora=lora, path=path)
    return Source(lora=lora, path=path, run=folder.parents[1], step=int(step[1]))


def refuse_unknown_formats(formats: Sequence[str]) -> None:
    if not formats:
        raise UserError("formats=[] asks for no file", "give formats=[universal]")
    for name in formats:
        if name not in ALL_FORMATS:
            raise UserError(f"formats names {name!r}, which is no export format", did_you_mean(name, ALL_FORMATS))


def release(
    source: Source,
    files: Mapping[str, Path],
    *,
    dtype: torch.dtype = torch.float32,
    strict: bool = False,
) -> list[Released]:
    """Write a file for each format, every one proved; in a run's export/ README.md too.

    strict: without captions, folder names and a cover.
    """
    title = next(iter(files.values())).stem
    lora, (about, card) = source.lora, described(source, title, strict=strict)
    released = []
    for name, file in files.items():
        if name == "peft":
            _write_peft(lora, file)
            released.append(Released(path=file, format=name))
            continue
        told = header(about, rank=max(len(pair.down) for pair in lora.modules.values()))
        if name != "universal":
            told = {key: value for key, value in told.items() if not key.startswith("ss_network_module")}
        proofs = export_lora(lora.modules, file, architecture=lora.architecture, dtype=dtype, header=told, format=name)
        released.append(Released(path=file, format=name, proofs=proofs))
    # What clients load goes before what only this program reads.
    first, samples = min(released, key=lambda one: not one.proofs), [] if strict else _samples(source)
    if source.run is not None and first.path.parent.resolve() == (source.run / "export").resolve():
        write_model_card(first.path.parent, first.path, about, card, first.proofs, samples)
    return released


def described(source: Source, title: str, *, strict: bool) -> tuple[About, RunCard | None]:
    """All that a file can say of itself: from its run, or from the header that it came with."""
    lora, origin, model = source.lora, origin_of(source.lora), source.options.get("model", {})
    card = card_of_run(source.run, source.step, private=strict) if source.run else None
    samples = [] if strict else _samples(source)
    side = source.options.get("dataset", {}).get("resolution")
    about = About(
        title=title,
        model=model.get("architecture_name") or origin.name,
        base=model.get("title") or origin.title,
        architecture=lora.architecture,
        date=time.strftime("%Y-%m-%dT%H:%M:%S"),
        resolution=(max(side),) * 2 if isinstance(side, list) and side else _size(lora.header),
        trigger_phrase=lora.trigger_word,
        licence=model.get("licence") or lora.header.get("modelspec.license"),
        pictures=card.learned.count if card and card.learned else None,
        tags=card.learned.tags if card and card.learned else {},
        cover=Image.open(samples[0][1]) if samples else None,
        version=__version__,
        run_card=card.to_json() if card else (None if strict else lora.header.get(RUN_CARD)),
    )
    return about, card


def _samples(source: Source) -> list[tuple[str, Path]]:
    """(prompt, picture) of the preview nearest to the step that is exported, not of the base."""
    if source.run is None or source.step is None:
        return []
    previews, step = source.run / "previews", source.step
    drawn = [at for at in drawn_steps(previews) if 0 < at <= step]
    texts = read_texts(previews)
    if not drawn or texts is None:
        return []
    return list(zip(texts.prompts, picture_files(step_folder(previews, drawn[-1])), strict=False))


def _size(told: Mapping[str, str]) -> tuple[int, int] | None:
    width, _, height = told.get("modelspec.resolution", "").partition("x")
    return (int(height), int(width)) if width.isdigit() and height.isdigit() else None


def _write_peft(lora: Lora, path: Path) -> None:
    kinds = {kind for module in lora.modules for kind in kinds_of(lora.architecture, module)}
    family = origin_of(lora).family
    if not family:
        raise UserError(
            "formats=[peft] needs the model's family, and this file does not tell it", "export another format"
        )
    with drafted(path) as draft:
        export_peft(lora, draft, family=family, targets=sorted(kinds))
        read = read_any(str(draft)).modules
        worst = max(relative_difference(pair, read.get(module)) for module, pair in lora.modules.items())
        if read.keys() != lora.modules.keys() or worst > 1e-6:
            raise RunError(f"{path.name} did not carry the adapter and was not written", "export another format")


def with_modules(source: Source, modules: Mapping[str, LoraWeights]) -> Source:
    """The same with other updates."""
    return replace(source, lora=replace(source.lora, modules=dict(modules)))
