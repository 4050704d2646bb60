"""What the answers say: ratios of ways that took turns, peaks against plans, and the limits that each is to keep."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median

from flux2_lora.benchmark.cases import CONTEXT, OFFLOADS, Case
from flux2_lora.benchmark.plans import Plan
from flux2_lora.benchmark.rates import Rates
from flux2_lora.benchmark.worker import Answer


class Found:
    """Answers by case, one a round; a round that failed answers why. plans: of the cases that follow one."""

    def __init__(self) -> None:
        self.answers: dict[Case, list[Answer]] = {}
        self.plans: dict[Case, Plan] = {}

    def add(self, case: Case, answer: Answer) -> None:
        self.answers.setdefault(case, []).append(answer)

    def of(self, case: Case, key: str) -> list[float]:
        """A figure of every round that did not fail."""
        return [answer[key] for answer in self.answers.get(case, []) if key in answer]

    def ratio(self, case: Case, over: Case) -> float | None:
        """The median of what a step took over what the other one's took in the same round."""
        rounds = zip(self.answers[case], self.answers[over], strict=False)
        pairs = [(one["step_s"], other["step_s"]) for one, other in rounds if "step_s" in one and "step_s" in other]
        return median(one / other for one, other in pairs) if pairs else None

    def most(self, case: Case, key: str) -> float | None:
        return max(self.of(case, key), default=None)


def row(case: Case, found: Found) -> Sequence[str]:
    """A case's measurements, or why there are none."""
    failed = next((answer["failed"] for answer in found.answers[case] if "failed" in answer), None)
    took, held, plan = found.of(case, "step_s"), found.most(case, "reserved"), found.plans.get(case)
    return (
        case.way,
        f"{case.batch} x {case.px}",
        str(case.card or ""),
        failed or f"{median(took):.4f}",
        "" if held is None else f"{held / 1e9:.2f}",
        f"{(plan.peak - CONTEXT) / 1e9:.2f}" if plan is not None and plan.peak else "",
    )


@dataclass(frozen=True, kw_only=True)
class Target:
    """A ratio or an amount, and the limits it is to keep; over: the case that it is divided by."""

    words: str
    value: float | None
    most: float | None = None
    least: float = 0.0

    @property
    def met(self) -> str:
        if self.value is None:
            return "no figure"
        if self.most is None:
            return ""
        return "met" if self.least <= self.value <= self.most else "missed"

    @property
    def limits(self) -> str:
        if self.most is None:
            return ""
        return f"{self.least:g} to {self.most:g}" if self.least else f"at most {self.most:g}"


def targets(name: str, found: Found, rates: Rates) -> Iterator[Target]:
    """Every figure that the docs give, from the cases that were run."""
    most = {"planned": 1.0, "fp8": 0.97, "int8": 0.97}
    limit_gb = {"flux1": 4.5, "dev_32b": 9.0}.get(name)
    widest = max(case.px for case in found.answers)
    for case in found.answers:
        over = Case(way="resident", batch=case.batch, px=case.px)
        if case.way not in ("resident", *OFFLOADS) and over in found.answers:
            limit = 1.03 if case.way == "streamed" and case.batch > 1 else most.get(case.way)
            yield Target(words=f"{case} / resident", value=found.ratio(case, over), most=limit)
        alone = Case(way="streamed", batch=case.batch, px=case.px)
        if case.way in ("peft", *OFFLOADS) and alone in found.answers:
            limit = 0.5 if case.way in OFFLOADS else None
            yield Target(words=f"{alone} / {case.way}", value=found.ratio(alone, case), most=limit)
        if case.way == "streamed" and case.card:
            yield bus_bound(case, found, rates)
        if case == Case(way="streamed", batch=1, px=widest):
            held = found.most(case, "reserved")
            value = (held + CONTEXT) / 1e9 if held else None
            yield Target(words=f"{case}: GB with the context", value=value, most=limit_gb)
        if case in found.plans:
            yield from against_plan(case, found)


def against_plan(case: Case, found: Found) -> Iterator[Target]:
    """Memory and time, over what was planned."""
    plan, held, took = found.plans[case], found.most(case, "reserved"), found.of(case, "step_s")
    peak = (held + CONTEXT) / plan.peak if held and plan.peak else None
    yield Target(words=f"{case}: peak / plan", value=peak, least=0.95, most=1.03)
    step = median(took) / plan.step_s if took and plan.step_s else None
    yield Target(words=f"{case}: step / plan", value=step)


def bus_bound(case: Case, found: Found, rates: Rates) -> Target:
    """Against the longer of what the resident base computes and what the bus takes for two passes' copies."""
    computed = found.of(replace(case, way="resident", card=None), "step_s")
    copied = found.most(case, "copied")
    took = found.of(case, "step_s")
    if not (computed and took and copied and rates.copy):
        return Target(words=f"{case} / the bus's bound", value=None, most=1.08)
    bound = max(median(computed), copied / rates.copy)
    return Target(words=f"{case} / the bus's bound", value=median(took) / bound, most=1.08)
