"""Train a LoRA on a folder of pictures. Read this file from top to bottom: it is the whole run.

    flux2-lora train                                                     the embedded demo
    flux2-lora train dataset.folder=~/pictures/mine dataset.trigger_word=mystyle name=mine
    torchrun --nproc-per-node 2 -m flux2_lora train ...                  two GPUs
    flux2-lora train from=mine.safetensors name=again                    the run that made a file, once more
    flux2-lora train --multirun adapter.rank=8,16 seed=0,1               four runs and a sheet that compares them

A flow model predicts the velocity that leads from a picture to noise. The run freezes such a model in FP8, puts a small
low-rank update B A beside every attention and MLP projection, and moves only those numbers, until the velocity on your
pictures, at random noise levels, comes out right.
"""

from __future__ import annotations

import dataclasses
import math
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flux2_lora.adapters import Adapter, Lora, attach, trainable
from flux2_lora.buckets import batches_between
from flux2_lora.config import arguments, changed_options, program, read_resolved, save_resolved
from flux2_lora.dataset import Record, Scan, preview_prompts, scan, trigger_words
from flux2_lora.dataset.seen import Memory
from flux2_lora.dataset.spec import bundled_folder
from flux2_lora.devices import keep_free_memory, pick_device
from flux2_lora.errors import RunError, UserError, listed
from flux2_lora.export import modules_of, table
from flux2_lora.families import Model, ModelFamily, load_family, open_model
from flux2_lora.inference.comparison import compare
from flux2_lora.inference.own import own_samples
from flux2_lora.inference.previews import Previewer, PreviewSet, preview_set
from flux2_lora.inference.request import settings_of
from flux2_lora.inference.run_page import write_report
from flux2_lora.inference.sampling import Recipe
from flux2_lora.inference.watch import Watch, due, open_watch
from flux2_lora.lora_files import OUR_NAMES
from flux2_lora.matmul import refuse_matmul
from flux2_lora.networks.features import Features, load_features
from flux2_lora.planning.choose import correct
from flux2_lora.publish.learned import differences, learned_from, save_learned
from flux2_lora.publish.release import Source, release
from flux2_lora.publish.reproduce import from_card
from flux2_lora.publish.run_card import read_card
from flux2_lora.quantize import load_frozen, stored_bytes, trial_of
from flux2_lora.run_options import Budget, RunOptions, budget_of
from flux2_lora.stream import streamer_of
from flux2_lora.targets import numbers_of, parse_ranked, resolve
from flux2_lora.training.averaging import Ema
from flux2_lora.training.checks import Subject, probe, run_checks, velocity
from flux2_lora.training.claim import claimed
from flux2_lora.training.encoding import (
    CachedSamples,
    Encoder,
    data_digest,
    encode_samples,
    prune_cache,
    still_samples,
    texts_of,
)
from flux2_lora.training.interrupt import Interrupt
from flux2_lora.training.memory import compile_blocks, recompute_blocks
from flux2_lora.training.optimizers import (
    grouped,
    learning_rate,
    make_optimizer,
    refuse_mixtures,
    set_rate,
)
from flux2_lora.training.processes import Processes, open_processes
from flux2_lora.training.progress import StepBar, console, forget_peak, peak_bytes
from flux2_lora.training.report import estimate, noise_levels, summary
from flux2_lora.training.shortage import Knob, demand_of, knobs, shortage_told
from flux2_lora.training.state import (
    Checkpoint,
    TrainState,
    delete_all,
    latest_checkpoint,
    open_checkpoint,
    prune_checkpoints,
    restore,
    save_checkpoint,
    set_aside,
)
from flux2_lora.training.step import Batch, Draws, Place, Sample, average_gradients, batches, share_of, training_loss
from flux2_lora.training.tracking import Metrics, refuse_missing

