"""From a command line to typed options, and from any mistake in it to two lines of text.

A program declares a dataclass and `@program("train")`. Hydra composes configs/train.yaml with the command line; the
result is checked against the dataclass (unknown keys, types) and its limits, and handed over as a frozen object. What
is wrong is said before anything is written: exit code 2, no traceback. Hydra lives in this module only.

With --multirun the program runs once for each combination of the options that hold several values. All combinations
are checked before the first one runs; each run has a folder of its own, and one that fails does not end the others.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import importlib.util
import inspect
import itertools
import json
import keyword
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
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flux2_lora.bundled import share
from flux2_lora.errors import RunError, UserError, did_you_mean, listed
from flux2_lora.files import digest, write_text
from flux2_lora.options import check

Spec = TypeVar("Spec")
# Questions to Hydra itself: nothing runs, or something else than our program does.
_HYDRA_FLAGS = ("-h", "--help", "--hydra-help", "--version", "-c", "--cfg", "-i", "--info")
_SWEEP_FLAGS = ("-m", "--multirun")
# Exit codes of Ctrl-C and SIGTERM; and those with which submitit leaves a job to be queued again, on Slurm and locally.
_INTERRUPTED, _REQUEUED = (130, 143), (-1, 144)
_LONGEST = 32  # signs of a swept value in a folder's name
# Hydra's ways to write the values of a sweep, besides a,b.
_SWEEP_FUNCTION = re.compile(r"(choice|range|interval|glob|shuffle|sort|tag)\(.*\)$")

OmegaConf.register_new_resolver("times", lambda factor, value: float(f"{factor * value:.6g}"), replace=True)
OmegaConf.register_new_resolver("share", lambda place: str(share() / place), replace=True)


def _run_name(dataset: Any) -> str:
    """A run is named after what it trains on: data/demo -> demo, owner/pictures -> pictures, kohya.toml -> kohya."""
    options = typing.cast("dict[str, Any]", OmegaConf.to_container(dataset, resolve=True))
    sources = options.get("sources")
    first = next((source for source in sources if isinstance(source, dict)), {}) if isinstance(sources, list) else {}
    places = (options.get("import"), options.get("hub"), first.get("folder"), first.get("hub"), options["folder"])
    named = Path(str(next(filter(None, places), "run")))
    try:
        place = named.expanduser().resolve()
    except (OSError, RuntimeError, ValueError):  # the scan says what is wrong with it
        place = named
    return place.stem if options.get("import") else place.name


OmegaConf.register_new_resolver("run_name", _run_name, replace=True)


@dataclass(frozen=True, kw_only=True)
class SweptRun:
    """A run of a sweep. options: the swept ones in which it differs from others; failure: what it died of, or None."""

    name: str
    folder: Path
    options: dict[str, str]
    overrides: tuple[str, ...]
    failure: str | None = None


def program(
    name: str, *, after_sweep: Callable[[list[SweptRun], Path], None] | None = None
) -> Callable[[Callable[[Spec], None]], Callable[[], None]]:
    """Turn `def run(config: SomeSpec) -> None` into a main() that reads configs/<name>.yaml and the command line.

    after_sweep is called once all runs of a sweep have ended, with the folder that is the sweep's own.
    """

    def wrap(run: Callable[[Spec], None]) -> Callable[[], None]:
        schema = _schema_of(run)

        def task(composed: DictConfig) -> None:
            _exit_on_user_error(lambda: run(_typed(composed, schema)))

        @functools.wraps(run)  # a job of a sweep in another process finds `run` through it
        def main() -> None:
            flags = [argument.split("=")[0] for argument in sys.argv[1:] if argument.startswith("-")]
            if flags and set(flags) <= set(_SWEEP_FLAGS):
                _exit_on_user_error(lambda: _sweep(name, sys.argv[1:], run, after_sweep))
                return
            if not set(flags) & {*_HYDRA_FLAGS, *_SWEEP_FLAGS}:
                sys.argv[1:] = [_literal(argument, schema) for argument in sys.argv[1:]]
                _exit_on_user_error(lambda: _typed(_compose(name, sys.argv[1:]), schema))
            hydra.main(version_base="1.3", config_path=str(share() / "configs"), config_name=name)(task)()

        return main

    return wrap


def _schema_of(run: Callable[[Any], None]) -> Any:
    return next(iter(typing.get_type_hints(run).values()))


def save_resolved(spec: Any, path: Path) -> None:
    """All options of a run, nothing left to interpolate, as YAML."""
    write_text(path, OmegaConf.to_yaml(OmegaConf.create(_plain(spec))))


def read_resolved(path: Path) -> dict[str, Any]:
    """What `save_resolved` wrote, as nested dictionaries; empty when there is no such file."""
    if not path.is_file():
        return {}
    content = OmegaConf.to_container(OmegaConf.load(path))
    return typing.cast("dict[str, Any]", content)


def changed_options(before: dict[str, Any], now: Any, ignored: tuple[str, ...]) -> list[str]:
    """Dotted options whose values differ, as "max_steps: 100 -> 200"; `ignored` are prefixes that may differ.

    An option that only one side knows is no difference: another version of this program has it.
    """
    then = _leaves(OmegaConf.create(before))
    today = _leaves(OmegaConf.create(_plain(now)))
    names = [name for name in then if name in today and not name.startswith(ignored)]
    return [f"{n}: {then[n]} -> {today[n]}" for n in names if then[n] != today[n]]


def _plain(value: Any) -> Any:
    """Dataclasses as dictionaries by the names of options: import_ is import, which Python keeps for itself."""
    if dataclasses.is_dataclass(value):
        return {entry.name.rstrip("_"): _plain(getattr(value, entry.name)) for entry in dataclasses.fields(value)}
    return [_plain(part) for part in value] if isinstance(value, list) else value


def _exit_on_user_error(action: Callable[[], object]) -> None:
    try:
        action()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except RunError as error:
        print(error, file=sys.stderr)
        sys.exit(1)


def _typed(composed: DictConfig, schema: type[Spec]) -> Spec:
    """The composed options as a frozen `schema`; UserError for an unknown key, a wrong type, a value out of range."""
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise UserError(f"{listed(missing)} must be given", f"add {missing[0]}=... to the command line")
    plain = typing.cast("dict[str, Any]", OmegaConf.to_container(composed, resolve=True))
    built = _built(plain, schema, "")
    check(built)
    return built


def _built(plain: dict[str, Any], schema: type[Spec], prefix: str) -> Spec:
    """One level of options; nested dataclasses first, since OmegaConf cannot merge into frozen ones."""
    kinds = typing.get_type_hints(schema)
    plain = {f"{key}_" if keyword.iskeyword(str(key)) else str(key): value for key, value in plain.items()}
    unknown = [key for key in plain if key not in kinds]
    if unknown:
        raise UserError(f"{prefix}{unknown[0]} is not an option", did_you_mean(unknown[0], list(kinds)))
    nested: dict[str, Any] = {
        name: _built(plain.get(name) or {}, typing.cast("type[Any]", kind), f"{prefix}{name}.")
        for name, kind in kinds.items()
        if dataclasses.is_dataclass(kind)
    }
    nested |= {
        name: _built_list(plain.get(name) or [], typing.get_args(kind)[0], prefix + name)
        for name, kind in kinds.items()
        if typing.get_origin(kind) is list and dataclasses.is_dataclass(typing.get_args(kind)[0])
    }
    node = OmegaConf.structured(schema)
    OmegaConf.set_readonly(node, False)
    for name, value in plain.items():
        if name not in nested:
            _assign(node, schema, name, value, prefix)
    flat = typing.cast("dict[str, Any]", OmegaConf.to_container(node))
    return schema(**{name: value for name, value in flat.items() if name not in nested}, **nested)


def _built_list(items: Any, schema: type[Spec], name: str) -> list[Spec]:
    """A list of groups of options, as [{folder: a, repeats: 2}, {folder: b}]."""
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise UserError(f"{name}={items} is not a list of options in braces", f"write {name}='[{{folder: pictures}}]'")
    return [_built(item, schema, f"{name}[{place}].") for place, item in enumerate(items)]


def _assign(node: DictConfig, schema: type, name: str, value: Any, prefix: str) -> None:
    wanted = str(typing.get_type_hints(schema)[name])
    if wanted.startswith("list[") and not isinstance(value, list) and value is not None:
        value = [value]  # one value stands for a list of one
    try:
        node[name] = value
    except OmegaConfBaseException as error:
        raise UserError(
            f"{prefix}{name}={value} is not {_described(wanted)}", f"{str(error).splitlines()[0]}"
        ) from error


def _described(wanted: str) -> str:
    words = {
        "list": "a list such as [a,b]",
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
        "str": "a text",
    }
    return next((text for kind, text in words.items() if kind in wanted.lower()), f"a value of type {wanted}")


def _compose(name: str, overrides: list[str]) -> DictConfig:
    """configs/<name>.yaml with overrides; UserError in place of Hydra's words."""
    idle = [override for override in overrides if override.startswith(("hydra/launcher=", "hydra.launcher."))]
    if idle:
        raise UserError(f"{idle[0]} starts nothing by itself", "add --multirun; without several values it is one run")
    with hydra.initialize_config_dir(config_dir=str(share() / "configs"), version_base="1.3"):
        return _composed(name, overrides)


