"""Kill training runs at random moments, resume each, and compare with a run that was never stopped.

    python scripts/prove_resume.py --kills 50

Half of the runs are killed (SIGKILL) at a random time, half at a random one of the moments before, in the middle of and
after each write, fsync and rename. Each is resumed and must end in the same bytes (adapter, average, optimizer) and the
same losses as the uninterrupted run. Runs have EMA, caption dropout and accumulation on; loader workers and numbers of
processes take turns. Runs on the bundled model, on a CPU, in a temporary folder; exit code 1 when one differs.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flux2_lora import cli

STEPS = 6
OPTIONS = (
    "device=cpu",
    f"max_steps={STEPS}",
    "batch_size=2",
    "grad_accumulation=2",
    "optimizer.ema_decay=0.9",
    "dataset.caption_dropout=0.3",
    "checkpoint_every=2",
    "keep_last=2",
    "validation.every=3",
    "validation.most=2",
    "validation.base_style=0",
    "preview.every=0",
    "checks=false",
)


@dataclass(frozen=True)
class Setting:
    """How a run is run: processes, and loader workers in each."""

    processes: int
    workers: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--seed", type=int, default=0)
    wanted = parser.parse_args()
    import_everything()
    settings = [Setting(processes, workers) for processes in wanted.processes for workers in wanted.workers]
    dice = random.Random(wanted.seed)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        runs = {setting: Reference(setting) for setting in settings}
        first = runs[settings[0]]
        for setting, run in runs.items():
            alike = setting.processes != settings[0].processes or run.end == first.end
            print(
                f"{setting}: {run.events} moments, {run.seconds:.1f} s, {'equal' if alike else 'DIFFERENT'}", flush=True
            )
        differ = 0
        for number in range(wanted.kills):
            setting = settings[number % len(settings)]
            how, same = killed_and_resumed(runs[setting], f"run{number}", dice, by_event=number % 8 < 4)
            differ += not same
            print(f"{number + 1:3} {setting} {how}: {'equal' if same else 'DIFFERENT'}", flush=True)
        differ += sum(runs[s].end != first.end for s in settings if s.processes == settings[0].processes)
        print(f"{wanted.kills - differ} of {wanted.kills} resumed runs end as the uninterrupted one")
    sys.exit(1 if differ else 0)


def import_everything() -> None:
    """What a run imports, so that its forks need not."""
    for name in ("accelerate", "peft.tuners.lora", "hydra", "filelock", "rich.progress", "wandb", "yaml"):
        importlib.import_module(name)
    for module in ("inference.watch", "inference.own", "inference.comparison", "export", "training.processes"):
        importlib.import_module(f"flux2_lora.{module}")
    import diffusers
    import transformers

    for name in ("Flux2Transformer2DModel", "AutoencoderKLFlux2", "FlowMatchEulerDiscreteScheduler"):
        getattr(diffusers, name)
    for name in ("T5EncoderModel", "AutoTokenizer", "T5Config"):
        getattr(transformers, name)


class Reference:
    """An uninterrupted run: how it ended, how many moments to be killed at it had, how long it took."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        name = f"whole-{setting.processes}-{setting.workers}"
        launch(setting, name)  # fills the caches, so that the timed run is like the others
        began = time.monotonic()
        launch(setting, f"{name}-again", count_into=Path(f"{name}.events"))
        self.seconds = time.monotonic() - began
        self.events = int(Path(f"{name}.events").read_text())
        self.end = end_of(f"{name}-again")
        if end_of(name) != self.end:
            raise SystemExit(f"{setting}: two uninterrupted runs differ")


