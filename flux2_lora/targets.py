"""Which projections get an adapter: groups in words, resolved to an exact list of modules.

    attention   mlp                  by kind, in all blocks
    double   single                  by block, all kinds
    single[5:10]   double[:4]        a range of blocks, counted from 0, end excluded, as Python counts
    single[5:10].attention           both
    attention:32                     any of these with a number of its own: a rank, or a factor of the rate

Law: a list names the union of its entries; where two entries name one module, the later entry's number holds. FLUX
fuses some attention and MLP projections in its single blocks: these belong to both kinds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flux2_lora.errors import UserError, did_you_mean
from flux2_lora.keys import is_target, kinds_of

_BLOCKS = {"double": "transformer_blocks", "single": "single_transformer_blocks"}
_KINDS = ("attention", "mlp")
_ENTRY = re.compile(
    r"(?:(?P<blocks>[a-z]+)(?:\[(?P<start>\d*):(?P<stop>\d*)\])?)?(?:(?:^|\.)(?P<kind>[a-z]+))?(?::(?P<number>\d+(?:\.\d*)?))?"
)


@dataclass(frozen=True, kw_only=True)
class Target:
    """One entry. blocks: None for all; kind: None for both; number: None where the entry gives none."""

    blocks: str | None = None
    start: int = 0
    stop: int | None = None
    kind: str | None = None
    number: float | None = None

    def holds(self, architecture: str, module: str) -> bool:
        """Whether this entry names a Diffusers module."""
        stack, number = module.split(".")[:2]
        if self.blocks is not None:
            inside = self.start <= int(number) and (self.stop is None or int(number) < self.stop)
            if stack != _BLOCKS[self.blocks] or not inside:
                return False
        return self.kind is None or self.kind in kinds_of(architecture, module)


def parse(entry: str, option: str = "adapter.targets") -> Target:
    """Read one entry; UserError that says what is wrong with it."""
    found = _ENTRY.fullmatch(entry.replace(" ", ""))
    words = [found["blocks"], found["kind"]] if found else []
    blocks = next((word for word in words if word in _BLOCKS), None)
    kind = next((word for word in words if word in _KINDS), None)
    unknown = [word for word in words if word and word not in (blocks, kind)]
    ranged = found is not None and found["start"] is not None
    if found is None or unknown or (blocks is None and (ranged or kind is None)):
        wrong = unknown[0] if unknown else entry
        raise UserError(
            f"{option} names {entry!r}, which is no group of projections",
            did_you_mean(wrong, [*_KINDS, *_BLOCKS]) + "; ranges are written single[5:10], ranks attention:32",
        )
    number = float(found["number"]) if found["number"] else None
    stop = int(found["stop"]) if found["stop"] else None
    return Target(blocks=blocks, start=int(found["start"] or 0), stop=stop, kind=kind, number=number)


def parse_ranked(entry: str) -> Target:
    """Read one entry whose number, if it has one, is a rank."""
    target = parse(entry)
    if target.number is not None and not (1 <= target.number <= 1024 and target.number.is_integer()):
        raise UserError(f"adapter.targets names {entry!r} with a rank out of range", "give a rank from 1 to 1024")
    return target


def resolve(entries: Sequence[str], architecture: str, modules: Iterable[str], rank: int) -> dict[str, int]:
    """Module -> rank for all modules that the entries name, in the order of `modules` (the Linears of the blocks).

    UserError for an entry that names none.
    """
    if not entries:
        raise UserError("adapter.targets=[] leaves nothing to train", "use adapter.targets=[attention,mlp]")
    for entry in entries:
        parse_ranked(entry)
    numbers = numbers_of(entries, architecture, modules, option="adapter.targets")
    return {module: rank if number is None else int(number) for module, number in numbers.items()}


def numbers_of(
    entries: Sequence[str], architecture: str, modules: Iterable[str], *, option: str
) -> dict[str, float | None]:
    """Module -> the number of the last entry that names it, for all modules that entries name, in their order.

    UserError for an entry that names none.
    """
    targetable = list(dict.fromkeys(module for module in modules if is_target(architecture, module)))
    numbers: dict[str, float | None] = {}
    for entry in entries:
        target = parse(entry, option)
        named = [module for module in targetable if target.holds(architecture, module)]
        if not named:
            counts = {
                word: len({m.split(".")[1] for m in targetable if m.startswith(f"{stack}.")})
                for word, stack in _BLOCKS.items()
            }
            raise UserError(
                f"{option} names {entry!r}, but the model has no such block",
                f"it has {counts['double']} double and {counts['single']} single blocks, counted from 0",
            )
        numbers |= dict.fromkeys(named, target.number)
    return {module: numbers[module] for module in targetable if module in numbers}
