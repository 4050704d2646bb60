"""What to say of a run that no layout brings onto a card: what is missing, and the smallest change that fits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from flux2_lora.errors import UserError
from flux2_lora.placement import MEMORY
from flux2_lora.planning.hardware import Card
from flux2_lora.planning.memory import Layout
from flux2_lora.planning.search import SLOTS, Search
from flux2_lora.planning.work import Given, Plan, Work
from flux2_lora.quantize import PrecisionSpec


def refusal(work: Work, card: Card, found: Sequence[Plan]) -> UserError:
    """What is missing, and the smallest change of the run after which it fits."""
    least = min(found, key=lambda plan: plan.vram.peak)
    what = (
        f"{work.resolution} px, batch_size={work.batch_size} and precision.base={work.precision.base} need "
        f"{least.vram.peak / 1e9:.1f} GB at least, and {card.name} has {card.vram_bytes / 1e9:.1f} GB to give"
    )
    short = [plan for plan in found if plan.vram.peak <= card.vram_bytes]
    if short:
        host = min(plan.host_bytes for plan in short)
        what = f"blocks that do not stay on {card.name} need {host / 1e9:.1f} GB of host memory, "
        ways = ["close other programs"]
        ways += ["memory.host=disk"] if work.given.host not in ("auto", "disk") else []
        ways += ["memory.block_inputs=device"] if work.given.block_inputs == "host" else []
        return UserError(f"{what}and there are {card.host_bytes / 1e9:.1f} GB", f"{', or '.join(ways)}")
    changes = list(_changes(work))
    for words, name, value in changes:
        if _fits_somehow(replace(work, **{name: value}), card):
            return UserError(what, f"{words} fits")
    said: dict[str, str] = {}
    together: dict[str, Any] = {}
    for words, name, value in changes:
        said[name], together[name] = words, value
        if len(said) > 1 and _fits_somehow(replace(work, **together), card):
            return UserError(what, f"{' '.join(said.values())} fits")
    return UserError(what, "choose a smaller model, or device=cpu")


def _changes(work: Work) -> Iterator[tuple[str, str, Any]]:
    """(as the user would write it, field, value) of changes that cut memory, those that cost least first."""
    given = work.given
    if given.plain is not None or given.resident is not None or given.block_inputs == "device":
        settled = {"plain_blocks": given.plain, "resident_blocks": given.resident}
        words = [f"memory.{name}=null" for name, value in settled.items() if value is not None]
        words += ["memory.block_inputs=auto"] if given.block_inputs == "device" else []
        yield " ".join(words), "given", Given(slots=given.slots, host=given.host)
    if work.batch_size > 1:
        yield "batch_size=1", "batch_size", 1
    for side in (768, 512, 256):
        if side < work.resolution:
            yield f"dataset.resolution={side}", "resolution", side
    if work.precision.base != "nf4":
        yield "precision.base=nf4", "precision", PrecisionSpec(base="nf4")
    if work.adapter.rank > 8:
        yield "adapter.rank=8", "adapter", replace(work.adapter, rank=8)


def _fits_somehow(work: Work, card: Card) -> bool:
    """Whether the layout that holds least fits, of those that the user leaves open."""
    search, given = Search(work=work, card=card, costs=work.costs(card)), work.given
    plain, on_host = min(given.plain or 0, search.count), given.block_inputs != "device"
    if not card.streams or search.stays:
        on_host = card.streams and given.block_inputs == "host"
        return search.plan("", Layout(resident=search.count, plain=plain, inputs_on_host=on_host), "device").fits(card)
    layout = Layout(slots=given.slots or SLOTS[0], resident=given.resident or 0, plain=plain)
    host = "disk" if given.host in ("auto", "disk") else MEMORY
    return any(search.plan("", replace(layout, inputs_on_host=on), host).fits(card) for on in {on_host, False})
