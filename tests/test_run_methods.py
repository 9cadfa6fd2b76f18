"""The methods of a run: what they get from its folder, tuning, distillation and ensembles."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from airrep import stages
from airrep.attributors import make_attributor
from airrep.attributors.kernels import KERNELS
from airrep.cli import main
from airrep.config import (
    DataConfig,
    EvaluateConfig,
    RunConfig,
    SubsetConfig,
    check_run,
)
from airrep.distillation import Lesson
from airrep.examples import Example, InputError, write_examples
from airrep.label_stages import make_labels, warm_up
from airrep.reading import read_examples
from airrep.run_methods import (
    check_methods_params,
    fingerprint_models,
    members_first,
    method_arguments,
    needs_warm_up,
    teacher_scores,
)
from airrep.train_settings import DistilSettings, TrainSettings
from data_builders.recipes import Recipe
from tests.tiny_lm import save_tiny_lm
from tests.tiny_models import tiny_encoder

COLOURS = ("blue", "green", "red", "white")
METHODS = ["airrep", "kernels", "tfidf", "logra", "tracin", "ensemble"]
PARAMS = {
    # So that tuning does not change the scores of a teacher that training has learned from.
    "logra": {"projection_rank": 2, "layers": "mlp", "damping": 0.1, "normalise": "cosine"},
    "tracin": {"projection_rank": 2},
    "kernels": {"members": ["logra"]},
    "ensemble": {"members": ["airrep", "kernels", "logra"]},
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run with labels and a warm-up of two checkpoints."""
    folder = tmp_path_factory.mktemp("run")
    examples = [
        Example(str(i), f"Which colour is thing {i * 7 % 10}?", COLOURS[i % 4]) for i in range(60)
    ]
    write_examples(folder / "examples.jsonl", examples)
    config = RunConfig(
        output=str(folder / "run"),
        device="cpu",
        lm=str(save_tiny_lm(folder / "lm")),
        encoder=str(tiny_encoder(folder / "encoder")),
        data=DataConfig(examples=str(folder / "examples.jsonl"), target_count=16),
        subsets=SubsetConfig(train=12, test=4, size=8, repeats=0),
        recipe=Recipe(learning_rate=1e-2, batch_size=4, warmup_steps=1, max_length=64),
        train=TrainSettings(max_steps=2, show_progress=False),
        evaluate=EvaluateConfig(methods=METHODS, params=PARAMS, draws=20),
    )
    check_run(config)
    make_labels(config)
    warm_up(config, checkpoints=2)
    return config


def test_methods_get_what_they_take_from_the_run(config: RunConfig) -> None:
    given = method_arguments(config, ["tfidf", "logra", "tracin", "random"])
    folder = Path(config.output) / "warm_up"
    assert given["tfidf"] == {}
    assert given["random"] == {"seed": 0}
    assert given["logra"]["lm"] == folder / "final"
    assert given["logra"]["projection_rank"] == 2
    assert given["logra"]["max_length"] == 64
    assert given["tracin"]["checkpoints"] == [folder / "checkpoint-1", folder / "final"]
    assert given["tracin"]["learning_rates"][0] > given["tracin"]["learning_rates"][1] > 0


def test_a_run_warms_up_only_for_methods_that_ask_its_model(config: RunConfig) -> None:
    assert needs_warm_up(config, ["tfidf", "logra"])
    assert needs_warm_up(config, ["ensemble"])
    assert not needs_warm_up(config, ["tfidf", "airrep"])
    params = {"logra": {"lm": "another"}}
    elsewhere = replace(config, evaluate=replace(config.evaluate, params=params))
    assert not needs_warm_up(elsewhere, ["logra"])


def test_a_model_that_is_not_there_yet_names_its_command(config: RunConfig, tmp_path: Path) -> None:
    fresh = replace(config, output=str(tmp_path))
    write_examples(tmp_path / "pool.jsonl", [Example("0", "Is it?", "yes")])
    with pytest.raises(InputError, match="run `airrep warm-up` first"):
        method_arguments(fresh, ["logra"])
    with pytest.raises(InputError, match="run `airrep train` first"):
        method_arguments(fresh, ["airrep"])


def test_members_of_an_ensemble_are_names(config: RunConfig) -> None:
    none = replace(config, evaluate=EvaluateConfig(methods=["ensemble"]))
    with pytest.raises(InputError, match="name methods, of an ensemble the one"):
        method_arguments(none, ["ensemble"])


