"""The pictures that another trainer's configuration names: kohya's and musubi-tuner's TOML, ai-toolkit's YAML.

Law: whatever such a file says about its pictures is taken over, noted or refused; nothing that changes what is trained
is dropped unseen. Files are data: nothing in them is run, and none can raise anything but UserError.
"""

from __future__ import annotations

import math
import re
import reprlib
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from flux2_lora.dataset.captions import clean
from flux2_lora.dataset.folders import shown
from flux2_lora.dataset.spec import SourceSpec
from flux2_lora.errors import UserError, listed

LARGEST_FILE = 1 << 20
"""Bytes; what is longer is no configuration that anybody wrote."""
ORDERS = 4
"""dataset.shuffle_tags for trainers that only say whether tags are shuffled: they draw a new order at every step."""
_SIDES = range(16, 16385)
_COUNTS = range(1_000_001)
_LONGEST = 60
_SHORT = reprlib.Repr()
_SHORT.maxlevel = 1
_SHORT.maxstring = _SHORT.maxother = _LONGEST

Options = Mapping[Any, Any]


@dataclass(frozen=True)
class Imported:
    """The sources that a file names, and a line for each of its options that is not taken over."""

    sources: list[SourceSpec]
    notes: list[str]


def read_import(place: str) -> Imported:
    """The sources in another trainer's file; each of its datasets or subsets is one, with options of its own.

    UserError that names dataset.import and the key: for what cannot be read, for values that mean nothing, for videos
    and for captions in one file, and where no dataset is left.
    """
    file = _File(place, _dialect_of(place))
    content = _content(file)
    read = [(tables, _source(file, tables)) for tables in file.dialect.datasets(file, content)]
    used = [(tables, source) for tables, source in read if source.repeats > 0]
    if not used:
        raise file.wrong(" repeats every dataset 0 times" if read else " names no dataset", file.dialect.shape)
    unseen = [tables[0].where for tables, source in read if source.repeats == 0]
    notes = [f"{file.name}: only its datasets are taken over"] if set(content) - file.dialect.keys else []
    notes += [f"{file.name}: {where} is left out, its num_repeats is 0" for where in unseen]
    notes += _notes(file, [tables for tables, _ in used])
    return Imported([source for _, source in used], notes)


@dataclass(frozen=True)
class _Table:
    """Options that stand together in the file."""

    where: str
    options: Options


@dataclass(frozen=True)
class _Value:
    """How a value is read (ValueError for one that means nothing; None says nothing), and what to write instead."""

    read: Callable[[Any], Any]
    wanted: str


Words = dict[str, tuple[str, _Value]]
"""A trainer's name of an option -> the field of SourceSpec, and how its value is read; of two, the first holds."""


@dataclass(frozen=True, kw_only=True)
class _Dialect:
    """A kind of file. datasets: the tables that hold for each dataset, innermost first; keys: all that we look at.

    syntax, shape: remedies for a file that cannot be parsed, and for one without datasets.
    """

    parse: Callable[[str], Any]
    datasets: Callable[[_File, Options], Iterator[Sequence[_Table]]]
    keys: frozenset[str]
    words: Words
    syntax: str
    shape: str


@dataclass(frozen=True)
class _File:
    place: str
    dialect: _Dialect

    @property
    def name(self) -> str:
        return shown(Path(self.place).name)

    def wrong(self, what: str, remedy: str) -> UserError:
        """`what` goes on after the option and its value."""
        return UserError(f"dataset.import={shown(self.place)}{what}", remedy)

    def placed(self, folder: str) -> str:
        """A folder as it is named where that exists, else beside this file where that exists."""
        beside = Path(self.place).expanduser().parent / folder
        return str(beside) if not _exists(Path(folder)) and _exists(beside) else folder


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value


def _text(value: Any) -> str | None:
    return clean(_string(value)) or None


def _folder(value: Any) -> str | None:
    if _string(value).lower().endswith((".json", ".jsonl", ".csv")):
        raise ValueError
    return value or None