# A resumed run may differ in these without being asked for it.
MAY_CHANGE = (
    "max_steps",
    "checkpoint_every",
    "keep_last",
    "keep_best",
    "preview.",
    "validation.every",
    "validation.patience",
    "checks",
    "resume",
    "from",
    "allow_change",
    "device",
    "processes",
    "loader_workers",
    "logger.",
    "cache.",
    "hardware.",
    "memory.resident_blocks",
    "memory.slots",
    "memory.plain_blocks",
    "memory.block_inputs",
    "memory.host",
    "memory.folder",
)
# In these it may not differ at all: the checkpoint's tensors would not fit, or mean something else.
MAY_NEVER_CHANGE = ("model.", "adapter.", "optimizer.kind", "optimizer.b_lr_ratio", "optimizer.block_lr")
MOST_FAILURES = 10


@program("train", after_sweep=compare, before=from_card)
def train(config: RunOptions) -> None:
    processes = open_processes(pick_device(config.device), config.processes)
    console.quiet = not processes.first
    run = Path(config.output_dir).expanduser() / config.name
    with claimed(run) if processes.first else nullcontext():
        data = look_and_encode(config, run, processes)
        if data is None:
            return
        told = partial(remedies, config, data, processes.device)
        with shortage_told("while the base was loaded and tried", told):
            state = build(config, data, processes)
        learn(config, run, data, state, processes)
        if processes.first:
            export(config, run, data, state)


@dataclass(frozen=True, kw_only=True)
class Data:
    """All that a run takes from outside: the model's files, cached tensors, and the checkpoint to go on from.

    facts: what a checkpoint notes down, and a resumed run must find again. budget: None where memory needs no plan.
    """

    model: Model
    budget: Budget | None
    records: Sequence[Record]
    encoder: Encoder
    samples: CachedSamples
    held_out: Sequence[Sample]
    scene: PreviewSet
    features: Features | None
    checkpoint: Checkpoint | None
    facts: Mapping[str, Any]


def look_and_encode(config: RunOptions, run: Path, processes: Processes) -> Data | None:
    """Check everything before anything is written, then encode: later phases read cached tensors only.

    None for a run that has nothing left to do.
    """
    family = load_family(config.model.family)
    refuse_contradictions(config, processes.device)
    with processes.first_one_first():
        cache, skipped = config.cache.place, run / "skipped.txt"
        memory, step_px = Memory(cache / "pictures.json"), family.pixels_per_token
        found = scan(config.dataset, seed=config.seed, step=step_px, memory=memory, cache=cache, report=skipped)
        checkpoint = where_to_start(config, run)
        if checkpoint is not None and checkpoint.step >= config.max_steps and exported(config, run).is_file():
            console.print(f"{config.name} has its {config.max_steps} steps; raise max_steps, or set resume=never")
            tell(config, run)
            return None
        model = open_model(config.model, to_train=True)
        place = config.validation.features if config.validation.nearest and config.preview.every else None
        features = load_features(place, torch.device("cpu")) if place else None
        refuse_what_would_do_nothing(config, model, found.training)
        budget = budget_of(config, processes.device)
        pictures = f"{len(found.training)} pictures, {len(found.validation)} held out"
        console.print(f"{config.name}: {pictures}, on {processes.words}")
        for line in [*found.report(skipped), *other_data(config, found)]:
            console.print(line)
        if processes.first:
            memory.save()
            save_resolved(config, run / "run.yaml")
            save_learned(run, learned_from(found.training, found.validation))
            if config.resume == "never":
                delete_all(run)
            set_aside(run, checkpoint.step if checkpoint else 0)

        encoder = Encoder(model, cache, processes.device, background=config.dataset.background)
        encoder.encode_texts(all_texts(config, [*found.training, *found.validation]))
        preserve_class = config.loss.preserve_class if config.loss.preserve else None
        samples = encode_samples(encoder, found.training, config.dataset, config.seed, preserve_class)
        held_out = still_samples(encoder, found.validation[: config.validation.most], config.dataset, config.seed)
        prompts, side = preview_prompts(config.dataset), max(config.dataset.resolution)
        scene = preview_set(config.preview, prompts, encoder, found.validation, found.training, side)
        prune_cache(config.cache, encoder)
        if config.loader_workers:
            encoder.verify()  # an encoder cannot run in a worker, so damage is mended before they start
    data = Data(
        model=model,
        budget=budget,
        records=found.training,
        encoder=encoder,
        samples=samples,
        held_out=held_out,
        scene=scene,
        features=features,
        checkpoint=checkpoint,
        facts={"data": data_digest(samples), "processes": processes.count},
    )
    refuse_other_facts(config, data)
    return data


