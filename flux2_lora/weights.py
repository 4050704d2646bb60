"""A model's weights as they lie in safetensors files, under Diffusers' names, one tensor in memory at a time.

Law: W = scale * values, with the very bytes of the file, and nothing is guessed. Opening reads headers only and settles
all that can be wrong: a truncated file, an unknown number format, scales that belong to no weight. Reading opens the
file for one tensor and maps it; what is not kept is unmapped with it, so that a 24 GB file never counts as memory.
Pickles are never opened.

Spellings of scaled FP8 after ComfyUI (QUANTIZATION.md, and its reader of older files) and BFL's releases:
`X.weight` beside `X.scale_weight` or `X.weight_scale`, one number or one a row; `X.comfy_quant` or the header's
`_quantization_metadata` names the format; `scaled_fp8` only marks the file. `X.scale_input` and `X.input_scale` are
for matrix products in FP8 and have no part in W.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flux2_lora.errors import UserError, listed
from flux2_lora.keys import ARCHITECTURES, bfl_of

FP8_FORMATS = ("float8_e4m3fn", "float8_e5m2")
_NUMBERS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
_SCALES = (".weight_scale", ".scale_weight")
_NOT_IN_W = (".input_scale", ".scale_input", ".comfy_quant")
_OTHER_FORMATS = (".weight_scale_2", ".pre_quant_scale", ".absmax", ".quant_state.bitsandbytes__nf4", ".qweight")
Header = tuple[tuple[int, ...], str]
"""Shape and number format of a tensor."""
_REMEDY = "give a safetensors file in bf16, fp16, fp32, fp8 or scaled fp8"


@dataclass(frozen=True, kw_only=True, eq=False)
class Stored:
    """A tensor as a file has it: scale * values. values: its shape; scale: float32 [1 1] or [out 1], or None for 1.

    values are a view of the mapped file, which stays mapped as long as they live: `dense` and `to` copy.
    """

    values: Tensor
    scale: Tensor | None = None

    def to(self, device: torch.device | str) -> Stored:
        """A copy on a device, byte for byte."""
        scale = None if self.scale is None else self.scale.to(device, copy=True)
        return Stored(values=self.values.to(device, copy=True), scale=scale)

    def rows(self, start: int, stop: int) -> Stored:
        """Rows [start, stop) of a matrix with their scales."""
        scale = self.scale if self.scale is None or len(self.scale) == 1 else self.scale[start:stop]
        return Stored(values=self.values[start:stop], scale=scale)

    def dense(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        """A copy of the tensor itself, rounded once."""
        return self.fill(torch.empty(self.values.shape, dtype=dtype, device=device))

    def fill(self, target: Tensor) -> Tensor:
        """Write the tensor into `target` of its shape, rounded once; returns `target`."""
        if self.scale is None:
            return target.copy_(self.values)
        return target.copy_(self.values.to(target.device).float() * self.scale.to(target.device))


@dataclass(frozen=True, kw_only=True)
class _Place:
    """rows [start, stop) of `key` in `file` (all rows where stop is None), and its scale's key if it has one."""

    file: Path
    key: str
    scale: str | None = None
    start: int = 0
    stop: int | None = None
    swapped: bool = False


