"""Real processes on awkward folders: a thousand damaged pictures, two at one cache, and kill -9."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from safetensors import safe_open
from safetensors.torch import load_file

from tests.conftest import Command
from tests.sets import picture

ROOT = Path(__file__).parents[2]
GIB = 2**30


def wholes() -> dict[str, bytes]:
    """Twelve kinds of picture files, each with what its format can carry besides."""
    noise = np.random.default_rng(0).integers(0, 256, (96, 128, 4), dtype=np.uint8)
    rgb, rgba = Image.fromarray(noise[..., :3]), Image.fromarray(noise)
    deep = Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    carried = {"exif": exif, "icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()}
    film = {"save_all": True, "append_images": [rgb.transpose(Image.Transpose.ROTATE_180)]}
    made = {
        "jpg": (rgb, "JPEG", carried),
        "cmyk.jpg": (rgb.convert("CMYK"), "JPEG", {}),
        "png": (rgba, "PNG", carried),
        "palette.png": (rgb.quantize(), "PNG", {"transparency": 3}),
        "deep.png": (deep, "PNG", {}),
        "animated.png": (rgb, "PNG", film),
        "webp": (rgba, "WEBP", carried),
        "gif": (rgb, "GIF", film),
        "bmp": (rgb, "BMP", {}),
        "tiff": (rgb, "TIFF", {**carried, "compression": "tiff_lzw"}),
        "deep.tif": (deep, "TIFF", {}),
        "avif": (rgb, "AVIF", carried),
    }
    files: dict[str, bytes] = {}
    for name, (image, kind, options) in made.items():
        raw = BytesIO()
        image.save(raw, kind, **options)  # type: ignore[arg-type]
        files[name] = raw.getvalue()
    return files


def mutated(whole: bytes, rng: random.Random) -> bytes:
    """Bytes changed, mostly in the header where sizes stand, cut off, doubled, or filled up."""
    raw = bytearray(whole)
    for _ in range(rng.choice((1, 1, 2, 8, 40))):
        if not raw:
            break
        place = rng.randrange(min(len(raw), 200)) if rng.random() < 0.5 else rng.randrange(len(raw))
        match rng.randrange(10):
            case 0:
                del raw[place:]
            case 1:
                raw[place:place] = raw[place : place + 64]
            case 2:
                raw[place : place + 4] = b"\xff\xff\xff\xff"
            case _:
                raw[place] = rng.randrange(256)
    return bytes(raw)


def run(*arguments: str, cwd: Path) -> tuple[int, str, int]:
    """A command in a process of its own: exit code, both streams, and its largest resident memory in bytes."""
    done = subprocess.run([sys.executable, "-c", *arguments], cwd=cwd, capture_output=True, check=False)
    said = (done.stdout + done.stderr).decode(errors="replace")
    return done.returncode, said, int(said.rpartition("largest ")[2]) if "largest " in said else 0


# Linux hands the largest size of a parent on to its children; only what the process says of itself is its own.
MAIN = """
import sys
from pathlib import Path
from flux2_lora.cli import main
from flux2_lora.devices import largest_resident
code = main(sys.argv[1:])
status = Path("/proc/self/status")
own = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")] if status.is_file() else []
print("largest", 1024 * int(own[0].split()[1]) if own else largest_resident(), file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.slow
def test_a_thousand_mutated_pictures_are_used_or_named(tmp_path: Path) -> None:
    rng, files = random.Random(0), wholes()
    assert len(files) == 12
    (tmp_path / "set").mkdir()
    for number in range(1000):
        name = sorted(files)[number % 12]
        (tmp_path / f"set/{number:04}.{name}").write_bytes(mutated(files[name], rng))
    code, said, largest = run(MAIN, "inspect", "dataset.folder=set", "dataset.default_caption=x", cwd=tmp_path)
    assert code == 0, said
    assert "Traceback" not in said
    seen = json.loads(json.loads((tmp_path / "outputs/cache/pictures.json").read_text())["seen"])
    refused = (tmp_path / "outputs/set/skipped.txt").read_text().splitlines()
    used = int(said.split(" pictures to train on")[0].split()[-1]) + int(said.split(" for validation")[0].split()[-1])
    assert used + len(refused) == 1000
    assert used > 100
    assert len(refused) > 100
    assert len(seen) <= used
    assert all(len(line.split(": ", 1)[1]) > 3 for line in refused)
    assert largest < 2 * GIB


@pytest.mark.parametrize("pixels", [(11_000, 11_000), (16_000, 12_000)])
def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path: Path, pixels: tuple[int, int]) -> None:
    picture(tmp_path / "set/good.png")
    Image.MAX_IMAGE_PIXELS, before = None, Image.MAX_IMAGE_PIXELS
    Image.new("1", pixels).save(tmp_path / "set/huge.png")
    Image.MAX_IMAGE_PIXELS = before
    assert (tmp_path / "set/huge.png").stat().st_size < 100_000
    code, said, largest = run(MAIN, "inspect", "dataset.folder=set", "dataset.default_caption=x", cwd=tmp_path)
    assert code == 0, said
    assert "skipped huge.png: " in said
    assert largest < 1.2 * GIB