def _composed(name: str, overrides: Sequence[str], mode: RunMode = RunMode.RUN) -> DictConfig:
    """As `_compose`, where Hydra is initialised. RunMode.MULTIRUN: the page of a sweep, its swept options unset."""
    try:
        if mode == RunMode.RUN:
            return hydra.compose(config_name=name, overrides=list(overrides))
        return GlobalHydra.instance().config_loader().load_configuration(name, list(overrides), run_mode=mode)
    except MissingConfigException as error:
        raise _unknown_choice(str(error)) from error
    except (HydraException, OmegaConfBaseException) as error:
        raise _unknown_option(str(error) or str(error.__cause__), overrides, _known(name, overrides)) from error


def _known(name: str, overrides: Sequence[str]) -> list[str]:
    """Every option, group, and parameter of the launcher that the overrides choose."""
    launcher = [override for override in overrides if override.startswith("hydra/launcher=")]
    page = hydra.compose(config_name=name, overrides=launcher, return_hydra_config=True)
    parameters = [f"hydra.launcher.{key}" for key in page.hydra.launcher]
    return [*_leaves(hydra.compose(config_name=name)), *_groups(), "hydra/launcher", "hydra/sweeper", *parameters]


def _unknown_choice(text: str) -> UserError:
    found = re.search(r"Could not find '([^']+)'", text)
    group, _, choice = (found.group(1) if found else "?/?").rpartition("/")
    if choice.startswith("submitit"):
        return UserError(f"{group}={choice} is not installed", "pip install 'flux2-lora[cluster]'")
    options = sorted(path.stem for path in (share() / "configs" / group).glob("*.yaml"))
    options = options or GlobalHydra.instance().config_loader().get_group_options(group)
    return UserError(f"{group}={choice} is not a choice", did_you_mean(choice, options))


