"""What sample and edit are asked alike: columns, and what a model cannot do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from flux2_lora.errors import UserError
from flux2_lora.families import Model
from flux2_lora.inference.request import AdapterChoice, columns_of, name_of, refuse_what_cannot_be, settings_of
from flux2_lora.inference.sampling import Recipe
from flux2_lora.inference.settings import public

TWO = ["outputs/ink", "outputs/ink/checkpoints/step-000100"]


def test_columns_are_the_base_and_each_adapter_at_each_strength() -> None:
    assert columns_of(AdapterChoice()) == [("base", [])]
    assert columns_of(AdapterChoice(adapters=TWO, strengths=[0.5, 1.0], weights=[1.0, 0.5])) == [
        ("base", [0.0, 0.0]),
        ("ink x 0.5", [0.5, 0.0]),
        ("ink x 1", [1.0, 0.0]),
        ("ink step-000100 x 0.5", [0.0, 0.25]),
        ("ink step-000100 x 1", [0.0, 0.5]),
    ]


def test_adapters_together_share_a_column() -> None:
    columns = columns_of(AdapterChoice(adapters=TWO, strengths=[2.0], weights=[1.0, 0.5], together=True))
    assert columns == [("base", [0.0, 0.0]), ("ink + ink step-000100 x 2", [2.0, 1.0])]


def test_a_negative_prompt_is_refused_by_a_distilled_model(tiny_model: Model) -> None:
    model = replace(tiny_model, spec=replace(tiny_model.spec, distilled=True))
    with pytest.raises(UserError, match=r"negative_prompt cannot be used: .* is distilled"):
        refuse_what_cannot_be(Recipe(negative_prompt="blue", cfg_scale=4.0), model, references=False)


def test_a_negative_prompt_without_effect_is_said(tiny_model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    refuse_what_cannot_be(Recipe(negative_prompt="blue", cfg_scale=1.0), tiny_model, references=False)
    assert "no effect at cfg_scale=1" in capsys.readouterr().out
    refuse_what_cannot_be(Recipe(negative_prompt="blue", cfg_scale=2.0), tiny_model, references=False)
    assert capsys.readouterr().out == ""


def test_references_need_a_family_that_looks_at_them(tiny_model: Model) -> None:
    with pytest.raises(UserError, match="looks at no reference pictures"):
        refuse_what_cannot_be(Recipe(), tiny_model, references=True)


def test_names_keep_what_is_no_suffix_and_name_the_checkpoint() -> None:
    assert name_of("style-v1.5.safetensors") == "style-v1.5"
    assert name_of("outputs/run-0.5") == "run-0.5"
    assert name_of("outputs/ink/checkpoints/step-000100/adapter.safetensors") == "ink step-000100"


def test_settings_tell_no_folder_of_this_machine(
    tiny_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "client" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    model = replace(tiny_model, spec=replace(tiny_model.spec, path="client/model"))
    settings = settings_of(model, Recipe(), prompt="red apple", size=(64, 64))
    assert settings.model_path == str(tmp_path / "client" / "model")
    assert public(settings).model_path == "model"
