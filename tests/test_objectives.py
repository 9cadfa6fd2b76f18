"""Objectives agree with hand-computed numbers, and never make NaN of missing or tied labels."""

from math import exp, log, sqrt

import numpy as np
import pytest
import torch
from scipy.stats import rankdata, spearmanr

from airrep import objectives
from airrep.examples import InputError
from airrep.objectives import (
    OBJECTIVES,
    correlation,
    make_objective,
    pairwise_ranking,
    soft_spearman,
    standardise_labels,
)

NAN = float("nan")
every_objective = pytest.mark.parametrize("name", list(OBJECTIVES))


def random_problem(seed: int = 0, shape: tuple[int, int] = (4, 7)) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    predicted = torch.randn(shape, generator=generator, dtype=torch.float64)
    return predicted.requires_grad_(), torch.randn(shape, generator=generator, dtype=torch.float64)


def test_correlation_golden_number() -> None:
    # Centred: (-4, -1, 5) / 3 and (-1, 1, 0); product sum 1, square sums 42/9 and 2.
    loss = correlation(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[1.0, 3.0, 2.0]]))
    assert loss.item() == pytest.approx(1 - 1 / sqrt(42 / 9 * 2), abs=1e-6)


def test_pairwise_ranking_golden_number() -> None:
    # Differences: 0 over 1 is 10, cut to 5; 0 over 2 is 9.7, cut to 5; 2 over 1 is 0.3.
    loss = pairwise_ranking(torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[10.0, 0.0, 0.3]]))
    by_hand = 5 * log(1 + exp(-1)) + 5 * log(1 + exp(1)) + 0.3 * log(1 + exp(-2))
    assert loss.item() == pytest.approx(by_hand / 10.3, abs=1e-6)
    # Below t_min a pair says nothing.
    close = pairwise_ranking(torch.tensor([[0.0, 9.0]]), torch.tensor([[0.09, 0.0]]))
    assert close.item() == 0


def test_soft_spearman_tends_to_spearman() -> None:
    predicted, labels = random_problem(shape=(3, 9))
    labels = labels.round()  # with ties
    rho = np.mean(
        [spearmanr(a, b).statistic for a, b in zip(predicted.detach(), labels, strict=True)]
    )
    loss = soft_spearman(predicted, labels, temperature=1e-5)
    assert loss.item() == pytest.approx(1 - rho, abs=1e-6)
    # Two subsets at distance 2 of standard deviation 1: any smooth ranks correlate perfectly.
    assert soft_spearman(torch.tensor([[1.0, -1.0]]), torch.tensor([[3.0, 2.0]])).item() == (
        pytest.approx(0, abs=1e-6)
    )


def test_average_ranks() -> None:
    labels = torch.tensor([[2.0, NAN, 1.0, 2.0, 5.0]])
    ranks = objectives._average_ranks(labels, labels.isfinite())
    assert ranks[0, [0, 2, 3, 4]].tolist() == rankdata([2, 1, 2, 5]).tolist()


@every_objective
def test_gradient(name: str) -> None:
    predicted, labels = random_problem()
    labels[0, 2] = NAN
    weights = torch.tensor([1.0, 0.5, 2.0, 0.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda p: make_objective(name)(p, labels, weights), predicted)


@every_objective
def test_a_missing_label_is_as_if_the_subset_were_not_there(name: str) -> None:
    predicted, labels = random_problem(shape=(1, 6))
    labels[0, 4] = NAN
    keep = [0, 1, 2, 3, 5]
    whole = make_objective(name)(predicted, labels, None)
    assert whole.item() == pytest.approx(
        make_objective(name)(predicted[:, keep], labels[:, keep], None).item()
    )
    (gradient,) = torch.autograd.grad(whole, predicted)
    assert gradient[0, 4] == 0
    assert gradient.abs().sum() > 0


@every_objective
@pytest.mark.parametrize(
    "labels", [[[1.0, 1.0, 1.0]], [[NAN, NAN, NAN]], [[NAN, 2.0, NAN]]], ids=str
)
def test_labels_without_signal_give_zero_and_no_gradient(
    name: str, labels: list[list[float]]
) -> None:
    predicted = torch.tensor([[0.3, -1.0, 2.0]], requires_grad=True)
    loss = make_objective(name)(predicted, torch.tensor(labels), None)
    loss.backward()
    assert loss.item() == 0
    assert predicted.grad is not None
    assert predicted.grad.tolist() == [[0, 0, 0]]


@every_objective
def test_tied_predictions_have_a_finite_gradient(name: str) -> None:
    predicted = torch.full((2, 3), 0.7, requires_grad=True)
    loss = make_objective(name)(predicted, torch.tensor([[1.0, 2.0, 3.0], [1.0, 1.0, 1.0]]), None)
    loss.backward()
    assert loss.item() > 0
    assert predicted.grad is not None
    assert predicted.grad.isfinite().all()


@every_objective
def test_a_target_of_weight_zero_is_not_there(name: str) -> None:
    predicted, labels = random_problem()
    weights = torch.tensor([1.0, 0.0, 1.0, 1.0])
    keep = [0, 2, 3]
    assert make_objective(name)(predicted, labels, weights).item() == pytest.approx(
        make_objective(name)(predicted[keep], labels[keep], None).item()
    )


@every_objective
def test_better_predictions_lose_less(name: str) -> None:
    _, labels = random_problem()
    objective = make_objective(name)
    assert objective(labels, labels, None) < objective(-labels, labels, None)


@pytest.mark.parametrize("name", ["pairwise_ranking", "soft_spearman"])
def test_blocks_of_targets_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for block in (2**25, 60):  # 60 pairs hold one target of 7 x 7
        monkeypatch.setattr(objectives, "PAIR_BLOCK", block)
        predicted, labels = random_problem()
        loss = make_objective(name)(predicted, labels, None)
        results.append((loss.item(), torch.autograd.grad(loss, predicted)[0]))
    assert results[0][0] == pytest.approx(results[1][0])
    assert torch.allclose(results[0][1], results[1][1])


def test_standardise_labels() -> None:
    losses = np.asarray(
        [[1.0, 2.0, 3.0], [2.0, np.inf, 4.0], [5.0, 5.0, 5.0], [1.0, NAN, NAN]], dtype=np.float32
    )
    labels, kept = standardise_labels(losses)
    step = sqrt(3 / 2)  # the spread of (1, 2, 3) is sqrt(2 / 3)
    expected = [[step, 0, -step], [1, NAN, -1], [NAN] * 3, [NAN] * 3]
    np.testing.assert_allclose(labels, expected, rtol=1e-6)
    assert labels.dtype == np.float32
    assert kept.tolist() == [True, True, False, False]


def test_standardised_labels_are_clipped() -> None:
    losses = np.zeros((1, 1000))
    losses[0, 0] = 7.0  # 31.6 standard deviations off
    assert standardise_labels(losses)[0].min() == -10


def test_errors() -> None:
    with pytest.raises(InputError, match="no objective 'hinge'; choose one of correlation"):
        make_objective("hinge")
    with pytest.raises(InputError, match=r"both must be \(targets, subsets\)"):
        correlation(torch.ones(2, 3), torch.ones(3, 2))
    with pytest.raises(InputError, match="give one number a target"):
        correlation(torch.ones(2, 3), torch.ones(2, 3), torch.ones(3))
