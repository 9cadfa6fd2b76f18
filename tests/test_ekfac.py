"""EK-FAC against its definition, written out with dense matrices and autograd."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from tiny_lm import save_tiny_lm
from torch.nn import functional as F

from airrep.attributors.ekfac import EKFACAttributor
from airrep.attributors.grad_dot import GradDotAttributor
from airrep.examples import Example, InputError, lm_template, tokenize_examples
from airrep.gradients import ekfac
from airrep.gradients.ekfac import (
    DrawnLabels,
    LayerCurvature,
    fit_curvature,
    leading_factors,
    products,
)
from airrep.gradients.layer_gradient import LayerGradient
from airrep.gradients.layers import linear_layers
from airrep.gradients.per_example import BatchGradients, GradientModel
from airrep.lm import load_lm

D_OUT, D_IN = 3, 4
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


def random_gradient(size: int, length: int, seed: int) -> LayerGradient:
    """Gradients of examples whose tokens fill their rows differently far."""
    sampler = torch.Generator().manual_seed(seed)
    inputs = torch.randn(size, length, D_IN, generator=sampler)
    outer = torch.randn(size, length, D_OUT, generator=sampler)
    lengths = torch.randint(1, length + 1, (size, 1), generator=sampler)
    mask = torch.arange(length) < lengths
    return LayerGradient(inputs, outer * mask[..., None], mask)


class GivenGradients:
    """In place of a model: "examples" are row numbers, and their gradients are there already."""

    def __init__(self, gradient: LayerGradient) -> None:
        self.gradient = gradient

    def backward(self, rows: Sequence[int]) -> BatchGradients:
        inputs, outer, mask = (
            part[list(rows)]
            for part in (self.gradient.inputs, self.gradient.output_gradients, self.gradient.mask)
        )
        return BatchGradients({"layer": LayerGradient(inputs, outer, mask)}, mask[:, 0])


def fitted(gradient: LayerGradient, step: int = 2) -> LayerCurvature:
    size = len(gradient.mask)
    batches = [range(start, min(start + step, size)) for start in range(0, size, step)]
    return fit_curvature(GivenGradients(gradient), lambda _: batches)["layer"]


def dense_fisher(gradient: LayerGradient) -> np.ndarray:
    """EK-FAC's Fisher matrix (d_out d_in, d_out d_in), example by example and token by token."""
    a_factor, b_factor = np.zeros((D_IN, D_IN)), np.zeros((D_OUT, D_OUT))
    matrices = []
    for a, b, mask in zip(gradient.inputs, gradient.output_gradients, gradient.mask, strict=True):
        a, b = a[mask].double().numpy(), b[mask].double().numpy()
        a_factor += a.T @ a
        b_factor += b.T @ b
        matrices.append(sum(np.outer(*pair) for pair in zip(b, a, strict=True)))
    q = np.kron(np.linalg.eigh(b_factor)[1], np.linalg.eigh(a_factor)[1])
    eigenvalues = np.mean([(q.T @ matrix.ravel()) ** 2 for matrix in matrices], axis=0)
    return q @ np.diag(eigenvalues) @ q.T


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 7), st.integers(1, 5), st.floats(0.01, 10), st.integers(0, 1000))
def test_preconditioning_solves_with_the_dense_matrix(
    size: int, length: int, damping: float, seed: int
) -> None:
    pool, target = random_gradient(size + 4, length, seed), random_gradient(2, length, seed + 1)
    fisher = dense_fisher(pool)
    shift = damping * np.trace(fisher) / len(fisher)
    expected = np.linalg.solve(
        fisher + shift * np.eye(len(fisher)), target.full().double().flatten(1).numpy().T
    ).T
    found = fitted(pool).precondition(target, damping).flatten(1)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_the_eigenvalues_add_up_to_the_mean_squared_norm() -> None:
    gradient = random_gradient(9, 4, seed=5)
    total = fitted(gradient).eigenvalues.sum()
    torch.testing.assert_close(total, gradient.full().square().sum((1, 2)).mean())


def test_one_layer_by_hand() -> None:
    # Two examples of one token each: G = b a^T is 2 at (0, 0), and 1 at (1, 1).
    inputs = torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]])
    outer = torch.tensor([[[2.0, 0.0]], [[0.0, 0.5]]])
    gradient = LayerGradient(inputs, outer, torch.ones(2, 1, dtype=torch.bool))
    curvature = fitted(gradient)
    # A and S are diagonal, and so is Lambda: 4/2, 1/2. The mean of its four entries is 5/8, of
    # which damping 1.6 adds 1: 2 / (2 + 1) and 1 / (0.5 + 1).
    expected = torch.tensor([[[2 / 3, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 2 / 3]]])
    torch.testing.assert_close(curvature.precondition(gradient, 1.6), expected)