def _suffixes(value: Any) -> list[str] | None:
    found = re.fullmatch(r"\.?([^\W_][\w.-]*)", _string(value))
    if value and (found is None or found[1].lower() == "json"):
        raise ValueError
    return [f".{found[1]}"] if found else None


def _whole(value: Any, allowed: range) -> int:
    if type(value) is not int or value not in allowed:
        raise ValueError
    return value


def _count(value: Any) -> int:
    return _whole(value, _COUNTS)


def _number(value: Any) -> float:
    """Text too: what YAML 1.1 makes of 5e-2."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError
    return float(value)


def _part(value: Any) -> float:
    if not 0 <= (part := _number(value)) <= 1:
        raise ValueError
    return part


def _weight(value: Any) -> float:
    if not 0 < (weight := _number(value)) < math.inf:
        raise ValueError
    return weight


def _area(value: Any) -> list[int]:
    """One side, or width and height: one resolution of the same area."""
    sides = value if isinstance(value, list) else [value, value]
    if len(sides) != 2:
        raise ValueError
    return [round(math.sqrt(math.prod(_whole(side, _SIDES) for side in sides)))]


def _resolutions(value: Any) -> list[int]:
    sides = value if isinstance(value, list) else [value]
    if not sides:
        raise ValueError
    return [_whole(side, _SIDES) for side in sides]


def _flag(yes: Any, no: Any) -> _Value:
    def read(value: Any) -> Any:
        if not isinstance(value, bool):
            raise ValueError
        return yes if value else no

    return _Value(read, "write true or false")


_METADATA = "write a metadata.jsonl with file_name and text on each line beside the pictures, and name their folder"
_PICTURES = "name a folder of pictures; videos cannot be trained on"

_FLAG = _flag(True, False)
_FOLDER = _Value(_folder, f"name a folder; for captions in one file: {_METADATA}")
_TEXT = _Value(_text, "write a text, in quotes")
_COUNT = _Value(_count, f"write a whole number from 0 to {_COUNTS[-1]}")
_SUFFIX = _Value(_suffixes, "write the suffix of the caption files, such as '.txt'; for JSON: " + _METADATA)

_BOTH: Words = {
    "num_repeats": ("repeats", _COUNT),
    "is_reg": ("regularisation", _FLAG),
    "caption_dropout_rate": ("caption_dropout", _Value(_part, "write a number from 0 to 1")),
    "keep_tokens": ("keep_tags", _COUNT),
    "random_crop": ("crop", _flag("random", "center")),
    "alpha_mask": ("alpha", _flag("mask", "background")),
}
_KOHYA: Words = _BOTH | {
    "image_dir": ("folder", _FOLDER),
    "image_directory": ("folder", _FOLDER),
    "resolution": ("resolution", _Value(_area, "write one side or [width, height], from 16 to 16384 px")),
    "caption_extension": ("caption_suffixes", _SUFFIX),
    "class_tokens": ("default_caption", _TEXT),
    "shuffle_caption": ("shuffle_tags", _flag(ORDERS, 0)),
    "flip_aug": ("flip", _FLAG),
    "conditioning_data_dir": ("masks", _FOLDER),
}
_AI_TOOLKIT: Words = _BOTH | {
    "folder_path": ("folder", _FOLDER),
    "dataset_path": ("folder", _FOLDER),
    "resolution": ("resolution", _Value(_resolutions, "write one side or a list of them, from 16 to 16384 px")),
    "caption_type": ("caption_suffixes", _SUFFIX),
    "caption_ext": ("caption_suffixes", _SUFFIX),
    "default_caption": ("default_caption", _TEXT),
    "trigger_word": ("trigger_word", _TEXT),
    "shuffle_tokens": ("shuffle_tags", _flag(ORDERS, 0)),
    "flip_x": ("flip", _FLAG),
    "mask_path": ("masks", _FOLDER),
    "loss_multiplier": ("weight", _Value(_weight, "write a number above 0, or remove the dataset")),
}
_REFUSED = {
    "metadata_file": _METADATA,
    "image_jsonl_file": _METADATA,
    "video_directory": _PICTURES,
    "video_jsonl_file": _PICTURES,
    "num_frames": _PICTURES,
    "auto_frame_count": _PICTURES,
    "invert_mask": "save the masks inverted (what is white is trained), and remove the option",
}
_WITHOUT_EFFECT = {
    # What is looked at, cached and loaded, and how.
    *("debug", "debug_dataset", "fast_image_size", "load_image_when_caching_latents", "num_workers", "prefetch_factor"),
    # The grid of buckets.
    *("bucket_reso_steps", "bucket_tolerance", "max_bucket_reso", "min_bucket_reso"),
    # Details of videos, of control images and of a validation set.
    *("do_i2v", "fps", "shrink_video_to_frames", "trim_auto_frame_count_tail"),
    *("control_transparent_color", "full_size_control_images", "num_controls_from_same_folder", "replay_transforms"),
    "validation_seed",
}
_AS_HERE = {
    "batch_size": 1,
    "buckets": True,
    "caption_separator": ",",
    "enable_bucket": True,
    "fp_latent_window_size": 9,
    "guidance_type": "targeted",
    "mask_min_value": 0.1,
    "network_multiplier": 1,
    "network_weight": 1,
    "num_frames": 1,
    "random_triggers_max": 1,
    "scale": 1,
    "token_warmup_min": 1,
    "type": "image",
}
"""What is done here anyway."""
_TOLD_OFF = frozenset({"buckets", "enable_bucket", "mask_min_value"})
"""What trains otherwise where it is off."""
_INSTEAD = {
    "batch_size": "batch_size={}",
    "bucket_no_upscale": "dataset.max_upscale=1",
    "mask_min_value": "dataset.unmasked_weight={}",
    "validation_split": "dataset.holdout={}",
}
"""Our option, with their value, for what a single source cannot say."""


def _tables(file: _File, parent: Options, key: str, before: str = "") -> list[_Table]:
    """The tables of a list, none where it is absent."""
    entries = parent.get(key)
    entries = [] if entries is None else entries
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        raise file.wrong(f": {before}{key} is no list of tables", file.dialect.shape)
    return [_Table(f"{before}{key}[{number}]", entry) for number, entry in enumerate(entries)]


def _table(file: _File, parent: Options, key: str) -> _Table:
    options = parent.get(key)
    if options is not None and not isinstance(options, Mapping):
        raise file.wrong(f": {key} is no table", file.dialect.shape)
    return _Table(key, options or {})


def _in_toml(file: _File, content: Options) -> Iterator[Sequence[_Table]]:
    general = _table(file, content, "general")
    for dataset in _tables(file, content, "datasets"):
        subsets = _tables(file, dataset.options, "subsets", f"{dataset.where}.")
        own = _Table(dataset.where, {key: value for key, value in dataset.options.items() if key != "subsets"})
        for subset in subsets:
            yield subset, own, general
        if not subsets:
            yield own, general


def _in_yaml(file: _File, content: Options) -> Iterator[Sequence[_Table]]:
    for process in _tables(file, _table(file, content, "config").options, "process", "config."):
        trigger = _Table(process.where, {"trigger_word": process.options.get("trigger_word")})
        for dataset in _tables(file, process.options, "datasets", f"{process.where}."):
            yield dataset, trigger


_TOML = _Dialect(
    parse=tomllib.loads,
    datasets=_in_toml,
    keys=frozenset({"general", "datasets"}),
    words=_KOHYA,
    syntax="mend that place; paths with backslashes stand in single quotes",
    shape="datasets are [[datasets]] tables with image_directory, or with [[datasets.subsets]] that have image_dir",
)
_YAML = _Dialect(
    parse=yaml.safe_load,
    datasets=_in_yaml,
    keys=frozenset(),
    words=_AI_TOOLKIT,
    syntax="mend that place; tags such as !!python are not read",
    shape="datasets are entries with folder_path in the list datasets of an entry of the list config.process",
)
_DIALECTS = {".toml": _TOML, ".yaml": _YAML, ".yml": _YAML}


def _dialect_of(place: str) -> _Dialect:
    dialect = _DIALECTS.get(Path(place).suffix.lower())
    if dialect is None:
        what = f"dataset.import={shown(place)} is neither TOML nor YAML by its suffix"
        raise UserError(what, "give kohya's or musubi-tuner's dataset configuration (.toml), or ai-toolkit's (.yaml)")
    return dialect


def _content(file: _File) -> Options:
    text = _text_of(file)
    try:
        content = file.dialect.parse(text)
    except Exception as error:  # PyYAML lets through what int, datetime and dict raise; both recurse
        reason = shown(" ".join(str(error).split()))[:200]
        raise file.wrong(f" cannot be read: {reason}", file.dialect.syntax) from error
    if not isinstance(content, Mapping):
        raise file.wrong(" names no dataset", file.dialect.shape)
    return content


def _text_of(file: _File) -> str:
    try:
        path = Path(file.place).expanduser()
        if not path.is_file():
            state = "is no file" if path.exists() else "does not exist"
            raise file.wrong(f" {state}", "check the path; a relative one starts at the working directory")
        if path.stat().st_size > LARGEST_FILE:
            raise file.wrong(f" has more than {LARGEST_FILE:,} bytes", "name the configuration itself")
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise file.wrong(" is not UTF-8", "save it as UTF-8") from error
    except (OSError, ValueError, RuntimeError) as error:  # the last: ~name of nobody
        reason = getattr(error, "strerror", None) or error
        raise file.wrong(f" cannot be read: {reason}", "check the path and its permissions") from error


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False


def _effective(tables: Sequence[_Table]) -> dict[str, tuple[str, Any]]:
    """Option -> where it stands and its value: the innermost, where several tables say it."""
    return {
        key if isinstance(key, str) else _said(key): (table.where, value)
        for table in reversed(tables)
        for key, value in table.options.items()
        if value is not None
    }


def _source(file: _File, tables: Sequence[_Table]) -> SourceSpec:
    options = _effective(tables)
    for key, (where, value) in options.items():
        if key in _REFUSED and _matters(key, value):
            raise file.wrong(f": {where}.{key}={_said(value)} cannot be taken over", _REFUSED[key])
    fields: dict[str, Any] = {}
    for key, (name, how) in file.dialect.words.items():
        value = _read(file, key, *options[key], how) if key in options else None
        if value is not None:
            fields.setdefault(name, value)
    for name in fields.keys() & {"folder", "masks"}:
        fields[name] = file.placed(fields[name])
    if "folder" not in fields:
        raise file.wrong(f": {tables[0].where} names no folder", file.dialect.shape)
    return SourceSpec(named_repeats=False, **fields)


def _read(file: _File, key: str, where: str, value: Any, how: _Value) -> Any:
    try:
        return how.read(value)
    except (ValueError, OverflowError) as error:
        raise file.wrong(f": {where}.{key}={_said(value)} cannot be used", how.wanted) from error


def _matters(key: str, value: Any) -> bool:
    """Whether an option makes their training another than ours."""
    silent = key in _WITHOUT_EFFECT or key.startswith("cache_")
    return (bool(value) or key in _TOLD_OFF) and not silent and value != _AS_HERE.get(key)


def _notes(file: _File, datasets: Sequence[Sequence[_Table]]) -> list[str]:
    """One line for each option and value that is not taken over, however many datasets say it."""
    places: dict[tuple[str, str], list[str]] = {}
    for tables in datasets:
        for key, (where, value) in _effective(tables).items():
            if key not in file.dialect.words and _matters(key, value):
                places.setdefault((key, _said(value)), []).append(where)
    return [
        f"{file.name}: {shown(key)[:_LONGEST]}={said} is not taken over ({listed(list(dict.fromkeys(wheres)))})"
        + (f"; {_INSTEAD[key].format(said)} does it for all sources" if key in _INSTEAD else "")
        for (key, said), wheres in places.items()
    ]


def _said(value: Any) -> str:
    """A value on one short line."""
    if isinstance(value, bool):
        return str(value).lower()
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python spells out no number of more than some thousand digits
        return "a number of too many digits"
