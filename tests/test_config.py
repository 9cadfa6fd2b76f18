"""The configuration: what a file may hold, and what is refused before anything slow."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from airrep.config import (
    DataConfig,
    EngineConfig,
    EvaluateConfig,
    RunConfig,
    SubsetConfig,
    check_config_file,
    check_run,
)
from airrep.examples import InputError
from airrep.train_settings import TrainSettings
from data_builders.recipes import Recipe

RUN = RunConfig(output="run")
NAN = float("nan")


@pytest.mark.parametrize(
    "text",
    [
        "name:\ndata: {corpus: null, columns: {prompt: a}}\nsubsets: {size: null}\nimported: null",
        "data: {corpus: {}}\ntrain: {average: null}",
        "recipe.epochs: 3",
        "evaluate: {scores: {a: x.npy, a.b: y.npy}}",
        "recipe: &r {epochs: 2}\ntrain: {<<: {seed: 1}, seed: 2}",
    ],
)
def test_files_that_are_right(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    check_config_file(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *(
            (text, rf"no value at '{key}'; give one")
            for key, text in {
                "seed": "seed: null",
                "lm": "lm:",
                "device": "device: null",
                "recipe": "recipe:",
                "train": "train:\nseed: 1",
                "recipe.learning_rate": "recipe: {learning_rate: null}",
                "subsets.train": "subsets.train: null",
                "data.columns": "data: {columns: null}",
                "data.corpus.pool_size": "data: {corpus: {pool_size: null}}",
                "evaluate.methods": "evaluate: {methods: null}",
                "engine.name": "engine: {name: null}",
            }.items()
        ),
        ("data: 5", r"has 5 at 'data'; give its keys"),
        ("train: []", r"has \[\] at 'train'; give its keys"),
        ("imported: x", r"has 'x' at 'imported'; give its keys"),
        ("lm: a\nlm: b", r"the key 'lm' is there twice\n.*line 2"),
        ("recipe: {epochs: 1, epochs: 2}", r"the key 'epochs' is there twice"),
        ("recipe.epochs: 3\nrecipe: {layers: 1}", r"'recipe\.epochs' beside 'recipe'"),
        ("a: " + "[" * 500, r"is not YAML"),
    ],
)
def test_files_that_are_wrong(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        check_config_file(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output": ""}, "output is '', which names nothing"),
        ({"output": "a\0b"}, "output is .*names nothing"),
        ({"lm": " "}, "lm is ' '"),
        ({"data": DataConfig(examples="")}, r"data\.examples is ''"),
        ({"seed": -1}, r"seed is -1; give a whole number from 0 to 2\*\*63 - 1"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
        ({"subsets": SubsetConfig(repeats=-1)}, r"subsets\.repeats is -1; give at least 0"),
        ({"engine": EngineConfig(models=0)}, r"engine\.models is 0; give at least 1"),
        ({"engine": EngineConfig("cached_trunk")}, "cached_trunk needs recipe.train"),
        ({"evaluate": EvaluateConfig(draws=0)}, r"evaluate\.draws is 0; give at least 1"),
        ({"evaluate": EvaluateConfig(["bm52"])}, "no method 'bm52'; did you mean 'bm25'"),
        ({"evaluate": EvaluateConfig(["bm25"] * 2)}, "method 'bm25' is named twice"),
        ({"recipe": Recipe(epochs=0)}, r"recipe\.epochs is 0"),
        ({"recipe": Recipe(weight_decay=NAN)}, r"recipe\.weight_decay is nan; give 0 or more"),
        ({"recipe": Recipe(learning_rate=NAN)}, r"recipe\.learning_rate is nan"),
        ({"recipe": Recipe(template="{response}")}, "template .* needs {prompt}"),
        ({"train": TrainSettings(max_steps=0)}, "train: max_steps is 0; give at least 1"),
        ({"train": TrainSettings(weight_decay=NAN)}, "train: weight_decay is nan"),
        ({"device": "cudo"}, "device 'cudo' cannot be used here"),
    ],
)
def test_settings_of_any_stage_are_checked_at_once(changes: dict[str, Any], message: str) -> None:
    check_run(RUN)
    with pytest.raises(InputError, match=message):
        check_run(replace(RUN, **changes))


def test_the_device_must_be_there_only_to_compute() -> None:
    check_run(replace(RUN, device="cudo"), computes=False)
