"""What a wheel carries: the library, the programs with their configuration and bundled sets, and nobody's pictures."""

from __future__ import annotations

import re
import tarfile
from pathlib import Path
from zipfile import ZipFile

import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parents[2]
PICTURE = b"\x89PNG\r\n\x1a\n a private moment"

KINDS = (
    r"flux2_lora/(\w+/)*\w+\.py",
    r"flux2_lora/(py\.typed|inference/run_page\.(css|js))",
    r"flux2_lora/share/(train|data|scripts)/\w+\.py",
    r"flux2_lora/share/configs/(\w+/)*\w+\.yaml",
    r"flux2_lora/share/data/(demo|demo_poster|tiny)/.+",
    r"flux2_lora-[^/]+\.dist-info/(METADATA|WHEEL|RECORD|entry_points\.txt|licenses/(LICENSE|NOTICE))",
)


def wheel_files(root: Path, folder: Path) -> set[str]:
    """Names in the wheel that is built from `root` into `folder`."""
    wheel = next(WheelBuilder(str(root)).build(directory=str(folder), versions=["standard"]))
    with ZipFile(wheel) as opened:
        return set(opened.namelist())


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    return wheel_files(ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The tree as the source distribution holds it: a copy in which a test may put things."""
    sdist = next(SdistBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"]))
    with tarfile.open(sdist) as opened:
        opened.extractall(tmp_path, filter="data")
    return next(path for path in tmp_path.iterdir() if path.is_dir())


def test_every_file_of_the_wheel_is_of_a_known_kind(shipped: set[str]) -> None:
    assert [name for name in sorted(shipped) if not any(re.fullmatch(kind, name) for kind in KINDS)] == []


@pytest.mark.parametrize("pattern", ["train/*.py", "data/*.py", "scripts/*.py", "configs/**/*.yaml"])
def test_programs_and_configuration_stand_under_share(pattern: str, shipped: set[str]) -> None:
    wanted = {f"flux2_lora/share/{path.relative_to(ROOT)}" for path in ROOT.glob(pattern)}
    assert wanted
    assert wanted <= shipped


def test_the_library_is_whole(shipped: set[str]) -> None:
    library = {str(path.relative_to(ROOT)) for path in (ROOT / "flux2_lora").rglob("*.py")}
    assert library | {"flux2_lora/py.typed"} <= shipped


def test_the_bundled_model_and_pictures_are_carried(shipped: set[str]) -> None:
    folders = [ROOT / "data" / name for name in ("demo", "demo_poster", "tiny")]
    bundled = {path for folder in folders for path in folder.rglob("*") if path.is_file()}
    names = {f"flux2_lora/share/{path.relative_to(ROOT)}" for path in bundled if path.name != ".DS_Store"}
    assert any(name.endswith(".safetensors") for name in names)
    assert names <= shipped


def test_the_wheel_of_the_source_distribution_is_that_of_the_checkout(
    copied: Path, tmp_path: Path, shipped: set[str]
) -> None:
    assert wheel_files(copied, tmp_path / "wheel") == shipped


@pytest.mark.parametrize(
    "place",
    [
        "data/mine/photo.png",
        "data/photo.png",
        "data/mine/nested/photo.png",
        "data/mine/adapter.safetensors",
        "outputs/demo/previews/photo.png",
        "scripts/adapter.safetensors",
    ],
)
def test_private_files_stay_out_of_the_wheel_and_the_source_distribution(
    place: str, copied: Path, tmp_path: Path
) -> None:
    private = copied / place
    private.parent.mkdir(parents=True, exist_ok=True)
    private.write_bytes(PICTURE)
    sdist = next(SdistBuilder(str(copied)).build(directory=str(tmp_path / "sdist"), versions=["standard"]))
    with tarfile.open(sdist) as opened:
        names = wheel_files(copied, tmp_path / "wheel") | set(opened.getnames())
    assert [name for name in names if private.name in name] == []
