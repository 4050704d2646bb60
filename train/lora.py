"""Train a LoRA on a folder of pictures. Read this file from top to bottom: it is the whole run.

    flux2-lora train                                                     the embedded demo
    flux2-lora train dataset.folder=~/pictures/mine dataset.trigger_word=mystyle name=mine

A flow model predicts the velocity that leads from a picture to noise. The run freezes such a model in FP8, puts a small
low-rank update B A beside every attention and MLP projection, and moves only those numbers, until the velocity on your
pictures, at random noise levels, comes out right.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from flux2_lora.adapters import Adapter, AdapterSpec, attach, state_of, trainable
from flux2_lora.buckets import batches_between, bucket_for
from flux2_lora.caches import CacheSpec
from flux2_lora.config import changed_options, program, read_resolved, save_resolved
from flux2_lora.dataset import DatasetSpec, Record, preview_prompts, scan, trigger_words
from flux2_lora.dataset.pictures import crop_to, open_picture
from flux2_lora.dataset.seen import Memory
from flux2_lora.devices import pick_device
from flux2_lora.errors import UserError, listed
from flux2_lora.export import export_universal, header, table
from flux2_lora.families import ModelFamily, ModelSpec, load_family, open_model
from flux2_lora.flow import TimestepSpec
from flux2_lora.inference.pictures import to_pictures
from flux2_lora.inference.previews import Previewer, PreviewSet, PreviewSpec
from flux2_lora.options import option
from flux2_lora.quantize import PrecisionSpec, load_frozen, stored_bytes
from flux2_lora.targets import parse, resolve
from flux2_lora.training.encoding import CachedSamples, Encoder, encode_samples, prune_cache, texts_of
from flux2_lora.training.interrupt import Interrupt
from flux2_lora.training.memory import MemorySpec, compile_blocks
from flux2_lora.training.optimizers import OptimizerSpec, learning_rate, make_optimizer
from flux2_lora.training.state import Checkpoint, latest_checkpoint, open_checkpoint, restore, save_checkpoint
from flux2_lora.training.step import Batch, Sample, batches, training_loss
from flux2_lora.training.tracking import LoggerSpec, Metrics, StepBar, console, peak_bytes, read_metrics
from flux2_lora.training.validation import ValidationSpec, validate

# A resumed run may differ in these; anything else would be another run under the same name.
MAY_CHANGE = (
    "max_steps",
    "checkpoint_every",
    "preview.",
    "validation.every",
    "resume",
    "device",
    "loader_workers",
    "logger.",
    "cache.",
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All options of a run; configs/train.yaml has the defaults and each group its own page there."""

    model: ModelSpec
    dataset: DatasetSpec
    adapter: AdapterSpec
    optimizer: OptimizerSpec
    timesteps: TimestepSpec
    precision: PrecisionSpec
    memory: MemorySpec
    validation: ValidationSpec
    preview: PreviewSpec
    logger: LoggerSpec
    name: str
    cache: CacheSpec
    output_dir: str = "outputs"
    seed: int = option(0, at_least=0)
    device: str = "auto"
    max_steps: int = option(1000, at_least=1)
    batch_size: int = option(1, at_least=1)
    grad_accumulation: int = option(1, at_least=1)
    checkpoint_every: int = option(100, at_least=1)
    resume: str = "auto"
    loader_workers: int = option(0, at_least=0)