def killed_and_resumed(reference: Reference, name: str, dice: random.Random, *, by_event: bool) -> tuple[str, bool]:
    """Kill a run, resume it, and say how it was killed and whether it ended as the reference did."""
    if by_event:
        moment = dice.randrange(reference.events)
        launch(reference.setting, name, kill_at=moment)
        how = f"killed at moment {moment}"
    else:
        after_s = dice.uniform(0.2, reference.seconds)
        launch(reference.setting, name, kill_after_s=after_s)
        how = f"killed after {after_s:.1f} s"
    left = len(list(Path("outputs", name, "checkpoints").glob("step-*")))
    launch(reference.setting, name)
    return f"{how}, {left} checkpoints", end_of(name) == reference.end


def end_of(name: str) -> dict[str, Any]:
    """The bytes of the last checkpoint, and the loss of each step."""
    run = Path("outputs", name)
    last = run / "checkpoints" / f"step-{STEPS:06d}"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "loss", "grad_norm", "lr", "validation_loss")
    return {
        "files": {file.name: file.read_bytes() for file in sorted(last.glob("*.safetensors"))},
        "rows": [{key: row[key] for key in kept if key in row} for row in rows],
    }


def launch(
    setting: Setting,
    name: str,
    *,
    kill_at: int | None = None,
    kill_after_s: float | None = None,
    count_into: Path | None = None,
) -> None:
    """Run to the end, or until it is killed: forks of this process, which has its imports and has computed nothing."""
    port, children = free_port(), []
    for rank in range(setting.processes):
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)
            first = rank == 0
            become(setting, rank, port, name, kill_at if first else None, count_into if first else None)
        children.append(child)
    deadline = None if kill_after_s is None else time.monotonic() + kill_after_s
    codes: dict[int, int] = {}
    while len(codes) < len(children):
        for child in children:
            if child not in codes:
                done, status = os.waitpid(child, os.WNOHANG)
                codes |= {child: os.waitstatus_to_exitcode(status)} if done else {}
        # One process of several that died leaves the others waiting for it; a launcher ends them, as is done here.
        if (deadline is not None and time.monotonic() > deadline) or any(codes.values()):
            for child in children:
                if child not in codes:
                    os.killpg(child, signal.SIGKILL)
        time.sleep(0.02)
    if kill_at is None and kill_after_s is None and any(codes.values()):
        raise SystemExit(f"{name} ended with {codes}: {Path(f'{name}.log').read_text()[-2000:]}")


def become(setting: Setting, rank: int, port: int, name: str, kill_at: int | None, count_into: Path | None) -> None:
    """The life of one process of a run; does not return."""
    log = os.open(f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    if setting.processes > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(setting.processes),
            "LOCAL_WORLD_SIZE": str(setting.processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    counter = Moments(kill_at)
    counter.watch()
    try:
        cli.main(["train", *OPTIONS, f"name={name}", f"loader_workers={setting.workers}"])
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    if count_into is not None:
        count_into.write_text(str(counter.count))
    sys.stdout.flush()
    os._exit(code)


class Moments:
    """Counts the moments around each write, fsync and rename, and kills the process at one of them."""

    def __init__(self, kill_at: int | None) -> None:
        self.count, self.kill_at = 0, kill_at

    def pass_one(self) -> None:
        if self.count == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1

    def watch(self) -> None:
        """Put the moments around the calls that write files."""
        os.fsync, os.replace = self._around(os.fsync), self._around(os.replace)
        opened = os.fdopen

        def fdopen(handle: int, *how: Any, **options: Any) -> Any:
            file = opened(handle, *how, **options)
            write = file.write

            def halved(content: bytes) -> int:
                self.pass_one()
                half = len(content) // 2
                written = write(content[:half])
                file.flush()
                self.pass_one()
                written += write(content[half:])
                self.pass_one()
                return int(written)

            if how and how[0] == "wb":
                file.write = halved
            return file

        os.fdopen = fdopen  # type: ignore[assignment]

    def _around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **options: Any) -> Any:
            self.pass_one()
            result = call(*arguments, **options)
            self.pass_one()
            return result

        return watched


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


if __name__ == "__main__":
    main()
