"""What a run starts from: pictures, the model's files and a checkpoint. All is checked before a file is written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from flux2_lora.config import save_resolved
from flux2_lora.dataset import Scan, scan
from flux2_lora.dataset.seen import Memory
from flux2_lora.families import Model, load_family, open_model
from flux2_lora.networks.features import Features, load_features
from flux2_lora.planning.work import Plan
from flux2_lora.publish.learned import differences, learned_from, save_learned
from flux2_lora.publish.run_card import read_card
from flux2_lora.run.refusals import refuse_what_would_do_nothing
from flux2_lora.run.resume import where_to_start
from flux2_lora.run.telling import tell_result
from flux2_lora.run_options import Budget, RunOptions, budget_of
from flux2_lora.training.processes import Processes
from flux2_lora.training.progress import console
from flux2_lora.training.state import Checkpoint, delete_all, set_aside


@dataclass(frozen=True, kw_only=True)
class Start:
    """found: the pictures, which `memory` knows by the next time; checkpoint: to go on from, None for a fresh run.

    budget: None where memory needs no plan; features: what pictures are compared by, None for VAE latents.
    """

    model: Model
    found: Scan
    memory: Memory
    checkpoint: Checkpoint | None
    budget: Budget | None
    features: Features | None

    @property
    def plan(self) -> Plan | None:
        """Of the budget."""
        return self.budget.plan if self.budget else None


def look(config: RunOptions, processes: Processes) -> Start | None:
    """Check everything, and say what is there; None for a run that has nothing left to do."""
    cache, skipped = config.cache.place, config.folder / "skipped.txt"
    memory, step_px = Memory(cache / "pictures.json"), load_family(config.model.family).pixels_per_token
    found = scan(config.dataset, seed=config.seed, step=step_px, memory=memory, cache=cache, report=skipped)
    checkpoint = where_to_start(config)
    if checkpoint is not None and checkpoint.step >= config.max_steps and config.exported.is_file():
        console.print(f"{config.name} has its {config.max_steps} steps; raise max_steps, or set resume=never")
        tell_result(config)
        return None
    model = open_model(config.model, to_train=True)
    place = config.validation.features if config.validation.nearest and config.preview.every else None
    features = load_features(place, torch.device("cpu")) if place else None
    refuse_what_would_do_nothing(config, model, found.training)
    budget = budget_of(config, processes.device)
    pictures = f"{len(found.training)} pictures, {len(found.validation)} held out"
    console.print(f"{config.name}: {pictures}, on {processes.words}")
    for line in [*found.report(skipped), *_other_data(config, found)]:
        console.print(line)
    return Start(model=model, found=found, memory=memory, checkpoint=checkpoint, budget=budget, features=features)


def begin(config: RunOptions, start: Start) -> None:
    """Write down what the run is, and put checkpoints away that it will not go on from."""
    start.memory.save()
    save_resolved(config, config.folder / "run.yaml")
    save_learned(config.folder, learned_from(start.found.training, start.found.validation))
    if config.resume == "never":
        delete_all(config.folder)
    set_aside(config.folder, start.checkpoint.step if start.checkpoint else 0)


def _other_data(config: RunOptions, found: Scan) -> list[str]:
    """How the pictures differ from those of the run that is made again (from=...)."""
    learned = read_card(Path(config.from_).expanduser()).learned if config.from_ else None
    if learned is None:
        return []
    changed = differences(learned, found.training, found.validation)
    return [f"data      {line}" for line in changed or ["pictures and captions are those of the run made again"]]
