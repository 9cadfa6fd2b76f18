"""Engines agree: one model or many, one example a row or several, stored layers or not."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from airrep.examples import InputError, TokenizedExample
from airrep.response_batch import fill_rows, response_batch
from data_builders.finetune import FineTuner
from data_builders.recipes import Recipe
from data_builders.stacked import Stack, clip_gradients
from tests.test_finetune import RECIPE, TARGETS, architectures, tokens
from tests.tiny_lm import tiny_tokenizer

SUBSETS = [np.asarray(rows) for rows in ([0, 3, 5, 8, 9], [1, 2, 3, 4, 15], [7, 6, 11, 12, 13])]


def build(name: str) -> tuple[nn.Module, list[TokenizedExample], list[TokenizedExample]]:
    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = architectures()[name](len(tokenizer)).eval()
    return model, tokens(tokenizer, 16), tokens(tokenizer, 6, 50)


def losses(
    name: str, recipe: Recipe, engine: str, subsets: Sequence[np.ndarray] = SUBSETS
) -> np.ndarray:
    tuner = FineTuner(*build(name), recipe, engine=engine, most_models=3)  # type: ignore[arg-type]
    assert tuner.engine == engine
    assert tuner.most_models == (3 if engine == "batched" else 1)
    # Its window of 8 tokens is shorter than a row: packed rows would look back too far.
    too_short = name.startswith("Gemma") and engine != "eager"
    assert [note.split(";")[0] for note in tuner.notes] == too_short * [
        f"{name}ForCausalLM cannot take packed rows".replace("TextFor", "For")
    ]
    generators = [np.random.default_rng(number) for number in range(len(subsets))]
    return tuner.losses_of(subsets, TARGETS, generators)


@pytest.mark.parametrize("train", ["all", "lora", "last_layers"])
@pytest.mark.parametrize("name", list(architectures()))
def test_many_models_at_once_train_as_each_does_alone(name: str, train: str) -> None:
    recipe = replace(RECIPE, train=train, layers=2)
    alone = losses(name, recipe, "eager")
    assert np.ptp(alone, axis=0).min() > 1e-3  # the subsets do differ
    np.testing.assert_allclose(losses(name, recipe, "batched"), alone, atol=2e-4)
    if train == "last_layers":
        np.testing.assert_allclose(losses(name, recipe, "cached_trunk"), alone, atol=2e-4)


def test_the_number_of_models_at_once_does_not_matter() -> None:
    subsets = [*SUBSETS, np.asarray([14, 10, 4]), np.asarray([0, 1, 2])]  # fewer steps
    tuner = FineTuner(*build("Llama"), RECIPE, engine="batched", most_models=5)

    def together(numbers: Sequence[int]) -> np.ndarray:
        chosen = [subsets[number] for number in numbers]
        return tuner.losses_of(chosen, TARGETS, [np.random.default_rng(n) for n in numbers])

    every = together(range(5))
    for numbers in ([0], [1], [3, 4], [4, 2, 0]):
        np.testing.assert_allclose(together(numbers), every[numbers], atol=1e-4)
    np.testing.assert_array_equal(together(range(5)), every)


def test_a_step_in_parts_is_the_whole_step() -> None:
    tuner = FineTuner(*build("Llama"), RECIPE, engine="batched", most_models=5)
    subsets = [np.arange(5), np.arange(9)[3:]]  # their last steps have 1 and 2 examples

    def run(parts: int, eval_batch: int) -> np.ndarray:
        tuner.parts, tuner.eval_batch = parts, eval_batch
        return tuner.losses_of(subsets, TARGETS, [np.random.default_rng(n) for n in (0, 1)])

    whole = run(1, 64)
    for parts, eval_batch in ((2, 3), (4, 1), (8, 64)):
        np.testing.assert_allclose(run(parts, eval_batch), whole, atol=1e-4)


def test_a_token_that_pads_learns_nothing_where_it_is_read() -> None:
    recipe = replace(RECIPE, train="all")
    model, pool, targets = build("Llama")
    padding = int(pool[0].ids[2])
    found = []
    for engine in ("eager", "batched"):
        model = build("Llama")[0]
        model.model.embed_tokens.padding_idx = padding  # type: ignore[union-attr]
        tuner = FineTuner(model, pool, targets, recipe, engine=engine, most_models=3)  # type: ignore[arg-type]
        found.append(tuner.losses_of(SUBSETS, TARGETS, [np.random.default_rng(0)] * 3))
    np.testing.assert_allclose(*found, atol=2e-4)


def test_a_stack_gives_the_model_back_as_it_was() -> None:
    model, pool, _ = build("GPT2")
    ids = torch.from_numpy(np.asarray(pool[0].ids))[None]
    parameters = list(model.parameters())
    with torch.no_grad():
        before = model(input_ids=ids).logits
        stack = Stack(model)
        stack.reset(3)
        assert {len(parameter) for parameter in model.parameters()} == {3}
        stack.close()
        assert torch.equal(model(input_ids=ids).logits, before)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


def test_what_does_not_fit_a_stack_is_trained_alone() -> None:
    model, pool, targets = build("Llama")
    model.model.gate = nn.Parameter(torch.zeros(1))  # type: ignore[union-attr]
    tuner = FineTuner(model, pool, targets, RECIPE, engine="batched")
    assert tuner.engine == "eager"
    assert "has weights beside those of its parts" in tuner.notes[0]
    alone = losses("Llama", RECIPE, "eager")
    generators = [np.random.default_rng(number) for number in range(3)]
    np.testing.assert_allclose(tuner.losses_of(SUBSETS, TARGETS, generators), alone, atol=1e-4)

    model = build("Llama")[0]
    head = model.lm_head
    # Looks at the whole batch, so models in it do not stay apart.
    head.register_forward_pre_hook(lambda module, inputs: inputs[0] * inputs[0].sum())
    tuner = FineTuner(model, pool, targets, RECIPE, engine="batched")
    assert tuner.engine == "eager"
    assert "does not compute the same in a stack" in tuner.notes[-1]


def test_fewer_models_are_trained_at_once_where_memory_runs_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = losses("Llama", RECIPE, "batched")
    tuner = FineTuner(*build("Llama"), RECIPE, engine="batched", most_models=3)
    train = FineTuner._train

    def limited(self: FineTuner, plans: Sequence[Sequence[np.ndarray]]) -> None:
        if len(plans) * 4 // self.parts > 2:
            raise torch.OutOfMemoryError("no room")
        train(self, plans)

    monkeypatch.setattr(FineTuner, "_train", limited)
    generators = [np.random.default_rng(number) for number in range(3)]
    np.testing.assert_allclose(tuner.losses_of(SUBSETS, TARGETS, generators), expected, atol=1e-4)
    assert (tuner.most_models, tuner.parts, tuner.eval_batch) == (1, 2, 32)

    def never(self: FineTuner, plans: Sequence[Sequence[np.ndarray]]) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(FineTuner, "_train", never)
    with pytest.raises(InputError, match="Memory runs out with one example at a time"):
        tuner.losses_of(SUBSETS, TARGETS, generators)


def compiled_and_plain(
    recipe: Recipe, subsets: Sequence[np.ndarray]
) -> tuple[FineTuner, list[np.ndarray]]:
    """A tuner told to compile, and the losses of subsets by it and by a plain one."""
    found = []
    for compiles in (False, True):
        tuner = FineTuner(
            *build("Llama"), recipe, engine="batched", most_models=2, compiles=compiles
        )
        found.append(tuner.losses_of(subsets, TARGETS, [np.random.default_rng(0)] * 2))
        tuner.eval_batch = 3
        found.append(tuner._measure(TARGETS))
    return tuner, found


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_one_compiled_graph_serves_all_blocks_and_shapes(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._dynamo.utils import counters

    if backend == "inductor":
        from torch._inductor import cpp_builder

        try:
            cpp_builder.get_cpp_compiler()
        except Exception as error:
            pytest.skip(f"no C++ compiler: {error}")
    # The first traces and differentiates the same graphs, but makes no kernels, which take long.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    counters.clear()
    recipe = replace(RECIPE, batch_size=6, epochs=1)  # steps of 6 and 4 examples: other shapes
    tuner, (plain, again, compiled, smaller) = compiled_and_plain(
        recipe, [np.arange(10), np.arange(16)[6:]]
    )
    assert tuner.notes == []
    assert tuner.stack is not None
    assert tuner.stack.is_compiled
    np.testing.assert_allclose(compiled, plain, atol=1e-4)
    np.testing.assert_allclose(smaller, again, atol=1e-4)
    # Two blocks, two shapes each of training and of measuring: a graph to train, one to measure.
    assert counters["stats"]["unique_graphs"] == 2


def test_models_train_uncompiled_where_the_compiler_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(in_training: bool, function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled() == in_training:
                raise RuntimeError("no compiler\nat all")
            return function(*args, **kwargs)

        return run

    for in_training in (True, False):
        monkeypatch.setattr(torch, "compile", partial(broken, in_training))
        tuner, (plain, _, compiled, _) = compiled_and_plain(RECIPE, SUBSETS[:2])
        assert tuner.notes == ["Blocks are not compiled: RuntimeError: no compiler"]
        assert tuner.stack is not None
        assert not tuner.stack.is_compiled
        np.testing.assert_array_equal(compiled, plain)

    def absent(function: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
        raise RuntimeError("not on this system")

    monkeypatch.setattr(torch, "compile", absent)
    tuner, (plain, _, compiled, _) = compiled_and_plain(RECIPE, SUBSETS[:2])
    assert tuner.notes == ["Blocks are not compiled: RuntimeError: not on this system"]
    np.testing.assert_array_equal(compiled, plain)


def test_what_cannot_be_compiled_says_why() -> None:
    tuner = FineTuner(*build("Llama"), RECIPE, engine="eager", compiles=True)
    assert tuner.notes == ["Only the batched engine compiles."]
    tuner = FineTuner(*build("GPTNeoX"), RECIPE, engine="batched", most_models=1, compiles=True)
    assert "LayerNorm would be compiled again for every length of rows" in tuner.notes[0]
    last = replace(RECIPE, train="last_layers", layers=1)
    tuner = FineTuner(*build("Llama"), last, engine="batched", most_models=1, compiles=True)
    assert "No block before the last trains" in tuner.notes[0]


def test_half_precision_stays_near_the_plain_reference() -> None:
    recipe = replace(RECIPE, precision="bf16", train="all")
    for name in ("Llama", "Qwen3"):  # the latter norms queries and keys, which are half already
        alone = losses(name, recipe, "eager")
        full = losses(name, replace(recipe, precision="fp32"), "eager")
        together = losses(name, recipe, "batched")
        assert 0 < np.abs(alone - full).max() < 5e-3
        np.testing.assert_allclose(together, alone, atol=5e-3)


def test_wrong_engines_are_refused() -> None:
    with pytest.raises(InputError, match="engine is 'fast'; choose one of auto, eager"):
        FineTuner(*build("Llama"), RECIPE, engine="fast")  # type: ignore[arg-type]
    with pytest.raises(InputError, match='cached_trunk needs recipe.train "last_layers"'):
        FineTuner(*build("Llama"), RECIPE, engine="cached_trunk")


def test_gradients_are_clipped_for_each_model() -> None:
    weight, bias = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2, 1))
    weight.grad, bias.grad = torch.tensor([[3.0, 0.0], [0.3, 0.0]]), torch.tensor([[4.0], [0.4]])
    clip_gradients([weight, bias], 1.0)
    torch.testing.assert_close(weight.grad, torch.tensor([[0.6, 0.0], [0.3, 0.0]]))
    torch.testing.assert_close(bias.grad, torch.tensor([[0.8], [0.4]]))


def test_rows_are_filled_first_fit_longest_first() -> None:
    assert fill_rows(np.asarray([3, 7, 2, 5, 4]), 8) == [[1], [3, 0], [4, 2]]
    assert fill_rows(np.asarray([], dtype=int), 8) == []


def test_a_batch_says_where_each_response_token_is_predicted() -> None:
    first = TokenizedExample(np.asarray([5, 6, 7, 8]), response_start=2)
    second = TokenizedExample(np.asarray([9, 4]), response_start=0)
    padded = response_batch([[first, second]])
    assert padded.ids.tolist() == [[5, 6, 7, 8], [9, 4, 0, 0]]
    assert padded.places.tolist() == [[1, 2, 4]]
    assert padded.tokens.tolist() == [[7, 8, 4]]
    assert padded.rows.tolist() == [[0, 0, 1]]
    assert not padded.packed
    twice = padded.repeat(2)
    assert twice.places.tolist() == [[1, 2, 4], [9, 10, 12]]
    assert twice.texts.tolist() == [[0] * 4, [1, 1, -1, -1]] * 2

    packed = response_batch([[first, second], [second]], width=6)
    assert packed.packed
    assert packed.ids.tolist() == [[5, 6, 7, 8, 9, 4], [9, 4, 0, 0, 0, 0]]
    assert packed.texts.tolist() == [[0, 0, 0, 0, 1, 1], [2, 2, -1, -1, -1, -1]]
    assert packed.offsets.tolist() == [[0, 1, 2, 3, 0, 1], [0, 1, 0, 0, 0, 0]]
    assert packed.places.tolist() == [[1, 2, 4], [6, 12, 12]]
    assert packed.tokens.tolist() == [[7, 8, 4], [4, 0, 0]]
    assert packed.rows.tolist() == [[0, 0, 1], [2, -1, -1]]
    seen = packed.attention()[0, 0] == 0
    assert seen.sum(dim=1).tolist() == [1, 2, 3, 4, 1, 2]
