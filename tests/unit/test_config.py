"""Text options reach the program as typed; the runs of a sweep have names, and each ends without ending the others."""

from __future__ import annotations

import pickle
import runpy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hydra
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from omegaconf import DictConfig, OmegaConf
from submitit.core.utils import UncompletedJobError

from flux2_lora import config, sweeps
from flux2_lora.bundled import share
from flux2_lora.config import literal
from flux2_lora.errors import RunError, UserError
from flux2_lora.sweeps import SweptRun, _Ended, _Job, _sweep_page


@dataclass(frozen=True, kw_only=True)
class Group:
    targets: list[str] = field(default_factory=list)
    strengths: list[float] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Schema:
    group: Group
    folder: str
    word: str | None = None
    count: int = 1


def parsed(argument: str) -> object:
    """The value that Hydra makes of an argument after ours."""
    override = OverridesParser.create().parse_override(literal(argument, Schema))
    return override.value()


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("folder=/home/jo,ann/a=b (1)", "/home/jo,ann/a=b (1)"),
        ("folder='quoted, already'", "quoted, already"),
        ("word=it's", "it's"),
        ("word=null", None),
        ("count=3", 3),
        ("group.strengths=[0.5,1]", [0.5, 1]),
        ("group.targets=[attention,mlp]", ["attention", "mlp"]),
        ("group.targets=[double, single[5:10].attention:8]", ["double", "single[5:10].attention:8"]),
        ("group.targets=['a, b', \"c\"]", ["a, b", "c"]),
        ("group.targets=[it's one, of [two, three]]", ["it's one", "of [two, three]"]),
        ("group.targets=[]", []),
        (r'group.targets=["he said \"x\", y", z]', ['he said "x", y', "z"]),
        (r"group.targets=['it\'s', 'a' or 'b']", ["it's", "'a' or 'b'"]),
        (r"folder=C:\pics\rome", r"C:\pics\rome"),
        ("folder=C:\\pics\\", "C:\\pics\\"),
        (r"folder=\\server\it's", r"\\server\it's"),
        (r"group.targets=[C:\a\b, d]", [r"C:\a\b", "d"]),
    ],
)
def test_a_value_arrives_as_it_was_typed(argument: str, value: object) -> None:
    assert parsed(argument) == value


@pytest.mark.parametrize(
    ("argument", "values"),
    [
        ("folder=/a=b (1),/c", ["/a=b (1)", "/c"]),
        ("folder='/a,b',/c d", ["/a,b", "/c d"]),
        ("folder='/a,b'", ["/a,b"]),
        ("folder=/only", ["/only"]),
        (r"folder=C:\a\,D:\it's", ["C:\\a\\", "D:\\it's"]),
        ("word=null,mystyle", [None, "mystyle"]),
        ("word=choice(a,b)", ["a", "b"]),
        ("count=range(1,4)", [1, 2, 3]),
        ("count=3,5", [3, 5]),
        (
            "group.targets=[attention],[attention, single[5:10].mlp:8]",
            [["attention"], ["attention", "single[5:10].mlp:8"]],
        ),
        ("group.targets=attention,single[5:10].mlp:8", ["attention", "single[5:10].mlp:8"]),
        ("group.targets=[attention,mlp]", [["attention", "mlp"]]),
        ("group.strengths=[0.5,1],[2]", [[0.5, 1], [2]]),
    ],
)
def test_in_a_sweep_commas_part_values_unless_they_are_quoted(argument: str, values: list[object]) -> None:
    override = OverridesParser.create().parse_override(literal(argument, Schema, sweep=True))
    found = override.sweep_iterator() if override.is_sweep_override() else [override._value]
    assert [override._convert_value(value) for value in found] == values


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ("0.0005", "0.0005"),
        ("1e-05", "1e-05"),
        ("'my pics/rome: 2024?'", "my_pics_rome_2024"),
        ("[attention,mlp]", "attention_mlp"),
        ("ends.", "ends"),
        ("null", "null"),
        ("'/home/jo/pictures/of/a/long/way/rome'", "home_jo_pict..ong_way_rome+"),
    ],
)
def test_a_swept_value_becomes_a_part_of_a_folders_name(value: str, part: str) -> None:
    found = sweeps._safe(value)
    assert found.removesuffix(found.partition("+")[2]) == part
    assert len(found) <= 40


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("['attention','mlp']", "[attention,mlp]"),
        ("'my pics'", "my pics"),
        ('"it\'s"', "it's"),
        ("0.5", "0.5"),
    ],
)
def test_a_swept_value_is_shown_without_the_quotes_that_hydra_needs(value: str, shown: str) -> None:
    assert sweeps._unquoted(value) == shown


def test_two_long_values_with_equal_ends_have_different_names() -> None:
    one, other = (sweeps._safe(f"/home/jo/pictures/{place}/of/a/long/way/rome") for place in ("here", "there"))
    assert one != other


def test_options_are_called_by_their_last_word_unless_two_share_it() -> None:
    assert sweeps._labels(["optimizer.lr", "lora@adapter", "seed"]) == {
        "optimizer.lr": "lr",
        "lora@adapter": "adapter",
        "seed": "seed",
    }
    assert sweeps._labels(["model.steps", "preview.steps"]) == {
        "model.steps": "model.steps",
        "preview.steps": "preview.steps",
    }


