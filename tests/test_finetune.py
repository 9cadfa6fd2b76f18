"""Fine-tuning on subsets: each starts from the same weights and depends on its seed only."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from airrep.examples import Example, InputError, Template, TokenizedExample, tokenize_examples
from airrep.lm import find_blocks, load_lm, response_losses
from data_builders.finetune import FineTuner
from data_builders.recipes import Recipe
from tests.tiny_lm import save_tiny_lm, tiny_tokenizer

COLOURS = ("blue", "green", "red", "white")
RECIPE = Recipe(learning_rate=1e-2, batch_size=4, warmup_steps=1, max_length=64)
TARGETS = np.arange(6)
SUBSET = np.asarray([0, 3, 5, 8, 9, 11, 14])


def tokens(tokenizer: object, count: int, offset: int = 0) -> list[TokenizedExample]:
    examples = [
        Example(str(i), f"Which colour is thing {i * 7 % 10}?", COLOURS[i % 4])
        for i in range(offset, offset + count)
    ]
    template = Template.parse("{prompt}\n{response}<end>")
    return tokenize_examples(examples, tokenizer, template, 64)


def make_tuner(folder: Path, recipe: Recipe = RECIPE, seed: int = 0) -> FineTuner:
    model, tokenizer = load_lm(folder)
    return FineTuner(model, tokens(tokenizer, 16), tokens(tokenizer, 6, 50), recipe, seed=seed)


def run(tuner: FineTuner, subset: np.ndarray = SUBSET, seed: int = 1) -> np.ndarray:
    return tuner.losses(subset, TARGETS, np.random.default_rng(seed))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_lm(tmp_path_factory.mktemp("lm") / "model")


@pytest.mark.parametrize("train", ["all", "lora", "last_layers"])
def test_losses_fall_and_depend_on_the_seed_only(folder: Path, train: str) -> None:
    tuner = make_tuner(folder, replace(RECIPE, train=train, layers=2))
    before = tuner.measure(TARGETS)
    first = run(tuner)
    other = run(tuner, seed=2)
    run(tuner, np.asarray([1, 2]))
    assert first.mean() < before.mean() - 0.05
    np.testing.assert_array_equal(run(tuner), first)
    assert np.abs(other - first).max() > 1e-5
    np.testing.assert_array_equal(run(make_tuner(folder, tuner.recipe)), first)


def test_measure_is_the_response_loss(folder: Path) -> None:
    model, tokenizer = load_lm(folder)
    expected = response_losses(model, tokens(tokenizer, 6, 50))
    for train in ("all", "lora", "last_layers"):
        tuner = make_tuner(folder, replace(RECIPE, train=train, layers=2))
        np.testing.assert_allclose(tuner.measure(TARGETS), expected, rtol=1e-5)


def test_measuring_some_targets_gives_their_losses(folder: Path) -> None:
    tuner = make_tuner(folder)
    every = tuner.measure(TARGETS)
    np.testing.assert_allclose(tuner.measure(np.asarray([4, 1])), every[[4, 1]], rtol=1e-5)


@pytest.mark.parametrize("layers", [1, 3, 4])
def test_stored_activations_give_what_frozen_layers_give(folder: Path, layers: int) -> None:
    with_trunk = run(make_tuner(folder, replace(RECIPE, train="last_layers", layers=layers)))
    model, tokenizer = load_lm(folder)
    model.requires_grad_(False)
    for module in (*model.model.layers[4 - layers :], model.model.norm):
        module.requires_grad_(True)
    plain = FineTuner(model, tokens(tokenizer, 16), tokens(tokenizer, 6, 50), RECIPE)
    np.testing.assert_allclose(with_trunk, run(plain), rtol=1e-4)


def architectures() -> dict[str, Callable[[int], transformers.PreTrainedModel]]:
    shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    wide = shape | {"intermediate_size": 64}
    grouped = wide | {"num_key_value_heads": 1, "head_dim": 16}

    def build(name: str, **settings: object) -> Callable[[int], transformers.PreTrainedModel]:
        def model(vocabulary: int) -> transformers.PreTrainedModel:
            config = getattr(transformers, f"{name}Config")(
                vocab_size=vocabulary, bos_token_id=None, eos_token_id=1, pad_token_id=0, **settings
            )
            return transformers.AutoModelForCausalLM.from_config(config)

        return model

    return {
        "Llama": build("Llama", **wide),
        "Qwen2": build("Qwen2", **wide, num_key_value_heads=1),
        "Qwen3": build("Qwen3", **grouped),
        "GPT2": build("GPT2", n_embd=32, n_layer=3, n_head=2, n_positions=128),
        "GPTNeoX": build("GPTNeoX", **wide),
        "Gemma2": build("Gemma2", **grouped, sliding_window=8, query_pre_attn_scalar=16),
        "Gemma3Text": build("Gemma3Text", **grouped, sliding_window=8, query_pre_attn_scalar=16),
        "Phi": build("Phi", **wide),
    }


@pytest.mark.parametrize("name", list(architectures()))
def test_the_trunk_fits_the_usual_architectures(name: str) -> None:
    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = architectures()[name](len(tokenizer)).eval()
    pool, targets = tokens(tokenizer, 16), tokens(tokenizer, 6, 50)
    expected = response_losses(model, targets)
    tuner = FineTuner(model, pool, targets, replace(RECIPE, train="last_layers", layers=1))
    np.testing.assert_allclose(tuner.measure(TARGETS), expected, rtol=1e-4)
    assert run(tuner).mean() < expected.mean()


def test_an_architecture_that_does_not_fit_is_refused(folder: Path) -> None:
    model, tokenizer = load_lm(folder)
    inner = model.model.layers[0].forward
    # A block that leaves a trace behind, which a stored activation cannot.
    model.model.layers[0].forward = lambda *a, **k: (setattr(model, "trace", 1), inner(*a, **k))[1]
    head = model.lm_head.forward
    model.lm_head.forward = lambda x: head(x) * getattr(model, "trace", 2)
    pool = tokens(tokenizer, 4)
    del_trace = model.register_forward_pre_hook(lambda m, a: setattr(m, "trace", 2))
    with pytest.raises(InputError, match="does not compute the same when its lower blocks"):
        FineTuner(model, pool, pool, replace(RECIPE, train="last_layers", layers=1))
    del_trace.remove()


def test_lora_leaves_the_global_generator_alone(folder: Path) -> None:
    state = torch.get_rng_state()
    make_tuner(folder, replace(RECIPE, train="lora"))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_blocks_are_found(folder: Path) -> None:
    model, _ = load_lm(folder)
    assert find_blocks(model) is model.model.layers


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": "some"}, "recipe.train is 'some'; choose one of all, lora, last_layers"),
        ({"precision": "fp8"}, "recipe.precision is 'fp8'"),
        ({"epochs": 0}, "recipe.epochs is 0; give at least 1"),
        ({"learning_rate": 0.0}, "recipe.learning_rate is 0.0; give more than 0"),
        ({"learning_rate": float("nan")}, "recipe.learning_rate is nan"),
        ({"warmup_steps": -1}, "recipe.warmup_steps is -1"),
        ({"train": "last_layers", "layers": 9}, "has 4 blocks; give 1 to 4"),
    ],
)
def test_impossible_recipes_are_refused(folder: Path, change: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_tuner(folder, replace(RECIPE, **change))


def test_the_fingerprint_knows_what_decides_the_losses() -> None:
    assert replace(RECIPE, layers=9).fingerprint() == RECIPE.fingerprint()
    assert replace(RECIPE, epochs=9).fingerprint() != RECIPE.fingerprint()
    last = replace(RECIPE, train="last_layers")
    assert replace(last, layers=9).fingerprint() != last.fingerprint()
