"""The encoder phase: pictures and captions become cached tensors before the transformer is loaded.

Keys are made of content: the bytes of the picture, the size it is cropped to, the weights that encode it, the text. So
a replaced picture, an edited caption or another VAE is encoded anew, and nothing else is. Each distinct text is encoded
and stored once. An encoder is loaded only where something is missing, and dropped before the next one comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch.utils.data import Dataset

from flux2_lora.caches import TensorCache
from flux2_lora.conditioning import Conditioning
from flux2_lora.dataset import Record, crop_to, open_rgb
from flux2_lora.devices import compute_dtype
from flux2_lora.families import Model
from flux2_lora.files import FileDigests
from flux2_lora.flow import generator
from flux2_lora.training.step import Sample


@dataclass(frozen=True)
class Encoder:
    """The encoder phase of one model over the two caches in `folder`."""

    model: Model
    folder: Path
    device: torch.device

    @property
    def latents(self) -> TensorCache:
        return TensorCache(self.folder, "latents")

    @property
    def texts(self) -> TensorCache:
        return TensorCache(self.folder, "texts")

    @cached_property
    def digests(self) -> FileDigests:
        return FileDigests(self.folder / "digests.json")

    def encode_pictures(self, crops: Sequence[tuple[Record, tuple[int, int], bool]]) -> list[str]:
        """Cache the latents of (picture, (height, width), mirrored) and return their keys, in order."""
        family = self.model.family
        weights = self.digests.of_folder(self.model.files.components / "vae")
        keys = [
            self.latents.key(family.name, weights, record.digest, f"{h}x{w}", "mirrored" if mirrored else "")
            for record, (h, w), mirrored in crops
        ]
        missing = [(key, crop) for key, crop in zip(keys, crops, strict=True) if self.latents.load(key) is None]
        if missing:
            vae = self.model.load_vae(self.device)
            for key, (record, (h, w), mirrored) in missing:
                pixels = crop_to(open_rgb(record.path), h, w)[None].to(self.device)
                with torch.no_grad():
                    latents = family.encode_pixels(vae, pixels.flip(-1) if mirrored else pixels)
                self.latents.store(key, {"latents": latents[0].cpu()})
        return keys

    def encode_texts(self, texts: Sequence[str]) -> dict[str, str]:
        """Cache every distinct text; returns text -> key."""
        model = self.model
        weights = [self.digests.of_folder(model.files.components / part) for part in model.family.text.parts]
        how = [str(model.spec.max_sequence_length), str(compute_dtype(self.device))]
        keys = {text: self.texts.key(model.family.name, *weights, *how, text) for text in texts}
        missing = [text for text, key in keys.items() if self.texts.load(key) is None]
        if missing:
            encode = model.load_prompt_encoder(self.device)
            for text, one in zip(missing, encode(missing), strict=True):
                pooled = {} if one.pooled is None else {"pooled": one.pooled[0]}
                self.texts.store(keys[text], {"embeds": one.embeds[0], **pooled})
        return keys

    def conditioning(self, keys: Sequence[str]) -> Conditioning:
        """Cached texts, stacked in the order of their keys."""
        entries = [_present(self.texts, key) for key in keys]
        pooled = torch.stack([entry["pooled"] for entry in entries]) if "pooled" in entries[0] else None
        return Conditioning(embeds=torch.stack([entry["embeds"] for entry in entries]), pooled=pooled)


@dataclass(frozen=True)
class CachedSamples(Dataset[Sample]):
    """Encoded pictures with their captions; the mirrored version, if any, is drawn by (seed, epoch, picture)."""

    encoder: Encoder
    records: Sequence[Record]
    picture_keys: Sequence[Sequence[str]]
    text_keys: Sequence[str]
    seed: int

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, place: int | tuple[int, int]) -> Sample:
        """The sample of an index, or of (index, epoch)."""
        index, epoch = place if isinstance(place, tuple) else (place, 0)
        versions, digest = self.picture_keys[index], self.records[index].digest
        stream = generator(self.seed, "version", epoch, digest)
        chosen = versions[int(torch.randint(len(versions), (1,), generator=stream))]
        return Sample(
            latents=_present(self.encoder.latents, chosen)["latents"],
            conditioning=self.encoder.conditioning([self.text_keys[index]]),
            key=digest,
        )


def encode_samples(
    encoder: Encoder, records: Sequence[Record], sizes: Sequence[tuple[int, int]], *, flip: bool, seed: int
) -> CachedSamples:
    """Encode pictures at their bucket's size (and mirrored, where `flip`), with their captions."""
    versions = (False, True) if flip else (False,)
    keys = [encoder.encode_pictures([(r, s, m) for r, s in zip(records, sizes, strict=True)]) for m in versions]
    texts = encoder.encode_texts([record.caption for record in records])
    return CachedSamples(
        encoder=encoder,
        records=records,
        picture_keys=list(zip(*keys, strict=True)),
        text_keys=[texts[record.caption] for record in records],
        seed=seed,
    )


def _present(cache: TensorCache, key: str) -> dict[str, torch.Tensor]:
    entry = cache.load(key)
    if entry is None:
        raise RuntimeError(f"the cache entry {key} was damaged or removed while in use; run again to rebuild it")
    return entry