def test_kernels_learn_from_the_runs_training_labels(config: RunConfig) -> None:
    arguments = method_arguments(config, ["kernels"])["kernels"]
    assert arguments["labels"].settings == config.train
    assert arguments["labels"].labels.losses.shape == (8, 12)
    assert [name for name, _ in arguments["members"]] == ["logra"]
    assert needs_warm_up(config, ["kernels"])
    alone = replace(config, evaluate=replace(config.evaluate, params={}))
    assert not needs_warm_up(alone, ["kernels"])
    assert method_arguments(alone, ["kernels"])["kernels"]["members"] == []


def test_a_method_can_be_a_member_twice(config: RunConfig) -> None:
    members = ["logra", {"logra": {"layers": "attn", "parameters": "biases"}}]
    params = PARAMS | {"kernels": {"members": members}}
    own = replace(config, evaluate=replace(config.evaluate, params=params))
    arguments = method_arguments(own, ["kernels"])["kernels"]
    (first, whole), (second, biases) = arguments["members"]
    assert first == second == "logra"
    assert whole["layers"] == "mlp"
    assert biases == whole | {"layers": "attn", "parameters": "biases"}
    assert needs_warm_up(own, ["kernels"])
    assert members_first(own, ["kernels", "logra"]) == [["logra"], ["kernels"]]
    made = make_attributor("kernels", **arguments)
    pool = read_examples(Path(config.output) / "pool.jsonl")
    assert len(made.fit(pool).weights_) == KERNELS + 4

    two = [("logra", {"lm": config.lm}), ("logra", {"lm": arguments["members"][0][1]["lm"]})]
    digests = fingerprint_models({"ensemble": {"members": two}})
    assert list(digests) == ["ensemble/logra", "ensemble/1/logra"]
    assert len(set(digests.values())) == 2


def test_the_warm_up_sees_as_many_examples_as_a_subset_has(config: RunConfig) -> None:
    about = json.loads((Path(config.output) / "warm_up" / "warm_up.json").read_text())
    assert about["inputs"]["examples"] == config.subsets.size == 8


def test_members_come_before_what_they_are_members_of(config: RunConfig) -> None:
    groups = members_first(config, ["ensemble", "kernels", "tfidf", "logra"])
    assert groups == [["tfidf", "logra"], ["kernels"], ["ensemble"]]


@pytest.mark.parametrize("members", [["airrep"], ["tfidf", "ensemble"]])
def test_kernels_refuse_members_that_have_seen_the_labels(
    config: RunConfig, members: list[str]
) -> None:
    params = {"kernels": {"members": members}, "ensemble": {"members": ["tfidf"]}}
    learned = replace(config, evaluate=replace(config.evaluate, params=params))
    with pytest.raises(InputError, match="has seen the labels that kernels learns"):
        method_arguments(learned, ["kernels"])


def test_distilled_trained_tuned_and_evaluated(config: RunConfig) -> None:
    config = replace(config, distil=DistilSettings("logra", pool_targets=5, steps=2))
    stages.train(config)
    folder = Path(config.output)
    teacher = np.load(folder / "distilled" / "teacher.npy")
    # Two of the eight targets are held out, of the pool too.
    assert teacher.shape == (6 + 5, 44 - 2)
    before = (folder / "distilled" / "teacher.npy").stat().st_mtime_ns
    stages.train(config)  # finished: nothing is computed again
    assert (folder / "distilled" / "teacher.npy").stat().st_mtime_ns == before

    with pytest.raises(InputError, match="No method of evaluate.methods can be tuned"):
        stages.tune(replace(config, evaluate=EvaluateConfig(methods=["random"])))
    assert stages.tune(config, trials=2)
    tuned = json.loads((folder / "tuned.json").read_text())
    assert list(tuned["methods"]) == ["tfidf", "logra", "tracin", "kernels", "ensemble"]
    tried = [row["params"].keys() for row in tuned["methods"]["logra"]["trials"]]
    assert all("projection_rank" not in keys for keys in tried)  # the configuration has it
    weights = tuned["methods"]["ensemble"]["chosen"]["weights"]
    assert sum(weights) == pytest.approx(1, abs=1e-5)
    again = (folder / "tuned.json").read_text()
    assert stages.tune(config, trials=2)
    assert (folder / "tuned.json").read_text() == again

    results = stages.evaluate(config)
    assert [row["name"] for row in results["methods"]] == METHODS
    assert not results["skipped"]
    arguments = results["inputs"]["arguments"]
    chosen = tuned["methods"]["tfidf"]["chosen"]
    assert arguments["tfidf"] == chosen
    assert arguments["ensemble"]["weights"] == weights
    assert {"logra", "ensemble/airrep", "ensemble/logra"} <= results["inputs"]["models"].keys()
    seconds = {row["name"]: row["prepare_seconds"] for row in results["methods"]}
    assert seconds["airrep"] > 0
    assert seconds["logra"] == seconds["tracin"] > 0
    assert seconds["tfidf"] is None
    # What the configuration says goes before what tuning chose.
    assert arguments["logra"]["projection_rank"] == 2


