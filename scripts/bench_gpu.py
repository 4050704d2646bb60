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
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from flux2_lora.conditioning import Conditioning
from flux2_lora.devices import compute_dtype, largest_resident, pick_device
from flux2_lora.families import Model, ModelFamily, load_family
from flux2_lora.weights import Stored

HELD, CONTEXT = 0.6e9, 0.45e9  # of a card: by the desktop and others, and by the driver for this process
RANK, LIMIT_S, WARM = 16, 240, 1
BASES = {"resident": "fp8", "streamed": "fp8", "planned": "fp8", "fp8": "fp8", "int8": "int8", "peft": "bf16"}
OFFLOADS = ("offload", "offload_stream")
WAYS = ("streamed", "planned", "fp8", "int8", "peft", *OFFLOADS)
SMALL = {"num_layers": 1, "num_single_layers": 3, "num_attention_heads": 2, "joint_attention_dim": 64}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model by its family and its geometry, in Diffusers' words; page: of configs/model, for its plan."""

    family: str
    page: str
    geometry: Mapping[str, Any]

    def small(self) -> Shape:
        return replace(self, geometry={**self.geometry, **SMALL})


def shape(family: str, page: str, layers: int, singles: int, heads: int, text: int, *, guidance: bool) -> Shape:
    sizes = {"num_layers": layers, "num_single_layers": singles, "num_attention_heads": heads}
    return Shape(family=family, page=page, geometry={**sizes, "joint_attention_dim": text, "guidance_embeds": guidance})


