"""Objectives: how far predicted subset scores are from subset labels.

All take predicted (T, M), labels (T, M) and optional target weights (T,), and return a scalar to
minimise. A label that is not finite is missing. A target whose labels do not vary carries no
signal and is left out; when no target is left, the loss is 0 with a zero gradient.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch.nn.functional import softplus
from torch.utils.checkpoint import checkpoint

from airrep.examples import InputError

LABEL_CLIP = 10.0
# Pairs of subsets held at once; more targets than fit are taken in blocks and recomputed.
PAIR_BLOCK = 2**25

Objective = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


def standardise_labels(losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Labels (T, M) float32 from losses (T, M): -(loss - mean) / std, clipped to [-10, 10].

    Mean and (population) standard deviation are each target's own. Losses that are not finite
    stay missing (NaN). Also returns which targets are kept, (T,) bool: one without spread, or
    with fewer than two losses, carries no signal and its labels are all NaN.
    """
    losses = np.asarray(losses, dtype=np.float64)
    present = np.isfinite(losses)
    counts = present.sum(axis=1)
    known = np.where(present, losses, 0.0)
    mean = known.sum(axis=1) / np.maximum(counts, 1)
    centred = np.where(present, losses - mean[:, None], 0.0)
    std = np.sqrt((centred**2).sum(axis=1) / np.maximum(counts, 1))
    # A spread within float32 rounding is no spread: the losses were stored as float32.
    kept = (counts >= 2) & (std > np.finfo(np.float32).eps * np.abs(known).max(axis=1, initial=0))
    labels = -centred / np.where(kept, std, 1.0)[:, None]
    labels = np.where(present & kept[:, None], np.clip(labels, -LABEL_CLIP, LABEL_CLIP), np.nan)
    return labels.astype(np.float32), kept


