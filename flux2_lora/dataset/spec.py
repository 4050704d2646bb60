"""What to train on, as options: one folder, or several sources with options of their own.

Law: a source says only what is its own. What it leaves null is the dataset's, so there is one place where each option
is set, and `sources_of` hands over sources in which nothing is left open.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flux2_lora.bundled import share
from flux2_lora.errors import UserError
from flux2_lora.options import option

CROPS = ("center", "focus", "random")
ALPHA = ("background", "mask")
POSTERIOR = ("auto", "sample", "mean")
CAPTION_SUFFIXES = (".txt", ".caption")


@dataclass(frozen=True, kw_only=True)
class SourceSpec:
    """One set of pictures: a `folder`, or a dataset of the hub (`hub`, its `split`). Null means the dataset's own.

    repeats: how often each picture is seen in an epoch, times what kohya's folder names say (10_name) where
    named_repeats; weight: what its loss is multiplied by; regularisation: pictures of the class in general, which are
    trained without the trigger word and never held out.
    """

    folder: str | None = None
    hub: str | None = None
    split: str = "train"
    repeats: int = option(1, at_least=1)
    named_repeats: bool = True
    weight: float = option(1.0, above=0)
    regularisation: bool = False
    resolution: list[int] | None = field(default=None, metadata={"at_least": 16})
    trigger_word: str | None = None
    default_caption: str | None = None
    caption_column: str | None = None
    caption_suffixes: list[str] | None = None
    caption_lines: bool | None = None
    caption_dropout: float | None = option(None, at_least=0, at_most=1)
    shuffle_tags: int | None = option(None, at_least=0)
    keep_tags: int | None = option(None, at_least=0)
    masks: str | None = None
    alpha: str | None = option(None, one_of=ALPHA)
    crop: str | None = option(None, one_of=CROPS)
    crop_variants: int | None = option(None, at_least=1)
    flip: bool | None = None


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """What to train on; configs/dataset/demo.yaml says what each option does.

    resolution is in px: each picture is trained at an area of about resolution^2, at each resolution listed. holdout is
    the part of the pictures kept for validation where there is no folder of them.
    """

    folder: str
    hub: str | None = None
    split: str = "train"
    sources: list[SourceSpec] = field(default_factory=list)
    import_: str | None = None
    regularisation: str | None = None
    regularisation_weight: float = option(1.0, above=0)
    validation: str | None = None
    holdout: float = option(0.1, at_least=0, at_most=0.9)
    follow_links: bool = False

    trigger_word: str | None = None
    default_caption: str | None = None
    caption_column: str | None = None
    caption_suffixes: list[str] = field(default_factory=lambda: list(CAPTION_SUFFIXES))
    caption_lines: bool = False
    caption_dropout: float = option(0.0, at_least=0, at_most=1)
    shuffle_tags: int = option(0, at_least=0)
    keep_tags: int = option(0, at_least=0)

    resolution: list[int] = field(default_factory=lambda: [1024], metadata={"at_least": 16})
    max_upscale: float = option(1.5, at_least=1)
    max_pixels: int = option(64_000_000, at_least=1)
    crop: str = option("center", one_of=CROPS)
    crop_variants: int = option(1, at_least=1)
    flip: bool = False

    background: str = "white"
    alpha: str = option("background", one_of=ALPHA)
    masks: str | None = None
    unmasked_weight: float = option(0.1, at_least=0, at_most=1)
    posterior: str = option("auto", one_of=POSTERIOR)

    @property
    def side_px(self) -> int:
        """The side of the largest square that is trained at."""
        return max(self.resolution)


@dataclass(frozen=True, kw_only=True)
class Source:
    """A source with nothing left open. name: how the user wrote it, for messages; validation: held out as a whole."""

    name: str
    folder: Path
    repeats: int
    named_repeats: bool
    weight: float
    regularisation: bool
    validation: bool
    resolution: tuple[int, ...]
    trigger_word: str | None
    default_caption: str | None
    caption_column: str | None
    caption_suffixes: tuple[str, ...]
    caption_lines: bool
    caption_dropout: float
    shuffle_tags: int
    keep_tags: int
    masks: Path | None
    alpha: str
    crop: str
    crop_variants: int
    flip: bool
    follow_links: bool


def bundled_folder() -> str:
    """The demo's pictures: what dataset.folder says where the user says nothing."""
    return str(share() / "data" / "demo")


def source_specs(spec: DatasetSpec, imported: list[SourceSpec]) -> list[SourceSpec]:
    """Every source that is asked for, in order; dataset.folder is one unless it is the bundled one beside others.

    Raises UserError for an entry of dataset.sources that names not exactly one of folder and hub.
    """
    for number, source in enumerate(spec.sources):
        if bool(source.folder) == bool(source.hub):
            both = "both" if source.folder else "neither"
            raise UserError(f"dataset.sources[{number}] names {both} of folder and hub", "name one of them")
    named = [SourceSpec(hub=spec.hub, split=spec.split)] if spec.hub else []
    others = [*named, *spec.sources, *imported]
    folder = [] if others and spec.folder == bundled_folder() else [SourceSpec(folder=spec.folder)]
    beside = (
        [SourceSpec(folder=spec.regularisation, regularisation=True, weight=spec.regularisation_weight)]
        if spec.regularisation
        else []
    )
    return [*folder, *others, *beside]


def resolved(spec: DatasetSpec, source: SourceSpec, folder: Path, name: str, *, validation: bool = False) -> Source:
    """`source` with the dataset's options in place of its nulls; its pictures lie in `folder`."""
    own = {entry.name: getattr(source, entry.name) for entry in dataclasses.fields(SourceSpec)}
    options: dict[str, Any] = {key: getattr(spec, key, None) if value is None else value for key, value in own.items()}
    options["caption_suffixes"] = [f".{suffix.lstrip('.')}" for suffix in options["caption_suffixes"]]
    options |= {key: tuple(value) for key, value in options.items() if isinstance(value, list)}
    for key in ("folder", "hub", "split", "masks", "trigger_word", "default_caption"):
        del options[key]
    masks = source.masks or spec.masks
    return Source(
        name=name,
        folder=folder,
        validation=validation,
        masks=Path(masks).expanduser() if masks else None,
        follow_links=spec.follow_links,
        default_caption=source.default_caption or (None if source.regularisation else spec.default_caption),
        trigger_word=None if source.regularisation else source.trigger_word or spec.trigger_word,
        **options,
    )