MODELS = {
    "flux1": shape("flux1", "flux1_dev", 19, 38, 24, 4096, guidance=True),
    "klein_9b": shape("flux2_klein", "flux2_klein_base_9b", 8, 24, 32, 12288, guidance=False),
    "dev_32b": shape("flux2_dev", "flux2_dev", 8, 48, 48, 15360, guidance=True),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row: a way to train, on so many pictures of a size. card: GB of the card that this one is capped to."""

    way: str
    batch: int
    px: int
    card: int | None = None

    @property
    def seat(self) -> object:
        """Cases of one seat are answered by one process."""
        return (self.way, self.card if self.way == "planned" else None)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="to train, beside `resident`")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each way")
    parser.add_argument("--steps", type=int, default=3, help="of a turn, after one that warms up")
    parser.add_argument("--minutes", type=float, default=9.5, help="no case begins later than this")
    parser.add_argument("--small", action="store_true", help="shapes that a CPU trains in a moment")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    if wanted.serve:
        serve(json.loads(wanted.serve))
        return
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
class Rates:
    """Bytes a second from pinned host memory, and bf16 operations a second of a large product; as measured."""

    copy: float = 0.0
    flops: float = 0.0

    @property
    def words(self) -> str:
        return f"{self.copy / 1e9:.1f} GB/s to the device, {self.flops / 1e12:.3g} TFLOP/s"


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One run over models; a card with its rates, and where files go meanwhile."""

    wanted: argparse.Namespace
    rates: Rates
    folder: Path
    began: float

    def model(self, name: str) -> Found:
        """Every case of a model: first those that take turns, then each other way, which ends before the next."""
        turns, alone = cases(name, self.wanted)
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
        asked = {case: asking_plan(MODELS[name], case, self.rates, self.folder, self.wanted) for case in planned}
        return {case: plan_of(*asking) for case, asking in asked.items()}


Answer = dict[str, Any]


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


def cases(name: str, wanted: argparse.Namespace) -> tuple[list[Case], list[Case]]:
    """Those that take turns, and those that are run once."""
    large, little = (64, 32) if wanted.small else (1024, 512)
    if name == "dev_32b":  # all of it resident takes 40 GB, and says nothing that the others do not
        return [Case(way="streamed", batch=1, px=large)], []
    turns = [
        *(Case(way=way, batch=4, px=large) for way in ("resident", "streamed")),
        Case(way="resident", batch=1, px=little),
        Case(way="streamed", batch=1, px=little, card=8),
        Case(way="resident", batch=4, px=little),
        *(Case(way="planned", batch=4, px=little, card=card) for card in (8, 12)),
        *(Case(way=way, batch=1, px=large) for way in ("resident", "streamed")),
    ]
    others = [Case(way=way, batch=4, px=large) for way in ("fp8", "int8")]
    others += [Case(way=way, batch=1, px=large) for way in ("peft", *OFFLOADS)]
    alone = [case for case in others if case.way in wanted.ways and name == "flux1"]
    asked = [case for case in turns if case.way in wanted.ways]
    compared = {(case.batch, case.px) for case in (*asked, *alone)}
    return [c for c in turns if c in asked or (c.way == "resident" and (c.batch, c.px) in compared)], alone


def targets(name: str, found: Found, rates: Rates) -> Iterator[Target]:
    """Every figure that the docs give, from the cases that were run."""
    most = {"planned": 1.0, "fp8": 0.97, "int8": 0.97}
    limit_gb = {"flux1": 4.5, "dev_32b": 9.0}.get(name)
    widest = max(case.px for case in found.answers)
    for case in found.answers:
        over = Case(way="resident", batch=case.batch, px=case.px)
        if case.way not in ("resident", *OFFLOADS) and over in found.answers:
            limit = 1.03 if case.way == "streamed" and case.batch > 1 else most.get(case.way)
            yield Target(words=f"{words_of(case)} / resident", value=found.ratio(case, over), most=limit)
        alone = Case(way="streamed", batch=case.batch, px=case.px)
        if case.way in ("peft", *OFFLOADS) and alone in found.answers:
            limit = 0.5 if case.way in OFFLOADS else None
            yield Target(words=f"{words_of(alone)} / {case.way}", value=found.ratio(alone, case), most=limit)
        if case.way == "streamed" and case.card:
            yield bus_bound(case, found, rates)
        if case == Case(way="streamed", batch=1, px=widest):
            held = found.most(case, "reserved")
            value = (held + CONTEXT) / 1e9 if held else None
            yield Target(words=f"{words_of(case)}: GB with the context", value=value, most=limit_gb)
        if case in found.plans:
            yield from against_plan(case, found)


def against_plan(case: Case, found: Found) -> Iterator[Target]:
    """Memory and time, over what was planned."""
    plan, held, took = found.plans[case], found.most(case, "reserved"), found.of(case, "step_s")
    peak = (held + CONTEXT) / plan.peak if held and plan.peak else None
    yield Target(words=f"{words_of(case)}: peak / plan", value=peak, least=0.95, most=1.03)
    step = median(took) / plan.step_s if took and plan.step_s else None
    yield Target(words=f"{words_of(case)}: step / plan", value=step)


def bus_bound(case: Case, found: Found, rates: Rates) -> Target:
    """Against the longer of what the resident base computes and what the bus takes for two passes' copies."""
    computed = found.of(replace(case, way="resident", card=None), "step_s")
    copied = found.most(case, "copied")
    took = found.of(case, "step_s")
    if not (computed and took and copied and rates.copy):
        return Target(words=f"{words_of(case)} / the bus's bound", value=None, most=1.08)
    bound = max(median(computed), copied / rates.copy)
    return Target(words=f"{words_of(case)} / the bus's bound", value=median(took) / bound, most=1.08)


def words_of(case: Case) -> str:
    return f"{case.way} {case.batch} x {case.px}" + (f" on {case.card} GB" if case.card else "")


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


def figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heading, ["---"] * len(heading), *rows))


# Plans, as the command prints them.


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the command chose for a card, or why there is nothing. peak: bytes with the driver's context."""

    resident: int = 0
    slots: int = 2
    plain: int = 0
    peak: float = 0.0
    step_s: float = 0.0
    failed: str = ""


