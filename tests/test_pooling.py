"""Attention pooling is the paper's formula, exactly, however far apart the scores lie."""

import numpy as np
import pytest
import torch

from airrep.examples import InputError
from airrep.pooling import attention_pool, mean_pool, membership


def by_definition(scores: torch.Tensor, subsets: list[list[int]]) -> torch.Tensor:
    """sum_i softmax(|s|)_i s_i, one target and one subset at a time."""
    rows = [
        [(torch.softmax(row[subset].abs(), 0) * row[subset]).sum() for subset in subsets]
        for row in scores
    ]
    return torch.stack([torch.stack(row) for row in rows])


def test_golden_number() -> None:
    pooled = attention_pool(torch.tensor([[-3.0, 1.0, 0.5]]), torch.ones(3, 1))
    # (e^3 * -3 + e * 1 + e^.5 * .5) / (e^3 + e + e^.5); softmax of s itself would give 0.77.
    assert pooled.item() == pytest.approx(-2.3193, abs=1e-4)


def test_all_subsets_at_once_equal_one_at_a_time() -> None:
    rng = np.random.default_rng(0)
    scores = torch.from_numpy(rng.normal(0, 4, (5, 20)))
    subsets = [sorted(rng.choice(20, size, replace=False)) for size in (1, 3, 7, 20)]
    members = membership([np.asarray(subset) for subset in subsets], 20)
    assert torch.allclose(attention_pool(scores, members), by_definition(scores, subsets))


def test_a_row_that_occurs_twice_counts_twice() -> None:
    scores = torch.tensor([[1.0, -2.0, 3.0]])
    twice = attention_pool(scores, membership([np.asarray([0, 1, 1])], 3))
    written_out = attention_pool(torch.tensor([[1.0, -2.0, -2.0]]), torch.ones(3, 1))
    assert torch.allclose(twice, written_out)


@pytest.mark.parametrize("gap", [30.0, 60.0, 90.0, 200.0, 1e4])
def test_a_subset_far_below_the_largest_score_is_exact(gap: float) -> None:
    scores = torch.tensor([[gap, -3.0, 1.0, 0.5], [0.1, -gap, gap, gap]])
    subsets = [[1, 2, 3], [0, 1, 2, 3], [3, 3, 2]]
    pooled = attention_pool(scores, membership([np.asarray(subset) for subset in subsets], 4))
    assert torch.allclose(pooled.double(), by_definition(scores.double(), subsets), rtol=1e-6)
    assert pooled[0, 0].item() == pytest.approx(-2.3193, abs=1e-4)


@pytest.mark.parametrize("largest", [2.0, 200.0])
def test_gradient(largest: float) -> None:
    scores = torch.tensor([[largest, -3.0, 1.0, 0.5], [0.3, 1.0, -2.0, 0.7]], dtype=torch.float64)
    members = membership([np.asarray([1, 2, 3]), np.asarray([0, 1]), np.asarray([3, 3, 2])], 4)
    assert torch.autograd.gradcheck(lambda s: attention_pool(s, members), scores.requires_grad_())


def test_membership_counts() -> None:
    members = membership([np.asarray([2, 0, 2]), np.asarray([1])], 3)
    assert members.tolist() == [[1, 0], [0, 1], [2, 0]]


def test_mean_pool_ignores_padding() -> None:
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [99.0, 99.0]], [[5.0, 6.0]] * 3])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert mean_pool(hidden, mask).tolist() == [[2.0, 3.0], [5.0, 6.0]]


def test_errors() -> None:
    with pytest.raises(InputError, match=r"Subset 1 has row 3, outside the pool of 3"):
        membership([np.asarray([0]), np.asarray([3])], 3)
    with pytest.raises(InputError, match="Subset 0 is empty"):
        membership([np.asarray([], dtype=np.int64)], 3)
    with pytest.raises(InputError, match="Subset 1 is empty"):
        attention_pool(torch.ones(1, 2), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    with pytest.raises(InputError, match=r"give \(targets, pool\) and \(pool, subsets\)"):
        attention_pool(torch.ones(1, 2), torch.ones(3, 1))