def test_tuning_that_can_try_nothing_says_so(config: RunConfig, tmp_path: Path, capsys) -> None:
    own = str(tmp_path / "run")
    shutil.copytree(config.output, own)
    broken = replace(
        config,
        output=own,
        evaluate=EvaluateConfig(params={"logra": {"projection_rank": 2, "batch_tokens": 0}}),
    )
    assert not stages.tune(broken, "logra,tfidf", trials=1)
    shown = capsys.readouterr().out
    assert "logra: no trial could run: batch_tokens is 0" in shown
    assert "tfidf: LDS" in shown


def test_a_teacher_that_does_not_exist_is_named(config: RunConfig, tmp_path: Path) -> None:
    wrong = replace(config, distil=DistilSettings(str(tmp_path / "scores.npy")))
    with pytest.raises(InputError, match="no method"):
        stages.train(wrong)
    for name, value in (("steps", 0), ("pool_targets", -1), ("subsets_per_step", 1)):
        with pytest.raises(InputError, match=f"distil.{name} is {value}"):
            check_run(replace(config, distil=DistilSettings("tfidf", **{name: value})))
    with pytest.raises(InputError, match="distil.learning_rate is 0.0; give a number above 0"):
        check_run(replace(config, distil=DistilSettings("tfidf", learning_rate=0.0)))
    with pytest.raises(InputError, match="no method 'logre'"):
        check_run(replace(config, evaluate=EvaluateConfig(params={"logre": {}})))


def test_another_model_takes_nothing_of_the_warm_up(config: RunConfig) -> None:
    params = {"tracin": {"lm": "other"}, "less": {"checkpoints": ["a", "b"]}}
    own = replace(config, evaluate=replace(config.evaluate, params=params))
    given = method_arguments(own, ["tracin", "less"])
    assert given["tracin"]["lm"] == "other"
    assert not {"checkpoints", "learning_rates", "layers"} & given["tracin"].keys()
    assert given["less"]["checkpoints"] == ["a", "b"]
    assert "learning_rates" not in given["less"]


def test_features_of_an_evaluation_may_be_stored(config: RunConfig, tmp_path: Path) -> None:
    params = {"logra": {"projection_rank": 2, "store": str(tmp_path / "features")}}
    stored = replace(config, evaluate=EvaluateConfig(methods=["logra"], params=params, draws=20))
    stages.evaluate(stored)
    assert list((tmp_path / "features").glob("**/features.bin"))
    stages.evaluate(stored)


def test_weights_of_other_members_are_not_taken(config: RunConfig, tmp_path: Path) -> None:
    distil = DistilSettings("logra", pool_targets=5, steps=2)  # as above
    stages.train(replace(config, distil=distil))
    stages.tune(config, methods="logra,ensemble", trials=1)
    assert "weights" in method_arguments(config, ["ensemble"])["ensemble"]
    params = PARAMS | {"ensemble": {"members": ["airrep", "tfidf"]}}
    other = replace(config, evaluate=replace(config.evaluate, params=params))
    assert "weights" not in method_arguments(other, ["ensemble"])["ensemble"]
    # Nor weights that were fitted to other scores of these members.
    params = PARAMS | {"logra": {"projection_rank": 3}}
    damped = replace(config, evaluate=replace(config.evaluate, params=params))
    with pytest.raises(InputError, match="fitted to other scores .* tune --methods ensemble"):
        method_arguments(damped, ["ensemble"])
    copied = replace(config, output=str(tmp_path / "copied"))
    shutil.copytree(config.output, copied.output)
    weights = Path(copied.output) / "encoder" / "model.safetensors"
    tensors = load_file(weights)
    tensors["projector.bias"] += 1
    save_file(tensors, weights)
    with pytest.raises(InputError, match="fitted to other scores .* tune --methods ensemble"):
        method_arguments(copied, ["ensemble"])
    members = {"members": ["airrep", "logra"], "weights": [1, 2]}
    own = replace(config.evaluate, params=PARAMS | {"ensemble": members})
    found = method_arguments(replace(copied, evaluate=own), ["ensemble"])["ensemble"]
    assert found["weights"] == [1, 2]