def asking_plan(
    model: Shape, case: Case, rates: Rates, folder: Path, wanted: argparse.Namespace
) -> tuple[subprocess.Popen[str], Path]:
    """Start `flux2-lora plan` for a case on a card with the rates of this one."""
    told = folder / f"{model.page}-{case.card}.json"
    geometry = {**model.geometry, **(SMALL if wanted.small else {})}
    options = [
        *(f"model={model.page}", "model.path=not_here", f"hardware={case.card}gb", f"output={told}", "preview.every=0"),
        *(f"model.geometry.{key}={json.dumps(value)}" for key, value in geometry.items()),
        *(f"hardware.copy_gb_s={rates.copy / 1e9}", f"hardware.bf16_tflops={rates.flops / 1e12}"),
        *("hardware.utilisation=1", "hardware.host_gb=64", f"adapter.rank={RANK}"),
        *(f"batch_size={case.batch}", f"dataset.resolution={case.px}"),
    ]
    command = [sys.executable, "-m", "flux2_lora", "plan", *options]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True), told


def plan_of(process: subprocess.Popen[str], told: Path) -> Plan:
    _, errors = process.communicate()
    if process.returncode:
        return Plan(failed=f"no plan: {last_line(errors)}")
    plan = json.loads(told.read_text())
    return Plan(
        resident=plan["resident_blocks"],
        slots=max(plan["slots"], 1),
        plain=plan["plain_blocks"],
        peak=plan["vram_bytes"]["peak"],
        step_s=plan["step_s"],
    )


def last_line(text: str) -> str:
    """The last line that says something, short enough for a table."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("hint")]
    return (lines or ["it said nothing"])[-1].replace("|", "/")[:120]


# Processes that each hold one base and train on what they are asked to.


class Worker:
    """A process that answers questions, each a line of JSON; a context that ends it."""

    def __init__(self, setting: Mapping[str, Any], folder: Path) -> None:
        self.errors = tempfile.NamedTemporaryFile("w+", dir=folder, suffix=".txt")  # noqa: SIM115 - ends with it
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--serve", json.dumps(setting)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )

    def ask(self, **question: Any) -> Answer:
        """Its answer; or {"failed": why} where it ended, or did not answer in time."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return self.why()
        return self.answer()

    def answer(self) -> Answer:
        """The next one; of a worker that loads early, the first says only that it did."""
        assert self.process.stdout is not None
        clock = threading.Timer(LIMIT_S, self.process.kill)
        clock.start()
        line = next((line for line in self.process.stdout if line.startswith("{")), None)
        clock.cancel()
        return self.why() if line is None else cast("Answer", json.loads(line))

    def why(self) -> Answer:
        """Of a process that ended."""
        if self.process.wait() < 0:
            return {"failed": f"ended by signal {-self.process.returncode}: {LIMIT_S} s were over, or host memory was"}
        self.errors.seek(0)
        return {"failed": last_line(self.errors.read())}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Let it go, and all that it holds; a second time does nothing."""
        self.process.communicate()
        self.errors.close()


def serve(setting: Answer) -> None:
    """Answer each line of the input until it ends; the base is loaded early where it takes turns, else when asked."""
    device = pick_device("auto")
    model = MODELS[setting["model"]].small() if setting["small"] else MODELS[setting["model"]]
    trained = build(model, setting, device) if setting["early"] else None
    if trained:
        print("{}", flush=True)
    for line in sys.stdin:
        trained = trained or build(model, setting, device)
        try:
            answer = trained.measure(**json.loads(line))
        except torch.OutOfMemoryError:
            answer = {"failed": "memory ran out"}
        print(json.dumps(answer), flush=True)


def measured_rates(device: torch.device) -> Rates:
    """The best of five copies, and of five products as FLUX.1's MLP takes them."""
    cuda = device.type == "cuda"
    size, (rows, depth, columns) = (2**30, (4608, 3072, 12288)) if cuda else (2**24, (128, 256, 512))
    source = torch.empty(size, dtype=torch.uint8, pin_memory=cuda)
    target = torch.empty(size, dtype=torch.uint8, device=device)
    kind = {"dtype": compute_dtype(device), "device": device}
    left, right = torch.randn(rows, depth, **kind), torch.randn(depth, columns, **kind)  # type: ignore[call-overload]
    copy = min(seconds(lambda: target.copy_(source, non_blocking=True), device) for _ in range(5))
    multiply = min(seconds(lambda: left @ right, device) for _ in range(5))
    return Rates(copy=size / copy, flops=2 * rows * depth * columns / multiply)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """What work takes until the device has done it."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    began = time.perf_counter()
    work()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - began


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A model of random weights, made as they are read: what `load_frozen` asks of a model that lies in files."""

    family: ModelFamily
    geometry: Mapping[str, Any]
    device: torch.device
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def weights(self) -> Drawn:
        return self

    def empty_transformer(self) -> nn.Module:
        from flux2_lora.networks.components import on_meta

        shell = on_meta(self.family.transformer_class, dict(self.geometry), "random")
        self.shapes.update({name: tuple(parameter.shape) for name, parameter in shell.named_parameters()})
        return shell

    def read(self, name: str) -> Stored:
        size, kind = self.shapes[name], {"dtype": compute_dtype(self.device), "device": self.device}
        if len(size) == 1:
            return Stored(values=torch.full(size, float(name.endswith("weight")), **kind))  # type: ignore[call-overload]
        return Stored(values=torch.randn(size, **kind).mul_(0.02))  # type: ignore[call-overload]


