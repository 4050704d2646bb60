"""What streaming costs a card, against a base that is all resident, PEFT and Diffusers' group offload: time and memory.

    python scripts/bench_gpu.py                       FLUX.1, FLUX.2 klein 9B and dev in their shapes, about 10 minutes
    python scripts/bench_gpu.py --models flux1        one of them
    python scripts/bench_gpu.py --small               shapes of a few kilobytes, on whatever is here

Weights are random and made on the device block by block; numbers do not change how long a product takes. Each way to
train is a process of its own that waits for its turn, so that ways which are compared take turns: a ratio is the median
over the rounds of what two ways took in the same round. A card of 8 GB is this one with its memory capped
(`card`, less what others and the driver hold). `planned` follows `flux2-lora plan` for that card, with the rates that
were measured here. Peaks are what PyTorch reserved; the driver's context comes on top, and is counted where a peak is
held against a target or a plan. What fails becomes a row that says why.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flux2_lora.benchmark.cases import MODELS, WAYS, Case, cases
from flux2_lora.benchmark.plans import Plan, asking_plan, plan_of
from flux2_lora.benchmark.rates import Rates, measured_rates
from flux2_lora.benchmark.verdict import Found, row, targets
from flux2_lora.benchmark.worker import Answer, Worker
from flux2_lora.devices import pick_device


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="to train, beside `resident`")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each way")
    parser.add_argument("--steps", type=int, default=3, help="of a turn, after one that warms up")
    parser.add_argument("--minutes", type=float, default=9.5, help="no case begins later than this")
    parser.add_argument("--small", action="store_true", help="shapes that a CPU trains in a moment")
    wanted = parser.parse_args()
    device = pick_device("auto")
    if device.type == "cpu" and not wanted.small:
        raise SystemExit("no GPU is here; --small runs shapes that a CPU trains in a moment")
    began, rates = time.monotonic(), measured_rates(device)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(wanted=wanted, rates=rates, folder=Path(folder), began=began)
        found = {name: bench.model(name) for name in wanted.models}
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{card}, PyTorch {torch.__version__}; {rates.words}; {time.monotonic() - began:.0f} s in all\n")
    rows = [(name, *row(case, one)) for name, one in found.items() for case in one.answers]
    print(table(("model", "way", "batch x px", "card, GB", "s a step", "reserved, GB", "planned, GB"), rows))
    print()
    judged = [(name, target) for name, one in found.items() for target in targets(name, one, rates)]
    cells = [(name, t.words, figure(t.value), t.limits, t.met) for name, t in judged]
    print(table(("model", "compared", "figure", "target", ""), cells))
    if wanted.small:
        print("\nThese shapes are small: figures say that the benchmark runs, and nothing else.")


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One run over models; a card with its rates, and where files go meanwhile."""

    wanted: argparse.Namespace
    rates: Rates
    folder: Path
    began: float

    def model(self, name: str) -> Found:
        """Every case of a model: first those that take turns, then each other way, which ends before the next."""
        turns, alone = cases(name, self.wanted.ways, small=self.wanted.small)
        found, planned = Found(), [case for case in turns if case.way == "planned"]
        with ExitStack() as alive:
            workers: dict[object, Worker] = {}
            for case in (case for case in (*turns, *alone) if case not in planned):
                if case.seat not in workers:
                    setting = {"way": case.way, "early": case in turns}
                    workers[case.seat] = alive.enter_context(self.worker(name, setting))
            found.plans.update(self.plans(name, planned))
            for case, plan in ((case, plan) for case, plan in found.plans.items() if not plan.failed):
                setting = {"way": case.way, "early": True, "resident": plan.resident, "slots": plan.slots}
                workers[case.seat] = alive.enter_context(self.worker(name, setting))
            for seat in {case.seat for case in turns} & workers.keys():  # nobody loads while another is timed
                workers[seat].answer()
            for case in (*turns * self.wanted.rounds, *alone):
                found.add(case, self.turn(case, workers.get(case.seat), found.plans.get(case)))
                if case in alone:
                    workers[case.seat].__exit__()
        return found

    def worker(self, name: str, setting: Mapping[str, Any]) -> Worker:
        return Worker({"model": name, "small": self.wanted.small, **setting}, self.folder)

    def turn(self, case: Case, worker: Worker | None, plan: Plan | None) -> Answer:
        if time.monotonic() - self.began > 60 * self.wanted.minutes:
            return {"failed": "no time was left"}
        if worker is None:
            return {"failed": plan.failed if plan is not None else ""}
        plain = 0 if plan is None else plan.plain
        return worker.ask(batch=case.batch, px=case.px, card=case.card, plain=plain, steps=self.wanted.steps)

    def plans(self, name: str, planned: Sequence[Case]) -> dict[Case, Plan]:
        """What `flux2-lora plan` says of each case, all asked at once."""
        asked = {
            case: asking_plan(MODELS[name], case, self.rates, self.folder, small=self.wanted.small) for case in planned
        }
        return {case: plan_of(*asking) for case, asking in asked.items()}


def figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heading, ["---"] * len(heading), *rows))


if __name__ == "__main__":
    main()
