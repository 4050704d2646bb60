"""Train a LoRA on a folder of pictures. Read this file from top to bottom: it is the whole run.

    flux2-lora train                                                     the embedded demo
    flux2-lora train dataset.folder=~/pictures/mine dataset.trigger_word=mystyle name=mine
    torchrun --nproc-per-node 2 -m flux2_lora train ...                  two GPUs
    flux2-lora train from=mine.safetensors name=again                    the run that made a file, once more
    flux2-lora train --multirun adapter.rank=8,16 seed=0,1               four runs and a sheet that compares them

A flow model predicts the velocity that leads from a picture to noise. Between the latents z of a picture and noise e,
at a noise level sigma from 0 to 1, the model sees x and is to say v:

    x = (1 - sigma) z + sigma e        v = e - z        loss = mean of (model(x, sigma, caption) - v)^2

The run freezes such a model in FP8, puts a small low-rank update beside every attention and MLP projection, so that its
output becomes W y + (alpha / rank) B A y, and moves only A and B, until the velocity on your pictures comes out right.
"""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from functools import partial

import torch

from flux2_lora.adapters import attach, trainable
from flux2_lora.buckets import batches_between
from flux2_lora.config import program
from flux2_lora.dataset import preview_prompts
from flux2_lora.devices import keep_free_memory, pick_device
from flux2_lora.inference.comparison import compare
from flux2_lora.inference.previews import preview_set
from flux2_lora.inference.watch import due
from flux2_lora.publish.reproduce import from_card
from flux2_lora.quantize import load_frozen
from flux2_lora.run.data import Data, all_texts, remedies
from flux2_lora.run.keeping import export, save
from flux2_lora.run.refusals import refuse_contradictions
from flux2_lora.run.resume import refuse_other_facts
from flux2_lora.run.start import Start, begin, look
from flux2_lora.run.telling import ran_away, tell_base, tell_how_to_go_on, tell_noise_levels, tell_pace
from flux2_lora.run.watching import watch_run
from flux2_lora.run_options import RunOptions
from flux2_lora.training.averaging import Ema
from flux2_lora.training.checks import Subject, probe, run_checks, velocity
from flux2_lora.training.claim import claimed
from flux2_lora.training.encoding import Encoder, data_digest, encode_samples, prune_cache, still_samples
from flux2_lora.training.interrupt import Interrupt
from flux2_lora.training.memory import compile_blocks, recompute_blocks
from flux2_lora.training.optimizers import grouped, learning_rate, make_optimizer, set_rate
from flux2_lora.training.processes import Processes, open_processes
from flux2_lora.training.progress import StepBar, console, forget_peak, peak_bytes
from flux2_lora.training.shortage import shortage_told
from flux2_lora.training.state import TrainState, restore
from flux2_lora.training.step import Batch, Draws, Place, average_gradients, batches, share_of, training_loss

MOST_FAILURES = 10  # steps in a row whose numbers are not finite


@program("train", after_sweep=compare, before=from_card)
def train(config: RunOptions) -> None:
    """Look at what is there, encode it, build the model, learn, export: the functions below, in this order."""
    processes = open_processes(pick_device(config.device), config.processes)
    console.quiet = not processes.first
    with claimed(config.folder) if processes.first else nullcontext():
        refuse_contradictions(config, processes.device)
        with processes.first_one_first():
            start = look(config, processes)
            data = encode(config, start, processes) if start is not None else None
        if data is None:
            return
        refuse_other_facts(config, data.start.checkpoint, data.facts)
        with shortage_told("while the base was loaded and tried", partial(remedies, config, data, processes.device)):
            state = build(config, data, processes)
        learn(config, data, state, processes)
        if processes.first:
            export(config, data, state)


def encode(config: RunOptions, start: Start, processes: Processes) -> Data:
    """Pictures as latents and captions as embeddings, each encoded once: later phases read cached tensors only."""
    if processes.first:
        begin(config, start)
    spec, found, family = config.dataset, start.found, start.model.family
    encoder = Encoder(start.model, config.cache.place, processes.device, background=spec.background)
    encoder.encode_texts(all_texts(config, found))
    samples = encode_samples(encoder, found.training, spec, config.seed, config.loss.preserved_class)
    held_out = still_samples(encoder, found.validation[: config.validation.most], spec, config.seed)
    prompts = preview_prompts(spec)
    scene = preview_set(config.preview, prompts, encoder, found.validation, found.training, spec.side_px)
    prune_cache(config.cache, encoder)
    if config.loader_workers:
        encoder.verify()  # an encoder cannot run in a worker, so damage is mended before they start
    return Data(
        start=start,
        encoder=encoder,
        samples=samples,
        held_out=held_out,
        scene=scene,
        draws=Draws(family=family, density=config.timesteps, seed=config.seed),
        facts={"data": data_digest(samples), "processes": processes.count},
    )


def batch_order(config: RunOptions, data: Data, processes: Processes, start: int, stop: int) -> list[list[Place]]:
    """(item, epoch) of each batch, over all processes, from micro-step `start` up to `stop`."""
    buckets = [item.bucket for item in data.samples.items]
    order = batches_between(buckets, config.batch_size * processes.count, config.seed, start, stop)
    return [[(index, epoch) for index in batch] for epoch, batch in order]


