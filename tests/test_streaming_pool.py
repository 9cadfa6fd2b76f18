"""Streaming over blocks is attention pooling, values and gradients, and keeps to its memory."""

import weakref
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from airrep.examples import InputError
from airrep.pooling import FAINT, Membership, attention_pool, membership
from airrep.streaming_pool import HEIGHT, attention_pool_embeddings

LEAST = 1  # bytes: blocks of one target and as few pool rows as there can be


def problem(
    targets: int, pool: int, subsets: int, scale: float, seed: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, Membership]:
    """Embeddings with scores of about `scale`, and subsets in which rows repeat."""
    rng = np.random.default_rng(seed)
    embeddings = torch.from_numpy(rng.standard_normal((targets + pool, 3))).to(dtype)
    members = membership([rng.integers(0, pool, rng.integers(1, 20)) for _ in range(subsets)], pool)
    return scale * embeddings[:targets], embeddings[targets:], members


def assert_streaming_is_dense(
    targets: torch.Tensor, pool: torch.Tensor, members: Membership, max_bytes: int, tolerance: float
) -> None:
    """Values and both gradients, within `tolerance` of the largest number."""
    leaves = [part.clone().requires_grad_() for part in (targets, pool)]
    expected = attention_pool(leaves[0] @ leaves[1].T, members)
    found = attention_pool_embeddings(*leaves, members, max_bytes)
    assert found.shape == expected.shape
    weights = torch.linspace(1, 2, expected.numel(), dtype=expected.dtype).view_as(expected)
    pairs = zip(
        (found, *torch.autograd.grad((found * weights).sum(), leaves)),
        (expected, *torch.autograd.grad((expected * weights).sum(), leaves)),
        strict=True,
    )
    for one, other in pairs:
        assert one.isfinite().all()
        assert (one - other).abs().max() <= tolerance * other.abs().max()


@settings(deadline=None, max_examples=40)
@given(
    targets=st.integers(1, 7),
    pool=st.integers(1, 3 * HEIGHT),
    subsets=st.integers(1, 12),
    scale=st.sampled_from([0.1, 3.0, 100.0, 1e4]),
    max_bytes=st.sampled_from([LEAST, 600_000, 2**26]),
    seed=st.integers(0, 2**16),
)
def test_streaming_equals_dense(
    targets: int, pool: int, subsets: int, scale: float, max_bytes: int, seed: int
) -> None:
    inputs = problem(targets, pool, subsets, scale, seed, torch.float64)
    assert_streaming_is_dense(*inputs, max_bytes, tolerance=1e-9)


@pytest.mark.parametrize("max_bytes", [LEAST, 600_000, 2**26])
def test_in_single_precision(max_bytes: int) -> None:
    inputs = problem(6, 2 * HEIGHT + 5, 30, 0.5, 0, torch.float32)
    assert_streaming_is_dense(*inputs, max_bytes, tolerance=1e-6)


def test_golden_number_over_blocks() -> None:
    """Three rows in three blocks, the largest |score| last, so that earlier sums are rescaled."""
    rows = [0, HEIGHT, 2 * HEIGHT]
    pool = torch.zeros(2 * HEIGHT + 1, 1)
    pool[rows, 0] = torch.tensor([0.5, 1.0, -3.0])
    members = membership([np.asarray(rows), np.asarray([0, 0, HEIGHT])], len(pool))
    pooled = attention_pool_embeddings(torch.ones(1, 1), pool, members, LEAST)
    # (e^3 * -3 + e * 1 + e^.5 * .5) / (e^3 + e + e^.5), and (e + 2 e^.5 * .5) / (e + 2 e^.5).
    assert pooled[0].tolist() == pytest.approx([-2.3193, 0.7260], abs=1e-4)


