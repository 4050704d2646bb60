"""The encoder phase: pictures and captions become cached tensors before the transformer is loaded.

Law: keys are made of content: the bytes of the picture and its mask, the crop, the weights that encode it, the text. So
a replaced picture, an edited caption or another VAE is encoded anew, and nothing else is. Each distinct text is encoded
and stored once. An encoder is loaded only where something is missing, and dropped before the next one comes. An entry
found damaged, at any time, is made again alone.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, get_worker_info

from flux2_lora.ahead import ahead
from flux2_lora.caches import CacheSpec, Held, TensorCache, prune
from flux2_lora.conditioning import Conditioning
from flux2_lora.dataset import DatasetSpec, Record
from flux2_lora.dataset.captions import without_trigger
from flux2_lora.dataset.crops import Crop
from flux2_lora.dataset.pictures import crop_mask, crop_to, file_bytes, open_mask, open_picture
from flux2_lora.devices import compute_dtype
from flux2_lora.errors import UserError
from flux2_lora.families import Model
from flux2_lora.files import FileDigests, digest
from flux2_lora.flow import generator
from flux2_lora.latents import Posterior
from flux2_lora.training.progress import console, counted
from flux2_lora.training.step import Sample

Job = tuple[Record, Crop]
HELD_BYTES = 256 << 20
"""Of cached tensors in memory, in each process that loads them."""


@dataclass(frozen=True)
class Pixels:
    """A crop before it is encoded. pixels: [3 h w] in [-1, 1]; mask: [1 h w] in tokens, None where all counts."""

    pixels: Tensor
    mask: Tensor | None


class Encoder:
    """The encoder phase of one model over the two caches in `folder`."""

    def __init__(self, model: Model, folder: Path, device: torch.device, *, background: str = "white") -> None:
        self.model, self.folder, self.device, self.background = model, folder, device, background
        self.latents = TensorCache(folder, "latents")
        self.texts = TensorCache(folder, "texts")
        self._jobs: dict[str, Job] = {}
        self._texts: dict[str, str] = {}
        self._held = Held(HELD_BYTES)

    def encode_pictures(self, jobs: Sequence[Job]) -> list[str]:
        """Cache the posterior of each crop (and its mask) and return their keys, in order."""
        keys = [self._picture_key(*job) for job in jobs]
        self._jobs |= dict(zip(keys, jobs, strict=True))
        missing = [key for key in dict.fromkeys(keys) if not self.latents.has(key)]
        if missing:
            self._encode_pictures(missing)
        return keys

    def encode_texts(self, texts: Sequence[str]) -> dict[str, str]:
        """Cache every distinct text; returns text -> key."""
        how = (str(self.model.spec.max_sequence_length), str(compute_dtype(self.device)))
        keys = {text: self.texts.key(self.model.family.name, *self._text_weights, *how, text) for text in texts}
        self._texts |= {key: text for text, key in keys.items()}
        missing = [key for key in keys.values() if not self.texts.has(key)]
        if missing:
            self._encode_texts(missing)
        return keys

    def posterior(self, key: str) -> tuple[Posterior, Tensor]:
        """The cached posterior of a crop, [c h w], and its mask, [1 h w]."""
        entry = self._entry(self.latents, key, self._encode_pictures)
        mask = entry.get("mask", torch.ones_like(entry["mean"][:1]))
        return Posterior(mean=entry["mean"], std=entry["std"]), mask

    def conditioning(self, keys: Sequence[str]) -> Conditioning:
        """Cached texts, stacked in the order of their keys."""
        entries = [self._entry(self.texts, key, self._encode_texts) for key in keys]
        pooled = torch.stack([entry["pooled"] for entry in entries]) if "pooled" in entries[0] else None
        return Conditioning(embeds=torch.stack([entry["embeds"] for entry in entries]), pooled=pooled)

    def verify(self) -> None:
        """Read every entry of this run in full, and make the damaged ones again."""
        pictures = [key for key in self._jobs if self.latents.load(key) is None]
        texts = [key for key in self._texts if self.texts.load(key) is None]
        if pictures:
            self._encode_pictures(pictures)
        if texts:
            self._encode_texts(texts)

    @property
    def healed(self) -> int:
        """How many damaged entries were met, and made again."""
        return self.latents.healed + self.texts.healed

    def keep(self) -> None:
        """Tell other runs that every entry of this one is in use, however long its epochs are."""
        for path in self.entries():
            with suppress(OSError):
                os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))

    def entries(self) -> set[Path]:
        """The files of everything that was encoded or found here."""
        return {self.latents.path(key) for key in self._jobs} | {self.texts.path(key) for key in self._texts}

    @cached_property
    def _digests(self) -> FileDigests:
        return FileDigests(self.folder / "digests.json")

    @cached_property
    def _vae_weights(self) -> str:
        return self._digests.of_folder(self.model.files.components / "vae")

    @cached_property
    def _text_weights(self) -> list[str]:
        return [self._digests.of_folder(self.model.files.components / part) for part in self.model.family.text.parts]

    def _picture_key(self, record: Record, crop: Crop) -> str:
        background = self.background if record.transparent else ""
        mask = record.mask.digest if record.mask else ""
        return self.latents.key(
            self.model.family.name, self._vae_weights, record.digest, crop.spelled(), mask, background
        )

    def _encode_pictures(self, keys: Sequence[str]) -> None:
        """Encode one at a time, so that numbers do not depend on what else is missing; decode ahead in threads."""
        vae = self.model.load_vae(self.device)
        opened = ahead(lambda key: self._open(*self._jobs[key]), keys)
        for key, found in counted("pictures encoded", zip(keys, opened, strict=True), len(keys)):
            if not self.latents.path(key).is_file():  # else another process may have been here
                self.latents.store(key, self._encoded(vae, found))

    def _open(self, record: Record, crop: Crop) -> Pixels:
        """The crop's pixels and mask, from the very bytes that its key names."""
        with _bytes_of(record.path, record.digest) as raw:
            opened = open_picture(raw, background=self.background)
        pixels = crop_to(opened.image, crop.height, crop.width, crop.centering)
        mask = None
        if record.mask is not None:
            painted = opened.alpha
            if record.mask.path is not None:
                with _bytes_of(record.mask.path, record.mask.digest) as raw:
                    painted = open_mask(raw)
            assert painted is not None
            side = self.model.family.pixels_per_token
            mask = crop_mask(painted, crop.height // side, crop.width // side, crop.centering)
        if crop.mirrored:
            return Pixels(pixels.flip(-1), None if mask is None else mask.flip(-1))
        return Pixels(pixels, mask)

    @torch.no_grad()
    def _encoded(self, vae: nn.Module, found: Pixels) -> dict[str, Tensor]:
        posterior = self.model.family.encode_pixels(vae, found.pixels[None].to(self.device))
        mask = {} if found.mask is None else {"mask": found.mask}
        return {"mean": posterior.mean[0].cpu(), "std": posterior.std[0].cpu(), **mask}

    def _encode_texts(self, keys: Sequence[str]) -> None:
        encode = self.model.load_prompt_encoder(self.device)
        encoded = encode([self._texts[key] for key in keys])
        for key, one in counted("texts encoded", zip(keys, encoded, strict=True), len(keys)):
            pooled = {} if one.pooled is None else {"pooled": one.pooled[0]}
            self.texts.store(key, {"embeds": one.embeds[0], **pooled})

    def _entry(self, cache: TensorCache, key: str, encode: Callable[[Sequence[str]], None]) -> Mapping[str, Tensor]:
        """An entry from memory or from the disk; made again where it is damaged or gone."""
        entry = self._held.get(key) or cache.load(key)
        if entry is None:
            encode([_in_main_process(key)])
            entry = _present(cache, key)
        self._held.put(key, entry)
        return entry


@dataclass(frozen=True)
class Item:
    """One of the places that a picture takes in an epoch: in one bucket, for one of its repeats."""

    record: Record
    bucket: tuple[int, int]
    repeat: int


def items_of(records: Sequence[Record]) -> list[Item]:
    """Every picture in each of its buckets, as often as its repeats: what an epoch holds, each once."""
    return [
        Item(record, bucket, repeat)
        for record in records
        for bucket in record.buckets
        for repeat in range(record.repeats)
    ]


@dataclass(frozen=True)
class CachedSamples(Dataset[Sample]):
    """Encoded items. What a step sees of one is drawn by (seed, epoch, item): crop, caption, and latents anew.

    spec: posterior says whether latents are drawn or are the mean, unless that is left to the model's family;
    unmasked_weight is what masks leave black. preserve_class: what stands for the trigger word in texts on which the
    base's output is preserved; None where it is not.
    """

    encoder: Encoder
    items: Sequence[Item]
    crop_keys: Mapping[tuple[Record, tuple[int, int]], Sequence[str]]
    text_keys: Mapping[str, str]
    seed: int
    spec: DatasetSpec
    preserve_class: str | None = None

    def __len__(self) -> int:
        return len(self.items)

    @property
    def draws(self) -> bool:
        """Whether latents are drawn anew from the posterior each time."""
        how = {"auto": self.encoder.model.family.samples_posterior, "sample": True, "mean": False}
        return how[self.spec.posterior]

    def __getitem__(self, place: tuple[int, int]) -> Sample:
        """The sample of (index, epoch)."""
        index, epoch = place
        item = self.items[index]
        record, source = item.record, item.record.source
        stream = generator(self.seed, "sample", epoch, item.repeat, *item.bucket, record.digest)
        crops = self.crop_keys[item.record, item.bucket]
        crop = crops[int(torch.randint(len(crops), (1,), generator=stream))]
        text = record.texts[int(torch.randint(len(record.texts), (1,), generator=stream))]
        dropped = float(torch.rand(1, generator=stream)) < source.caption_dropout
        posterior, mask = self.encoder.posterior(crop)
        latents = posterior.draw(stream) if self.draws else posterior.mean
        return self._sample(item, latents, mask, "" if dropped else text)

    def still(self, index: int) -> Sample:
        """The sample that never changes, for validation: the first crop, the first caption, the posterior's mean."""
        item = self.items[index]
        posterior, mask = self.encoder.posterior(self.crop_keys[item.record, item.bucket][0])
        return self._sample(item, posterior.mean, mask, item.record.caption)

    def _sample(self, item: Item, latents: Tensor, mask: Tensor, text: str) -> Sample:
        outside = self.spec.unmasked_weight
        preserved = None
        if self.preserve_class is not None:
            other = without_trigger(text, item.record.source.trigger_word, self.preserve_class)
            preserved = self.encoder.conditioning([self.text_keys[other]])
        return Sample(
            latents=latents,
            conditioning=self.encoder.conditioning([self.text_keys[text]]),
            mask=outside + (1 - outside) * mask,
            key=item.record.digest,
            weight=item.record.source.weight,
            preserved=preserved,
        )


def texts_of(records: Sequence[Record], preserve_class: str | None = None) -> list[str]:
    """Every text that training on these may draw, the dropped caption and those to preserve the base on included."""
    dropped = [""] if any(record.source.caption_dropout > 0 for record in records) else []
    texts = [(record, text) for record in records for text in record.texts]
    preserved = [without_trigger(text, record.source.trigger_word, preserve_class or "") for record, text in texts]
    return [*(text for _, text in texts), *dropped, *(preserved if preserve_class is not None else [])]


def encode_samples(
    encoder: Encoder, records: Sequence[Record], spec: DatasetSpec, seed: int, preserve_class: str | None = None
) -> CachedSamples:
    """Encode every crop and every text that training on `records` may draw."""
    items = items_of(records)
    crops = {
        (record, bucket): [(record, crop) for crop in record.crops(bucket, seed)]
        for record in records
        for bucket in record.buckets
    }
    keys = iter(encoder.encode_pictures([job for jobs in crops.values() for job in jobs]))
    return CachedSamples(
        encoder=encoder,
        items=items,
        crop_keys={place: [next(keys) for _ in jobs] for place, jobs in crops.items()},
        text_keys=encoder.encode_texts(texts_of(records, preserve_class)),
        seed=seed,
        spec=spec,
        preserve_class=preserve_class,
    )


def still_samples(encoder: Encoder, records: Sequence[Record], spec: DatasetSpec, seed: int) -> list[Sample]:
    """Pictures to measure on: encoded as those to train on are, each once a bucket, and never drawn anew."""
    samples = encode_samples(encoder, records, spec, seed)
    return [samples.still(index) for index in range(len(samples)) if samples.items[index].repeat == 0]


def data_digest(samples: CachedSamples) -> str:
    """Digest of everything that training takes from the data: what is drawn from, in its order, and what it counts."""
    parts = [
        json.dumps(
            [*samples.crop_keys[item.record, item.bucket], *item.record.texts, item.repeat, item.record.source.weight]
        )
        for item in samples.items
    ]
    return digest(*parts)


def prune_cache(spec: CacheSpec, encoder: Encoder) -> None:
    """Keep the caches within the limits of `spec`, sparing what this run uses."""
    if spec.max_gb is None and spec.max_days is None:
        return
    pruned = prune(
        encoder.folder,
        max_bytes=None if spec.max_gb is None else spec.max_gb * 1e9,
        max_age_s=None if spec.max_days is None else spec.max_days * 86400,
        keep=encoder.entries(),
    )
    if pruned.entries:
        console.print(f"pruned {pruned.entries} cache entries, {pruned.size / 1e6:.0f} MB")


@contextmanager
def _bytes_of(file: Path, content: str) -> Iterator[bytes]:
    """The bytes of a file that must still be those with that digest."""
    with file_bytes(file) as raw:
        if digest(raw) != content:
            raise UserError(f"{file} changed while it was being read", "run the same command again")
        yield raw


def _in_main_process(key: str) -> str:
    """An encoder cannot run in a loader's worker, which was forked from a process that has computed."""
    if get_worker_info() is not None:
        raise RuntimeError(
            f"the cache entry {key} is damaged or gone; run again to rebuild it, or use loader_workers=0"
        )
    return key


def _present(cache: TensorCache, key: str) -> dict[str, Tensor]:
    entry = cache.load(key)
    if entry is None:
        raise RuntimeError(f"the cache entry {key} was damaged right after it was written; check the disk")
    return entry