def test_a_damaged_teacher_is_asked_again(config: RunConfig) -> None:
    config = replace(config, distil=DistilSettings("tfidf", steps=1), output=config.output)
    pool = [Example(str(i), f"thing {i}", "red") for i in range(4)]
    lesson = Lesson(pool[:2], pool[1:], np.arange(2), np.arange(1, 4), [])
    first = teacher_scores(config, "tfidf", pool, lesson)
    folder = Path(config.output) / "distilled"
    (folder / "teacher.npy").write_bytes(b"nothing")
    np.testing.assert_array_equal(teacher_scores(config, "tfidf", pool, lesson), first)
    (folder / "teacher.json").write_text("{")
    np.testing.assert_array_equal(teacher_scores(config, "tfidf", pool, lesson), first)
    # Of another lesson it is asked anew.
    other = Lesson(pool[:2], pool[:3], np.arange(2), np.arange(3), [])
    assert not np.array_equal(teacher_scores(config, "tfidf", pool, other), first)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (["ensemble", "tfidf"], "cannot be its own member"),
        (["tfidf", "tfidf"], "tfidf is a member of ensemble twice"),
        ([{"logra": {"seed": 1}}, {"logra": {"seed": 1}}], "a member of ensemble twice"),
        ([{"logra": {}, "trak": {}}], "name methods, of an ensemble"),
        ([{"logra": 3}], "name methods, of an ensemble"),
        ([{"logre": {}}], "did you mean 'logra'"),
        (["logre"], "did you mean 'logra'"),
    ],
)
def test_members_that_cannot_be(config: RunConfig, members: list[str], message: str) -> None:
    params = {"ensemble": {"members": members}}
    wrong = replace(config, evaluate=replace(config.evaluate, params=params))
    with pytest.raises(InputError, match=message):
        method_arguments(wrong, ["ensemble"])


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"logra": {"dampign": 0.1}}, "'logra': got an unexpected keyword argument 'dampign'"),
        ({"logra": {"damping": "much"}}, "got damping 'much'; it takes float"),
        ({"kernels": {"members": [{"logra": {"rank": 4}}]}}, "unexpected keyword argument 'rank'"),
        ({"kernels": {"members": ["airrep"]}}, "has seen the labels that kernels learns"),
        ({"ensemble": {"weights": [1]}}, "name methods"),
    ],
)
def test_wrong_parameters_are_refused_before_anything_is_made(
    params: dict, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match=message):
        check_methods_params(RunConfig("out", evaluate=EvaluateConfig(params=params)))
    given = ["--output", str(tmp_path / "run"), "--evaluate.params", json.dumps(params)]
    assert main(["subsets", *given]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_only_parameters_that_are_given_are_checked_before() -> None:
    check_methods_params(RunConfig("out", evaluate=EvaluateConfig(methods=["ensemble"])))


def test_teachers_that_cannot_be(config: RunConfig) -> None:
    with pytest.raises(InputError, match="did you mean 'logra'"):
        stages.train(replace(config, distil=DistilSettings("logre")))
    with pytest.raises(InputError, match="needs the encoder that is to be trained"):
        check_run(replace(config, distil=DistilSettings("airrep")))


def test_a_missing_encoder_is_noticed_before_the_warm_up(config: RunConfig, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(config.output, copy, ignore=shutil.ignore_patterns("encoder", "warm_up"))
    with pytest.raises(InputError, match="run `airrep train` first"):
        stages.evaluate(replace(config, output=str(copy)))
    assert not (copy / "warm_up").exists()