def test_batches_and_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, targets = random_gradient(8, 5, seed=1), random_gradient(3, 5, seed=2)
    once = fitted(pool, step=8)
    expected = products((once.precondition(targets, 0.1),), pool)
    monkeypatch.setattr(ekfac, "BLOCK", 2 * D_IN * D_OUT)
    again = fitted(pool, step=3)
    torch.testing.assert_close(
        products((again.precondition(targets, 0.1),), pool), expected, rtol=1e-4, atol=1e-4
    )


def test_padding_does_not_count() -> None:
    gradient = random_gradient(6, 4, seed=3)
    padded = LayerGradient(
        torch.cat([gradient.inputs, torch.full((6, 2, D_IN), 100.0)], dim=1),
        torch.cat([gradient.output_gradients, torch.zeros(6, 2, D_OUT)], dim=1),
        torch.cat([gradient.mask, torch.zeros(6, 2, dtype=torch.bool)], dim=1),
    )
    target = random_gradient(2, 3, seed=4)
    torch.testing.assert_close(
        fitted(padded).precondition(target, 0.1), fitted(gradient).precondition(target, 0.1)
    )


def test_a_layer_without_gradients_gives_zeros() -> None:
    nothing = LayerGradient(
        torch.ones(2, 3, D_IN), torch.zeros(2, 3, D_OUT), torch.ones(2, 3, dtype=torch.bool)
    )
    assert not fitted(nothing).precondition(nothing, 0.1).any()


def test_half_precision_states_are_widened() -> None:
    gradient = random_gradient(6, 4, seed=3)
    half = LayerGradient(
        gradient.inputs.bfloat16(), gradient.output_gradients.bfloat16(), gradient.mask
    )
    found = fitted(half).precondition(half, 0.1)
    assert found.dtype == torch.float32
    exact = fitted(gradient).precondition(gradient, 0.1)
    torch.testing.assert_close(found, exact, rtol=0.1, atol=0.1 * exact.abs().max().item())


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 1000))
def test_products_of_full_and_factored_matrices(targets: int, size: int, seed: int) -> None:
    matrices = torch.randn(targets, D_OUT, D_IN, generator=torch.Generator().manual_seed(seed))
    gradient = random_gradient(size, 4, seed)
    expected = torch.einsum("toi,boi->tb", matrices, gradient.full())
    torch.testing.assert_close(products((matrices,), gradient), expected, **CLOSE)
    factored = leading_factors(matrices, rank=D_OUT, seed=0)
    torch.testing.assert_close(products(factored, gradient), expected, rtol=1e-3, atol=1e-4)


def test_products_of_factored_matrices_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    matrices = torch.randn(5, D_OUT, D_IN, generator=torch.Generator().manual_seed(0))
    factored, gradient = leading_factors(matrices, 2, seed=0), random_gradient(4, 3, seed=0)
    expected = products(factored, gradient)
    monkeypatch.setattr(ekfac, "BLOCK", 1)
    torch.testing.assert_close(products(factored, gradient), expected)


def test_low_rank_keeps_nearly_what_the_best_rank_keeps() -> None:
    sampler = torch.Generator().manual_seed(0)
    matrices = torch.randn(4, 30, 20, generator=sampler) @ torch.diag(0.7 ** torch.arange(20))
    left, right = leading_factors(matrices, rank=5, seed=0)
    lost = (matrices - left @ right).square().sum((1, 2))
    best = torch.linalg.svdvals(matrices)[:, 5:].square().sum(1)
    assert (lost <= 1.02 * best).all()


def test_gradients_that_are_not_finite_are_refused() -> None:
    gradient = random_gradient(2, 3, seed=0)
    gradient.output_gradients[0, 0, 0] = torch.nan
    with pytest.raises(InputError, match="Gradients of the layer layer are not finite"):
        fitted(gradient)


# The attributor, on a tiny language model

LAYERS = r"\.1\..*(q_proj|down_proj)"
POOL = [
    Example(f"p{n}", f"What is {n} plus {n}?" + " Say it." * (n % 3), f"It is {2 * n}, of course.")
    for n in range(9)
]
TARGETS = [Example(f"t{n}", f"Is {n} the answer?", "Yes. " * (n + 1)) for n in range(4)]


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_lm(tmp_path_factory.mktemp("lm") / "model", layers=2, hidden=16)


def make(lm: Path, **settings: Any) -> EKFACAttributor:
    return EKFACAttributor(lm, **{"layers": LAYERS, "fisher": "empirical"} | settings)


