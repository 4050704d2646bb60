"""The bundled model and picture set, loaded once, and a real transformer small enough to be built at random."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

from flux2_lora import cli
from flux2_lora.bundled import share
from flux2_lora.families import Model, ModelFamily, ModelSpec, load_family, open_model
from flux2_lora.flow import TimestepSpec
from flux2_lora.networks.transformers import block_linears
from flux2_lora.quantize import FrozenLinear
from flux2_lora.training.step import Batch, Draws, Sample, share_of
from flux2_lora.weights import Stored

if TYPE_CHECKING:
    from tests.streamed import Case

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@dataclass(frozen=True)
class Outcome:
    """What a command left: exit code and both streams."""

    code: int
    out: str
    err: str


Command = Callable[..., Outcome]


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """Sums come in the same order on any machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny() -> Path:
    return share() / "data" / "tiny"


@pytest.fixture(scope="session")
def family() -> ModelFamily:
    return load_family("flux2_small")


@pytest.fixture
def transformer() -> nn.Module:
    """A real Flux2Transformer2DModel with random weights: 1 double and 2 single blocks of 2 heads of 16."""
    from diffusers import Flux2Transformer2DModel

    torch.manual_seed(0)
    model: nn.Module = Flux2Transformer2DModel(
        in_channels=128,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    return model.eval()


@pytest.fixture(scope="session")
def tiny_model(tiny: Path) -> Model:
    """The bundled model, opened."""
    return open_model(ModelSpec(family="flux2_small", path=str(tiny), title="tiny", architecture_name="tiny"))


def drawn(family: ModelFamily, samples: Sequence[Sample], step: int = 0) -> Batch:
    """The samples as a batch of step `step`, under seed 0 and the usual density."""
    share = share_of([(place, 0) for place in range(len(samples))], rank=0, processes=1)
    return Draws(family=family, density=TimestepSpec(), seed=0).of(samples, share, step)


def quantised(transformer: nn.Module, kind: str = "fp8") -> nn.Module:
    """Freeze a transformer in place and quantise the Linears of its blocks, as loading does."""
    transformer.requires_grad_(False)
    for path in block_linears(transformer):
        linear = transformer.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        stored = Stored(values=linear.weight.detach())
        transformer.set_submodule(path, FrozenLinear(stored, linear.bias, kind, dtype=linear.weight.dtype))
    return transformer


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """Run `flux2-lora <arguments>` in an empty folder, in this process: one import of torch serves all."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Outcome:
        capfd.readouterr()
        try:
            code = cli.main(list(arguments))
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        streams = capfd.readouterr()
        return Outcome(code or 0, streams.out, streams.err)

    return run


class _Stream:
    """Stands for a stream of a device that does everything as soon as it is told; notes what it was told."""

    said: list[str]

    def __init__(self, *_: object) -> None: ...

    def wait_stream(self, _: object) -> None:
        _Stream.said.append("after what was given")

    def wait_event(self, _: object) -> None:
        _Stream.said.append("after an event")


class _Event:
    def record(self, _: object) -> None:
        _Stream.said.append("event")

    def synchronize(self) -> None:
        """Nothing runs behind the host's back here."""


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """CUDA's calls, as far as copies make them; what was told in order."""
    _Stream.said = []
    for name, double in (("Stream", _Stream), ("Event", _Event), ("stream", lambda _: nullcontext())):
        monkeypatch.setattr(torch.cuda, name, double)
    monkeypatch.setattr(torch.cuda, "current_stream", _Stream)
    monkeypatch.setattr(Tensor, "record_stream", lambda *_: _Stream.said.append("slot"))
    return _Stream.said


@pytest.fixture(scope="session")
def cases() -> dict[tuple[str, str], Case]:
    from tests.streamed import every_case

    return every_case()


@pytest.fixture
def case(cases: dict[tuple[str, str], Case]) -> Case:
    return cases["flux2", "fp8"]
