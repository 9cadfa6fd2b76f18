"""Attention pooling of embeddings in bounded memory: no score outlives its block.

Blocks of scores (pool rows x targets) are folded into running sums whose weights are relative to
the largest score so far, as flash attention does (Dao et al., arXiv 2205.14135); the backward
pass makes every block again.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from airrep.examples import InputError
from airrep.pooling import FAINT, MemberBlock, Membership, softmax_pool

MAX_BYTES = 2**26  # larger blocks are no faster
NUMBERS_A_CELL = 8  # that live at once, a target and pool row, or target and subset, of a block
WIDTH = 256  # most targets of a block: more make its matrix products no faster
HEIGHT = 4096  # fewest pool rows of a block


def attention_pool_embeddings(
    targets: torch.Tensor, pool: torch.Tensor, members: Membership, max_bytes: int = MAX_BYTES
) -> torch.Tensor:
    """`attention_pool` (T, M) of the scores targets @ pool.T, of embeddings (T, d) and (N, d).

    Differentiable in both, once. Beside tensors of the inputs' and the result's size it needs
    `max_bytes`, or what a block of one target takes if that is more (about 100 bytes a subset, or
    a quarter of a megabyte); the bound changes nothing but rounding. Raises InputError for shapes
    that do not fit.
    """
    if targets.ndim != 2 or pool.ndim != 2 or targets.shape[1] != pool.shape[1]:
        raise InputError(
            f"Embeddings have shapes {tuple(targets.shape)} and {tuple(pool.shape)}; "
            "give (targets, d) and (pool, d)."
        )
    if len(pool) != members.pool_size:
        raise InputError(
            f"There are {len(pool)} embeddings of the pool and memberships of a pool of "
            f"{members.pool_size}; give both for the same pool."
        )
    if torch.float64 not in (targets.dtype, pool.dtype):
        targets, pool = targets.float(), pool.float()
    return _AttentionPool.apply(targets, pool, members, max_bytes)


class _AttentionPool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, targets: torch.Tensor, pool: torch.Tensor, members: Membership, max_bytes: int
    ) -> torch.Tensor:
        width, height = _block_shape(len(targets), members.subset_count, max_bytes, targets.dtype)
        blocks = members.blocks(height, pool.device)
        pooled = targets.new_empty(len(targets), members.subset_count)
        total = torch.empty_like(pooled)
        peak = targets.new_empty(len(targets))
        for own in _slices(len(targets), width):
            sums, peak[own] = _running_sums(targets[own], pool, blocks, members.subset_count)
            total[own] = sums[:, 0].T
            pooled[own] = sums[:, 1].T / sums[:, 0].T
        for some, column, rows in _faint(total, members, width * height):
            pooled[some, column] = softmax_pool(targets[some] @ pool[rows].T)
        ctx.save_for_backward(targets, pool, pooled, total, peak)
        ctx.members, ctx.blocks, ctx.shape = members, blocks, (width, height)
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, given: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        targets, pool, pooled, total, peak = ctx.saved_tensors
        width, height = ctx.shape
        to_targets, to_pool = torch.zeros_like(targets), torch.zeros_like(pool)
        for own in _slices(len(targets), width):
            share = (given[own] / total[own]).masked_fill_(total[own] < FAINT, 0.0)
            shares = torch.stack([share.T, (share * pooled[own]).T], dim=1)  # (M, 2, T)
            for block in ctx.blocks:
                rows = block.pool_rows
                to_scores = _score_gradient(targets[own], pool[rows], peak[own], block, shares)
                to_pool[rows].addmm_(to_scores, targets[own])
                to_targets[own].addmm_(to_scores.T, pool[rows])
        for some, column, rows in _faint(total, ctx.members, width * height):
            leaves = [part.requires_grad_() for part in (targets[some], pool[rows])]
            with torch.enable_grad():
                value = softmax_pool(leaves[0] @ leaves[1].T)
            gradients = torch.autograd.grad(value, leaves, given[some, column])
            to_targets.index_add_(0, some, gradients[0])
            to_pool.index_add_(0, rows, gradients[1])
        return to_targets, to_pool, None, None


def _block_shape(
    target_count: int, subset_count: int, max_bytes: int, dtype: torch.dtype
) -> tuple[int, int]:
    """Targets and pool rows of a block."""
    cells = max_bytes // (NUMBERS_A_CELL * dtype.itemsize)
    # A block adds to the sums of every subset, which should cost no more than its scores.
    least = max(HEIGHT, subset_count)
    width = max(1, min(target_count, WIDTH, cells // (least + subset_count)))
    return width, max(least, cells // width - subset_count)


def _slices(count: int, size: int) -> Iterator[slice]:
    return (slice(first, first + size) for first in range(0, count, size))


def _running_sums(
    targets: torch.Tensor, pool: torch.Tensor, blocks: list[MemberBlock], subset_count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums (M, 2, T) of w and w s inside each subset, w = exp(|s| - peak), and peaks (T,)."""
    sums = targets.new_zeros(subset_count, 2, len(targets))
    peak = targets.new_zeros(len(targets))
    for block in blocks:
        scores = pool[block.pool_rows] @ targets.T  # (rows, T)
        magnitude = scores.abs()
        higher = torch.maximum(peak, magnitude.amax(dim=0))
        terms = torch.empty(len(scores), 2, len(targets), dtype=scores.dtype, device=scores.device)
        weights = torch.exp(magnitude.sub_(higher), out=terms[:, 0])
        torch.mul(weights, scores, out=terms[:, 1])
        sums *= torch.exp(peak - higher)
        sums += block.by_subset.sum(terms.flatten(1)).view_as(sums)
        peak = higher
    return sums, peak


def _score_gradient(
    targets: torch.Tensor,
    pool: torch.Tensor,
    peak: torch.Tensor,
    block: MemberBlock,
    shares: torch.Tensor,
) -> torch.Tensor:
    """The gradient (rows, T) of a block's scores.

    df_j / ds_i = w_i / total_j (1 + sign(s_i) (s_i - f_j)); `shares` (M, 2, T) are the gradient of
    f_j over total_j, and that times f_j.
    """
    scores = pool @ targets.T
    own, by_pooled = block.by_row.sum(shares.flatten(1)).view(len(pool), 2, -1).unbind(dim=1)
    magnitude = scores.abs()
    # Large scores leave in the difference before the small 1 comes in.
    slope = (own * magnitude).addcmul_(scores.sign_(), by_pooled, value=-1.0).add_(own)
    return slope.mul_(magnitude.sub_(peak).exp_())


def _faint(
    total: torch.Tensor, members: Membership, cells: int
) -> Iterator[tuple[torch.Tensor, int, torch.Tensor]]:
    """Targets, subset and its pool rows where `total` (T, M) is faint, some targets at a time."""
    faint = total < FAINT
    for column in faint.any(dim=0).nonzero().flatten().tolist():
        rows = members.subset(column).to(faint.device)
        for some in faint[:, column].nonzero().flatten().split(max(1, cells // len(rows))):
            yield some, column, rows