def weight_gradients(lm: Path, examples: Sequence[Example]) -> list[dict[str, np.ndarray]]:
    """Gradients of every example's summed response loss by autograd, one example at a time."""
    model, tokenizer = load_lm(lm)
    found = []
    for one in tokenize_examples(examples, tokenizer, lm_template(tokenizer), 512):
        ids = torch.from_numpy(one.ids).long()
        logits = model(input_ids=ids[None]).logits[0]
        loss = F.cross_entropy(
            logits[one.response_start - 1 : -1], ids[one.response_start :], reduction="sum"
        )
        weights = {name: layer.weight for name, layer in linear_layers(model, LAYERS).items()}
        gradients = torch.autograd.grad(loss, list(weights.values()))
        found.append(
            {name: one.double().numpy() for name, one in zip(weights, gradients, strict=True)}
        )
    return found


def test_scores_are_those_of_the_dense_matrices_and_autograd(lm: Path) -> None:
    attributor = make(lm).fit(POOL)
    pool, targets = weight_gradients(lm, POOL), weight_gradients(lm, TARGETS)
    expected = np.zeros((len(TARGETS), len(POOL)))
    for name, curvature in attributor.curvature_.items():
        q = np.kron(curvature.out_vectors.double(), curvature.in_vectors.double())
        g, g_targets = (np.stack([one[name].ravel() for one in side]) for side in (pool, targets))
        eigenvalues = ((g @ q) ** 2).mean(axis=0)
        fisher = q @ np.diag(eigenvalues + 0.1 * eigenvalues.mean()) @ q.T
        expected += np.linalg.solve(fisher, g_targets.T).T @ g.T
    assert len(attributor.curvature_) == 2
    scores = attributor.score(TARGETS)
    np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_the_basis_is_of_the_tokens_inputs_and_output_gradients(lm: Path) -> None:
    attributor = make(lm, layers=r"\.1\..*q_proj").fit(POOL)
    model, tokenizer = load_lm(lm)
    layer = model.model.layers[1].self_attn.q_proj
    inner, outer = torch.zeros(16, 16), torch.zeros(16, 16)
    for one in tokenize_examples(POOL, tokenizer, lm_template(tokenizer), 512):
        seen = {}
        hook = layer.register_forward_hook(
            lambda _, inputs, output, seen=seen: seen.update(a=inputs[0], b=output)
        )
        ids = torch.from_numpy(one.ids).long()
        logits = model(input_ids=ids[None]).logits[0]
        hook.remove()
        loss = F.cross_entropy(
            logits[one.response_start - 1 : -1], ids[one.response_start :], reduction="sum"
        )
        gradient = torch.autograd.grad(loss, seen["b"])[0][0]
        inner += seen["a"][0].detach().T @ seen["a"][0].detach()
        outer += gradient.T @ gradient
    (curvature,) = attributor.curvature_.values()
    for vectors, factor in ((curvature.in_vectors, inner), (curvature.out_vectors, outer)):
        turned = vectors.T @ factor @ vectors
        between = turned - torch.diag(turned.diagonal())
        assert between.abs().max() < 1e-4 * turned.max()


def test_the_fisher_matrix_may_be_of_a_sample(lm: Path) -> None:
    sampled = make(lm, sample=4).fit(POOL)
    (batch,) = sampled._sample(sampled.tokens_, 4)
    chosen = {one.ids.tobytes() for one in batch}
    rows = [row for row, one in enumerate(sampled.tokens_) if one.ids.tobytes() in chosen]
    alone = make(lm).fit([POOL[row] for row in rows])
    assert len(rows) == 4
    for name, curvature in sampled.curvature_.items():
        torch.testing.assert_close(
            curvature.eigenvalues, alone.curvature_[name].eigenvalues, rtol=1e-4, atol=1e-9
        )
    scores = sampled.score(TARGETS)
    np.testing.assert_allclose(
        scores[:, rows], alone.score(TARGETS), rtol=1e-3, atol=1e-4 * np.abs(scores).max()
    )
    backwards = make(lm, sample=4).fit(POOL[::-1]).score(TARGETS)[:, ::-1]
    np.testing.assert_allclose(backwards, scores, rtol=1e-3, atol=1e-4 * np.abs(scores).max())


def test_with_much_damping_scores_are_those_of_grad_dot(lm: Path) -> None:
    scores = make(lm, layers=r"\.1\..*q_proj", damping=1e6).fit(POOL).score(TARGETS)
    plain = GradDotAttributor(lm, layers=r"\.1\..*q_proj").fit(POOL).score(TARGETS)
    scale = (scores * plain).sum() / (plain**2).sum()
    assert scale > 0
    np.testing.assert_allclose(scores / scale, plain, rtol=1e-3, atol=1e-3 * np.abs(plain).max())


