"""Pooling: tokens into an embedding, and scores of pool examples into scores of subsets.

Training, evaluation and scoring all pool by the formula of `attention_pool`: the published code
trains with softmax of |score| and evaluates with softmax of the score, two different functions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import embedding_bag

from airrep.examples import InputError

# Below this total, a subset's weights relative to the row's largest score near the smallest
# float32; such a subset is pooled relative to its own largest score instead.
FAINT = 1e-24


class Lists(NamedTuple):
    """Lists of rows of a matrix, one after the other."""

    rows: torch.Tensor
    starts: torch.Tensor  # where each list begins

    def sum(self, matrix: torch.Tensor) -> torch.Tensor:
        """The sum (lists, columns) of the rows of `matrix` in each list; 0 for an empty one."""
        return embedding_bag(self.rows, matrix, self.starts, mode="sum")


class MemberBlock(NamedTuple):
    """The memberships of a run of pool rows, seen from both sides."""

    pool_rows: slice
    by_subset: Lists  # for each subset, its rows, counted from the run's first
    by_row: Lists  # for each row of the run, its subsets


@dataclass(frozen=True)
class Membership:
    """Which pool rows each subset has: the matrix (pool, subsets) of counts, held as lists.

    Subset j has rows[starts[j]:starts[j + 1]]; a row that occurs twice is listed twice.
    `scores @ members` adds up scores (targets, pool) inside every subset, (targets, subsets).
    """

    rows: np.ndarray
    starts: np.ndarray
    pool_size: int

    @property
    def subset_count(self) -> int:
        """How many subsets there are."""
        return len(self.starts) - 1

    def subset(self, column: int) -> torch.Tensor:
        """The pool rows of one subset."""
        return torch.from_numpy(self.rows[self.starts[column] : self.starts[column + 1]])

    def __rmatmul__(self, scores: torch.Tensor) -> torch.Tensor:
        lists = _lists(self.rows, self.starts, scores.device)
        return lists.sum(scores.T.contiguous()).T

    def blocks(self, height: int, device: torch.device) -> list[MemberBlock]:
        """The memberships by runs of `height` pool rows, without runs that are in no subset."""
        from scipy import sparse

        ones = np.ones(len(self.rows), dtype=np.int8)
        shape = (self.subset_count, self.pool_size)
        # In this form the columns of a run lie together; repeated rows stay repeated.
        by_row = sparse.csr_array((ones, self.rows, self.starts), shape=shape).tocsc()
        blocks = []
        for first in range(0, self.pool_size, height):
            run = slice(first, min(first + height, self.pool_size))
            part = by_row[:, run]
            if part.nnz:
                by_subset = part.tocsr()
                blocks.append(
                    MemberBlock(
                        run,
                        _lists(by_subset.indices, by_subset.indptr, device),
                        _lists(part.indices, part.indptr, device),
                    )
                )
        return blocks


def membership(subsets: Sequence[np.ndarray], pool_size: int) -> Membership:
    """The memberships of `subsets`, each an array of pool rows in which rows may repeat.

    Raises InputError for no subsets, empty subsets and rows outside the pool.
    """
    if len(subsets) == 0:
        raise InputError("There are no subsets; give at least one array of pool rows.")
    arrays = [np.asarray(subset, dtype=np.int64) for subset in subsets]
    for column, rows in enumerate(arrays):
        if rows.size == 0:
            raise InputError(f"Subset {column} is empty; give it at least one pool row.")
        if rows.min() < 0 or rows.max() >= pool_size:
            wrong = rows.min() if rows.min() < 0 else rows.max()
            raise InputError(
                f"Subset {column} has row {wrong}, outside the pool of {pool_size}; "
                f"rows go from 0 to {pool_size - 1}."
            )
    starts = np.cumsum([0, *(len(rows) for rows in arrays)])
    return Membership(np.concatenate(arrays), starts, pool_size)


def attention_pool(scores: torch.Tensor, members: Membership) -> torch.Tensor:
    """Scores of all subsets at once: sum_i a_i s_i with a = softmax |s| inside the subset.

    Takes scores (T, N), returns (T, M); a row that occurs twice in a subset counts twice. The
    pooling of AirRep (arXiv 2505.18513, section 3.2), written as two products with the membership
    matrix. Differentiable in the scores; exact however far apart scores lie. For scores that are
    products of embeddings, `attention_pool_embeddings` does the same in bounded memory.
    Raises InputError for shapes that do not fit.
    """
    if scores.ndim != 2 or scores.shape[1] != members.pool_size:
        raise InputError(
            f"Scores have shape {tuple(scores.shape)} and the memberships are of a pool of "
            f"{members.pool_size}; give scores (targets, pool)."
        )
    scores = scores if scores.dtype == torch.float64 else scores.float()
    magnitude = scores.abs()
    weights = torch.exp(magnitude - magnitude.detach().amax(dim=1, keepdim=True))  # (T, N)
    total = weights @ members  # (T, M)
    faint = total.detach() < FAINT
    pooled = ((weights * scores) @ members) / total.masked_fill(faint, 1.0)
    return _repool(pooled, scores, members, faint) if faint.any() else pooled


def pool_scores(scores: torch.Tensor, members: Membership, pooling: str) -> torch.Tensor:
    """Scores (T, M) of all subsets from scores (T, N), by "attention" or by "sum"."""
    return attention_pool(scores, members) if pooling == "attention" else scores @ members


def softmax_pool(scores: torch.Tensor) -> torch.Tensor:
    """Attention pooling (T,) of the scores (T, n) of one subset, relative to its own largest."""
    return (torch.softmax(scores.abs(), dim=1) * scores).sum(dim=1)


def mean_pool(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean (B, d) of the hidden states (B, L, d) of the tokens in mask (B, L); 0 without any."""
    weights = mask.to(hidden.dtype).unsqueeze(1)  # (B, 1, L)
    return (weights @ hidden).squeeze(1) / weights.sum(dim=2).clamp(min=1)


def _lists(rows: np.ndarray, starts: np.ndarray, device: torch.device) -> Lists:
    """Of lists that end where the next one starts."""
    return Lists(torch.from_numpy(rows).to(device), torch.from_numpy(starts[:-1]).to(device))


def _repool(
    pooled: torch.Tensor, scores: torch.Tensor, members: Membership, faint: torch.Tensor
) -> torch.Tensor:
    """`pooled` with its faint entries replaced by a softmax over the subset's own rows."""
    targets, columns, values = [], [], []
    for column in faint.any(dim=0).nonzero().flatten().tolist():
        rows = faint[:, column].nonzero().flatten()
        targets.append(rows)
        columns.append(torch.full_like(rows, column))
        values.append(softmax_pool(scores[rows][:, members.subset(column)]))
    return pooled.index_put((torch.cat(targets), torch.cat(columns)), torch.cat(values))