def _unknown_option(text: str, overrides: Sequence[str], known: list[str]) -> UserError:
    for override in overrides:
        name = override.lstrip("+~").split("=")[0]
        if name.startswith("hydra.") and not name.startswith("hydra.launcher."):
            continue
        if name not in known and not any(key.startswith(f"{name}.") for key in known):
            near = get_close_matches(name, known, n=1, cutoff=0.6)
            near = near or sorted((key for key in known if _near_leaf(name, key)), key=lambda key: key.count("."))
            hint = f"did you mean {near[0]}?" if near else "flux2-lora COMMAND --cfg job lists the options"
            return UserError(f"{name} is not an option", hint)
    if text.startswith("Ambiguous value"):
        return UserError(text.splitlines()[0], "write a list as [a,b]; add --multirun to train once with each")
    return UserError(text.splitlines()[0], "write options as name=value; put quotes around values with , = { } [ ]")


def _near_leaf(name: str, key: str) -> bool:
    """rnak is near adapter.rank: people leave the group out."""
    return bool(get_close_matches(name.rpartition(".")[2], [key.rpartition(".")[2]], n=1, cutoff=0.6))


def _groups() -> list[str]:
    return [path.name for path in (share() / "configs").iterdir() if path.is_dir()]


def _leaves(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> value of every option that is no group; interpolations resolved where they can be."""
    found: dict[str, Any] = {}
    for key in config:
        name, node = f"{prefix}{key}", OmegaConf.select(config, str(key), throw_on_missing=False)
        if isinstance(node, DictConfig):
            found |= _leaves(node, f"{name}.")
        else:
            found[name] = OmegaConf.to_container(node) if OmegaConf.is_list(node) else node
    return found


def _sweep(
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
    options = [_literal(a, _schema_of(run), sweep=True) for a in arguments if a not in _SWEEP_FLAGS]
    hydras = [option for option in options if option.startswith(("hydra.", "hydra/"))]
    options = [option for option in options if option not in hydras]
    with hydra.initialize_config_dir(config_dir=str(share() / "configs"), version_base="1.3"):
        runs = _planned(program, options, _schema_of(run))
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
        spec = _typed(_composed(program, overrides), schema)
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
        overrides = (*run.overrides, f"name={_quoted(name)}") if named else run.overrides
        found.append(dataclasses.replace(run, name=name, folder=run.folder / name, overrides=overrides))
    return found


def _sweep_page(program: str, options: Sequence[str], hydras: Sequence[str]) -> DictConfig:
    """What the runs of a sweep share, with a folder for it: Hydra and launchers write nowhere else."""
    page = _composed(program, [*options, *hydras], RunMode.MULTIRUN)
    stem = str(page.get("name", program))
    folder = Path(str(page.get("output_dir", "outputs"))).expanduser() / f"{stem}-sweep"
    ours = (f"hydra.sweep.dir={_quoted(str(folder))}", "hydra.sweep.subdir=.", f"hydra.job.name={_quoted(stem)}")
    return _composed(program, [*options, *ours, *hydras], RunMode.MULTIRUN)


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
            self.run(_typed(composed, _schema_of(self.run)))
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


def _literal(argument: str, schema: type, *, sweep: bool = False) -> str:
    """Quote the values of text options: folders, prompts and block ranges may hold commas, brackets and signs.

    In a sweep commas stand between values, and each value is quoted by itself. There the user must quote a value that
    holds a comma, in quotes that the shell leaves: "dataset.folder='rome, 2024',oslo".
    """
    name, equals, value = argument.partition("=")
    kind = _kind_of(schema, name.split("."))
    if not equals or kind not in (str, str | None, list[str]) or (sweep and _SWEEP_FUNCTION.match(value)):
        return argument
    values = _items(value) if sweep else [value]
    return f"{name}={','.join(_literal_value(part, kind) for part in values)}"


def _literal_value(value: str, kind: Any) -> str:
    if value.startswith(("'", '"', "${")) or value in ("null", ""):
        return value
    if kind != list[str]:
        return _quoted(value)
    if value.startswith("[") and value.endswith("]"):
        return f"[{','.join(_quoted(item) for item in _items(value[1:-1]))}]"
    return value if "," in value else _quoted(value)


def _quoted(text: str) -> str:
    if text.startswith("${") or re.fullmatch(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*\"""", text):
        return text
    return "'" + re.sub(r"(\\*)('|$)", _escaped, text) + "'"


def _escaped(found: re.Match[str]) -> str:
    """Backslashes before a quote or the end are doubled, others stay as they are: so Hydra reads them."""
    return 2 * found[1] + ("\\'" if found[2] else "")


def _items(inside: str) -> list[str]:
    """Split a list at the commas that stand in no quotes and no brackets; blanks around the items go."""
    items, depth, quote, escaped = [""], 0, "", False
    for mark in inside:
        if quote:
            quote = "" if mark == quote and not escaped else quote
            escaped = mark == "\\" and not escaped
        elif mark in "'\"" and not items[-1].strip():
            quote = mark
        else:
            depth += (mark == "[") - (mark == "]")
        if mark == "," and not quote and depth == 0:
            items.append("")
        else:
            items[-1] += mark
    stripped = [item.strip() for item in items]
    return stripped if any(stripped) else []


def _kind_of(schema: type, path: list[str]) -> Any:
    """The type of a dotted option, None where there is no such option."""
    hints = typing.get_type_hints(schema)
    kind: Any = hints.get(path[0]) or hints.get(f"{path[0]}_")
    if len(path) > 1:
        return _kind_of(typing.cast("type", kind), path[1:]) if dataclasses.is_dataclass(kind) else None
    return kind