def build(model: Shape, setting: Answer, device: torch.device) -> Trained:
    """A base with an adapter, as the way asks."""
    from flux2_lora.adapters import AdapterSpec, attach, trainable
    from flux2_lora.matmul import DEQUANTIZE
    from flux2_lora.networks.transformers import blocks_in
    from flux2_lora.quantize import FrozenLinear, PrecisionSpec, load_frozen, trial_of
    from flux2_lora.training.memory import MemorySpec
    from flux2_lora.training.optimizers import OptimizerSpec, make_optimizer

    torch.manual_seed(0)
    way, family = setting["way"], load_family(model.family)
    drawn = Drawn(family=family, geometry=model.geometry, device=device)
    stay = {"streamed": 0, "planned": setting.get("resident")}.get(way)
    memory = MemorySpec(resident_blocks=stay, slots=setting.get("slots"), host="pinned")
    count = model.geometry["num_layers"] + model.geometry["num_single_layers"]
    spec = PrecisionSpec(base=BASES.get(way, "fp8"), matmul=way if way in ("fp8", "int8") else DEQUANTIZE)
    transformer = load_frozen(cast("Model", drawn), spec, device, memory.placement(count))
    if (trial := trial_of(transformer)) is not None and trial.used == DEQUANTIZE:
        raise SystemExit(trial.words)
    if way == "peft":
        attach_plain(transformer, family.architecture)
    else:
        attach(transformer, family.architecture, AdapterSpec(rank=RANK), seed=0)
    if way in OFFLOADS:
        offload(transformer, device, streams=way == "offload_stream" and device.type == "cuda")
    parameters = list(trainable(transformer).values())
    frozen = [
        m.values for block in blocks_in(transformer).values() for m in block.modules() if isinstance(m, FrozenLinear)
    ]
    placement = memory.placement(count)
    moved = 0.0 if placement is None else 2 * (count - len(placement.resident) - placement.slots) / count
    return Trained(
        family=family,
        transformer=transformer,
        parameters=parameters,
        optimizer=make_optimizer(OptimizerSpec(), [{"params": parameters, "lr": 1e-4, "lr_scale": 1.0}]),
        device=device,
        way=way,
        text=16 if setting["small"] else 512,
        copied=int(moved * sum(values.numel() for values in frozen)),
        blocks=count,
        block_inputs="host" if setting["model"] == "dev_32b" else "device",  # as its plan for 9 GB has them
    )


