"""What a run leaves: checkpoints to go on from, and one file for all clients, re-read and proven."""

from __future__ import annotations

from flux2_lora.adapters import Adapter, Lora
from flux2_lora.dataset import trigger_words
from flux2_lora.export import modules_of, table
from flux2_lora.inference.watch import Watch
from flux2_lora.lora_files import OUR_NAMES
from flux2_lora.publish.release import Source, release
from flux2_lora.run.data import Data
from flux2_lora.run.telling import tell_report, tell_result
from flux2_lora.run_options import RunOptions
from flux2_lora.training.progress import console
from flux2_lora.training.state import TrainState, prune_checkpoints, save_checkpoint


def save(config: RunOptions, data: Data, state: TrainState, watch: Watch) -> None:
    """A checkpoint to go on from; those that need not be kept are deleted."""
    data.encoder.keep()
    watch.metrics.sync()
    adapter = Adapter(
        state=state.adapter(),
        rank=config.adapter.rank,
        alpha=config.adapter.scale * config.adapter.rank,
        targets=list(config.adapter.targets),
        family=data.model.family.name,
        trigger_word=trigger_words(data.start.found.training),
    )
    save_checkpoint(config.folder, state, adapter, data.facts)
    prune_checkpoints(config.folder, config.keep_last, watch.best_step if config.keep_best else None)


def export(config: RunOptions, data: Data, state: TrainState) -> None:
    """The file that clients load, re-read and proven; then what was learned and what comes next."""
    modules = modules_of(state.adapter(), config.adapter.rank, config.adapter.scale * config.adapter.rank)
    lora = Lora(
        modules=modules,
        naming=OUR_NAMES,
        total=len(modules),
        architecture=data.model.family.architecture,
        family=data.model.family.name,
        trigger_word=trigger_words(data.start.found.training),
    )
    source = Source(lora=lora, path=config.folder, run=config.folder, step=state.step)
    [released] = release(source, {"universal": config.exported})
    console.print(table(released.proofs))
    tell_result(config)
    tell_report(config)