def test_scores_of_the_pool_itself_are_an_inner_product(lm: Path) -> None:
    scores = make(lm).fit(POOL).score(POOL).astype(float)
    np.testing.assert_allclose(scores, scores.T, rtol=1e-3, atol=1e-4 * scores.max())
    assert np.linalg.eigvalsh((scores + scores.T) / 2).min() > -1e-4 * scores.max()


def test_batches_and_lots_of_targets_do_not_matter(lm: Path) -> None:
    expected = make(lm).fit(POOL).score(TARGETS)
    again = make(lm, batch_tokens=70, memory_gb=1e-9).fit(POOL).score(TARGETS)
    np.testing.assert_allclose(again, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_lots_of_targets_keep_to_the_memory(lm: Path) -> None:
    # Two layers with 16 x 16 and 16 x 32 weights: 768 numbers of 4 bytes a target.
    attributor = make(lm, memory_gb=10 * 768 * 4 / 2**30).fit(POOL)
    assert attributor._targets_a_pass() == 10
    # In rank 2: 2 x (16 + 16) and 2 x (16 + 32) numbers.
    attributor.target_rank = 2
    assert attributor._targets_a_pass() == 10 * 768 // 160


def test_target_rank_comes_near_to_the_whole(lm: Path) -> None:
    attributor = make(lm).fit(POOL)
    whole = attributor.score(TARGETS)
    far = []
    for rank in (1, 4, 16):
        attributor.target_rank = rank
        far.append(np.linalg.norm(attributor.score(TARGETS) - whole) / np.linalg.norm(whole))
    assert far[0] > far[1] > 0.01
    assert far[2] < 1e-4


def test_gradients_of_drawn_labels_have_no_mean(lm: Path) -> None:
    model, tokenizer = load_lm(lm)
    examples = tokenize_examples(POOL[:1] * 200, tokenizer, lm_template(tokenizer), 512)
    layers = linear_layers(model, r"\.1\..*q_proj")

    def share(gradient_model: GradientModel) -> float:
        """The mean gradient's squared norm, in units of an independent mean's."""
        with gradient_model as opened:
            (gradient,) = opened.backward(examples).layers.values()
        whole = gradient.full()
        return float(200 * whole.mean(0).square().sum() / whole.square().sum((1, 2)).mean())

    assert share(GradientModel(model, layers)) == pytest.approx(200, rel=1e-3)
    assert share(DrawnLabels(model, layers, seed=0)) < 3


def test_labels_are_drawn_by_the_seed_whatever_the_pools_order(lm: Path) -> None:
    first = make(lm, fisher="true").fit(POOL).score(TARGETS)
    backwards = make(lm, fisher="true").fit(POOL[::-1]).score(TARGETS)[:, ::-1]
    np.testing.assert_allclose(backwards, first, rtol=1e-3, atol=1e-4 * np.abs(first).max())
    other = make(lm, fisher="true", seed=1).fit(POOL).score(TARGETS)
    assert not np.allclose(other, first, rtol=1e-2)
    assert np.corrcoef(other.ravel(), first.ravel())[0, 1] > 0.8


def test_bf16_comes_near_to_fp32(lm: Path) -> None:
    exact = make(lm).fit(POOL).score(TARGETS)
    half = make(lm, precision="bf16").fit(POOL).score(TARGETS)
    assert np.corrcoef(half.ravel(), exact.ravel())[0, 1] > 0.98


@pytest.mark.parametrize("target_rank", [None, 3])
def test_saved_and_loaded(lm: Path, tmp_path: Path, target_rank: int | None) -> None:
    attributor = make(lm, target_rank=target_rank).fit(POOL)
    attributor.save(tmp_path / "saved")
    again = EKFACAttributor(lm, layers=LAYERS, target_rank=target_rank)
    again._restore(load_file(tmp_path / "saved" / "state.safetensors"))
    again.pool_size_ = len(POOL)
    np.testing.assert_array_equal(again.score(TARGETS), attributor.score(TARGETS))


def test_other_weights_are_refused(lm: Path, tmp_path: Path) -> None:
    attributor = make(lm).fit(POOL)
    attributor.lm = save_tiny_lm(tmp_path / "other", layers=2, hidden=16, seed=1)
    with pytest.raises(InputError, match="has other weights .* fit again"):
        attributor.score(TARGETS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fisher": "false"}, "fisher is 'false'; choose one of true, empirical"),
        ({"damping": 0.0}, "damping is 0.0; give a share of the mean eigenvalue above 0"),
        ({"target_rank": 0}, "target_rank is 0; give at least 1, or none"),
        ({"sample": 0}, "sample is 0; give at least 1"),
        ({"memory_gb": 0.0}, "memory_gb is 0.0; give more than 0"),
    ],
)
def test_wrong_settings_are_refused(lm: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(lm, **settings).fit(POOL)
