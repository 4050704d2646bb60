"""Which split is chosen, what is said where none fits, and the tables of docs/memory.md."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from flux2_lora.adapters import AdapterSpec
from flux2_lora.bundled import share
from flux2_lora.errors import UserError
from flux2_lora.families import ModelSpec, outline
from flux2_lora.planning.choose import choose, correct, drawing_plan, plans
from flux2_lora.planning.hardware import HardwareSpec, card_of
from flux2_lora.planning.memory import Learning
from flux2_lora.planning.work import Given, Plan, Previews, Work
from flux2_lora.quantize import PrecisionSpec
from flux2_lora.training.optimizers import OptimizerSpec, state_bytes
from tests.conftest import Command
from tests.plans import CARDS, MODELS, card, costs_of, outline_of, work_of

ADAM8 = Learning(state_bytes=2.03)


def named(model: str, px: int, hardware: str, name: str, **changes: float) -> Plan:
    """A plan by its name; of a card with some of its numbers changed."""
    work = work_of(model, px, learning=ADAM8)
    found = plans(work, card(hardware, **changes), costs_of(model, px))
    return next(plan for plan in found if plan.name == name)


def chosen(model: str, px: int, hardware: str, **changes: float) -> Plan:
    return choose(work_of(model, px, learning=ADAM8), card(hardware, **changes), costs_of(model, px)).chosen


@pytest.mark.parametrize(
    ("model", "billions"),
    [
        ("flux2_klein_base_4b", 3.88),
        ("flux2_klein_base_9b", 9.08),
        ("flux1_dev", 11.90),
        ("flux2_dev", 32.22),
        ("flux2_small", 11.90),
    ],
)
def test_a_page_of_a_model_says_its_shape(model: str, billions: float) -> None:
    counted = sum(parameter.numel() for parameter in outline_of(model).sketch().parameters())
    assert round(counted / 1e9, 2) == billions
    assert outline_of(model).released_bytes > 2 * counted
    if model in MODELS:
        assert round(costs_of(model, 512).parameters / 1e9, 2) == billions


def test_a_folder_that_is_here_says_its_own_shape(tiny: Path) -> None:
    spec = ModelSpec(family="flux2_small", path=str(tiny), title="t", architecture_name="a")
    assert outline(spec).config["num_single_layers"] == 4
    assert outline(spec).text_tokens == 16


def test_a_model_of_unknown_shape_is_refused() -> None:
    with pytest.raises(UserError, match="nothing says what shape") as error:
        outline(ModelSpec(family="flux1", path="nobody/nothing", title="t", architecture_name="a"))
    assert "model.geometry" in error.value.remedy


@pytest.mark.parametrize(
    ("model", "px", "hardware", "step_s", "stretch"),
    [
        ("flux1_dev", 512, "rtx3060_12gb", 3.54, 1.04),
        ("flux1_dev", 512, "rtx4060_8gb", 2.99, 1.06),
        ("flux1_dev", 512, "rtx4070_12gb", 1.61, 1.05),
        ("flux1_dev", 512, "rtx4090_24gb", 0.60, 1.68),
        ("flux1_dev", 512, "h200", 0.12, 3.5),
        ("flux1_dev", 1024, "rtx4060_8gb", 10.94, 1.00),
        ("flux1_dev", 1024, "h200", 0.46, 1.22),
        ("flux2_klein_base_9b", 512, "rtx4090_24gb", 0.63, 1.28),
        ("flux2_klein_base_9b", 1024, "rtx4070_12gb", 5.8, 1.00),
        ("flux2_klein_base_4b", 1024, "rtx4060_8gb", 5.1, 1.00),
        ("flux2_dev", 1024, "rtx4070_12gb", 21.3, 1.00),
        ("flux2_dev", 1024, "h200", 1.64, 1.05),
    ],
)
def test_streaming_stretches_a_step_as_it_was_predicted(
    model: str, px: int, hardware: str, step_s: float, stretch: float
) -> None:
    """Within 3 %: fully resident and recomputed, against two slots and nothing resident."""
    changes = {"copy_gb_s": 12.0} if hardware == "rtx3060_12gb" else {}
    resident = named(model, px, hardware, "resident, recomputed", **changes)
    scarce = named(model, px, hardware, "streamed, recomputed", **changes)
    assert resident.step_s == pytest.approx(step_s, rel=0.05 if step_s < 0.2 else 0.03)
    least = stretched(model, px, hardware, **changes)
    assert least / resident.step_s == pytest.approx(stretch, rel=0.03)
    assert scarce.step_s <= least * 1.0001


def stretched(model: str, px: int, hardware: str, **changes: float) -> float:
    """Seconds of a step with two slots and nothing resident."""
    from flux2_lora.planning.memory import Layout
    from flux2_lora.planning.search import Search

    search = Search(work=work_of(model, px), card=card(hardware, **changes), costs=costs_of(model, px))
    return search.step_s(Layout(slots=2), "pinned")


@pytest.mark.parametrize(
    ("model", "px", "hardware", "plain", "ratio"),
    [
        ("flux1_dev", 512, "rtx4060_8gb", 24, 0.92),
        ("flux1_dev", 512, "rtx3060_12gb", 44, 0.75),
        ("flux1_dev", 512, "rtx4070_12gb", 44, 0.82),
        ("flux1_dev", 768, "rtx4060_8gb", 11, 0.94),
        ("flux1_dev", 1024, "rtx4060_8gb", 5, 0.97),
        ("flux1_dev", 1024, "rtx3060_12gb", 12, 0.94),
        ("flux2_klein_base_9b", 512, "rtx4060_8gb", 16, 0.84),
        ("flux2_klein_base_9b", 1024, "rtx4060_8gb", 3, 0.97),
        ("flux2_klein_base_4b", 1024, "rtx4060_8gb", 7, 0.91),
    ],
)
def test_memory_goes_to_plain_blocks_as_it_was_predicted(
    model: str, px: int, hardware: str, plain: int, ratio: float
) -> None:
    """Against fully resident and recomputed, which none of these cards could hold; docs/memory.md has the reasons."""
    plan = chosen(model, px, hardware)
    assert plan.step_s / named(model, px, hardware, "resident, recomputed").step_s == pytest.approx(ratio, abs=0.04)
    assert plan.plain_blocks == pytest.approx(plain, abs=5)
    assert plan.resident_blocks <= 2
    assert plan.vram.peak <= card(hardware).vram_bytes


@pytest.mark.parametrize("model", ["flux1_dev", "flux2_klein_base_4b"])
def test_more_memory_is_never_slower(model: str) -> None:
    steps = [chosen(model, 512, "rtx4060_8gb", vram_gb=size).step_s for size in (5, 6, 7, 8, 10, 12, 16, 24, 48)]
    assert all(after <= before + 1e-4 for before, after in pairwise(steps))
    assert steps[-1] < 0.8 * steps[0]


@pytest.mark.parametrize("hardware", CARDS)
def test_more_pixels_never_need_less_memory_or_time(hardware: str) -> None:
    found = [named("flux1_dev", px, hardware, "streamed, recomputed") for px in (512, 768, 1024)]
    for less, more in pairwise(found):
        assert less.vram.activations < more.vram.activations
        assert less.vram.working <= more.vram.working
        assert less.step_s < more.step_s


def test_little_host_memory_streams_off_the_disk() -> None:
    plan = chosen("flux1_dev", 1024, "rtx4060_8gb", host_gb=8, disk_gb_s=5)
    assert plan.host == "disk"
    assert plan.host_bytes < 4e9
    assert plan.step_s <= 1.02 * chosen("flux1_dev", 1024, "rtx4060_8gb").step_s
    assert plan.disk_bytes - named("flux1_dev", 1024, "rtx4060_8gb", "streamed").disk_bytes > 11.5e9


def test_fp8_products_are_shown_and_taken_only_where_they_are_asked_for() -> None:
    work = work_of("flux1_dev", 512, learning=ADAM8)
    choice = choose(work, card("rtx4060_8gb"), costs_of("flux1_dev", 512))
    faster = next(plan for plan in choice.others if plan.matmul == "fp8")
    assert choice.chosen.matmul == "bf16"
    assert faster.step_s < choice.chosen.step_s
    asked = choose(replace(work, matmul="fp8"), card("rtx4060_8gb"), costs_of("flux1_dev", 512)).chosen
    assert asked.step_s == faster.step_s
    with pytest.raises(UserError, match="RTX 3060 12 GB multiplies no FP8"):
        choose(replace(work, matmul="fp8"), card("rtx3060_12gb"), costs_of("flux1_dev", 512))


def test_previews_and_accumulation_lengthen_the_run() -> None:
    work = work_of("flux2_klein_base_4b", 512, previews=Previews(every=100, pictures=4, steps=10, passes=2))
    plan = choose(work, card("rtx4060_8gb"), costs_of("flux2_klein_base_4b", 512)).chosen
    assert plan.preview_s == pytest.approx(4 * 10 * 2 * plan.draw_s)
    assert plan.run_s == pytest.approx(1000 * plan.step_s + 11 * plan.preview_s)  # the base is drawn too
    doubled = choose(replace(work, grad_accumulation=2), card("rtx4060_8gb"), costs_of("flux2_klein_base_4b", 512))
    assert doubled.chosen.step_s == pytest.approx(2 * plan.step_s)


@pytest.mark.parametrize(
    ("changes", "hardware", "remedy"),
    [
        ({"batch_size": 32}, 6, "batch_size=1 fits"),
        ({"resolution": 2048}, 4, "dataset.resolution=768 fits"),
        ({"adapter": AdapterSpec(rank=512)}, 5, "adapter.rank=8 fits"),
    ],
)
def test_what_cannot_fit_is_refused_with_the_change_that_would(
    changes: dict[str, object], hardware: float, remedy: str
) -> None:
    work = Work(outline=outline_of("flux2_klein_base_4b"), **{"resolution": 512, **changes})  # type: ignore[arg-type]
    with pytest.raises(UserError) as error:
        choose(work, card("rtx4060_8gb", vram_gb=hardware))
    assert "GB at least, and RTX 4060 8 GB has" in error.value.what
    assert error.value.remedy == remedy


@pytest.mark.slow
def test_several_changes_are_named_where_one_is_not_enough() -> None:
    work = work_of("flux2_klein_base_4b", 1024, batch_size=8, precision=PrecisionSpec(base="bf16"))
    with pytest.raises(UserError) as error:
        choose(work, card("rtx4060_8gb", vram_gb=3.1))
    assert error.value.remedy.startswith("batch_size=1 dataset.resolution=")


@pytest.mark.slow
def test_what_no_change_makes_fit_is_said() -> None:
    with pytest.raises(UserError, match="choose a smaller model") as error:
        choose(work_of("flux2_klein_base_4b", 512), card("rtx4060_8gb", vram_gb=1.0))
    assert "0.4 GB to give" in error.value.what


def test_first_steps_as_planned_say_nothing() -> None:
    plan = chosen("flux1_dev", 512, "rtx4060_8gb")
    held = plan.vram.peak - plan.vram.context
    assert correct(plan, card("rtx4060_8gb"), step_s=plan.step_s * 1.05, peak_bytes=held) == []


def test_a_slow_step_and_a_spill_are_said_with_the_option() -> None:
    plan, here = chosen("flux1_dev", 512, "rtx4060_8gb"), card("rtx4060_8gb")
    spilled = here.vram_bytes - plan.vram.context + int(0.5e9)
    slow, spill = correct(plan, here, step_s=2 * plan.step_s, peak_bytes=spilled)
    assert f"{2 * plan.run_s / 3600:.1f} h at this rate" in slow
    assert "hardware.bf16_tflops=11.3 hardware.utilisation=1 plans with it" in slow
    assert "shared memory" in spill
    fewer = plan.plain_blocks - -(-int(0.5e9) // plan.plain_bytes)
    assert f"memory.plain_blocks={fewer}" in spill


def test_memory_that_stays_free_is_offered_to_plain_blocks() -> None:
    plan = chosen("flux1_dev", 512, "rtx4060_8gb")
    (line,) = correct(plan, card("rtx4060_8gb"), step_s=plan.step_s, peak_bytes=int(4e9))
    assert "memory.plain_blocks=" in line
    assert "stay free" in line


@pytest.mark.parametrize(
    ("px", "matmul", "seconds"),
    [(512, "bf16", 0.96), (768, "bf16", 1.86), (1024, "bf16", 3.31), (512, "fp8", 0.61), (1024, "fp8", 1.98)],
)
def test_drawing_with_a_12b_model_on_8_gb(px: int, matmul: str, seconds: float) -> None:
    """Seconds of a forward pass of FLUX.1 dev in fp8 on an RTX 4060, as docs/memory.md has them."""
    layout, taken = drawing_plan(
        work_of("flux1_dev", px, matmul=matmul), card("rtx4060_8gb"), costs_of("flux1_dev", px)
    )
    assert taken == pytest.approx(seconds, rel=0.03)
    assert layout.slots >= 2


@pytest.mark.parametrize("name", sorted(page.stem for page in (share() / "configs" / "hardware").glob("*.yaml")))
def test_every_budget_is_complete_once_it_is_measured(name: str) -> None:
    found = card(name)
    assert min(found.vram_bytes, found.copy_bytes_s, found.flops_s, found.host_bytes) > 0
    assert found.measured == (name in ("auto", "cpu"))


def test_a_processor_is_measured() -> None:
    found = card_of(HardwareSpec(), torch.device("cpu"))
    assert found.measured
    assert not found.streams
    assert 1e8 < found.flops_s < 1e14
    assert found.context_bytes > 1e8


@pytest.mark.parametrize(
    ("kind", "expected"), [("adamw", 8), ("adamw8bit", 2.03), ("paged_adamw8bit", 2.03), ("lion", 4), ("prodigy", 16)]
)
def test_an_optimizer_is_asked_for_the_bytes_of_its_state(kind: str, expected: float) -> None:
    assert state_bytes(OptimizerSpec(kind=kind)) == pytest.approx(expected, abs=0.01)
    assert state_bytes(OptimizerSpec(kind=kind, ema_decay=0.9)) == pytest.approx(expected + 4, abs=0.01)


def test_the_command_plans_the_embedded_demo_and_writes_the_contract(command: Command) -> None:
    outcome = command("plan", "output=plan.json")
    assert outcome.code == 0, outcome.err
    assert "> resident" in outcome.out
    written = json.loads(Path("plan.json").read_text())
    vram = written["vram_bytes"]
    assert vram["peak"] == sum(size for part, size in vram.items() if part != "peak")
    assert {"host_bytes", "disk_bytes", "step_s", "resident_blocks", "plain_blocks"} <= written.keys()
    assert written["resident_blocks"] == 6
    assert not Path("outputs").exists()


def test_the_command_plans_for_a_card_and_a_model_that_are_not_here(command: Command) -> None:
    real = ("model=flux2_klein_base_4b", "hardware=rtx4060_8gb", "dataset.resolution=512", "optimizer=adamw8bit")
    outcome = command("plan", *real, "output=plan.json")
    assert outcome.code == 0, outcome.err
    assert "RTX 4060 8 GB: 7.4 GB to give" in outcome.out
    assert "assumed until a step is timed" in outcome.out
    assert json.loads(Path("plan.json").read_text())["plain_blocks"] > 10


def test_the_command_refuses_a_card_that_is_too_small_and_writes_nothing(command: Command) -> None:
    outcome = command("plan", "model=flux1_dev", "hardware=8gb", "hardware.vram_gb=1", "output=plan.json")
    assert outcome.code == 2
    assert outcome.err.splitlines()[0].startswith("error: 1024 px, batch_size=1")
    assert not Path("plan.json").exists()


@pytest.mark.parametrize("given", [Given(resident=10, slots=3, plain=2), Given(resident=4), Given(plain=0, slots=2)])
def test_what_the_user_settled_stays_as_it_is(given: Given) -> None:
    costs = costs_of("flux2_klein_base_4b", 512)
    plan = choose(replace(work_of("flux2_klein_base_4b", 512), given=given), card("rtx4060_8gb"), costs).chosen
    assert given.resident in (None, plan.resident_blocks)
    assert given.slots in (None, plan.slots) or plan.host == "device"
    assert given.plain in (None, plan.plain_blocks)


def test_what_the_user_settled_and_does_not_fit_is_refused() -> None:
    work = replace(work_of("flux2_klein_base_9b", 1024), given=Given(resident=32, plain=0))
    with pytest.raises(UserError, match="GB at least"):
        choose(work, card("rtx4060_8gb"), costs_of("flux2_klein_base_9b", 1024))


def test_blocks_that_host_memory_cannot_hold_are_said_to_be_the_cause() -> None:
    work, costs = work_of("flux2_klein_base_9b", 512), costs_of("flux2_klein_base_9b", 512)
    for host, remedy in (("auto", "close other programs"), ("pinned", "close other programs, or memory.host=disk")):
        with pytest.raises(UserError, match="GB of host memory") as error:
            choose(replace(work, given=Given(host=host)), card("rtx4060_8gb", host_gb=1.0), costs)
        assert error.value.remedy == remedy


def test_a_plan_streams_from_where_the_user_says() -> None:
    work, costs = work_of("flux2_klein_base_4b", 1024), costs_of("flux2_klein_base_4b", 1024)
    small, few = card("rtx4060_8gb", host_gb=5), card("rtx4060_8gb")
    for on, host, expected in (
        (few, "disk", "disk"),
        (few, "staged", "memory"),
        (few, "auto", "memory"),
        (small, "auto", "disk"),
    ):
        assert choose(replace(work, given=Given(host=host)), on, costs).chosen.host == expected
    with pytest.raises(UserError, match="GB of host memory"):
        choose(replace(work, given=Given(host="pinned", resident=0)), small, costs)


def test_flux2_dev_trains_at_1024_px_on_9_gb_with_inputs_in_host_memory_and_not_without() -> None:
    """On 9 GB of which nobody else holds any, with a context of 0.45 GB; the chosen plan says what the host holds."""
    work, costs = work_of("flux2_dev", 1024, learning=ADAM8), costs_of("flux2_dev", 1024)
    here = card("rtx3060_12gb", vram_gb=9, reserved_gb=0, host_gb=64)
    plan = choose(work, here, costs).chosen
    assert plan.inputs_on_host
    assert plan.vram.peak < 9e9
    inputs = costs.blocks["transformer_blocks"].forward.net * (plan.blocks - plan.plain_blocks)
    assert plan.host_bytes == pytest.approx(2e9 + inputs + sum(costs.block(i).frozen_bytes for i in range(56)))
    with pytest.raises(UserError) as error:
        choose(replace(work, given=Given(block_inputs="device")), here, costs)
    assert error.value.remedy == "memory.block_inputs=auto fits"
    assert not choose(work, card("rtx3060_12gb", host_gb=64), costs).chosen.inputs_on_host


def test_residents_are_as_many_as_fit_beside_the_plain_blocks_that_were_asked_for() -> None:
    """Where copies are waited for, more residents are faster, and five plain blocks leave room for some."""
    costs = costs_of("flux2_klein_base_9b", 512)
    work = replace(work_of("flux2_klein_base_9b", 512, learning=ADAM8), given=Given(plain=5))
    plan = choose(work, card("rtx4090_24gb", vram_gb=8), costs).chosen
    assert plan.plain_blocks == 5
    assert plan.resident_blocks > 0


def test_what_the_user_settled_is_named_where_it_is_what_does_not_fit() -> None:
    costs = costs_of("flux2_klein_base_9b", 1024)
    work = replace(work_of("flux2_klein_base_9b", 1024), given=Given(plain=20))
    with pytest.raises(UserError) as error:
        choose(work, card("rtx4060_8gb"), costs)
    assert error.value.remedy == "memory.plain_blocks=null fits"


def test_a_class_that_is_preserved_takes_two_graphs_and_three_passes() -> None:
    work, costs = work_of("flux2_klein_base_4b", 512), costs_of("flux2_klein_base_4b", 512)
    given = Given(resident=0, slots=2, plain=0)
    one, two = (
        choose(replace(work, given=given, learning=Learning(graphs=graphs)), card("rtx4060_8gb"), costs).chosen
        for graphs in (1, 2)
    )
    assert two.step_s == pytest.approx(2 * one.step_s + one.draw_s)
    assert two.vram.activations > 1.9 * one.vram.activations


def test_holes_that_a_plan_has_set_aside_are_not_offered_to_plain_blocks() -> None:
    plan, here = chosen("flux1_dev", 512, "rtx4060_8gb"), card("rtx4060_8gb")
    usable = here.vram_bytes - plan.vram.context
    assert correct(plan, here, step_s=plan.step_s, peak_bytes=usable - plan.vram.holes - plan.plain_bytes) == []