@pytest.mark.parametrize("gap", [30.0, 60.0, 200.0, 1e4])
@pytest.mark.parametrize("max_bytes", [LEAST, 2**26])
def test_a_subset_far_below_the_largest_score_is_exact(gap: float, max_bytes: int) -> None:
    pool = torch.zeros(HEIGHT + 4, 1)
    pool[-4:, 0] = torch.tensor([-3.0, 1.0, 0.5, gap])
    first = HEIGHT
    subsets = [[first, first + 1, first + 2], [first, first + 3], [first + 2, first + 2]]
    members = membership([np.asarray(subset) for subset in subsets], len(pool))
    targets = torch.tensor([[1.0], [-1.0]])
    pooled = attention_pool_embeddings(targets, pool, members, max_bytes)
    assert pooled[:, 0].tolist() == pytest.approx([-2.3193, 2.3193], abs=1e-4)
    assert pooled[:, 1].tolist() == pytest.approx([gap, -gap], rel=1e-6)
    assert pooled[:, 2].tolist() == pytest.approx([0.5, -0.5], rel=1e-6)
    assert_streaming_is_dense(targets, pool, members, max_bytes, tolerance=1e-6)


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_gradient(scale: float) -> None:
    """Against differences; at the larger scale some subsets are pooled relative to their own."""
    targets, pool, members = problem(3, 12, 5, scale, 0, torch.float64)
    scores = (targets @ pool.T).abs()
    total = torch.exp(scores - scores.amax(dim=1, keepdim=True)) @ members
    assert (total < FAINT).any() == (scale > 1)
    leaves = (targets.requires_grad_(), pool.requires_grad_())
    assert torch.autograd.gradcheck(
        lambda *parts: attention_pool_embeddings(*parts, members, LEAST), leaves
    )


def test_half_precision_embeddings_are_pooled_in_single_precision() -> None:
    targets, pool, members = problem(4, 50, 5, 1.0, 0, torch.bfloat16)
    pooled = attention_pool_embeddings(targets, pool, members)
    assert pooled.dtype == torch.float32
    expected = attention_pool(targets.float() @ pool.float().T, members)
    torch.testing.assert_close(pooled, expected)


class Allocations(TorchDispatchMode):
    """The bytes of all tensors made inside that live at once, at most, and of the largest."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: Counter[int] = Counter()  # by storage
        self.live = self.peak = self.largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        made = function(*args, **(kwargs or {}))
        given = {id(part) for part in (*args, *(kwargs or {}).values())}
        for part in made if isinstance(made, list | tuple) else [made]:
            if isinstance(part, torch.Tensor) and id(part) not in given:
                self._count(part)
        return made

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        self.largest = max(self.largest, size)
        self.live += 0 if self.tensors[key] else size
        self.peak = max(self.peak, self.live)
        self.tensors[key] += 1
        weakref.finalize(tensor, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.tensors[key] -= 1
        self.live -= 0 if self.tensors[key] else size


@pytest.mark.parametrize("scale", [0.5, 1e4])
def test_memory_is_bounded(scale: float) -> None:
    targets, pool, members = problem(60, 12_000, 30, scale, 0, torch.float32)
    targets.requires_grad_(), pool.requires_grad_()
    max_bytes = 2**19
    scores = 4 * len(targets) * len(pool)
    result = 4 * len(targets) * members.subset_count
    lists = 2 * 4 * (len(members.rows) + len(pool)) + 8 * len(pool)
    assert scores > 5 * max_bytes
    with Allocations() as streaming:
        pooled = attention_pool_embeddings(targets, pool, members, max_bytes)
        pooled.sum().backward()
    # Gradients, and results with their totals, gradient and what autograd keeps of it.
    own_size = 2 * (targets.nbytes + pool.nbytes) + 4 * result + lists
    assert streaming.largest <= max_bytes
    assert streaming.peak <= max_bytes + own_size


def test_what_counts_memory_sees_all_scores() -> None:
    targets, pool, members = problem(60, 12_000, 30, 0.5, 0, torch.float32)
    with Allocations() as dense:
        attention_pool(targets.requires_grad_() @ pool.T, members).sum().backward()
    assert dense.largest >= 4 * len(targets) * len(pool)
    assert dense.peak >= 3 * dense.largest


def test_errors() -> None:
    _, pool, members = problem(1, 10, 2, 1.0, 0, torch.float32)
    with pytest.raises(InputError, match=r"shapes \(4, 2\) and \(10, 3\); give \(targets, d\)"):
        attention_pool_embeddings(torch.ones(4, 2), pool, members)
    with pytest.raises(InputError, match=r"9 embeddings of the pool and memberships of a pool of"):
        attention_pool_embeddings(torch.ones(4, 3), pool[:9], members)


@pytest.mark.parametrize("rows", [[3, 0, 5, 5, 1], [2]])
def test_subsets_of_one_example_are_its_scores(rows: list[int]) -> None:
    targets, pool, _ = problem(4, 6, 1, 3.0, 0, torch.float64)
    members = membership([np.asarray([row]) for row in rows], len(pool))
    assert_streaming_is_dense(targets, pool, members, LEAST, 1e-12)
    assert torch.equal(attention_pool_embeddings(targets, pool, members), targets @ pool[rows].T)
