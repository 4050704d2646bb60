"""Sweeps: a program runs once for each combination of the options that hold several values.

All combinations are checked before the first one runs; each run has a folder of its own, and one that fails does not
end the others. Hydra's launchers start the runs, here one after the other or on a cluster; which runs there are, and
what they are called, is decided here.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import inspect
import itertools
import json
import os
import re
import shutil
import sys
import traceback
import typing
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf

from flux2_lora.bundled import share
from flux2_lora.config import SWEEP_FLAGS, composed, literal, schema_of, typed
from flux2_lora.errors import RunError, UserError, listed
from flux2_lora.files import digest, write_text
from flux2_lora.options import quoted

# Exit codes of Ctrl-C and SIGTERM; and those with which submitit leaves a job to be queued again, on Slurm and locally.
_INTERRUPTED, _REQUEUED = (130, 143), (-1, 144)
_LONGEST = 32  # signs of a swept value in a folder's name


@dataclass(frozen=True, kw_only=True)
class SweptRun:
    """A run of a sweep. options: the swept ones in which it differs from others; failure: what it died of, or None."""

    name: str
    folder: Path
    options: dict[str, str]
    overrides: tuple[str, ...]
    failure: str | None = None


def sweep(
    program: str,
    arguments: Sequence[str],
    run: Callable[[Any], None],
    after: Callable[[list[SweptRun], Path], None] | None,
) -> None:
    """Run a program once for each combination of the swept options.

    Exits with 1 where a run failed, with 2 where each was refused for its options.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("--multirun runs in one process", "torchrun is for single runs; leave out one of the two")
    options = [literal(a, schema_of(run), sweep=True) for a in arguments if a not in SWEEP_FLAGS]
    hydras = [option for option in options if option.startswith(("hydra.", "hydra/"))]
    options = [option for option in options if option not in hydras]
    with hydra.initialize_config_dir(config_dir=str(share() / "configs"), version_base="1.3"):
        runs = _planned(program, options, schema_of(run))
        page = _sweep_page(program, options, hydras)
        folder, logs = Path(page.hydra.sweep.dir), page.hydra.launcher.get("submitit_folder")
        new = not folder.exists()
        print(f"sweep of {len(runs)} runs" + (f"; they log to {Path(logs).parent}" if logs else ""))
        ended = _launched(page, runs, _Job(run=run, sweep=folder, total=len(runs)))
    runs = [dataclasses.replace(one, failure=end.failure) for one, end in zip(runs, ended, strict=True)]
    began, refused = any(one.folder.is_dir() for one in runs), all(end.code == 2 for end in ended)
    if after is not None and began:
        after(runs, folder)
    if refused and new and not began:
        _forget(folder)
    if any(one.failure for one in runs):
        print(_failures(runs), file=sys.stderr)
        sys.exit(2 if refused else 1)


def _forget(folder: Path) -> None:
    """Wrong input leaves nothing behind."""
    shutil.rmtree(folder)
    with suppress(OSError):
        folder.parent.rmdir()  # stays where it holds anything


def _failures(runs: Sequence[SweptRun]) -> UserError:
    """Which runs failed, by what they died of."""
    names: dict[str, list[str]] = {}
    for run in runs:
        if run.failure:
            names.setdefault(run.failure, []).append(run.name)
    count = sum(map(len, names.values()))
    told = "; ".join(f"{listed(same)} ({reason})" for reason, same in names.items())
    hint = "the same command tries them again; runs that are done end at once"
    return UserError(f"{count} of {len(runs)} runs failed: {told}", hint)


