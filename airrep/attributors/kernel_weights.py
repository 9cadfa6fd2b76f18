"""Weights of kernels that depend on the target, learned from labels."""

import numpy as np
import torch

from airrep.metrics import lds_per_target
from airrep.objectives import correlation

RATE, STEPS, EVERY = 0.01, 200, 5  # of Adam, over all labels at once
START = 0.1  # of each kernel's weight, for every target


def learn_weights(
    trained: tuple[np.ndarray, np.ndarray, np.ndarray],
    held: tuple[np.ndarray, np.ndarray, np.ndarray] | None,
    penalty: float,
) -> np.ndarray:
    """Weights (kernels, G) whose products with a target's gates (G,) weigh its kernels.

    `trained` are gates (T, G), the first of them 1, the kernels' sums over subsets (kernels, T, M)
    and standardised labels (T, M); `held` are the same of other targets and subsets, with their
    losses, which choose the step (None: the last is taken). Sums are brought to one spread first.
    """
    gates, sums, labels = map(torch.from_numpy, trained)
    units = sums.std(dim=(1, 2))[:, None]
    units = torch.where(units > 0, units, torch.inf)  # a kernel that tells nothing
    weights = torch.zeros(len(sums), gates.shape[1])
    weights[:, 0] = START
    weights.requires_grad_()
    optimizer = torch.optim.Adam([weights], lr=RATE)
    best, best_lds = weights.detach(), -np.inf

    def predict(gates: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
        return torch.einsum("htm,th->tm", sums, gates @ (weights / units).T)

    for step in range(STEPS + 1):
        if held is not None and step % EVERY == 0:
            with torch.no_grad():
                scores = predict(*map(torch.from_numpy, held[:2])).numpy()
            lds = float(lds_per_target(scores, held[2])[0].mean())
            if lds > best_lds:
                best, best_lds = weights.detach().clone(), lds
        loss = correlation(predict(gates, sums), labels)
        loss = loss + penalty * weights[:, 1:].square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return ((weights.detach() if held is None else best) / units).numpy()