def build(config: RunOptions, data: Data, processes: Processes) -> TrainState:
    """The base, quantised and frozen, the adapter beside its projections, and seconds of checks before hours."""
    model, family, device = data.model, data.model.family, processes.device
    forget_peak(device)
    blocks, plan = model.blocks(), data.budget.plan if data.budget else None
    transformer = load_frozen(model, config.precision, device, config.memory.placement(blocks, plan))
    draws = draws_of(config, family)
    batch = tried = None
    if config.checks:
        batch = probe(data.samples, draws, batch_order(config, data.samples, processes.count, 0, 1)[0], device)
        tried = velocity(model, transformer, batch)
    targeted = attach(transformer, family.architecture, config.adapter, seed=config.seed)
    console.print(
        f"base in {config.precision.base}: {stored_bytes(transformer) / 1e6:.1f} MB with the adapter; "
        f"LoRA on {targeted} of {len(model.projections())} projections, rank {config.adapter.rank}"
    )
    if (trial := trial_of(transformer)) is not None:
        console.print(trial.words)
    if (streamer := streamer_of(transformer)) is not None:
        console.print(streamer.words)
    if plan is not None:
        console.print(plan.words)
    recompute_blocks(transformer, config.memory.plain(blocks, device, plan), config.memory.offload(device, plan))
    parameters = trainable(transformer)
    optimizer = make_optimizer(config.optimizer, grouped(config.optimizer, family.architecture, parameters))
    ema = Ema(config.optimizer.ema_decay, list(parameters.values())) if config.optimizer.ema_decay else None
    state = TrainState(transformer=transformer, parameters=parameters, optimizer=optimizer, ema=ema)
    if batch is not None and tried is not None:
        subject = Subject(
            model=model,
            transformer=transformer,
            optimizer=optimizer,
            spec=config.adapter,
            samples=data.samples,
            draws=draws,
            loss=config.loss,
            batch=batch,
            before=tried,
        )
        console.print(run_checks(subject))
    if data.checkpoint is not None:
        restore(data.checkpoint, state)
        console.print(f"going on from {data.checkpoint.folder}")
    if config.memory.compile:
        compile_blocks(transformer)
    return state


def learn(config: RunOptions, run: Path, data: Data, state: TrainState, processes: Processes) -> None:
    """The loop. Every draw is a function of (seed, step, sample), so stopping and going on changes nothing."""
    family, device, start, micro = data.model.family, processes.device, state.step, config.grad_accumulation
    side = max(config.dataset.resolution)
    mu = family.training_mu((side // family.pixels_per_token) ** 2)
    console.print(f"noise levels at {side} px: {noise_levels(config.timesteps, mu)}")
    if device.type == "cpu":
        keep_free_memory()
    told = partial(remedies, config, data, device)
    with shortage_told("while the base drew its own pictures", told):
        watch = watch_of(config, run, data, state, device) if processes.first else None
    if watch is not None and start == 0:
        with shortage_told("in validation at step 0", told):
            watch.look(state)
    order = batch_order(config, data.samples, processes.count, start * micro, config.max_steps * micro)
    stream = batches(
        data.samples,
        [share_of(batch, processes.rank, processes.count) for batch in order],
        draws_of(config, family),
        first_step=start * micro,
        workers=config.loader_workers,
        pinned=device.type == "cuda",
    )
    enough = watch is not None and watch.enough
    stopping = processes.agreed(enough)
    telling = closing(watch.metrics) if watch is not None else nullcontext()
    with Interrupt() as interrupt, telling, StepBar(config.max_steps, start) as bar:
        while state.step < config.max_steps and not stopping:
            began = time.perf_counter()
            lr = learning_rate(config.optimizer, state.step, config.max_steps)
            with shortage_told(f"in step {state.step + 1}", told):
                loss, norm = take_step(config, processes, family, state, stream, lr)
            step_s, peak = time.perf_counter() - began, peak_bytes(device)
            if watch is not None:
                watch.note(state, loss=loss, lr=lr, grad_norm=norm, step_s=step_s, peak_bytes=peak)
                with shortage_told(f"in validation at step {state.step}", told):
                    watch.look(state)
                bar.update(state.step, loss=loss, validation=watch.validation_loss, step_s=step_s, peak=peak)
                enough = watch.enough
            stopping = processes.agreed(bool(interrupt.signal) or enough or state.failing >= MOST_FAILURES)
            wanted = due(state.step, config.checkpoint_every, config.max_steps) or stopping
            if watch is not None and (wanted or (config.keep_best and watch.newest_is_best)):
                data.encoder.keep()
                watch.metrics.sync()
                save_checkpoint(run, state, adapter_of(config, data, state), data.facts)
                prune_checkpoints(run, config.keep_last, watch.best_step if config.keep_best else None)
            if state.step == start + 3:
                tell_pace(data.budget, config.max_steps - state.step, step_s, peak)
    if data.encoder.healed:
        console.print(f"{data.encoder.healed} damaged entries of the cache were made again")
    if state.failing >= MOST_FAILURES:
        raise RunError(
            f"loss or gradient were not finite in {MOST_FAILURES} steps in a row, up to step {state.step}",
            f"the adapter of step {state.step - MOST_FAILURES} is kept in {run / 'checkpoints'}; lower optimizer.lr",
        )
    if stopping and not enough and state.step < config.max_steps:
        tell_how_to_go_on(run, state.step, first=processes.first)
        sys.exit(128 + (interrupt.signal or signal.SIGTERM))


def tell_pace(budget: Budget | None, steps_left: int, step_s: float, peak: int) -> None:
    """How long the run will take at this rate, and where the plan was wrong."""
    console.print(f"at this rate: {estimate(step_s, steps_left, peak)}")
    for line in correct(budget.plan, budget.card, step_s=step_s, peak_bytes=peak) if budget else ():
        console.print(f"plan      {line}")


def take_step(
    config: RunOptions,
    processes: Processes,
    family: ModelFamily,
    state: TrainState,
    stream: Iterator[Batch],
    lr: float,
) -> tuple[float, float]:
    """One optimizer step; returns loss and gradient norm. Where these are not finite, nothing is moved."""
    accelerator, parameters = processes.accelerator, list(state.parameters.values())
    total = torch.zeros((), device=processes.device)
    for _ in range(config.grad_accumulation):
        batch = next(stream).to(processes.device)
        with accelerator.autocast():
            loss = training_loss(family, state.transformer, batch, config.loss) / config.grad_accumulation
        accelerator.backward(loss)
        total += loss.detach()
    if processes.count > 1:
        average_gradients(parameters, processes.mean)
        total = processes.mean(total)
    clipped = accelerator.clip_grad_norm_(parameters, config.optimizer.max_grad_norm)
    mean, norm = torch.stack([total, clipped]).tolist()  # where the host waits for the device, once in a step
    if math.isfinite(mean) and math.isfinite(norm):
        set_rate(state.optimizer, lr)
        state.optimizer.step()
        if state.ema is not None:
            state.ema.update()
        state.failing = 0
    else:
        state.skipped, state.failing = state.skipped + 1, state.failing + 1
    state.optimizer.zero_grad()
    state.step += 1
    return mean, norm


def export(config: RunOptions, run: Path, data: Data, state: TrainState) -> None:
    """One file for all clients, re-read and proven; then what was learned and what comes next."""
    modules = modules_of(state.adapter(), config.adapter.rank, config.adapter.scale * config.adapter.rank)
    lora = Lora(
        modules=modules,
        naming=OUR_NAMES,
        total=len(modules),
        architecture=data.model.family.architecture,
        family=data.model.family.name,
        trigger_word=trigger_words(data.records),
    )
    [released] = release(Source(lora=lora, path=run, run=run, step=state.step), {"universal": exported(config, run)})
    console.print(table(released.proofs))
    tell(config, run)
    tell_report(run)


def exported(config: RunOptions, run: Path) -> Path:
    """The file that a run ends in."""
    return run / "export" / f"{config.name}.safetensors"


def tell(config: RunOptions, run: Path) -> None:
    """What was learned, where it lies, and the next command."""
    following = "flux2-lora train dataset.folder=~/pictures/mine dataset.trigger_word=mystyle name=mine"
    if config.dataset.folder != bundled_folder():
        model = [argument for argument in arguments() if argument.startswith(("model=", "model."))]
        following = shlex.join(["flux2-lora", "sample", *model, f"adapters=[{run}]", 'prompts=["a prompt"]'])
    for line in summary(run, exported(config, run), following):
        console.print(line)


def tell_report(run: Path) -> None:
    """Write the page of the run. The adapter is exported by then: a disk that is full must not end the run badly."""
    try:
        console.print(f"report    {write_report(run)}")
    except (OSError, RunError) as error:
        console.print(f"report    not written: {error}")


def tell_how_to_go_on(run: Path, step: int, *, first: bool) -> None:
    """After a run that was stopped."""
    again = shlex.join(["flux2-lora", "train", *arguments()])
    console.print(f"stopped after step {step}; go on with\n  {again}")
    if first:
        tell_report(run)


def where_to_start(config: RunOptions, run: Path) -> Checkpoint | None:
    """The checkpoint to go on from, or None to start afresh; UserError when the run there is another one."""
    if config.resume == "never":
        return None
    if config.resume == "auto":
        checkpoint = latest_checkpoint(run, lambda f: console.print(f"{f} is damaged and passed over"))
    else:
        checkpoint = open_checkpoint(Path(config.resume).expanduser())
    changes = changed_options(read_resolved(run / "run.yaml"), config, MAY_CHANGE) if checkpoint else []
    fixed = [change for change in changes if change.startswith(MAY_NEVER_CHANGE)]
    if fixed or (changes and not config.allow_change):
        ways = "choose another name=..., or resume=never to replace it"
        raise UserError(
            f"name={config.name} is a run with other options ({listed(fixed or changes, 3)})",
            ways if fixed else f"{ways}, or allow_change=true to go on all the same",
        )
    if changes:
        console.print(f"going on with other options: {listed(changes, 10)}")
    return checkpoint


def refuse_other_facts(config: RunOptions, data: Data) -> None:
    """UserError when a resumed run has not the pictures, captions, masks or processes that it began with."""
    before = data.checkpoint.facts if data.checkpoint else data.facts
    names = {"data": "pictures, captions or masks", "processes": "a number of processes"}
    changed = [name for key, name in names.items() if before.get(key) != data.facts[key]]
    if changed and not config.allow_change:
        raise UserError(
            f"name={config.name} was begun with other {' and '.join(changed)}",
            "choose another name=..., resume=never to replace it, or allow_change=true to go on all the same",
        )


def refuse_contradictions(config: RunOptions, device: torch.device) -> None:
    """UserError for options that contradict each other, before anything is looked for."""
    refuse_mixtures(config.optimizer, device)
    refuse_matmul(config.precision.matmul, config.precision.base, device)
    refuse_missing(config.logger)
    for entry in config.adapter.targets:
        parse_ranked(entry)
    low, high = config.timesteps.min_sigma, config.timesteps.max_sigma
    if low >= high:
        raise UserError(f"timesteps.min_sigma={low:g} is not below timesteps.max_sigma={high:g}", "leave room between")
    if config.validation.patience and not config.validation.every:
        raise UserError("validation.patience has nothing to wait for", "set validation.every=50, or patience=0")


def refuse_what_would_do_nothing(config: RunOptions, model: Model, records: Sequence[Record]) -> None:
    """UserError for a wish that this model or these pictures cannot meet."""
    family = model.family
    ranks = resolve(config.adapter.targets, family.architecture, model.projections(), config.adapter.rank)
    numbers_of(config.optimizer.block_lr, family.architecture, ranks, option="optimizer.block_lr")
    if config.preview.guidance not in (None, config.model.guidance) and not model.takes_guidance():
        raise UserError(
            f"preview.guidance={config.preview.guidance:g} asks for a guidance embedding, which this model has not",
            "set preview.guidance=null, and preview.cfg_scale for true guidance",
        )
    if config.preview.negative_prompt and config.preview.cfg_scale <= 1:
        raise UserError("preview.negative_prompt does nothing at preview.cfg_scale=1", "set preview.cfg_scale=3")
    if config.loss.preserve and not any(record.source.trigger_word for record in records):
        raise UserError(
            "loss.preserve needs a trigger word, to put loss.preserve_class in its place", "set dataset.trigger_word"
        )


def other_data(config: RunOptions, found: Scan) -> list[str]:
    """How the pictures differ from those of the run that is made again (from=...)."""
    learned = read_card(Path(config.from_).expanduser()).learned if config.from_ else None
    if learned is None:
        return []
    changed = differences(learned, found.training, found.validation)
    return [f"data      {line}" for line in changed or ["pictures and captions are those of the run made again"]]


def draws_of(config: RunOptions, family: ModelFamily) -> Draws:
    return Draws(family=family, density=config.timesteps, seed=config.seed)


def batch_order(config: RunOptions, samples: CachedSamples, processes: int, start: int, stop: int) -> list[list[Place]]:
    """(item, epoch) of each batch, over all processes, from micro-step `start` up to `stop`."""
    buckets = [item.bucket for item in samples.items]
    order = batches_between(buckets, config.batch_size * processes, config.seed, start, stop)
    return [[(index, epoch) for index in batch] for epoch, batch in order]


def remedies(config: RunOptions, data: Data, device: torch.device) -> list[Knob]:
    """The options that would need less memory than these."""
    side = max(config.dataset.resolution)
    demand = demand_of(
        data.model,
        config.precision,
        config.memory,
        config.adapter,
        device,
        choice=data.budget.plan if data.budget else None,
        batch_size=config.batch_size,
        side_px=side,
        text_tokens=data.scene.conditioning.embeds.shape[1],
    )
    return knobs(demand, resolution=side, rank=config.adapter.rank)


def base_prompts(config: RunOptions) -> list[str]:
    """Prompts in the base's own styles, on which forgetting is measured."""
    return config.model.base_prompts[: config.validation.base_style] if config.validation.every else []


def all_texts(config: RunOptions, records: Sequence[Record]) -> list[str]:
    """Every text of the run, to be encoded together: a large encoder's layers are then read once."""
    previews = [*config.preview.prompts, *preview_prompts(config.dataset), config.preview.negative_prompt]
    preserve_class = config.loss.preserve_class if config.loss.preserve else None
    return [*texts_of(records, preserve_class), *previews, *base_prompts(config)]


def watch_of(config: RunOptions, run: Path, data: Data, state: TrainState, device: torch.device) -> Watch:
    """What looks at the run as it goes: trackers, validation, previews."""
    metrics = Metrics(
        run / "metrics.jsonl",
        config.logger,
        name=config.name,
        config=dataclasses.asdict(config),
        resumed_at=state.step,
    )
    previewer = None
    if config.preview.every:
        vae, previews = data.model.load_vae(torch.device("cpu")), run / "previews"
        previewer = Previewer(
            family=data.model.family,
            vae=vae,
            spec=config.preview,
            scene=data.scene,
            folder=previews,
            title=config.name,
            device=device,
            settings=settings_of(
                data.model,
                Recipe(
                    negative_prompt=config.preview.negative_prompt,
                    steps=config.preview.steps,
                    guidance=config.preview.guidance,
                    cfg_scale=config.preview.cfg_scale,
                ),
                prompt="",
                size=(data.scene.height_px, data.scene.width_px),
                adapters=[(str(exported(config, run).resolve()), 1.0)],
            ),
            last=config.max_steps,
            at_once=config.batch_size,
        )
    side, own = max(config.dataset.resolution), run / "base_style.safetensors"
    return open_watch(
        family=data.model.family,
        spec=config.validation,
        device=device,
        last=config.max_steps,
        metrics=metrics,
        previewer=previewer,
        held_out=data.held_out,
        samples=data.samples,
        features=data.features,
        own=own_samples(data.encoder, state.transformer, base_prompts(config), side, own),
        at_once=config.batch_size,
        remedies=partial(remedies, config, data, device),
    )


def adapter_of(config: RunOptions, data: Data, state: TrainState) -> Adapter:
    return Adapter(
        state=state.adapter(),
        rank=config.adapter.rank,
        alpha=config.adapter.scale * config.adapter.rank,
        targets=list(config.adapter.targets),
        family=data.model.family.name,
        trigger_word=trigger_words(data.records),
    )


if __name__ == "__main__":
    train()