def _planned(program: str, options: Sequence[str], schema: type[Any]) -> list[SweptRun]:
    """The runs of a sweep, in the order of the command line; UserError for what is wrong with any of them."""
    choices = _choices(options)
    swept = [key for key, values in choices.items() if len(set(values)) > 1]
    labels = _labels([key for key in swept if key != "name"])
    runs: dict[tuple[str, ...], SweptRun] = {}
    for values in itertools.product(*choices.values()):
        chosen = dict(zip(choices, values, strict=True))
        overrides = tuple(f"{key}={value}" for key, value in chosen.items())
        spec = typed(composed(program, overrides), schema)
        tells = {label: _unquoted(chosen[key]) for key, label in labels.items()}
        name = "-".join([getattr(spec, "name", program), *(f"{key}={_safe(text)}" for key, text in tells.items())])
        place = Path(getattr(spec, "output_dir", "outputs")).expanduser()
        runs[overrides] = SweptRun(name=name, folder=place, options=tells, overrides=overrides)
    return _distinct(list(runs.values()), named="name" in typing.get_type_hints(schema))


def _choices(options: Sequence[str]) -> dict[str, list[str]]:
    """The values of each option, written as Hydra reads them: several for those that are swept."""
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    found = {}
    for option in options:
        try:
            [override] = parser.parse_overrides([option])
            found[override.get_key_element()] = _values(override)
        except HydraException as error:
            hint = "write a,b,c or range(1,4), and quotes around values with , = { } [ ]"
            raise UserError(f"{option} is neither a value nor a list of values", hint) from error
    return found


def _values(override: Override) -> list[str]:
    if override.is_sweep_override():
        return list(override.sweep_string_iterator())
    return [override.get_value_element_as_str()]


def _unquoted(value: str) -> str:
    """['attention','mlp'] -> [attention,mlp]"""
    return re.sub(r"""(^|(?<=[\[,]))['"]|['"]($|(?=[],]))""", "", value)


def _labels(keys: Sequence[str]) -> dict[str, str]:
    """optimizer.lr is called lr in the names of runs, unless the sweep has two options that end so."""
    plain = {key: key.lstrip("+~").rpartition("@")[2] for key in keys}
    short = {key: re.split("[./]", name)[-1] for key, name in plain.items()}
    often = Counter(short.values())
    return {key: short[key] if often[short[key]] == 1 else plain[key] for key in keys}


def _safe(value: str) -> str:
    """A value as a part of a folder's name on any system: other signs become _, a long one keeps its two ends."""
    text = re.sub(r"[^A-Za-z0-9._=+-]+", "_", value).strip("_").rstrip(".")
    return text if len(text) <= _LONGEST else f"{text[:12]}..{text[-12:]}+{digest(value)[:6]}"


def _distinct(runs: Sequence[SweptRun], *, named: bool) -> list[SweptRun]:
    """Runs with their folders; names that a file system could take for one another are told apart by a digest."""
    often = Counter(run.name.casefold() for run in runs)
    found = []
    for run in runs:
        twin = often[run.name.casefold()] > 1
        name = f"{run.name}+{digest(*run.overrides)[:6]}" if twin else run.name
        overrides = (*run.overrides, f"name={quoted(name)}") if named else run.overrides
        found.append(dataclasses.replace(run, name=name, folder=run.folder / name, overrides=overrides))
    return found


def _sweep_page(program: str, options: Sequence[str], hydras: Sequence[str]) -> DictConfig:
    """What the runs of a sweep share, with a folder for it: Hydra and launchers write nowhere else."""
    page = composed(program, [*options, *hydras], RunMode.MULTIRUN)
    stem = str(page.get("name", program))
    folder = Path(str(page.get("output_dir", "outputs"))).expanduser() / f"{stem}-sweep"
    ours = (f"hydra.sweep.dir={quoted(str(folder))}", "hydra.sweep.subdir=.", f"hydra.job.name={quoted(stem)}")
    return composed(program, [*options, *ours, *hydras], RunMode.MULTIRUN)


