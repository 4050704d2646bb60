"""What caching costs beside the VAE itself, and how soon a folder that is cached is ready to train.

    python scripts/bench_prepare.py                       both parts
    python scripts/bench_prepare.py --pictures 4 --ready 100 --resolution 256

First, pictures of 12 megapixels and about 2 MB, from a folder that was never seen: scan, decode, crop, encode and store
them, against the forward of a VAE of FLUX.2's real size (random weights) on crops that are in memory already. The VAE
is loaded before both. Rounds of both alternate, and the median of their ratios is printed. Then --ready such pictures
on the bundled model: cached once, and looked at again by a fresh process, up to the first samples that training could
take. Importing the libraries, which costs the same with any pictures, is given beside that.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import tempfile
import time
from dataclasses import replace
from functools import cache
from io import BytesIO
from pathlib import Path
from statistics import median

import numpy as np
import psutil
import torch
from PIL import Image
from torch import nn

from flux2_lora.bundled import share
from flux2_lora.dataset import DatasetSpec, Scan, scan
from flux2_lora.dataset.pictures import crop_to, open_picture
from flux2_lora.dataset.seen import Memory
from flux2_lora.devices import pick_device
from flux2_lora.families import Model, ModelSpec, open_model
from flux2_lora.training.encoding import CachedSamples, Encoder, encode_samples

TINY = ModelSpec(family="flux2_small", path=str(share() / "data/tiny"), title="tiny", architecture_name="tiny")
WIDTH, HEIGHT = 4000, 3000
ROUNDS = 3


class Ready(Model):
    """A model whose VAE is loaded once."""

    @cache  # noqa: B019 - there is one, for as long as the process runs
    def load_vae(self, device: torch.device) -> nn.Module:
        return super().load_vae(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=2, help="pictures a round")
    parser.add_argument("--resolution", type=int, default=512, help="px, for the VAE of real size")
    parser.add_argument("--ready", type=int, default=1000, help="pictures of the second part")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--folder", type=Path, help="where all is made; default: the system's temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as place:
        folder = Path(place)
        speed(folder, arguments.pictures, arguments.resolution, arguments.device)
        if arguments.ready:
            readiness(folder, arguments.ready)


def speed(folder: Path, count: int, resolution: int, device: str) -> None:
    """Print pictures a second of the bare VAE, of caching, and their ratio."""
    model, chosen = model_of_real_size(folder / "model"), pick_device(device)
    vae = model.load_vae(chosen)
    bare, cached = [], []
    for number in range(ROUNDS + 1):
        pictures = folder / f"round-{number}"
        make_pictures(pictures, count, first=number * count)
        crops = [crop_to(open_picture(path).image, resolution, resolution) for path in sorted(pictures.glob("*.jpg"))]
        began = time.perf_counter()
        with torch.no_grad():
            for crop in crops:
                model.family.encode_pixels(vae, crop[None].to(chosen)).mean.cpu()
        between = time.perf_counter()
        look_and_encode(model, pictures, folder / "cache", resolution, chosen, texts=False)
        bare.append(between - began)
        cached.append(time.perf_counter() - between)
    ratios = [one / other for one, other in zip(bare[1:], cached[1:], strict=True)]  # the first round warms up
    print("| VAE | device | pictures | px | bare VAE, a second | caching, a second | ratio |")
    print("|---|---|---|---|---|---|---|")
    print(
        f"| {sum(p.numel() for p in vae.parameters()) / 1e6:.0f} M | {chosen.type} | {ROUNDS} x {count} | {resolution} "
        f"| {count / median(bare[1:]):.3f} | {count / median(cached[1:]):.3f} | {median(ratios):.2f} |\n",
        flush=True,
    )


def readiness(folder: Path, count: int) -> None:
    """Print how long a first preparation takes, and how soon a second process is ready."""
    make_pictures(folder / "many", count, first=1_000_000)
    size = sum(path.stat().st_size for path in (folder / "many").glob("*.jpg"))
    rows = []
    for what in ("first", "second"):
        with multiprocessing.get_context("spawn").Pool(1) as pool:  # its memory and its imports are its own
            rows.append((what, *pool.apply(ready, (folder / "many", folder / "many-cache"))))
    print("| pictures | in all | run | scan, s | caches, s | data ready after, s | libraries imported in, s |")
    print("|---|---|---|---|---|---|---|")
    for what, imported, scanned, cached in rows:
        print(
            f"| {count} | {size / 1e9:.2f} GB | {what} | {scanned:.1f} | {cached:.1f} | {scanned + cached:.1f} "
            f"| {imported:.1f} |"
        )


def ready(pictures: Path, store: Path) -> tuple[float, float, float]:
    """Seconds until this process has its libraries and a model's headers, of the scan, and to the first samples."""
    model = open_model(TINY)
    imported = time.time() - psutil.Process().create_time()
    began = time.perf_counter()
    memory, found = look(pictures, store, 64)
    memory.save()
    between = time.perf_counter()
    samples = encode(model, found, store, torch.device("cpu"), texts=True)
    assert samples is not None
    for index in range(4):
        samples[index, 0]
    return imported, between - began, time.perf_counter() - between


def look_and_encode(
    model: Model, pictures: Path, store: Path, resolution: int, device: torch.device, *, texts: bool
) -> None:
    """As `flux2-lora prepare` does."""
    memory, found = look(pictures, store, resolution)
    memory.save()
    encode(model, found, store, device, texts=texts)


def look(pictures: Path, store: Path, resolution: int) -> tuple[Memory, Scan]:
    memory = Memory(store / "pictures.json")
    spec = DatasetSpec(folder=str(pictures), resolution=[resolution], default_caption="a picture", holdout=0)
    report = store / "skipped.txt"
    return memory, scan(spec, seed=0, step=16, memory=memory, cache=store, report=report)


def encode(model: Model, found: Scan, store: Path, device: torch.device, *, texts: bool) -> CachedSamples | None:
    """Pictures alone where the question is what they cost."""
    encoder = Encoder(model, store, device)
    if texts:
        return encode_samples(encoder, found.training, DatasetSpec(folder=""), 0)
    jobs = [(r, crop) for r in found.training for bucket in r.buckets for crop in r.crops(bucket, 0)]
    encoder.encode_pictures(jobs)
    return None


def model_of_real_size(folder: Path) -> Model:
    """The bundled model with a VAE of FLUX.2's size, its weights random."""
    from diffusers import AutoencoderKLFlux2

    shutil.copytree(share() / "data" / "tiny", folder)
    shutil.rmtree(folder / "vae")
    torch.manual_seed(0)
    AutoencoderKLFlux2().save_pretrained(folder / "vae")
    opened = open_model(replace(TINY, path=str(folder)))
    return Ready(opened.spec, opened.family, opened.files, opened.weights)


def make_pictures(folder: Path, count: int, first: int) -> None:
    """JPEG files of a camera's size; each differs from the others by a comment, and so in content."""
    folder.mkdir(parents=True)
    whole = photograph()
    for number in range(first, first + count):
        comment = f"picture {number}".encode()
        segment = b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment
        (folder / f"{number:08}.jpg").write_bytes(whole[:2] + segment + whole[2:])


def photograph() -> bytes:
    """Smooth shapes and a little noise, of 12 megapixels and about 2 MB."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)).astype(np.int16)
    grain = rng.normal(0, 4, (HEIGHT, WIDTH, 1)).astype(np.int16)
    content = BytesIO()
    Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(content, "JPEG", quality=86)
    return content.getvalue()


if __name__ == "__main__":
    main()
