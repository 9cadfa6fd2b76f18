"""The warm-up model: trained on the whole pool as the tuner trains, and kept as plain folders."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from airrep.config import EngineConfig, RunConfig
from airrep.examples import Example, InputError, lm_template, tokenize_examples, write_examples
from airrep.gradients.adam import saved_moments
from airrep.gradients.layers import linear_layers
from airrep.lm import load_lm, response_losses
from data_builders import warm_up as module
from data_builders.finetune import FineTuner
from data_builders.recipes import Recipe, batches
from data_builders.warm_up import open_warm_up, warm_up
from tests.tiny_lm import save_tiny_lm

COLOURS = ("blue", "green", "red", "white")
RECIPE = Recipe(learning_rate=1e-2, batch_size=4, warmup_steps=1, max_length=64)
STEPS = 6  # 11 examples, 4 a step, twice


def examples(count: int, offset: int = 0) -> list[Example]:
    return [
        Example(str(i), f"Which colour is thing {i * 7 % 10}?", COLOURS[i % 4])
        for i in range(offset, offset + count)
    ]


POOL, TARGETS = examples(11), examples(5, 50)


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_lm(tmp_path_factory.mktemp("lm") / "model", layers=3)


@pytest.fixture
def config(lm: Path, tmp_path: Path) -> RunConfig:
    write_examples(tmp_path / "run" / "pool.jsonl", POOL)
    return RunConfig(str(tmp_path / "run"), lm=str(lm), recipe=RECIPE, seed=3, device="cpu")


def run(config: RunConfig, checkpoints: int = 1, moments: bool = False) -> Path:
    return warm_up(config, checkpoints, moments, show_progress=False)


def target_losses(folder: Path) -> np.ndarray:
    model, tokenizer = load_lm(folder)
    tokens = tokenize_examples(TARGETS, tokenizer, lm_template(tokenizer), RECIPE.max_length)
    return response_losses(model, tokens)


def tuner_losses(config: RunConfig, steps: int) -> np.ndarray:
    """Losses of the targets after the first steps on the whole pool, by the plain engine."""
    model, tokenizer = load_lm(Path(config.lm))
    template = lm_template(tokenizer)
    pool, targets = (
        tokenize_examples(some, tokenizer, template, RECIPE.max_length) for some in (POOL, TARGETS)
    )
    tuner = FineTuner(model, pool, targets, config.recipe, seed=config.seed, engine="eager")
    plan = batches(np.arange(len(pool)), config.recipe, np.random.default_rng([config.seed, 0]))
    trained = tuner.steps([plan])
    for _ in range(steps):
        next(trained)
    return tuner.measure(np.arange(len(targets)))


@pytest.mark.parametrize(
    ("train", "engine"),
    [("all", "auto"), ("lora", "auto"), ("last_layers", "auto"), ("last_layers", "eager")],
)
def test_each_checkpoint_is_the_model_after_its_steps(
    config: RunConfig, train: str, engine: str
) -> None:
    config = replace(
        config, recipe=replace(RECIPE, train=train, layers=1), engine=EngineConfig(engine)
    )
    final = run(config, checkpoints=3)
    found = open_warm_up(config)
    assert [row.path.name for row in found] == ["checkpoint-1", "checkpoint-2", "final"]
    assert [row.step for row in found] == [2, 4, 6]
    assert found[-1].path == final
    base = target_losses(Path(config.lm))
    for row in found:
        expected = tuner_losses(config, row.step)
        np.testing.assert_allclose(target_losses(row.path), expected, rtol=1e-4)
        assert np.abs(expected - base).max() > 1e-2


def test_some_of_the_pool_is_drawn_by_the_seed(config: RunConfig) -> None:
    final = warm_up(config, examples=5, show_progress=False)
    rows = np.sort(np.random.default_rng(config.seed).permutation(len(POOL))[:5])
    folder = Path(config.output).with_name("alone")
    write_examples(folder / "pool.jsonl", [POOL[row] for row in rows])
    alone = warm_up(replace(config, output=str(folder)), show_progress=False)
    np.testing.assert_array_equal(target_losses(final), target_losses(alone))
    assert [row.path for row in open_warm_up(config)] == [final]
    with pytest.raises(InputError, match=f"examples is 5 in the folder, {len(POOL)} now"):
        run(config)


@pytest.mark.parametrize("examples", [0, len(POOL) + 1])
def test_examples_that_the_pool_has_not_are_refused(config: RunConfig, examples: int) -> None:
    with pytest.raises(InputError, match=f"give 1 to {len(POOL)}"):
        warm_up(config, examples=examples, show_progress=False)


def test_adapters_leave_nothing_but_plain_weights(config: RunConfig) -> None:
    final = run(replace(config, recipe=replace(RECIPE, train="lora")))
    plain = AutoModelForCausalLM.from_pretrained(config.lm).state_dict()
    merged = load_file(final / "model.safetensors")
    assert set(merged) <= set(plain)
    changed = {name for name in merged if not torch.equal(merged[name], plain[name])}
    assert changed == {name for name in merged if name.endswith("_proj.weight")}
    assert not list(final.glob("adapter*"))


def test_frozen_layers_stay_as_they_were(config: RunConfig) -> None:
    final = run(replace(config, recipe=replace(RECIPE, train="last_layers", layers=1)))
    plain, trained = (
        load_file(Path(config.lm) / "model.safetensors"),
        load_file(final / "model.safetensors"),
    )
    changed = {name for name in plain if not torch.equal(trained[name], plain[name])}
    last = {name for name in plain if name.startswith("model.layers.2.")}
    assert changed == last | {"model.norm.weight"}


def test_rates_and_losses_are_those_of_every_step(config: RunConfig) -> None:
    run(config, checkpoints=2)
    about = json.loads((Path(config.output) / "warm_up" / "warm_up.json").read_text())
    # One step of warm-up from 0, then linear to 0: 0, 5/5, 4/5, 3/5, 2/5, 1/5 of the rate.
    first, last = open_warm_up(config)
    assert (first.step, last.step) == (3, 6)
    assert first.learning_rate == pytest.approx(1e-2 * 4 / 5)
    assert last.learning_rate == pytest.approx(1e-2 / 5)
    assert first.mean_learning_rate == pytest.approx(1e-2 * (0 + 1 + 4 / 5) / 3)
    assert last.mean_learning_rate == pytest.approx(1e-2 * (3 + 2 + 1) / 15)
    # Before the first step the model is as it came, and the first rate is 0: so is the second.
    model, tokenizer = load_lm(Path(config.lm))
    rows = np.random.default_rng([config.seed, 0]).permutation(len(POOL))[:8]
    tokens = tokenize_examples([POOL[r] for r in rows], tokenizer, lm_template(tokenizer), 64)
    losses = response_losses(model, tokens)
    counts = np.asarray([len(example) - example.response_start for example in tokens])
    for step, some in enumerate((slice(0, 4), slice(4, 8))):
        expected = np.average(losses[some], weights=counts[some])
        assert about["losses"][step] == pytest.approx(expected, rel=1e-4)
    assert len(about["losses"]) == STEPS
    assert about["losses"][-1] < about["losses"][0]


def test_moments_are_adams_by_parameter_name(config: RunConfig) -> None:
    recipe = replace(RECIPE, epochs=1, batch_size=16, clip_norm=1e6)  # one step
    final = run(replace(config, recipe=recipe), moments=True)
    moments = load_file(final / "optimizer.safetensors")
    model, tokenizer = load_lm(Path(config.lm))
    tokens = tokenize_examples(POOL, tokenizer, lm_template(tokenizer), 64)
    total = torch.zeros(())
    for example in tokens:
        ids = torch.from_numpy(example.ids.astype(np.int64))[None]
        labels = ids.clone()
        labels[:, : example.response_start] = -100
        loss = model(input_ids=ids, labels=labels).loss
        total = total + loss * (len(example) - example.response_start)
    (total / sum(len(example) - example.response_start for example in tokens)).backward()
    names = dict(model.named_parameters())
    kinds = ("step", "exp_avg", "exp_avg_sq")
    assert set(moments) == {f"optimizer/{kind}/{name}" for kind in kinds for name in names}
    for name, parameter in names.items():
        gradient = parameter.grad
        assert gradient is not None
        torch.testing.assert_close(
            moments[f"optimizer/exp_avg/{name}"], 0.1 * gradient, rtol=1e-4, atol=1e-7
        )
        torch.testing.assert_close(
            moments[f"optimizer/exp_avg_sq/{name}"], 1e-3 * gradient**2, rtol=1e-3, atol=1e-11
        )
    load_lm(final)  # the moments beside the weights do not disturb


def test_moments_of_a_cut_model_have_the_whole_models_names(config: RunConfig) -> None:
    config = replace(config, recipe=replace(RECIPE, train="last_layers", layers=1))
    moments = load_file(run(config, moments=True) / "optimizer.safetensors")
    names = {name.rpartition("/")[2] for name in moments}
    layer = {name for name in names if name.startswith("model.layers.2.")}
    assert len(layer) == 9
    assert names == layer | {"model.norm.weight"}


def test_gradient_methods_find_the_moments(config: RunConfig) -> None:
    final = run(config, moments=True)
    model, _ = load_lm(final)
    found = saved_moments(final, linear_layers(model, "q_proj"))
    assert found is not None
    assert len(found) == 3
    assert {one.steps for one in found.values()} == {STEPS}
    assert all((one.square > 0).any() for one in found.values())


def test_a_finished_warm_up_is_used_again(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    final = run(config)
    monkeypatch.setattr(module, "load_lm", None)  # nothing is loaded
    assert run(config) == final
    assert "warm_up is there already" in capsys.readouterr().out
    assert run(replace(config, recipe=replace(RECIPE, layers=9))) == final  # not of this recipe
    assert [row.path for row in open_warm_up(config)] == [final]


def test_a_warm_up_of_something_else_is_refused(config: RunConfig) -> None:
    run(config)
    other = replace(config, seed=4, recipe=replace(RECIPE, epochs=3))
    with pytest.raises(
        InputError,
        match=r"of something else: seed is 3 in .* 4 now; recipe.epochs is 2 in .* 3 now",
    ):
        run(other)
    with pytest.raises(InputError, match="checkpoints is 1 in the folder, 2 now; moments is False"):
        run(config, 2, True)
    write_examples(Path(config.output) / "pool.jsonl", POOL[1:])
    with pytest.raises(InputError, match=r"pool is [0-9a-f]{64} in the folder, [0-9a-f]{64} now"):
        open_warm_up(config)


def test_a_killed_warm_up_starts_again(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    save, saved = module._Training._save, []

    def killed(self: module._Training, number: int, *rest: object) -> Path:
        saved.append(number)
        if number == 2:
            raise KeyboardInterrupt
        return save(self, number, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(module._Training, "_save", killed)
    with pytest.raises(KeyboardInterrupt):
        run(config, checkpoints=3)
    assert saved == [1, 2]
    assert not (Path(config.output) / "warm_up").exists()
    with pytest.raises(InputError, match="is not there yet; run `airrep warm-up` first"):
        open_warm_up(config)
    monkeypatch.undo()
    final = run(config, checkpoints=2)
    np.testing.assert_allclose(target_losses(final), tuner_losses(config, STEPS), rtol=1e-5)
    assert sorted(path.name for path in final.parent.iterdir()) == [
        "checkpoint-1",
        "final",
        "warm_up.json",
    ]
    names = {path.name for path in Path(config.output).iterdir()}
    assert names == {"pool.jsonl", "warm_up"}


def test_too_little_memory_takes_smaller_parts(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, recipe=replace(RECIPE, warmup_steps=0))
    backward, parts = FineTuner._backward, []

    def limited(self: FineTuner, rows: Sequence[np.ndarray]) -> torch.Tensor:
        losses = backward(self, rows)
        parts.append(self.parts)
        if self.parts < 4 and len(parts) % 3 == 0:  # its gradients are there already
            raise torch.OutOfMemoryError("no room")
        return losses

    monkeypatch.setattr(FineTuner, "_backward", limited)
    final = run(config)
    monkeypatch.undo()
    assert parts == [1] * 3 + [2] * 3 + [4] * STEPS
    np.testing.assert_allclose(target_losses(final), tuner_losses(config, STEPS), rtol=1e-4)


@pytest.mark.parametrize(
    ("recipe", "settings", "message"),
    [
        ({}, {"checkpoints": 7}, "checkpoints is 7, of 6 training steps; give 1 to 6"),
        ({}, {"checkpoints": 0}, "checkpoints is 0, of 6"),
        ({"train": "lora"}, {"moments": True}, "Adam's moments would be of the adapters"),
        ({"learning_rate": 1e30}, {}, "Training diverged: the loss of step 4 is nan"),
    ],
)
def test_what_cannot_be_is_refused(
    config: RunConfig, recipe: dict, settings: dict, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        warm_up(replace(config, recipe=replace(RECIPE, **recipe)), **settings, show_progress=False)
    assert not (Path(config.output) / "warm_up").exists()


def test_a_damaged_folder_is_named(config: RunConfig) -> None:
    run(config)
    file = Path(config.output) / "warm_up" / "warm_up.json"
    for text in ("{", "[]", "{}", '{"inputs": 3}'):
        file.write_text(text)
        with pytest.raises(
            InputError, match=r"warm_up.json cannot be read .* and run `airrep warm-"
        ):
            open_warm_up(config)


def test_it_needs_the_pool(config: RunConfig) -> None:
    (Path(config.output) / "pool.jsonl").unlink()
    with pytest.raises(InputError, match="run `airrep subsets` first"):
        run(config)


@pytest.mark.parametrize(("train", "layers"), [("all", None), ("last_layers", {"1", "2"})])
def test_the_layers_that_trained_are_known(
    config: RunConfig, train: str, layers: set[str] | None
) -> None:
    """Gradients of others would say nothing of this recipe, and LESS has no moments of them."""
    config = replace(config, recipe=replace(RECIPE, train=train, layers=2))
    model, _ = load_lm(run(config, moments=True))
    pattern = open_warm_up(config)[-1].layers
    if layers is None:
        assert pattern is None
        return
    found = linear_layers(model, pattern)
    assert {name.split(".")[2] for name in found} == layers
    assert saved_moments(open_warm_up(config)[-1].path, found) is not None