def correlation(
    predicted: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """1 - Pearson's r between predicted and labels over the subsets, mean over targets.

    A target whose predictions do not vary counts r = 0, with a zero gradient.
    """
    _check_shapes(predicted, labels, weights)
    present = labels.isfinite()
    labels, labels_flat = _centre(labels.to(predicted), present)
    predicted, predicted_flat = _centre(predicted, present)
    flat = labels_flat | predicted_flat
    norm = torch.sqrt(
        predicted.square().sum(dim=1).masked_fill(flat, 1.0)
        * labels.square().sum(dim=1).masked_fill(flat, 1.0)
    )
    r = (predicted * labels).sum(dim=1).masked_fill(flat, 0.0) / norm  # (T,)
    return _target_mean(1 - r, _weights(labels_flat, weights, predicted.dtype))


def pairwise_ranking(
    predicted: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor | None = None,
    t_min: float = 0.1,
    t_max: float = 5.0,
) -> torch.Tensor:
    """The ranking loss of AirRep (arXiv 2505.18513, section 3.3).

    Every pair of subsets with label_i > label_j adds w_ij log(1 + exp(-(f_i - f_j))), where w_ij
    is 0 for differences below `t_min`, else the difference, at most `t_max`; the sum over all
    pairs of all targets is divided by the sum of the weights.
    """
    _check_shapes(predicted, labels, weights)

    def block(predicted: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        difference = labels.unsqueeze(2) - labels.unsqueeze(1)  # (T, M, M), NaN where missing
        strength = difference.clamp(max=t_max).where(difference >= max(t_min, 0.0), 0.0)
        strength = strength.where(difference > 0, 0.0)
        wrong = softplus(predicted.unsqueeze(1) - predicted.unsqueeze(2))
        return torch.stack([(strength * wrong).sum(dim=(1, 2)), strength.sum(dim=(1, 2))], dim=1)

    labels = labels.to(predicted).where(labels.isfinite(), torch.nan)
    losses, strengths = _by_blocks(block, predicted, labels).unbind(dim=1)  # (T,), (T,)
    scale = _weights(torch.zeros_like(strengths, dtype=torch.bool), weights, predicted.dtype)
    total = (scale * strengths).sum()
    return (scale * losses).sum() / total.where(total > 0, 1.0)


def soft_spearman(
    predicted: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor | None = None,
    temperature: float = 0.2,
) -> torch.Tensor:
    """1 - Spearman's rho with a smooth rank of the predictions, mean over targets.

    The smooth rank of f_i is sum_j sigmoid((f_i - f_j) / tau) (Qin, Liu and Li, "A general
    approximation framework for direct optimization of information retrieval measures", 2010,
    equation 11), tau being `temperature` times the standard deviation of the target's
    predictions, so that their scale does not matter. It tends to the rank as tau goes to 0.
    Labels have their exact ranks, ties averaged.
    """
    _check_shapes(predicted, labels, weights)
    present = labels.isfinite()
    centred, flat = _centre(predicted, present)
    variance = centred.square().sum(dim=1) / present.sum(dim=1).clamp(min=1)
    scaled = centred / (temperature * torch.sqrt(variance.masked_fill(flat, 1.0)).unsqueeze(1))

    def smooth_ranks(scaled: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        above = torch.sigmoid(scaled.unsqueeze(2) - scaled.unsqueeze(1))
        return (above * present.unsqueeze(1)).sum(dim=2)

    ranks = _by_blocks(smooth_ranks, scaled, present.to(predicted.dtype))
    return correlation(ranks, _average_ranks(labels, present).to(predicted), weights)


OBJECTIVES: dict[str, Objective] = {
    "correlation": correlation,
    "pairwise_ranking": pairwise_ranking,
    "soft_spearman": soft_spearman,
}


def make_objective(name: str) -> Objective:
    """The objective of that name; InputError for an unknown one."""
    if name not in OBJECTIVES:
        raise InputError(f"There is no objective {name!r}; choose one of {', '.join(OBJECTIVES)}.")
    return OBJECTIVES[name]


def _centre(values: torch.Tensor, present: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows minus their mean over what is present, 0 elsewhere; and which rows do not vary."""
    values = values.where(present, 0.0)
    counts = present.sum(dim=1, keepdim=True).clamp(min=1)
    centred = (values - values.sum(dim=1, keepdim=True) / counts).where(present, 0.0)
    rounding = 4 * torch.finfo(values.dtype).eps * values.detach().abs().amax(dim=1)
    return centred, centred.detach().abs().amax(dim=1) <= rounding


def _average_ranks(labels: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """Ranks from 1 of the labels that are present, ties averaged, NaN elsewhere."""
    labels = labels.where(present, torch.inf)  # missing ones sort last and change no other rank
    ordered = labels.sort(dim=1).values.contiguous()
    below = torch.searchsorted(ordered, labels.contiguous())
    not_above = torch.searchsorted(ordered, labels.contiguous(), right=True)
    return ((below + not_above + 1) / 2).where(present, torch.nan)


def _by_blocks(
    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    a: torch.Tensor,
    b: torch.Tensor,
) -> torch.Tensor:
    """`function` of the rows of a and b (T, M), in blocks when its (T, M, M) is too large."""
    rows = max(1, PAIR_BLOCK // max(1, a.shape[1] ** 2))
    if rows >= len(a):
        return function(a, b)
    return torch.cat(
        [
            checkpoint(
                function, a[start : start + rows], b[start : start + rows], use_reentrant=False
            )
            for start in range(0, len(a), rows)
        ]
    )


def _weights(
    left_out: torch.Tensor, weights: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    given = torch.ones_like(left_out, dtype=dtype) if weights is None else weights.to(dtype)
    return given.masked_fill(left_out, 0.0)


def _target_mean(losses: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    total = weights.sum()
    return (weights * losses).sum() / total.where(total > 0, 1.0)


def _check_shapes(
    predicted: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None
) -> None:
    if predicted.ndim != 2 or predicted.shape != labels.shape:
        raise InputError(
            f"Predictions have shape {tuple(predicted.shape)}, labels {tuple(labels.shape)}; "
            "both must be (targets, subsets)."
        )
    if weights is not None and weights.shape != predicted.shape[:1]:
        raise InputError(
            f"Target weights have shape {tuple(weights.shape)} for {len(predicted)} targets; "
            "give one number a target."
        )