def test_nothing_usable_stops_before_a_model_is_looked_for(command: Command, tmp_path: Path) -> None:
    for number in range(8):
        picture(tmp_path / f"set/{number}.png").write_bytes(b"no picture")
    outcome = command("train", "dataset.folder=set", "model.path=nowhere")
    assert outcome.code == 2
    what, remedy = outcome.err.strip().splitlines()
    assert "none can be used: 0.png (not a picture, whatever its name says), 1.png" in what
    assert "and 3 more; the full list is in outputs/set/skipped.txt" in what
    assert remedy.startswith("  hint: ")
    assert len((tmp_path / "outputs/set/skipped.txt").read_text().splitlines()) == 8


# --- several processes at one cache

ENCODE = """
import sys, os, torch
torch.set_num_threads(1)
from pathlib import Path
from flux2_lora.dataset import DatasetSpec, scan
from flux2_lora.dataset.seen import Memory
from flux2_lora.families import ModelSpec, open_model
from flux2_lora.bundled import share
from flux2_lora.training.encoding import Encoder, encode_samples
import diffusers, transformers

def encode(cache, told):
    spec = DatasetSpec(folder="set", resolution=[64], flip=True, holdout=0)
    memory = Memory(Path(cache) / "pictures.json")
    found = scan(spec, seed=0, step=16, memory=memory, cache=Path(cache), report=Path("skipped.txt"))
    tiny = str(share() / "data/tiny")
    model = open_model(ModelSpec(family="flux2_small", path=tiny, title="tiny", architecture_name="tiny"))
    encoder = Encoder(model, Path(cache), torch.device("cpu"))
    for kind in (encoder.latents, encoder.texts):
        def noted(key, tensors, store=kind.store):
            store(key, tensors)
            told(key)
        kind.store = noted
    encode_samples(encoder, found.training, spec, 0)
    return encoder
"""

KILLED = (
    ENCODE
    + """
import json, random, signal, time
warm = open_model(ModelSpec(family="flux2_small", path=str(share() / "data/tiny"), title="t", architecture_name="t"))
warm.load_vae(torch.device("cpu")), warm.load_prompt_encoder(torch.device("cpu"))  # imported before the forks
rng = random.Random(0)
outcomes = []
for point in range(20):
    cache = f"cache-{point}"
    ready, write = os.pipe()
    child = os.fork()
    if child == 0:
        encode(cache, lambda key: os.write(write, b"."))
        signal.pause()
    for _ in range(1 + point * 32 // 20):
        os.read(ready, 1)
    if rng.random() < 0.7:
        time.sleep(rng.random() * 0.02)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    left = {path.stem for path in Path(cache).rglob("*.safetensors")}
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        made = []
        encoder = encode(cache, made.append)
        os.write(write, json.dumps([made, encoder.healed]).encode())
        os._exit(0)
    os.waitpid(child, 0)
    made, healed = json.loads(os.read(read, 1 << 20))
    every = {path.stem for path in Path(cache).rglob("*.safetensors")}
    outcomes.append([os.WIFSIGNALED(status), sorted(left), sorted(made), sorted(every), healed])
print("outcomes", json.dumps(outcomes))
"""
)