def test_runs_that_a_file_system_would_put_in_one_folder_are_told_apart() -> None:
    texts = ("'a b'", "'A-b'", "a_b", "other")
    runs = [
        SweptRun(name=f"x-word={sweeps._safe(text)}", folder=Path(), options={}, overrides=(f"word={text}",))
        for text in texts
    ]
    names = [run.name for run in sweeps._distinct(runs, named=True)]
    assert len({name.casefold() for name in names}) == 4
    assert names[3] == "x-word=other"


def composed(**options: object) -> DictConfig:
    return OmegaConf.create({"folder": "pictures", **options})


def job_of(action: Callable[[], object], *, here: bool = True) -> _Job:
    def run(spec: Plain) -> None:
        action()

    return _Job(run=run, sweep=Path(), total=1, here=here)


@dataclass(frozen=True, kw_only=True)
class Plain:
    folder: str


def raising(error: BaseException) -> Callable[[], None]:
    def action() -> None:
        raise error

    return action


@pytest.mark.parametrize(
    ("error", "ended"),
    [
        (UserError("seed=x is wrong", "try y"), _Ended(code=2, failure="seed=x is wrong")),
        (RunError("the disk is full", "free some"), _Ended(code=1, failure="the disk is full")),
        (SystemExit("step 3: loss nan"), _Ended(code=1, failure="step 3: loss nan")),
        (SystemExit(1), _Ended(code=1, failure="exit code 1")),
        (SystemExit(0), _Ended()),
        (ValueError("odd\nsecond line"), _Ended(code=1, failure="ValueError: odd")),
    ],
    ids=repr,
)
def test_whatever_a_run_dies_of_becomes_how_it_ended(error: BaseException, ended: _Ended) -> None:
    assert job_of(raising(error))._ended(composed()) == ended


def test_an_option_that_is_wrong_for_one_run_is_how_it_ended() -> None:
    assert job_of(lambda: None)._ended(composed(fodler="x")).failure == "fodler is not an option"


@pytest.mark.parametrize("code", [130, 143])
def test_ctrl_c_and_sigterm_end_the_whole_sweep_here_and_one_run_elsewhere(code: int) -> None:
    with pytest.raises(SystemExit):
        job_of(raising(SystemExit(code)))._ended(composed())
    assert job_of(raising(SystemExit(code)), here=False)._ended(composed()).code == code


@pytest.mark.parametrize("code", [-1, 144])
def test_a_job_that_submitit_queues_again_has_not_ended(code: int) -> None:
    with pytest.raises(SystemExit):
        job_of(raising(SystemExit(code)), here=False)._ended(composed())


def test_a_job_finds_its_program_in_another_process() -> None:
    main = runpy.run_path(str(share() / "train/lora.py"), run_name="elsewhere")["train"]
    found = pickle.loads(pickle.dumps(_Job(run=main.__wrapped__, sweep=Path("a"), total=3)))
    assert (found.run.__name__, found.sweep, found.total, found.here) == ("train", Path("a"), 3, False)
    assert config.schema_of(found.run).__name__ == "RunOptions"


@pytest.mark.parametrize("launcher", ["submitit_slurm", "submitit_local"])
def test_a_cluster_writes_into_the_folder_of_the_sweep(launcher: str) -> None:
    with hydra.initialize_config_dir(config_dir=str(share() / "configs"), version_base="1.3"):
        page = _sweep_page("train", ["output_dir='~/out'", "seed=0,1"], [f"hydra/launcher={launcher}"])
    assert page.hydra.launcher.submitit_folder == f"{Path.home()}/out/demo-sweep/.submitit/%j"
    assert page.hydra.launcher.name == "demo"


def test_a_killed_job_does_not_hide_how_the_others_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def end() -> None:
        sweeps.write_text(sweeps._report(tmp_path, 1), '{"code": 2, "failure": "no such folder"}')

    def launch(overrides: Any, initial_job_idx: int) -> None:
        jobs = [SimpleNamespace(wait=lambda: None), SimpleNamespace(wait=end)]
        raise UncompletedJobError(f"Job 1 of {len(jobs)} has not produced any output")

    (tmp_path / ".ended").mkdir()
    (tmp_path / ".ended/0.json").write_text('{"code": 0, "failure": null}')  # of an earlier start of the same sweep
    runs = [SweptRun(name=name, folder=tmp_path / name, options={}, overrides=()) for name in ("a", "b")]
    with hydra.initialize_config_dir(config_dir=str(share() / "configs"), version_base="1.3"):
        page = _sweep_page("train", [], [])
        monkeypatch.setattr(Plugins, "instantiate_launcher", lambda *_, **__: SimpleNamespace(launch=launch))
        job = _Job(run=lambda spec: None, sweep=tmp_path, total=2)
        ended = sweeps._launched(page, runs, job)
    assert ended == [_Ended(code=1, failure="killed, without a word"), _Ended(code=2, failure="no such folder")]
