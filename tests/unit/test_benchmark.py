"""What the benchmark compares, and what it makes of the answers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flux2_lora.benchmark.cases import MODELS, WAYS, Case, cases
from flux2_lora.benchmark.plans import Plan, plan_of
from flux2_lora.benchmark.rates import Rates
from flux2_lora.benchmark.steps import build
from flux2_lora.benchmark.verdict import Found, against_plan, bus_bound, row, targets
from flux2_lora.benchmark.worker import Worker


@pytest.mark.parametrize("name", ["flux1", "dev_32b"])
def test_every_way_takes_steps_that_move_the_adapter_alone(name: str) -> None:
    for way in ("resident", *WAYS) if name == "flux1" else ("streamed",):
        setting = {"way": way, "small": True, "resident": 1, "slots": 2}
        trained = build(MODELS[name].small(), setting, torch.device("cpu"))
        before = [parameter.detach().clone() for parameter in trained.parameters]
        answer = trained.measure(batch=2, px=32, card=None, plain=1, steps=1)
        assert answer["step_s"] > 0, way
        moved = [not torch.equal(one, old) for one, old in zip(trained.parameters, before, strict=True)]
        assert moved.count(True) >= len(moved) // 2, way
        frozen = {id(p) for p in trained.transformer.parameters()} - {id(p) for p in trained.parameters}
        assert not [p for p in trained.transformer.parameters() if id(p) in frozen and p.grad is not None], way
        assert (answer["copied"] > 0) == (way in ("streamed", "planned")), way


def test_a_step_copies_what_two_slots_do_not_hold_in_each_direction() -> None:
    model = MODELS["klein_9b"].small()
    found = [
        build(model, {"way": way, "small": True, "resident": stay, "slots": 2}, torch.device("cpu"))
        for way, stay in (("streamed", None), ("planned", 1))
    ]
    # Of 4 blocks: 2 copies a direction with none that stays, 1 with one.
    assert found[0].copied == 2 * found[1].copied


def test_ratios_are_taken_within_a_round_and_rounds_that_failed_count_for_nothing() -> None:
    found = Found()
    one, other = (Case(way=way, batch=4, px=1024) for way in ("streamed", "resident"))
    for case, times in ((one, (2.0, None, 9.0)), (other, (1.0, 5.0, 8.0))):
        for took in times:
            found.add(case, {"failed": "memory ran out"} if took is None else {"step_s": took, "reserved": 4e9})
    target = next(t for t in targets("flux1", found, Rates()) if t.words.endswith("/ resident"))
    assert target.value == (2 + 9 / 8) / 2
    assert (target.limits, target.met) == ("at most 1.03", "missed")
    assert "memory ran out" in row(one, found)


def test_where_the_bus_is_slower_than_the_card_the_bound_is_what_it_takes() -> None:
    found = Found()
    found.add(Case(way="resident", batch=1, px=512), {"step_s": 0.1, "reserved": 1e9})
    case = Case(way="streamed", batch=1, px=512, card=8)
    found.add(case, {"step_s": 0.42, "reserved": 1e9, "copied": 20e9})
    assert bus_bound(case, found, Rates(copy=50e9, flops=1.0)).value == pytest.approx(1.05)
    assert bus_bound(case, found, Rates(copy=500e9, flops=1.0)).value == pytest.approx(4.2)


def test_a_peak_is_held_against_its_plan_with_the_context_of_the_driver() -> None:
    found, case = Found(), Case(way="planned", batch=4, px=512, card=8)
    found.plans[case] = Plan(resident=1, slots=2, plain=3, peak=7.4e9, step_s=2.0)
    found.add(case, {"step_s": 1.0, "reserved": 6.95e9})
    peak, step = against_plan(case, found)
    assert (peak.value, peak.met, peak.limits) == (1.0, "met", "0.95 to 1.03")
    assert step.value == 0.5


def test_a_command_without_a_plan_makes_a_row_that_says_why(tmp_path: Path) -> None:
    code = "import sys; print('error: nothing fits', file=sys.stderr); print('  hint: x', file=sys.stderr); sys.exit(2)"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    assert plan_of(process, tmp_path / "plan.json") == Plan(failed="no plan: error: nothing fits")


@pytest.mark.slow
def test_a_process_that_ends_answers_with_its_last_words(tmp_path: Path) -> None:
    with Worker({"model": "none", "small": True, "way": "streamed", "early": False}, tmp_path) as worker:
        assert worker.ask(batch=1) == {"failed": "KeyError: 'none'"}
        assert worker.ask(batch=1) == {"failed": "KeyError: 'none'"}


def test_ways_that_nothing_is_compared_with_are_left_out() -> None:
    turns, alone = cases("flux1", ["offload"], small=False)
    assert [(case.way, case.batch, case.px) for case in turns] == [("resident", 1, 1024)]
    assert [case.way for case in alone] == ["offload"]
    assert cases("klein_9b", ["offload"], small=False) == ([], [])