@pytest.fixture
def eleven(tmp_path: Path) -> Path:
    """Eleven pictures, so 33 entries with their mirrored crops and captions."""
    for number in range(11):
        picture(tmp_path / f"set/{number}.png", f"caption {number}", colour=(20 * number, 9, 9))
    return tmp_path


def entries(cache: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {path.stem: load_file(path) for path in cache.rglob("*.safetensors")}


def equal(one: dict[str, dict[str, torch.Tensor]], other: dict[str, dict[str, torch.Tensor]]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(tensor, other[key][name]) for key, tensors in one.items() for name, tensor in tensors.items()
    )


def encoded(folder: Path, cache: str) -> dict[str, dict[str, torch.Tensor]]:
    code, said, _ = run(f"{ENCODE}\nencode({cache!r}, print)", cwd=folder)
    assert code == 0, said
    return entries(folder / cache)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forked")
def test_after_kill_9_the_next_run_encodes_the_rest_only(eleven: Path) -> None:
    """At 20 points, between entries and inside of one; each process is killed as the system kills."""
    code, said, _ = run(KILLED, cwd=eleven)
    assert code == 0, said[-3000:]
    outcomes = json.loads(said.split("outcomes ")[1].splitlines()[0])
    assert len(outcomes) == 20
    wanted = encoded(eleven, "cache-0")
    assert len(wanted) == 33
    for point, (killed, left, made, every, healed) in enumerate(outcomes):
        assert killed
        assert healed == 0
        assert set(left) | set(made) == set(every) == set(wanted)
        assert not set(left) & set(made)
        assert equal(entries(eleven / f"cache-{point}"), wanted)
    assert len({len(left) for _, left, _, _, _ in outcomes}) > 10


@pytest.mark.slow
def test_two_processes_fill_one_cache(eleven: Path) -> None:
    both = [
        subprocess.Popen([sys.executable, "-c", f"{ENCODE}\nencode('shared', print)"], cwd=eleven) for _ in range(2)
    ]
    assert [process.wait() for process in both] == [0, 0]
    assert equal(entries(eleven / "shared"), encoded(eleven, "alone"))
    assert [path.name for path in (eleven / "shared").rglob(".*")] == []


# --- a run with everything at once


@pytest.fixture
def rich(tmp_path: Path) -> list[str]:
    """Options of a run in which every draw is made: crops, flips, tags, dropped captions, latents, two sources."""
    rng = np.random.default_rng(0)
    for number in range(6):
        folder = tmp_path / ("2_mine" if number < 4 else "other")
        folder.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (70, 110, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"thing {number}, red, round, flat")
    Image.fromarray(np.eye(70, 110, dtype=np.uint8) * 255).save(tmp_path / "2_mine/0-masklabel.png")
    return [
        *("dataset.folder=2_mine", "dataset.sources=[{folder: other, weight: 0.5, trigger_word: osks}]"),
        *("dataset.trigger_word=sks", "dataset.shuffle_tags=3", "dataset.caption_dropout=0.3", "dataset.flip=true"),
        *("dataset.crop=random", "dataset.crop_variants=2", "dataset.posterior=sample", "dataset.resolution=[48,64]"),
        *("dataset.holdout=0.2", "batch_size=2", "preview.every=0", "validation.every=6", "device=cpu"),
    ]


def learned(name: str, step: int) -> dict[str, dict[str, torch.Tensor]]:
    return entries(Path(f"outputs/{name}/checkpoints/step-{step:06}"))


def test_a_run_with_every_draw_resumes_bit_for_bit(command: Command, rich: list[str]) -> None:
    whole = command("train", *rich, "name=whole", "max_steps=6", "checkpoint_every=3")
    assert whole.code == 0, whole.err
    assert command("train", *rich, "name=halves", "max_steps=3").code == 0
    assert command("train", *rich, "name=halves", "max_steps=6").code == 0
    assert equal(learned("halves", 6), learned("whole", 6))


def test_workers_change_nothing(command: Command, rich: list[str]) -> None:
    assert command("train", *rich, "name=alone", "max_steps=4").code == 0
    assert command("train", *rich, "name=helped", "max_steps=4", "loader_workers=2").code == 0
    assert equal(learned("alone", 4), learned("helped", 4))


def test_every_trigger_word_is_in_the_export(command: Command, rich: list[str]) -> None:
    assert command("train", *rich, "name=words", "max_steps=1").code == 0
    with safe_open(Path("outputs/words/export/words.safetensors"), framework="pt") as file:
        assert file.metadata()["modelspec.trigger_phrase"] == "sks, osks"


def test_prepare_prunes_what_is_old(command: Command, rich: list[str]) -> None:
    quick = [option for option in rich if option.startswith("dataset.")]
    assert command("prepare", *quick).code == 0
    before = set(Path("outputs/cache").rglob("*.safetensors"))
    for path in before:
        os.utime(path, (0, path.stat().st_mtime))
    pruned = command("prepare", "dataset.folder=other", "cache.max_days=7")
    assert pruned.code == 0
    assert "pruned " in pruned.out
    after = set(Path("outputs/cache").rglob("*.safetensors"))
    assert before - after
    assert command("prepare", *quick, "cache.max_gb=0.000001").code == 0
    assert before <= set(Path("outputs/cache").rglob("*.safetensors"))


def test_a_damaged_cache_is_told_and_mended(command: Command, eleven: Path) -> None:
    assert command("prepare", "dataset.folder=set").code == 0
    for path in list(Path("outputs/cache/latents").rglob("*.safetensors"))[:3]:
        path.write_bytes(path.read_bytes()[:-3])
    assert "3 damaged entries were made again" in command("prepare", "dataset.folder=set").out
    assert "damaged" not in command("prepare", "dataset.folder=set").out


def test_an_imported_file_trains(command: Command, eleven: Path) -> None:
    Path("k.toml").write_text(
        "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = 'set'\nnum_repeats = 2\ncolor_aug = true\n"
    )
    outcome = command("train", "dataset.import=k.toml", "max_steps=1", "preview.every=0", "device=cpu")
    assert outcome.code == 0, outcome.err
    assert "k.toml: color_aug=true is not taken over" in outcome.out
    assert "import: k.toml" in Path("outputs/k/run.yaml").read_text()


@pytest.mark.parametrize(
    ("options", "what", "remedy"),
    [
        (["dataset.sources=[{foldr: a}]"], "dataset.sources[0].foldr is not an option", "did you mean folder?"),
        (["dataset.sources=[a]"], "dataset.sources=['a'] is not a list of options in braces", "[{folder: pictures}]"),
        (["dataset.sources=[{folder: set, repeats: 0}]"], "dataset.sources[0].repeats=0 is out of range", "at least 1"),
        (["dataset.sources=[{}]"], "dataset.sources[0] names neither of folder and hub", "name one of them"),
        (["dataset.import=gone.toml"], "dataset.import=gone.toml does not exist", "check the path"),
        (["dataset.import=set"], "dataset.import=set is neither TOML nor YAML", "kohya"),
        (["dataset.masks=gone", "dataset.folder=set"], "dataset.masks=gone does not exist", ""),
        (["dataset.background=octarine", "dataset.folder=set"], "dataset.background=octarine is not a colour", "white"),
        (["dataset.resolution=[64,8]", "dataset.folder=set"], "dataset.resolution[1]=8 is out of range", "at least 16"),
        (["dataset.hub=nobody/nothing"], "dataset.hub=nobody/nothing (split train) cannot be loaded", "check the id"),
    ],
)
def test_a_wrong_dataset_option_is_named_with_a_remedy(
    command: Command, eleven: Path, options: list[str], what: str, remedy: str
) -> None:
    outcome = command("train", *options)
    assert outcome.code == 2
    first, second = outcome.err.strip().splitlines()
    assert what in first
    assert remedy in second
    assert not [path for path in Path("outputs").rglob("*") if path.is_file() and "datasets" not in path.parts]