def offload(transformer: nn.Module, device: torch.device, *, streams: bool) -> None:
    """Diffusers' group offload of every block, with bytes as parameters: its stream leaves buffers where they are."""
    from flux2_lora.quantize import FrozenLinear

    for linear in [module for module in transformer.modules() if isinstance(module, FrozenLinear)]:
        values = linear.values
        del linear.values
        linear.register_parameter("values", nn.Parameter(values, requires_grad=False))
    transformer.enable_group_offload(  # type: ignore[operator]
        onload_device=device, offload_type="block_level", num_blocks_per_group=1, use_stream=streams
    )


def attach_plain(transformer: nn.Module, architecture: str) -> None:
    """PEFT as its documentation has it, on the same projections, with adapters in float32."""
    from peft import LoraConfig, inject_adapter_in_model

    from flux2_lora.adapters import AdapterSpec, trainable
    from flux2_lora.networks.transformers import block_linears
    from flux2_lora.targets import resolve

    named = resolve(AdapterSpec().targets, architecture, block_linears(transformer), RANK)
    pattern = "|".join(map(re.escape, named))
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=pattern), transformer)
    for parameter in trainable(transformer).values():
        parameter.data = parameter.data.float()


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A base and its adapter, ready to take steps. text: tokens of a caption; copied: bytes a step brings over."""

    family: ModelFamily
    transformer: nn.Module
    parameters: Sequence[nn.Parameter]
    optimizer: torch.optim.Optimizer
    device: torch.device
    way: str
    text: int
    copied: int
    blocks: int
    block_inputs: str

    def measure(self, *, batch: int, px: int, card: int | None, plain: int, steps: int) -> Answer:
        """Steps on pictures of px x px; seconds of the median one, and bytes at the peak."""
        self.recompute(plain)
        inputs = self.inputs(batch, px // self.family.pixels_per_token)
        if self.device.type == "cuda":
            total = torch.cuda.get_device_properties(self.device).total_memory
            pool = total if card is None else card * 1e9 - HELD - CONTEXT
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(min(pool / total, 1.0), self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        took = [seconds(lambda: self.step(*inputs), self.device) for _ in range(WARM + steps)][WARM:]
        cuda = self.device.type == "cuda"
        held = torch.cuda.max_memory_reserved(self.device) if cuda else largest_resident()
        torch.cuda.empty_cache()  # others take their turns now
        return {"step_s": median(took), "reserved": held, "copied": self.copied}

    def recompute(self, plain: int) -> None:
        """Let blocks be computed again in backward, but for `plain` of them; in others' ways as they do it."""
        from flux2_lora.training.memory import MemorySpec, recompute_blocks

        if self.way in ("peft", *OFFLOADS):
            self.transformer.enable_gradient_checkpointing()  # type: ignore[operator]
        else:
            memory = MemorySpec(plain_blocks=plain, block_inputs=self.block_inputs)
            recompute_blocks(self.transformer, memory.plain(self.blocks, self.device), memory.offload(self.device))

    def inputs(self, batch: int, side: int) -> tuple[Tensor, Tensor, Conditioning]:
        """Latents, what they are to become, and text."""
        width = cast("Any", self.transformer).config.joint_attention_dim
        latents, target = (
            torch.randn(batch, self.family.latent_channels, side, side, device=self.device) for _ in range(2)
        )
        embeds = torch.randn(batch, self.text, width, device=self.device)
        return latents, target, Conditioning(embeds=embeds, pooled=torch.randn(batch, 768, device=self.device))

    def step(self, latents: Tensor, target: Tensor, said: Conditioning) -> None:
        """Forward, backward, clip, update."""
        plain_peft = self.way == "peft"
        sigmas = torch.full((len(latents),), 0.5, device=self.device)
        with torch.autocast(self.device.type, torch.bfloat16) if plain_peft else nullcontext():
            moved = self.family.velocity(self.transformer, latents, sigmas, said)
        (moved.float() - target).square().mean().backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


if __name__ == "__main__":
    main()
