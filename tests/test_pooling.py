"""Attention pooling is the paper's formula, exactly, however far apart the scores lie."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from airrep.examples import InputError
from airrep.pooling import Membership, attention_pool, mean_pool, membership


def members_of(*subsets: list[int], pool_size: int) -> Membership:
    return membership([np.asarray(subset) for subset in subsets], pool_size)


def by_definition(scores: torch.Tensor, subsets: list[list[int]]) -> torch.Tensor:
    """sum_i softmax(|s|)_i s_i, one target and one subset at a time."""
    rows = [
        [(torch.softmax(row[subset].abs(), 0) * row[subset]).sum() for subset in subsets]
        for row in scores
    ]
    return torch.stack([torch.stack(row) for row in rows])


def test_golden_number() -> None:
    pooled = attention_pool(torch.tensor([[-3.0, 1.0, 0.5]]), members_of([0, 1, 2], pool_size=3))
    # (e^3 * -3 + e * 1 + e^.5 * .5) / (e^3 + e + e^.5); softmax of s itself would give 0.77.
    assert pooled.item() == pytest.approx(-2.3193, abs=1e-4)


def test_all_subsets_at_once_equal_one_at_a_time() -> None:
    rng = np.random.default_rng(0)
    scores = torch.from_numpy(rng.normal(0, 4, (5, 20)))
    subsets = [sorted(rng.choice(20, size, replace=False)) for size in (1, 3, 7, 20)]
    members = members_of(*subsets, pool_size=20)
    assert torch.allclose(attention_pool(scores, members), by_definition(scores, subsets))


def test_a_row_that_occurs_twice_counts_twice() -> None:
    scores = torch.tensor([[1.0, -2.0, 3.0]])
    twice = attention_pool(scores, members_of([0, 1, 1], pool_size=3))
    written_out = attention_pool(
        torch.tensor([[1.0, -2.0, -2.0]]), members_of([0, 1, 2], pool_size=3)
    )
    assert torch.allclose(twice, written_out)


@pytest.mark.parametrize("gap", [30.0, 60.0, 90.0, 200.0, 1e4])
def test_a_subset_far_below_the_largest_score_is_exact(gap: float) -> None:
    scores = torch.tensor([[gap, -3.0, 1.0, 0.5], [0.1, -gap, gap, gap]])
    subsets = [[1, 2, 3], [0, 1, 2, 3], [3, 3, 2]]
    pooled = attention_pool(scores, members_of(*subsets, pool_size=4))
    assert torch.allclose(pooled.double(), by_definition(scores.double(), subsets), rtol=1e-6)
    assert pooled[0, 0].item() == pytest.approx(-2.3193, abs=1e-4)


@pytest.mark.parametrize("largest", [2.0, 200.0])
def test_gradient(largest: float) -> None:
    scores = torch.tensor([[largest, -3.0, 1.0, 0.5], [0.3, 1.0, -2.0, 0.7]], dtype=torch.float64)
    members = members_of([1, 2, 3], [0, 1], [3, 3, 2], pool_size=4)
    assert torch.autograd.gradcheck(lambda s: attention_pool(s, members), scores.requires_grad_())


def test_products_with_memberships_add_up_scores() -> None:
    members = members_of([2, 0, 2], [1], pool_size=3)
    assert members.subset_count == 2
    assert members.subset(0).tolist() == [2, 0, 2]
    # The matrix of counts, from the scores of one pool row at a time.
    assert (torch.eye(3) @ members).tolist() == [[1, 0], [0, 1], [2, 0]]
    scores = torch.tensor([[1.0, 10.0, 100.0], [2.0, 20.0, 200.0]])
    assert (scores @ members).tolist() == [[201.0, 10.0], [402.0, 20.0]]


@given(
    st.integers(1, 30),
    st.lists(st.lists(st.integers(0, 29), min_size=1, max_size=8), min_size=1, max_size=6),
    st.integers(1, 40),
)
def test_blocks_hold_every_membership_once(
    pool_size: int, drawn: list[list[int]], height: int
) -> None:
    subsets = [[row % pool_size for row in subset] for subset in drawn]
    counts = np.zeros((pool_size, len(subsets)))
    for column, subset in enumerate(subsets):
        np.add.at(counts, (subset, column), 1)
    by_subset, by_row = np.zeros_like(counts), np.zeros_like(counts)
    members = members_of(*subsets, pool_size=pool_size)
    for block in members.blocks(height, torch.device("cpu")):
        rows = counts[block.pool_rows]
        assert 0 < len(rows) <= height
        by_subset[block.pool_rows] = block.by_subset.sum(torch.eye(len(rows))).T
        by_row[block.pool_rows] = block.by_row.sum(torch.eye(len(subsets)))
    np.testing.assert_array_equal(by_subset, counts)
    np.testing.assert_array_equal(by_row, counts)


def test_mean_pool_ignores_padding() -> None:
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [99.0, 99.0]], [[5.0, 6.0]] * 3])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert mean_pool(hidden, mask).tolist() == [[2.0, 3.0], [5.0, 6.0]]


def test_errors() -> None:
    with pytest.raises(InputError, match=r"Subset 1 has row 3, outside the pool of 3"):
        members_of([0], [3], pool_size=3)
    with pytest.raises(InputError, match="There are no subsets; give at least one array"):
        members_of(pool_size=3)
    with pytest.raises(InputError, match="Subset 1 is empty; give it at least one pool row"):
        members_of([0], [], pool_size=3)
    with pytest.raises(InputError, match=r"shape \(1, 2\) .* a pool of 3; give scores \(targets"):
        attention_pool(torch.ones(1, 2), members_of([0, 2], pool_size=3))
