"""What clients make of a file, against what was measured with their own code: ComfyUI 0.29, Forge (2025-06), Forge Neo
(2026-02), InvokeAI 6.14, Diffusers 0.42, on adapters of rank 4 and alpha 8 for attention and MLP of all blocks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from flux2_lora.adapters import LoraWeights
from flux2_lora.export.clients import CLIENTS, file_of
from flux2_lora.export.formats import comfyui, universal
from flux2_lora.export.proof import relative_difference
from flux2_lora.keys import ARCHITECTURES

RANK, SCALE, HIDDEN = 4, 2.0, 6
State = dict[str, Tensor]


def adapter(architecture: str, *, outside: bool = False) -> dict[str, LoraWeights]:
    """Two blocks of each kind, all Linears in the proportions of the architecture."""
    rng = torch.Generator().manual_seed(0)
    table = ARCHITECTURES[architecture]
    places = {**table.blocks, **(table.outside if outside else {})}
    modules = {}
    for name, place in places.items():
        height = HIDDEN * (place.stop - place.start) * (1 if place.parts > 1 else 6)
        for number in "01" if "*" in name else "0":
            down, up = torch.randn(RANK, 8, generator=rng), torch.randn(height, RANK, generator=rng)
            modules[name.replace("*", number)] = LoraWeights(down=down, up=up, scale=SCALE)
    return modules


def named(modules: Mapping[str, LoraWeights], spell: Callable[[str], str], *, kohya: bool, alpha: bool) -> State:
    """The tensors by Diffusers' modules. alpha: beside them, else folded into the ups."""
    down, up = (".lora_down.weight", ".lora_up.weight") if kohya else (".lora_A.weight", ".lora_B.weight")
    state = {}
    for name, lora in modules.items():
        state[spell(name) + down] = lora.down
        state[spell(name) + up] = lora.up if alpha else lora.scale * lora.up
        if alpha:
            state[spell(name) + ".alpha"] = torch.tensor(SCALE * RANK)
    return state


def by_bfl(modules: Mapping[str, LoraWeights], architecture: str, *, kohya: bool, alpha: bool) -> State:
    folded = comfyui(modules, architecture, torch.float32)
    found = {}
    for key, tensor in folded.items():
        name, half = key.rsplit(".lora_", 1)
        spelled = {"A.weight": "down.weight", "B.weight": "up.weight"}[half] if kohya else half
        found[f"{name}.lora_{spelled}"] = tensor / SCALE if alpha and half.startswith("B") else tensor
        if alpha and half.startswith("A"):
            found[f"{name}.alpha"] = torch.tensor(SCALE * len(tensor))
    return found


def by_kohya(modules: Mapping[str, LoraWeights], architecture: str, alpha: str) -> State:
    tensors = universal(modules, architecture, torch.float32)
    if alpha == "none":
        return {key: tensor for key, tensor in tensors.items() if not key.endswith(".alpha")}
    if alpha == "scale":
        factor = {".alpha": SCALE, "_up.weight": 1 / SCALE}
        return {key: next((f for e, f in factor.items() if key.endswith(e)), 1.0) * t for key, t in tensors.items()}
    return tensors


def saved_by_diffusers(modules: Mapping[str, LoraWeights]) -> State:
    """Its savers leave alpha out of the tensors."""
    return {
        k: t for k, t in named(modules, "transformer.{}".format, kohya=False, alpha=True).items() if "alpha" not in k
    }


FILES: Mapping[str, Callable[[Mapping[str, LoraWeights], str], State]] = {
    "a": lambda m, _: named(m, "transformer.{}".format, kohya=False, alpha=False),
    "b": lambda m, _: saved_by_diffusers(m),
    "b2": lambda m, _: saved_by_diffusers(m),
    "b3": lambda m, _: named(m, "transformer.{}".format, kohya=False, alpha=True),
    "c": lambda m, a: by_bfl(m, a, kohya=False, alpha=False),
    "c2": lambda m, a: by_bfl(m, a, kohya=False, alpha=True),
    "d": lambda m, a: by_kohya(m, a, "scale"),
    "d2": lambda m, a: by_kohya(m, a, "none"),
    "d3": lambda m, a: by_kohya(m, a, "rank"),
    "e": lambda m, a: by_bfl(m, a, kohya=True, alpha=True),
    "f": lambda m, _: named(m, "base_model.model.{}".format, kohya=False, alpha=False),
    "g": lambda m, _: named(m, "{}".format, kohya=False, alpha=False),
    "h": lambda m, _: named(m, lambda n: f"lora_transformer_{n.replace('.', '_')}", kohya=True, alpha=True),
    "i": lambda m, _: named(m, "diffusion_model.{}".format, kohya=False, alpha=False),
}
# Columns: ComfyUI, Diffusers, Forge, Forge Neo, InvokeAI.
COLUMNS = ("ComfyUI", "Diffusers", "Forge", "Forge Neo", "InvokeAI")
MEASURED = {
    "flux2": {
        "a": "ok ok refused ok ok",
        "b": "half ok refused half half",
        "b2": "half half refused half half",
        "b3": "ok refused refused ok refused",
        "c": "ok ok refused ok ok",
        "c2": "ok refused refused ok refused",
        "d": "ok ok refused ok ok",
        "d2": "ok ok refused ok ok",
        "d3": "ok ok refused ok ok",
        "e": "ok nothing refused ok refused",
        "f": "nothing ok refused refused ok",
        "g": "ok nothing refused ok ok",
        "h": "ok nothing refused ok refused",
        "i": "nothing ok refused refused refused",
    },
    "flux1": {
        "a": "ok ok ok ok ok",
        "b": "half ok half half half",
        "b3": "ok ok ok ok refused",
        "c": "ok nothing ok ok ok",
        "c2": "ok nothing ok ok refused",
        "d": "ok ok ok ok ok",
        "d2": "ok ok ok ok ok",
        "d3": "ok ok ok ok ok",
        "e": "ok ok ok ok refused",
        "f": "nothing refused refused refused ok",
        "g": "ok nothing refused ok refused",
        "h": "ok refused ok ok refused",
        "i": "nothing nothing refused refused refused",
    },
}
CELLS = [
    (architecture, file, client, outcome)
    for architecture, rows in MEASURED.items()
    for file, outcomes in rows.items()
    for client, outcome in zip(COLUMNS, outcomes.split(), strict=True)
]