def build(config: RunOptions, data: Data, processes: Processes) -> TrainState:
    """The base, quantised and frozen, the adapter beside its projections, and seconds of checks before hours.

    B begins at zero, so the run begins at the base; the checks hold the adapted model against it.
    """
    model, plan, device = data.model, data.start.plan, processes.device
    architecture, blocks = model.family.architecture, model.blocks()
    forget_peak(device)
    transformer = load_frozen(model, config.precision, device, config.memory.placement(blocks, plan))
    batch = tried = None
    if config.checks:
        batch = probe(data.samples, data.draws, batch_order(config, data, processes, 0, 1)[0], device)
        tried = velocity(model, transformer, batch)
    targeted = attach(transformer, architecture, config.adapter, seed=config.seed)
    tell_base(config, transformer, plan, targeted=targeted, of=len(model.projections()))
    recompute_blocks(transformer, config.memory.plain(blocks, device, plan), config.memory.offload(device, plan))
    parameters = trainable(transformer)
    optimizer = make_optimizer(config.optimizer, grouped(config.optimizer, architecture, parameters))
    ema = Ema(config.optimizer.ema_decay, list(parameters.values())) if config.optimizer.ema_decay else None
    state = TrainState(transformer=transformer, parameters=parameters, optimizer=optimizer, ema=ema)
    if batch is not None and tried is not None:
        subject = Subject(
            model=model,
            transformer=transformer,
            optimizer=optimizer,
            spec=config.adapter,
            samples=data.samples,
            draws=data.draws,
            loss=config.loss,
            batch=batch,
            before=tried,
        )
        console.print(run_checks(subject))
    if data.start.checkpoint is not None:
        restore(data.start.checkpoint, state)
        console.print(f"going on from {data.start.checkpoint.folder}")
    if config.memory.compile:
        compile_blocks(transformer)
    return state


def learn(config: RunOptions, data: Data, state: TrainState, processes: Processes) -> None:
    """The loop. Every draw is a function of (seed, step, sample), so stopping and going on changes nothing."""
    device, start = processes.device, state.step
    tell_noise_levels(config, data.model.family)
    if device.type == "cpu":
        keep_free_memory()
    told = partial(remedies, config, data, device)
    with shortage_told("while the base drew its own pictures", told):
        watch = watch_run(config, data, state, device) if processes.first else None
    if watch is not None and start == 0:
        watch.look(state)
    stream = stream_of(config, data, processes, start)
    enough = stopping = processes.agreed(watch is not None and watch.enough)
    telling = closing(watch.metrics) if watch is not None else nullcontext()
    with Interrupt() as interrupt, telling, StepBar(config.max_steps, start) as bar:
        while state.step < config.max_steps and not stopping:
            began = time.perf_counter()
            with shortage_told(f"in step {state.step + 1}", told):
                loss, lr, norm = take_step(config, data, state, stream, processes)
            step_s, peak = time.perf_counter() - began, peak_bytes(device)
            if watch is not None:
                watch.note(state, loss=loss, lr=lr, grad_norm=norm, step_s=step_s, peak_bytes=peak)
                watch.look(state)
                bar.update(state.step, loss=loss, validation=watch.validation_loss, step_s=step_s, peak=peak)
            enough = processes.agreed(watch is not None and watch.enough)
            stopping = enough or processes.agreed(bool(interrupt.signal) or state.failing >= MOST_FAILURES)
            wanted = due(state.step, config.checkpoint_every, config.max_steps) or stopping
            if watch is not None and (wanted or (config.keep_best and watch.newest_is_best)):
                save(config, data, state, watch)
            if state.step == start + 3:
                tell_pace(data.start.budget, config.max_steps - state.step, step_s, peak)
    if data.encoder.healed:
        console.print(f"{data.encoder.healed} damaged entries of the cache were made again")
    if state.failing >= MOST_FAILURES:
        raise ran_away(config, state)
    if stopping and not enough and state.step < config.max_steps:
        tell_how_to_go_on(config, state.step, first=processes.first)
        sys.exit(128 + (interrupt.signal or signal.SIGTERM))


def stream_of(config: RunOptions, data: Data, processes: Processes, step: int) -> Iterator[Batch]:
    """This process's shares of the batches after `step`, with their noise and noise levels, made ahead of their use."""
    first, last = (one * config.grad_accumulation for one in (step, config.max_steps))
    order = batch_order(config, data, processes, first, last)
    shares = [share_of(batch, processes.rank, processes.count) for batch in order]
    pinned = processes.device.type == "cuda"
    return batches(data.samples, shares, data.draws, first_step=first, workers=config.loader_workers, pinned=pinned)


def take_step(
    config: RunOptions, data: Data, state: TrainState, stream: Iterator[Batch], processes: Processes
) -> tuple[float, float, float]:
    """Noise the latents, compare velocities, move A and B; returns loss, learning rate and gradient norm.

    `training_loss` mixes x, asks the model and takes the mean square. Where a number is not finite, nothing is moved.
    """
    accelerator, parameters = processes.accelerator, list(state.parameters.values())
    total = torch.zeros((), device=processes.device)
    lr = learning_rate(config.optimizer, state.step, config.max_steps)
    for _ in range(config.grad_accumulation):
        batch = next(stream).to(processes.device)  # latents z, their noise e and noise levels sigma, and captions
        loss = training_loss(data.model.family, state.transformer, batch, config.loss) / config.grad_accumulation
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
    return mean, lr, norm


if __name__ == "__main__":
    train()
