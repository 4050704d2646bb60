"""From a command line to typed options, and from any mistake in it to two lines of text.

A program declares a dataclass and `@program("train")`. Hydra composes configs/train.yaml with the command line; the
result is checked against the dataclass (unknown keys, types) and its limits, and handed over as a frozen object. What
is wrong is said before anything is written: exit code 2, no traceback. Hydra lives in this module and in sweeps.
"""

from __future__ import annotations

import dataclasses
import functools
import keyword
import re
import sys
import typing
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flux2_lora.bundled import share
from flux2_lora.errors import RunError, UserError, did_you_mean, listed
from flux2_lora.files import write_text
from flux2_lora.options import check, quoted

if TYPE_CHECKING:
    from flux2_lora.sweeps import SweptRun

Spec = TypeVar("Spec")
# Questions to Hydra itself: nothing runs, or something else than our program does.
_HYDRA_FLAGS = ("-h", "--help", "--hydra-help", "--version", "-c", "--cfg", "-i", "--info")
SWEEP_FLAGS = ("-m", "--multirun")
# Hydra's ways to write the values of a sweep, besides a,b.
_SWEEP_FUNCTION = re.compile(r"(choice|range|interval|glob|shuffle|sort|tag)\(.*\)$")

_given: list[str] = []

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


def program(
    name: str,
    *,
    after_sweep: Callable[[list[SweptRun], Path], None] | None = None,
    before: Callable[[Sequence[str]], list[str]] | None = None,
) -> Callable[[Callable[[Spec], None]], Callable[[], None]]:
    """Turn `def run(config: SomeSpec) -> None` into a main() that reads configs/<name>.yaml and the command line.

    after_sweep is called once all runs of a sweep have ended, with the folder that is the sweep's own; before, with the
    arguments, for those that it makes of them.
    """

    def wrap(run: Callable[[Spec], None]) -> Callable[[], None]:
        schema = schema_of(run)

        def task(options: DictConfig) -> None:
            _exit_on_user_error(lambda: run(typed(options, schema)))

        @functools.wraps(run)  # a job of a sweep in another process finds `run` through it
        def main() -> None:
            _given[:] = sys.argv[1:]
            if before is not None:
                _exit_on_user_error(lambda: sys.argv.__setitem__(slice(1, None), before(sys.argv[1:])))
            flags = [argument.split("=")[0] for argument in sys.argv[1:] if argument.startswith("-")]
            if flags and set(flags) <= set(SWEEP_FLAGS):
                from flux2_lora.sweeps import sweep  # needs this module

                _exit_on_user_error(lambda: sweep(name, sys.argv[1:], run, after_sweep))
                return
            if not set(flags) & {*_HYDRA_FLAGS, *SWEEP_FLAGS}:
                sys.argv[1:] = [literal(argument, schema) for argument in sys.argv[1:]]
                _exit_on_user_error(lambda: typed(_compose(name, sys.argv[1:]), schema))
            hydra.main(version_base="1.3", config_path=str(share() / "configs"), config_name=name)(task)()

        return main

    return wrap


def schema_of(run: Callable[[Any], None]) -> Any:
    return next(iter(typing.get_type_hints(run).values()))


def arguments() -> list[str]:
    """What the user wrote behind the command, before it was quoted for Hydra."""
    return list(_given)


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


def typed(composed: DictConfig, schema: type[Spec]) -> Spec:
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
        return composed(name, overrides)


def composed(name: str, overrides: Sequence[str], mode: RunMode = RunMode.RUN) -> DictConfig:
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


def literal(argument: str, schema: type, *, sweep: bool = False) -> str:
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
        return quoted(value)
    if value.startswith("[") and value.endswith("]"):
        return f"[{','.join(quoted(item) for item in _items(value[1:-1]))}]"
    return value if "," in value else quoted(value)


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
