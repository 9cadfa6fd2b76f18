"""Pooling: tokens into an embedding, and scores of pool examples into scores of subsets.

Training, evaluation and scoring all pool with `attention_pool`: the published code trains with
softmax of |score| and evaluates with softmax of the score, two different functions.
"""

from collections.abc import Sequence

import numpy as np
import torch

from airrep.examples import InputError

# Below this total, a subset's weights relative to the row's largest score near the smallest
# float32; such a subset is pooled relative to its own largest score instead.
FAINT = 1e-24


def membership(subsets: Sequence[np.ndarray], pool_size: int) -> torch.Tensor:
    """How often each pool row occurs in each subset, (pool, subsets) float32.

    Raises InputError for empty subsets and rows outside the pool.
    """
    members = torch.zeros(pool_size, len(subsets))
    for column, subset in enumerate(subsets):
        rows = np.asarray(subset, dtype=np.int64)
        if rows.size == 0:
            raise InputError(f"Subset {column} is empty; give it at least one pool row.")
        if rows.min() < 0 or rows.max() >= pool_size:
            wrong = rows.min() if rows.min() < 0 else rows.max()
            raise InputError(
                f"Subset {column} has row {wrong}, outside the pool of {pool_size}; "
                f"rows go from 0 to {pool_size - 1}."
            )
        counts = np.bincount(rows, minlength=pool_size)
        members[:, column] = torch.from_numpy(counts)
    return members


def attention_pool(scores: torch.Tensor, members: torch.Tensor) -> torch.Tensor:
    """Scores of all subsets at once: sum_i a_i s_i with a = softmax |s| inside the subset.

    Takes scores (T, N) and `membership` counts (N, M), returns (T, M); a row that occurs twice
    in a subset counts twice. The pooling of AirRep (arXiv 2505.18513, section 3.2), written as
    two matrix products. Differentiable in the scores; exact however far apart scores lie.
    Raises InputError for shapes that do not fit and for empty subsets.
    """
    _check_pooled(scores, members)
    scores = scores if scores.dtype == torch.float64 else scores.float()
    members = members.to(scores)
    magnitude = scores.abs()
    weights = torch.exp(magnitude - magnitude.detach().amax(dim=1, keepdim=True))  # (T, N)
    total = weights @ members  # (T, M)
    faint = total.detach() < FAINT
    pooled = ((weights * scores) @ members) / total.masked_fill(faint, 1.0)
    return _repool(pooled, scores, members, faint) if faint.any() else pooled


def mean_pool(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean (B, d) of the hidden states (B, L, d) of the tokens in mask (B, L); 0 without any."""
    weights = mask.to(hidden.dtype).unsqueeze(1)  # (B, 1, L)
    return (weights @ hidden).squeeze(1) / weights.sum(dim=2).clamp(min=1)


def _repool(
    pooled: torch.Tensor, scores: torch.Tensor, members: torch.Tensor, faint: torch.Tensor
) -> torch.Tensor:
    """`pooled` with its faint entries replaced by a softmax over the subset's own rows."""
    targets, columns, values = [], [], []
    for column in faint.any(dim=0).nonzero().flatten().tolist():
        rows = faint[:, column].nonzero().flatten()
        subset = members[:, column].nonzero().flatten()
        inside = scores[rows][:, subset]  # (faint targets, subset)
        # A count c multiplies a weight by c, which adds log c to its exponent.
        attention = torch.softmax(inside.abs() + members[subset, column].log(), dim=1)
        targets.append(rows)
        columns.append(torch.full_like(rows, column))
        values.append((attention * inside).sum(dim=1))
    return pooled.index_put((torch.cat(targets), torch.cat(columns)), torch.cat(values))


def _check_pooled(scores: torch.Tensor, members: torch.Tensor) -> None:
    if scores.ndim != 2 or members.ndim != 2 or scores.shape[1] != members.shape[0]:
        raise InputError(
            f"Scores have shape {tuple(scores.shape)} and memberships {tuple(members.shape)}; "
            "give (targets, pool) and (pool, subsets)."
        )
    empty = (members.sum(dim=0) <= 0).nonzero().flatten()
    if len(empty):
        raise InputError(f"Subset {int(empty[0])} is empty; give it at least one pool row.")