@program("train")
def train(config: TrainConfig) -> None:  # noqa: C901 - the whole run, in the order in which it happens
    # 1. Look before anything is written: the pictures, the model, the run to go on with.
    device = pick_device(config.device)
    run, family = Path(config.output_dir).expanduser() / config.name, load_family(config.model.family)
    cache, skipped = config.cache.place, run / "skipped.txt"
    memory, step_px = Memory(cache / "pictures.json"), family.pixels_per_token
    found = scan(config.dataset, seed=config.seed, step=step_px, memory=memory, cache=cache, report=skipped)
    records, held_out = found.training, found.validation
    for entry in config.adapter.targets:
        parse(entry)
    checkpoint = where_to_start(config, run)
    start = checkpoint.step if checkpoint else 0
    model = open_model(config.model, to_train=True)
    resolve(config.adapter.targets, family.architecture, model.projections(), config.adapter.rank)
    console.print(f"{config.name}: {len(records)} pictures, {len(held_out)} held out, on {device}")
    for line in found.report(skipped):
        console.print(line)
    memory.save()
    save_resolved(config, run / "run.yaml")

    # 2. Encoders in a phase of their own: from here on only cached tensors are read.
    encoder = Encoder(model, cache, device, background=config.dataset.background)
    encoder.encode_texts(all_texts(config, [*records, *held_out]))
    samples = encode_samples(encoder, records, config.dataset, config.seed)
    validation = validation_samples(config, encoder, held_out)
    scene = preview_set(config, encoder, [*held_out, *records])
    prune_cache(config.cache, encoder)
    if config.loader_workers:
        encoder.verify()  # an encoder cannot run in a worker, so damage is mended before they start

    # 3. The base, quantised and frozen, and the adapter beside its projections.
    transformer = load_frozen(model, config.precision, device)
    targeted = attach(transformer, family.architecture, config.adapter, seed=config.seed)
    console.print(
        f"base in {config.precision.base}: {stored_bytes(transformer) / 1e6:.1f} MB with the adapter; "
        f"LoRA on {targeted} of {len(model.projections())} projections, rank {config.adapter.rank}"
    )
    if config.memory.checkpointing(device):
        transformer.enable_gradient_checkpointing()  # type: ignore[operator]
    if config.memory.compile:
        compile_blocks(transformer)

    # 4. Accelerate places the model and steps the optimizer; a checkpoint puts the numbers back.
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="bf16" if device.type == "cuda" else "no",
        step_scheduler_with_optimizer=False,
    )
    optimizer = make_optimizer(config.optimizer, trainable(transformer))
    if checkpoint is not None:
        restore(checkpoint, transformer, optimizer)
        console.print(f"going on from {checkpoint.folder}")
    transformer, optimizer = accelerator.prepare(transformer, optimizer)
    metrics = Metrics(
        run / "metrics.jsonl", config.logger, name=config.name, config=dataclasses.asdict(config), resumed_at=start
    )
    previewer = None
    if config.preview.every:
        vae = model.load_vae(device)
        previewer = Previewer(family, vae, config.preview, scene, run / "previews", config.name, device)

    def look(step: int) -> float | None:
        """Validation and preview where their turn has come; the validation loss if there is one."""
        loss = None
        if validation and due(step, config.validation.every, config.max_steps):
            result = validate(family, transformer, validation, config.validation.sigmas, device)
            metrics.write(step, **result.row())
            loss = result.mean
        if previewer is not None and due(step, config.preview.every, config.max_steps):
            previewer.draw(transformer, step)
        return loss

    # 5. The loop. Every draw is a function of (seed, step, sample), so stopping and going on changes nothing.
    latest = look(0) if start == 0 else None
    micro = config.grad_accumulation
    order = batch_order(config, samples, start * micro, config.max_steps * micro)
    stream = batches(samples, order, config.loader_workers)
    with Interrupt() as interrupt, StepBar(config.max_steps, start) as bar:
        for step in range(start, config.max_steps):
            began = time.perf_counter()
            lr = learning_rate(config.optimizer, step, config.max_steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss = accumulate(config, accelerator, family, transformer, stream, step)
            norm = float(accelerator.clip_grad_norm_(trainable(transformer), config.optimizer.max_grad_norm))
            if not math.isfinite(loss + norm):
                raise SystemExit(f"step {step + 1}: loss {loss}, gradient norm {norm}; stopped before they were used")
            optimizer.step()
            optimizer.zero_grad()

            done, step_s, peak = step + 1, time.perf_counter() - began, peak_bytes(device)
            metrics.write(done, loss=loss, lr=lr, grad_norm=norm, step_s=step_s, peak_bytes=peak)
            latest = look(done) or latest
            bar.update(done, loss=loss, validation=latest, step_s=step_s, peak=peak)
            if due(done, config.checkpoint_every, config.max_steps) or interrupt.signal:
                encoder.keep()
                checkpoint = save_checkpoint(run, done, adapter_of(config, family, transformer, records), optimizer)
            if interrupt.signal:
                break
    metrics.close()
    if encoder.healed:
        console.print(f"{encoder.healed} damaged entries of the cache were made again")
    if interrupt.signal and checkpoint is not None and checkpoint.step < config.max_steps:
        console.print(f"stopped after step {checkpoint.step}; the same command goes on from {checkpoint.folder}")
        sys.exit(128 + interrupt.signal)

    # 6. One file for ComfyUI, Forge and Diffusers, re-read and proven; then what was learned and what comes next.
    exported = run / "export" / f"{config.name}.safetensors"
    proofs = export_universal(
        state_of(transformer),
        config.adapter.rank,
        config.adapter.alpha or config.adapter.rank,
        exported,
        architecture=family.architecture,
        dtype=torch.float32,
        header=header(
            title=config.name,
            model=config.model.architecture_name,
            base=config.model.title,
            architecture=family.architecture,
            rank=config.adapter.rank,
            date=time.strftime("%Y-%m-%dT%H:%M:%S"),
            resolution=(max(config.dataset.resolution),) * 2,
            trigger_phrase=trigger_words(records),
        ),
    )
    console.print(table(proofs))
    summary(run, exported)


def where_to_start(config: TrainConfig, run: Path) -> Checkpoint | None:
    """The checkpoint to go on from, or None to start afresh; UserError when the run there is another one."""
    if config.resume == "never":
        return None
    checkpoint = (
        latest_checkpoint(run) if config.resume == "auto" else open_checkpoint(Path(config.resume).expanduser())
    )
    changes = changed_options(read_resolved(run / "run.yaml"), config, MAY_CHANGE) if checkpoint else []
    if changes:
        raise UserError(
            f"name={config.name} is a run with other options ({listed(changes, 3)})",
            "choose another name=..., or resume=never to replace it",
        )
    return checkpoint


def due(step: int, every: int, last: int) -> bool:
    """At step 0, every `every` steps and at the end; never where `every` is 0."""
    return every > 0 and (step % every == 0 or step == last)


def batch_order(config: TrainConfig, samples: CachedSamples, start: int, stop: int) -> list[list[tuple[int, int]]]:
    """(item, epoch) of each batch from `start` up to `stop`."""
    buckets = [item.bucket for item in samples.items]
    order = batches_between(buckets, config.batch_size, config.seed, start, stop)
    return [[(index, epoch) for index in batch] for epoch, batch in order]


def all_texts(config: TrainConfig, records: Sequence[Record]) -> list[str]:
    """Every text of the run, to be encoded together: a large encoder's layers are then read once."""
    previews = [*config.preview.prompts, *preview_prompts(config.dataset), config.preview.negative_prompt]
    return [*texts_of(records), *previews]


def validation_samples(config: TrainConfig, encoder: Encoder, held_out: Sequence[Record]) -> list[Sample]:
    """Held-out pictures, encoded as the training pictures are; empty where there are none."""
    samples = encode_samples(encoder, held_out[: config.validation.most], config.dataset, config.seed)
    return [samples.still(index) for index in range(len(samples)) if samples.items[index].repeat == 0]


def preview_set(config: TrainConfig, encoder: Encoder, records: Sequence[Record]) -> PreviewSet:
    """Prompts as the user gave them, or the captions of the first pictures; the first picture is the one edited."""
    texts = list(config.preview.prompts) or preview_prompts(config.dataset) or [r.caption for r in records]
    texts = texts[: config.preview.count]
    side, edited = max(config.dataset.resolution), next((r for r in records if r.caption in texts), records[0])
    keys = encoder.encode_texts([*texts, config.preview.negative_prompt, edited.caption])
    height, width = bucket_for(side, side, side, encoder.model.family.pixels_per_token)
    return PreviewSet(
        texts=texts,
        conditioning=encoder.conditioning([keys[text] for text in texts]).to(encoder.device, torch.float32),
        negative=encoder.conditioning([keys[config.preview.negative_prompt]]).to(encoder.device, torch.float32),
        height_px=height,
        width_px=width,
        edited=to_pictures(crop_to(open_picture(edited.path).image, height, width)[None])[0],
        edited_conditioning=encoder.conditioning([keys[edited.caption]]).to(encoder.device, torch.float32),
    )


def accumulate(
    config: TrainConfig,
    accelerator: Accelerator,
    family: ModelFamily,
    transformer: nn.Module,
    stream: Iterator[Batch],
    step: int,
) -> float:
    """Forward and backward over the batches of one optimizer step; their mean loss."""
    total, count = 0.0, config.grad_accumulation
    for part in range(count):
        batch = next(stream).to(accelerator.device)
        with accelerator.autocast():
            loss = training_loss(
                family, transformer, batch, config.timesteps, seed=config.seed, step=step * count + part
            )
        accelerator.backward(loss / count)
        total += loss.item() / count
    return total


def adapter_of(config: TrainConfig, family: ModelFamily, transformer: nn.Module, records: Sequence[Record]) -> Adapter:
    return Adapter(
        state=state_of(transformer),
        rank=config.adapter.rank,
        alpha=config.adapter.alpha or config.adapter.rank,
        targets=list(config.adapter.targets),
        family=family.name,
        trigger_word=trigger_words(records),
    )


def summary(run: Path, exported: Path) -> None:
    """Five lines: what was learned, the grid, the adapter, the export, and the next command."""
    losses = [row["validation_loss"] for row in read_metrics(run / "metrics.jsonl") if "validation_loss" in row]
    learned = "no validation pictures, so no validation loss"
    if losses:
        learned = f"validation loss {losses[0]:.3f} (base) -> {losses[-1]:.3f}, {losses[-1] / losses[0]:.2f} x"
    newest = max((run / "previews").glob("step-*.png"), default=None)
    last = latest_checkpoint(run)
    console.print(f"learned   {learned}")
    console.print(f"grid      {newest or 'previews are off (preview.every=0)'}")
    console.print(f"adapter   {last.folder if last else run}")
    console.print(f"export    {exported}")
    console.print("next      flux2-lora train dataset.folder=~/pictures/mine dataset.trigger_word=mystyle name=mine")


if __name__ == "__main__":
    train()