@dataclass(frozen=True, kw_only=True)
class _Ended:
    """How a run of a sweep ended: the exit code that it would have had by itself, and what it died of."""

    code: int = 0
    failure: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What a launcher calls for each run, in this process or in another; whatever the run ends in, it returns.

    here: whether in the process of the sweep, which Ctrl-C and SIGTERM end as a whole.
    """

    run: Callable[[Any], None]
    sweep: Path
    total: int
    here: bool = True

    def __call__(self, composed: DictConfig) -> _Ended:
        number = HydraConfig.get().job.num
        print(f"run {number + 1} of {self.total}" + (f": {composed.name}" if "name" in composed else ""))
        ended = self._ended(composed)
        write_text(_report(self.sweep, number), json.dumps(dataclasses.asdict(ended)))
        gc.collect()  # a model that lingers in a cycle would be missing from the memory of the next run
        return ended

    def __reduce__(self) -> tuple[Any, ...]:
        """As the program's file and the function's name: `__main__` is another program where this is read."""
        return _job_elsewhere, (inspect.getfile(self.run), self.run.__name__, self.sweep, self.total)

    def _ended(self, composed: DictConfig) -> _Ended:
        try:
            self.run(typed(composed, schema_of(self.run)))
        except UserError as error:
            print(error, file=sys.stderr)
            return _Ended(code=2, failure=error.what)
        except RunError as error:
            print(error, file=sys.stderr)
            return _Ended(code=1, failure=error.what)
        except SystemExit as stop:
            return self._stopped(stop)
        except Exception as error:  # noqa: BLE001 - whatever one run dies of, the others are run
            traceback.print_exc()
            return _Ended(code=1, failure=f"{type(error).__name__}: {error}".splitlines()[0])
        return _Ended()

    def _stopped(self, stop: SystemExit) -> _Ended:
        if stop.code in (_INTERRUPTED if self.here else _REQUEUED):
            raise stop
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
            return _Ended(code=1, failure=stop.code)
        return _Ended(code=stop.code, failure=f"exit code {stop.code}") if stop.code else _Ended()


def _job_elsewhere(file: str, name: str, sweep: Path, total: int) -> _Job:
    """A job in the process of a launcher, which has not run the program: it is loaded from its file."""
    found = importlib.util.spec_from_file_location("flux2_lora_program", file)
    assert found is not None
    assert found.loader is not None
    module = sys.modules[found.name] = importlib.util.module_from_spec(found)  # types are looked up by this name
    found.loader.exec_module(module)
    return _Job(run=inspect.unwrap(getattr(module, name)), sweep=sweep, total=total, here=False)


def _report(sweep: Path, number: int) -> Path:
    return sweep / ".ended" / f"{number}.json"


def _launched(page: DictConfig, runs: Sequence[SweptRun], job: _Job) -> list[_Ended]:
    """Run all of them by the launcher that the page names; how each ended."""
    write_text(job.sweep / "multirun.yaml", OmegaConf.to_yaml(page))
    for number in range(len(runs)):
        _report(job.sweep, number).unlink(missing_ok=True)
    context = HydraContext(config_loader=GlobalHydra.instance().config_loader(), callbacks=Callbacks())
    launcher = Plugins.instance().instantiate_launcher(hydra_context=context, task_function=job, config=page)
    try:
        results = launcher.launch([list(run.overrides) for run in runs], initial_job_idx=0)
        return [result.return_value for result in results]
    except RuntimeError as error:
        if not any(kind.__name__ == "UncompletedJobError" for kind in type(error).__mro__):
            return [_Ended(code=2, failure=f"hydra/launcher: {str(error).splitlines()[0]}")] * len(runs)
        print(error, file=sys.stderr)
        _wait_for_the_others(error)
        return [_reported(_report(job.sweep, number)) for number in range(len(runs))]


def _wait_for_the_others(error: RuntimeError) -> None:
    """submitit's launcher raises at the first job that was killed, and keeps the jobs to itself."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        for job in frame.f_locals.get("jobs", []):
            job.wait()


def _reported(report: Path) -> _Ended:
    """What a job left word of, when its launcher gave up."""
    if report.is_file():
        return _Ended(**json.loads(report.read_text(encoding="utf-8")))
    return _Ended(code=1, failure="killed, without a word")