class Weights:
    """Tensors by name. `shapes` is known at once; `read` touches the file."""

    def __init__(self, source: Path, places: Mapping[str, _Place], shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.source = source
        self.shapes = shapes
        self._places = places

    def read(self, name: str) -> Stored:
        """Map one tensor. KeyError for an unknown name, UserError for FP8 that has lost its scale."""
        place = self._places[name]
        with _opened(place.file) as file:
            values = _rows(file, place.key, place)
            scale = None if place.scale is None else _scale(file, place, self.shapes[name][0])
        if scale is None and _looks_scaled(values):
            raise UserError(
                f"{place.file} holds {place.key} in FP8 up to 448, as only scaled weights are, but without its scale",
                "the file was converted wrongly; fetch it from its first source",
            )
        if place.swapped:
            values = torch.cat(values.chunk(2)[::-1])
            scale = scale if scale is None or len(scale) == 1 else torch.cat(scale.chunk(2)[::-1])
        return Stored(values=values, scale=scale)

    def rows(self, name: str, indices: Tensor) -> Tensor:
        """Rows `indices` [n] of an unscaled matrix, for embeddings: the other rows are never read."""
        place = self._places[name]
        with _opened(place.file) as file:
            matrix: Tensor = file.get_tensor(place.key)
            return matrix[indices]

    def below(self, prefix: str) -> Weights:
        """The tensors whose names start with `prefix`, without it."""
        names = [name for name in self.shapes if name.startswith(prefix)]
        return Weights(
            self.source,
            {name.removeprefix(prefix): self._places[name] for name in names},
            {name.removeprefix(prefix): self.shapes[name] for name in names},
        )

    def renamed(self, names: Mapping[str, str]) -> Weights:
        """The same tensors, some of them under another name; names that are not there are passed over."""
        return Weights(
            self.source,
            {names.get(name, name): place for name, place in self._places.items()},
            {names.get(name, name): shape for name, shape in self.shapes.items()},
        )

    def expect(self, shapes: Mapping[str, tuple[int, ...]], *, more: bool = False) -> None:
        """UserError that names tensors which are missing, mis-shaped or, unless `more` may be there, unexpected."""
        misshaped = [
            f"{name} {list(self.shapes[name])} for {list(shape)}"
            for name, shape in shapes.items()
            if name in self.shapes and self.shapes[name] != shape
        ]
        wrong = [
            *_counted("missing", sorted(shapes.keys() - self.shapes.keys())),
            *_counted("unexpected", [] if more else sorted(self.shapes.keys() - shapes.keys())),
            *_counted("mis-shaped", sorted(misshaped)),
        ]
        if wrong:
            raise UserError(
                f"{self.source} does not fit its model: {'; '.join(wrong)}",
                "the file is of another model or incomplete; fetch it again, or choose its model with model=...",
            )


def open_folder(folder: Path) -> Weights:
    """The safetensors of a Diffusers or transformers part (`transformer/`), sharded or not, names as they are."""
    files = sorted(folder.glob("*.safetensors"))
    indexed = _index(folder)
    files = [file for file in files if file.name in indexed] if indexed else files
    absent = sorted(indexed - {file.name for file in files})
    if absent or not files:
        pickled = any(folder.glob("*.bin"))
        raise UserError(
            f"{folder} lacks {listed(absent) or 'safetensors files'}",
            "pickled weights are not opened; fetch the safetensors form" if pickled else "fetch the missing files",
        )
    places: dict[str, _Place] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        for key, (shape, _) in read_header(file).items():
            places[key], shapes[key] = _Place(file=file, key=key), shape
    return Weights(folder, places, shapes)


def open_file(path: Path, architecture: str) -> Weights:
    """A single file in BFL's or Diffusers' names, with or without ComfyUI's prefix, under Diffusers' names.

    Raises UserError for a file that is damaged, holds no transformer of `architecture`, or is quantised in a format
    other than FP8. Tensors that the table does not know keep their names, so that `Weights.expect` names them.
    """
    header = read_header(path)
    prefix = next(p for p in _PREFIXES if not p or any(key.startswith(p) for key in header))
    header = {key: found for key, found in header.items() if key.startswith(prefix)}
    told = _formats(path, header, prefix)
    _refuse_quantisation(path, header, told)
    tensors = {key.removeprefix(prefix): (key, shape) for key, (shape, _) in header.items()}
    scales = _take_scales(path, tensors)
    scaled = [f"{layer}.weight" for layer in told] if "scaled_fp8" not in tensors else list(tensors)
    fp8 = [key for key in scaled if key.endswith(".weight") and header[tensors[key][0]][1].startswith("F8_")]
    lost = [key for key in fp8 if key not in scales]
    if lost:
        raise UserError(f"{path} says that it is scaled, but has no scale for {listed(lost, 3)}", _REMEDY)
    for key in [k for k in tensors if k.endswith(_NOT_IN_W) or k == "scaled_fp8"]:
        del tensors[key]
    named = _diffusers_names(tensors, architecture)
    places, shapes = {}, {}
    for name, (key, cut) in named.items():
        actual, shape = tensors[key]
        place = _Place(file=path, key=actual, scale=scales.get(key), swapped=cut.swapped)
        if (cut.start, cut.stop) != (0, 1):
            place = replace(place, start=round(cut.start * shape[0]), stop=round(cut.stop * shape[0]))
            shape = (round(cut.stop * shape[0]) - place.start, *shape[1:])
        places[name], shapes[name] = place, shape
    return Weights(path, places, shapes)


def read_header(path: Path) -> dict[str, Header]:
    """Key -> (shape, number format) of a safetensors file; UserError where it is damaged, cut short or another kind."""
    if path.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        raise UserError(f"{path} is a pickle, which can run any code when opened", _REMEDY)
    if path.suffix == ".gguf":
        raise UserError(f"{path} is a GGUF file, which this program does not read", _REMEDY)
    with _opened(path) as file:
        header = {}
        for key in file.keys():  # noqa: SIM118 - not a dict
            part = file.get_slice(key)
            header[key] = (tuple(part.get_shape()), str(part.get_dtype()))
        return header


def read_json(path: Path) -> dict[str, Any]:
    """A config file; UserError when it is absent or no JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error})", "fetch the file again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is no JSON object", "fetch the file again")
    return content


@dataclass(frozen=True, kw_only=True)
class _Cut:
    """A part of a weight's rows, as fractions of its height."""

    start: float = 0
    stop: float = 1
    swapped: bool = False


def _diffusers_names(tensors: Mapping[str, object], architecture: str) -> dict[str, tuple[str, _Cut]]:
    """Diffusers name -> (key in the file, rows). A file in Diffusers' names passes as it is."""
    if any(".transformer_blocks." in f".{key}" for key in tensors):
        return {key: (key, _Cut()) for key in tensors}
    named: dict[str, tuple[str, _Cut]] = {}
    taken: set[str] = set()
    for starred in _all_names(architecture):
        for module in _numbered(starred, architecture, tensors):
            place = bfl_of(architecture, module)
            for leaf, spelled in (("weight", "weight"), ("bias", "bias"), ("weight", "scale")):
                key = f"{place.module}.{spelled}"
                if key in tensors:
                    cut = _Cut(start=place.start / place.parts, stop=place.stop / place.parts, swapped=place.swapped)
                    named[f"{module}.{leaf}"] = (key, cut)
                    taken.add(key)
    return named | {key: (key, _Cut()) for key in tensors if key not in taken}


def _all_names(architecture: str) -> Iterator[str]:
    table = ARCHITECTURES[architecture]
    yield from (*table.blocks, *table.outside, *table.norms)


def _numbered(starred: str, architecture: str, tensors: Mapping[str, object]) -> list[str]:
    """A starred module for every block that the file holds."""
    if "*" not in starred:
        return [starred]
    kind = bfl_of(architecture, starred.replace("*", "0")).module.partition(".")[0]
    numbers = {key.split(".")[1] for key in tensors if key.startswith(f"{kind}.")}
    return [starred.replace("*", number) for number in sorted(numbers, key=lambda n: (len(n), n))]


def _take_scales(path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> dict[str, str]:
    """Weight -> key of its scale, and take the scales out of `tensors`; UserError for one that fits no weight."""
    scales: dict[str, str] = {}
    unfit = []
    for key in [k for k in tensors if k.endswith(_SCALES)]:
        actual, shape = tensors.pop(key)
        weight = key.rpartition(".")[0] + ".weight"
        rows = tensors[weight][1][0] if weight in tensors else 0
        fits = shape in ((), (1,), (1, 1), (rows,), (rows, 1))
        if not rows or not fits or weight in scales:
            unfit.append(f"{key} {list(shape)}")
        scales[weight] = actual
    if unfit:
        raise UserError(f"{path} holds scales that fit no weight, per tensor or per row: {listed(unfit, 3)}", _REMEDY)
    return scales


def _looks_scaled(values: Tensor) -> bool:
    """Whether e4m3 values reach +-448 (bytes 7e and fe): a plain cast of a model's weights stays below 10 or so."""
    return values.dtype == torch.float8_e4m3fn and bool((values.view(torch.uint8) & 0x7F == 0x7E).any())


def _formats(path: Path, header: Mapping[str, Header], prefix: str) -> dict[str, str]:
    """Layer -> the format that the file declares for it, in a tensor beside it or in the header's metadata."""
    with _opened(path) as file:
        beside = {key: bytes(file.get_tensor(key).tolist()) for key in header if key.endswith(".comfy_quant")}
        written = (file.metadata() or {}).get("_quantization_metadata", "{}")
    layers = _parsed(path, "_quantization_metadata", written.encode()).get("layers", {})
    layers |= {key.removesuffix(".comfy_quant"): _parsed(path, key, raw) for key, raw in beside.items()}
    known = {layer.removeprefix(prefix): str(told.get("format")) for layer, told in layers.items()}
    return {layer: told for layer, told in known.items() if f"{prefix}{layer}.weight" in header}


def _refuse_quantisation(path: Path, header: Mapping[str, Header], told: Mapping[str, str]) -> None:
    """UserError unless every matrix is a float, and in FP8 as far as the file says anything."""
    foreign = [key for key in header if key.endswith(_OTHER_FORMATS)]
    foreign += [f"{layer}: {name}" for layer, name in told.items() if name not in FP8_FORMATS]
    if foreign:
        raise UserError(f"{path} is quantised in a format other than FP8 ({listed(foreign, 2)})", _REMEDY)
    for key, (shape, dtype) in header.items():
        if len(shape) > 1 and dtype not in _NUMBERS:
            raise UserError(f"{path} holds {key} as {dtype}, which is no number format of a base model", _REMEDY)


def _parsed(path: Path, key: str, raw: bytes) -> dict[str, Any]:
    try:
        content = json.loads(raw)
    except ValueError as error:
        raise UserError(f"{path} describes its quantisation in {key} with no JSON", _REMEDY) from error
    return content if isinstance(content, dict) else {}


def _index(folder: Path) -> set[str]:
    """The files that an index of shards names; none where there is no index."""
    indices = sorted(folder.glob("*.safetensors.index.json"))
    return {str(name) for index in indices for name in read_json(index).get("weight_map", {}).values()}


def _rows(file: Any, key: str, place: _Place) -> Tensor:
    if place.stop is None:
        whole: Tensor = file.get_tensor(key)
        return whole
    part: Tensor = file.get_slice(key)[place.start : place.stop]
    return part


def _scale(file: Any, place: _Place, rows: int) -> Tensor:
    """[1 1], or [rows 1] cut like the weight."""
    scale: Tensor = file.get_tensor(place.scale).float().reshape(-1, 1)
    return scale if len(scale) == 1 else scale[place.start : place.start + rows]


def _counted(what: str, names: Sequence[str]) -> list[str]:
    return [f"{len(names)} {what} ({listed(names, 3)})"] if names else []


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file; UserError when there is none or it is not whole."""
    try:
        file = safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist", "give the path of a safetensors file") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error})", "fetch the file again") from error
    with file as opened:
        yield opened
