"""DataInf against the paper's formula, written out in loops over autograd's gradients."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_lm import save_tiny_lm
from torch.nn import functional as F

from airrep.attributors.datainf import DataInfAttributor, learn_layers, solve
from airrep.attributors.grad_dot import GradDotAttributor
from airrep.examples import Example, InputError, lm_template, tokenize_examples
from airrep.gradients.layers import linear_layers
from airrep.gradients.store import GradientStore
from airrep.lm import load_lm

LAYERS = r"\.1\..*(q_proj|down_proj)"
ONE_LAYER = r"\.1\..*q_proj"
POOL = [
    Example(f"p{n}", f"What is {n} plus {n}?" + " Say it." * (n % 3), f"It is {2 * n}, of course.")
    for n in range(9)
]
TARGETS = [Example(f"t{n}", f"Is {n} the answer?", "Yes. " * (n + 1)) for n in range(4)]


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_lm(tmp_path_factory.mktemp("lm") / "model", layers=2, hidden=16)


def make(lm: Path, **settings: Any) -> DataInfAttributor:
    return DataInfAttributor(lm, **{"layers": LAYERS, "projection_rank": None} | settings)


def weight_gradients(lm: Path, examples: Sequence[Example]) -> list[list[np.ndarray]]:
    """Of every example the gradient of each layer, of the summed response loss, as a vector."""
    model, tokenizer = load_lm(lm)
    weights = [layer.weight for layer in linear_layers(model, LAYERS).values()]
    found = []
    for one in tokenize_examples(examples, tokenizer, lm_template(tokenizer), 512):
        ids = torch.from_numpy(one.ids).long()
        logits = model(input_ids=ids[None]).logits[0]
        loss = F.cross_entropy(
            logits[one.response_start - 1 : -1], ids[one.response_start :], reduction="sum"
        )
        gradients = torch.autograd.grad(loss, weights)
        found.append([gradient.flatten().double().numpy() for gradient in gradients])
    return found


def literal_scores(
    targets: Sequence[Sequence[np.ndarray]], pool: Sequence[Sequence[np.ndarray]], damping: float
) -> np.ndarray:
    scores = np.zeros((len(targets), len(pool)))
    for layer in range(len(pool[0])):
        own = [gradients[layer] for gradients in pool]
        n, d = len(own), len(own[0])
        lam = damping * sum(g @ g for g in own) / (n * d)
        for row, gradients in enumerate(targets):
            v = gradients[layer]
            solved = np.zeros_like(v)
            for g in own:
                solved += (v - (v @ g) / (lam + g @ g) * g) / (n * lam)
            for column, g in enumerate(own):
                scores[row, column] += solved @ g
    return scores


@pytest.mark.parametrize("damping", [0.1, 100.0])
def test_scores_are_those_of_the_formula(lm: Path, damping: float) -> None:
    expected = literal_scores(weight_gradients(lm, TARGETS), weight_gradients(lm, POOL), damping)
    scores = make(lm, damping=damping).fit(POOL).score(TARGETS)
    np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())


def test_scores_of_projected_gradients_are_those_of_the_formula(lm: Path) -> None:
    attributor = make(lm, projection_rank=3).fit(POOL)
    (features,) = attributor.features_
    projections = features.projections(torch.device("cpu"))

    def projected(examples: Sequence[Example]) -> list[list[np.ndarray]]:
        sides = [(p_out.double().numpy(), p_in.double().numpy()) for p_out, p_in in projections]
        return [
            [
                (p_out.T @ g.reshape(len(p_out), len(p_in)) @ p_in).ravel()
                for g, (p_out, p_in) in zip(gradients, sides, strict=True)
            ]
            for gradients in weight_gradients(lm, examples)
        ]

    projections = list(projections.values())
    expected = literal_scores(projected(TARGETS), projected(POOL), 0.1)
    scores = attributor.score(TARGETS)
    np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())


def test_by_hand() -> None:
    # One layer of two numbers; g = (1, 0) and (0, 3), v = (1, 1), damping 0.4. The squared norms
    # are 1 and 9, so lambda = 0.4 x 10 / (2 x 2) = 1. H^-1 v is the mean of
    # (1, 1) - 1/2 (1, 0) = (1/2, 1) and (1, 1) - 3/10 (0, 3) = (1, 1/10): (3/4, 11/20).
    store = GradientStore(2, 2, {})
    store.write(np.arange(2), torch.tensor([[1.0, 0.0], [0.0, 3.0]]), torch.zeros(2))
    solved = solve(torch.tensor([[1.0, 1.0]]), store, learn_layers(store, [2], damping=0.4))
    np.testing.assert_allclose(solved, [[3 / 4, 11 / 20]], rtol=1e-6)


def test_a_layer_without_gradients_counts_for_nothing() -> None:
    store = GradientStore(2, 3, {})
    store.write(np.arange(2), torch.tensor([[1.0, 0, 0], [2.0, 0, 0]]), torch.zeros(2))
    solved = solve(torch.ones(1, 3), store, learn_layers(store, [1, 2], damping=0.1))
    assert solved[0, 0] > 0
    assert not solved[0, 1:].any()


def test_with_much_damping_scores_are_those_of_grad_dot(lm: Path) -> None:
    scores = make(lm, layers=ONE_LAYER, damping=1e6).fit(POOL).score(TARGETS)
    plain = GradDotAttributor(lm, layers=ONE_LAYER).fit(POOL).score(TARGETS)
    scale = (scores * plain).sum() / (plain**2).sum()
    assert scale > 0
    np.testing.assert_allclose(scores / scale, plain, rtol=1e-3, atol=1e-3 * np.abs(plain).max())


def test_one_pool_example_gives_the_exact_inverse(lm: Path) -> None:
    # With one g the mean of inverses is the inverse: (g g^T + lambda I)^-1.
    (g,), targets = weight_gradients(lm, POOL[:1]), weight_gradients(lm, TARGETS)
    expected = np.zeros((len(targets), 1))
    for layer, own in enumerate(g):
        fisher = np.outer(own, own) + 0.1 * (own @ own) / len(own) * np.eye(len(own))
        expected[:, 0] += np.linalg.solve(fisher, own) @ np.stack([v[layer] for v in targets]).T
    scores = make(lm).fit(POOL[:1]).score(TARGETS)
    np.testing.assert_allclose(scores, expected, rtol=2e-2)


def test_batches_and_blocks_do_not_matter(
    lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = make(lm).fit(POOL).score(TARGETS)
    monkeypatch.setattr("airrep.gradients.store.BLOCK_BYTES", 1)
    again = make(lm, batch_tokens=70, store=tmp_path / "store").fit(POOL).score(TARGETS)
    np.testing.assert_allclose(again, expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())


def test_damping_has_to_be_positive(lm: Path) -> None:
    with pytest.raises(InputError, match="damping is -1; give a share .* above 0"):
        make(lm, damping=-1).fit(POOL)