def outcome_of(architecture: str, file: str, client: str) -> str:
    """ok, half, nothing or refused, by our tables."""
    modules = adapter(architecture)
    header = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": SCALE * RANK})} if file == "b" else {}
    reading = CLIENTS[client](file_of(FILES[file](modules, architecture), header), architecture)
    if reading.refusal:
        return "refused"
    if not reading.updates:
        return "nothing"
    assert reading.updates.keys() == modules.keys()
    assert not reading.unread
    worst = max(relative_difference(lora, reading.updates[name]) for name, lora in modules.items())
    halves = {name: LoraWeights(down=m.down, up=m.up, scale=m.scale / 2) for name, m in modules.items()}
    half = max(relative_difference(lora, reading.updates[name]) for name, lora in halves.items())
    return "ok" if worst < 1e-4 else "half" if half < 1e-4 else "wrong"


@pytest.mark.parametrize(("architecture", "file", "client", "outcome"), CELLS)
def test_a_client_reads_a_file_as_was_measured(architecture: str, file: str, client: str, outcome: str) -> None:
    assert outcome_of(architecture, file, client) == outcome


def unread(form: str, client: str) -> tuple[int, bool]:
    """(Linears of FLUX.2 that a client leaves out when all are adapted, whether it refuses the file)."""
    modules = adapter("flux2", outside=True)
    tensors = comfyui(modules, "flux2", torch.float32)
    if form == "diffusers":
        tensors = named(modules, "transformer.{}".format, kohya=False, alpha=False)
    if form == "kohya":
        prefix, names = "lora_unet_", {}
        for key, tensor in tensors.items():
            name, half = key.removeprefix("diffusion_model.").rsplit(".lora_", 1)
            down = half.startswith("A")
            names[f"{prefix}{name.replace('.', '_')}.lora_{'down' if down else 'up'}.weight"] = tensor
        tensors = names
    reading = CLIENTS[client](file_of(tensors, {}), "flux2")
    return len(modules) - len(reading.updates), bool(reading.refusal)


@pytest.mark.parametrize(
    ("form", "client", "lost", "refused"),
    [
        ("diffusers", "ComfyUI", 7, False),
        ("diffusers", "Forge Neo", 7, False),
        ("diffusers", "Diffusers", 0, False),
        ("diffusers", "InvokeAI", 0, False),
        ("comfyui", "ComfyUI", 0, False),
        ("comfyui", "Diffusers", 1, False),
        ("comfyui", "InvokeAI", 0, False),
        ("kohya", "ComfyUI", 0, False),
        ("kohya", "Diffusers", 6, False),
        ("kohya", "InvokeAI", 36, True),
    ],
)
def test_linears_outside_the_blocks_are_lost_as_was_measured(
    form: str, client: str, lost: int, *, refused: bool
) -> None:
    found = unread(form, client)
    assert found[1] == refused
    assert refused or found[0] == lost


def test_invokeai_knows_flux1_by_its_first_blocks() -> None:
    later = {name: lora for name, lora in adapter("flux1").items() if ".0.attn.add_q" not in name}
    file = file_of(named(later, "transformer.{}".format, kohya=False, alpha=False), {})
    assert "first blocks" in CLIENTS["InvokeAI"](file, "flux1").refusal
    assert not CLIENTS["ComfyUI"](file, "flux1").refusal


def test_forge_takes_a_file_with_twelve_unknown_keys_and_none_with_thirteen() -> None:
    known = named(adapter("flux1"), "transformer.{}".format, kohya=False, alpha=False)
    strays = {f"stray{number}.weight": torch.ones(1) for number in range(13)}
    assert CLIENTS["Forge"](file_of({**known, **strays}, {}), "flux1").refusal
    del strays["stray0.weight"]
    assert len(CLIENTS["Forge"](file_of({**known, **strays}, {}), "flux1").unread) == 12
