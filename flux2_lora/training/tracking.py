"""What a run tells machines: metrics.jsonl, and a tracker where one is wanted.

Law: a tracker never ends a run. What goes wrong there is said once, and metrics.jsonl goes on without it.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from PIL import Image

from flux2_lora.errors import UserError
from flux2_lora.files import room_for, write_text
from flux2_lora.options import option
from flux2_lora.training.progress import console

if TYPE_CHECKING:
    import wandb

# A run starts online in 1 to 2 s; on a dead network wandb would wait 90 s at its start and for ever at its end.
_START_S = 30
_FINISH_S = 120


@dataclass(frozen=True, kw_only=True)
class LoggerSpec:
    """kind: jsonl (always written), or tensorboard or wandb beside it; wandb_project names the project there.

    wandb_mode: online, which gives way to WANDB_MODE and falls back to offline, or offline.
    """

    kind: str = option("jsonl", one_of=("jsonl", "tensorboard", "wandb"))
    wandb_project: str = "flux2-lora"
    wandb_mode: str = option("online", one_of=("online", "offline"))


def refuse_missing(spec: LoggerSpec) -> None:
    """UserError with the command to install what the tracker needs."""
    if spec.kind == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
        raise UserError("logger=tensorboard needs tensorboard", "pip install 'flux2-lora[tensorboard]'")


class Metrics:
    """Appends one JSON object a row to metrics.jsonl in the run's folder, and tells the tracker of the spec.

    resumed_at: the step from which the run goes on; later rows are dropped, 0 drops all.
    UserError where the tracker's package is missing; RunError for a full disk, OSError with the path for what else
    keeps metrics.jsonl from being written.
    """

    def __init__(self, path: Path, spec: LoggerSpec, *, name: str, config: Mapping[str, Any], resumed_at: int) -> None:
        self.path, self._kind = path, spec.kind
        self._tracker: Tracker | None = None
        refuse_missing(spec)
        kept = [row for row in read_metrics(path) if resumed_at > 0 and row["step"] <= resumed_at]
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        with self._spared():
            self._tracker = _open_tracker(spec, path.parent, name=name, config=config, resumed_at=resumed_at)

    def write(self, step: int, **values: float) -> None:
        with _naming(self.path), room_for(self.path, 1 << 10), self.path.open("a") as file:
            file.write(json.dumps({"step": step, **{name: _number(value) for name, value in values.items()}}) + "\n")
        with self._spared():
            if self._tracker is not None:
                self._tracker.scalars(step, values)

    def picture(self, step: int, name: str, path: Path) -> None:
        """Hand a PNG to the tracker; `name` is the heading it gets there."""
        with self._spared():
            if self._tracker is not None:
                self._tracker.picture(step, name, path)

    def sync(self) -> None:
        """Make the rows so far safe from a power cut."""
        with _naming(self.path), self.path.open("a") as file:
            os.fsync(file.fileno())

    def close(self) -> None:
        with self._spared():
            if self._tracker is not None:
                self._tracker.close()
        self._tracker = None

    @contextmanager
    def _spared(self) -> Iterator[None]:
        """Whatever a tracker raises is said once, and ends the tracker in place of the run."""
        try:
            yield
        # wandb raises its Error, OSError, pydantic's ValueError and bare Exceptions of private modules.
        except Exception as error:  # noqa: BLE001
            self._tracker = None
            console.print(f"{self._kind}: {_in_a_line(error)}; the run goes on without it, and with {self.path.name}")


class Tracker(Protocol):
    """Where rows and pictures go besides metrics.jsonl; its methods may raise anything."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def picture(self, step: int, name: str, path: Path) -> None: ...

    def close(self) -> None: ...


def _open_tracker(
    spec: LoggerSpec, folder: Path, *, name: str, config: Mapping[str, Any], resumed_at: int
) -> Tracker | None:
    if spec.kind == "tensorboard":
        return _TensorBoard(folder / "tensorboard", config, resumed_at)
    if spec.kind == "wandb":
        return _Wandb(spec, folder, name=name, config=config, resumed_at=resumed_at)
    return None


class _TensorBoard:
    """Event files in `folder`; what an earlier process wrote after `resumed_at` is hidden there."""

    def __init__(self, folder: Path, config: Mapping[str, Any], resumed_at: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=resumed_at + 1 if resumed_at else 0)
        text = json.dumps(config, indent=2, default=str)
        self._writer.add_text("config", f"```\n{text}\n```", resumed_at)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, path: Path) -> None:
        with Image.open(path) as picture:
            self._writer.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """A run of wandb, the same again after a resume: online where that works, else offline, which is said.

    "step" is a metric of its own and the axis of the others. wandb's own steps may not go back: after a resume it would
    refuse the rows that come again, and `wandb sync` of an offline run would give them later numbers.
    """

    def __init__(
        self, spec: LoggerSpec, folder: Path, *, name: str, config: Mapping[str, Any], resumed_at: int
    ) -> None:
        import wandb

        self._image = wandb.Image
        identity = _run_id(folder / "wandb-run-id.txt", resumed_at)
        start = partial(
            _start_wandb, project=spec.wandb_project, name=name, config=config, folder=folder, identity=identity
        )
        why = "offline as asked"
        try:
            self._run = start("offline" if spec.wandb_mode == "offline" else None)
        except (wandb.Error, OSError) as error:
            why = f"{_in_a_line(error)}; the run goes on offline"
            with suppress(SystemExit):  # teardown exits with the code of wandb's service
                wandb.teardown()  # for the service, the id of the failed attempt is still in use
            self._run = start("offline")
        self._upload = f"wandb sync {Path(self._run.dir).parent}"
        if self._run.offline:
            console.print(f"wandb: {why}, to upload it later: {self._upload}")
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def picture(self, step: int, name: str, path: Path) -> None:
        self._run.log({"step": step, name: self._image(str(path))})

    def close(self) -> None:
        try:
            self._run.finish()
        except TimeoutError:
            console.print(f"wandb: the upload did not end in {_FINISH_S} s; to upload the rest: {self._upload}")


def _start_wandb(
    mode: Literal["offline"] | None, *, project: str, name: str, config: Mapping[str, Any], folder: Path, identity: str
) -> wandb.Run:
    """mode: None for what WANDB_MODE says, which is online by default. wandb.Error or OSError where that fails."""
    import wandb

    wandb.setup(
        wandb.Settings(
            login_timeout=_START_S,
            init_timeout=_START_S,
            finish_timeout=_FINISH_S,
            finish_timeout_raises=True,
            quiet=True,  # otherwise it also looks up the user's name, 5 s each time on a dead network
        )
    )
    run = wandb.init(
        project=project,
        name=name,
        id=identity,
        dir=str(folder),
        config=dict(config),
        mode=mode,
        resume="allow",
        reinit="finish_previous",
    )
    if run.disabled:
        raise TimeoutError("disabled by WANDB_MODE, or no answer when it asked for an API key")
    return run


def _run_id(file: Path, resumed_at: int) -> str:
    """The id of the run there, kept in `file`; a new one for a run that starts.

    Random: the path alone would be the same on another machine, and for the run that replaces this one.
    """
    if resumed_at == 0 or not file.is_file():
        write_text(file, secrets.token_hex(8))
    return file.read_text()


def _number(value: float) -> float | None:
    """JSON knows no number that is not finite."""
    return value if math.isfinite(value) else None


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """An OSError with `path` in it; that of a full disk names no file by itself."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl; a last line cut short by a crash is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows
