"""What leaving examples out does to a linear head: influence, rescaled influence, Newton step.

All of them estimate weights after refitting minus weights now, flat (c d,), from one Hessian H
of the whole fit. `counts` (n,) says how often each example is in the refit: 1 as now, 0 left
out. With g_i the gradient of an example's loss, A_i its curvature by the logits and x_i its
features, and T the examples left out:

- influence: H^-1 sum_T g_i.
- rescaled influence (arXiv 2506.06656): each example's own Newton step, added up. For one logit
  that is influence / (1 - h_i) with the leverage h_i = a_i x_i^T H^-1 x_i; for more the residual
  r_i is replaced by (I - A_i B_i)^-1 r_i, B_i (c, c) being x_i^T H^-1 x_i in each block of H^-1.
- Newton step: (H - sum_T A_i (x) x_i x_i^T)^-1 sum_T g_i, by the refit's own Hessian at the weights
  there are. For a single example it is the rescaled influence.
"""

from collections.abc import Iterator
from functools import cached_property

import numpy as np
from scipy.linalg import cho_solve, solve

from airrep.gradients.linear_head import LinearHead, blocks, factor_hessian, outer


class HeadInfluence:
    """The three estimates for a head and the examples (n, d), (n,) it was fitted on."""

    def __init__(self, head: LinearHead, features: np.ndarray, labels: np.ndarray) -> None:
        self.head = head
        self.features = features
        self.residuals = head.residuals(features, labels)
        self.factor = factor_hessian(head.hessian(features))

    def solve(self, vectors: np.ndarray) -> np.ndarray:
        """H^-1 times each row of (m, c d)."""
        return cho_solve(self.factor, vectors.T).T

    def influence(self, counts: np.ndarray) -> np.ndarray:
        """Change (c d,) of the weights to first order."""
        return self.solve(self._total(self.residuals, counts)[None])[0]

    def rescaled_influence(self, counts: np.ndarray) -> np.ndarray:
        """Change (c d,): the sum of single examples' Newton steps."""
        return self.solve(self._total(self.rescaled_residuals, counts)[None])[0]

    def newton_step(self, counts: np.ndarray) -> np.ndarray:
        """Change (c d,): one Newton step from the head towards the refit's minimum."""
        changed = np.flatnonzero(counts != 1)
        # Solving for the group's columns costs 2 (c d)^2 per column, a new factor (c d)^3 / 3.
        few = 6 * len(changed) < self.features.shape[1]
        return self._woodbury(changed, counts) if few else self._dense(counts)

    def leverages(self) -> np.ndarray:
        """Block leverages A_i B_i (n, c, c); their traces add up to tr((H - l2 I) H^-1)."""
        return np.concatenate(list(self._leverage_blocks()))

    @cached_property
    def rescaled_residuals(self) -> np.ndarray:
        """(I - A_i B_i)^-1 r_i, (n, c): what each residual is with the example left out."""
        rescaled = np.empty_like(self.residuals)
        unit = np.eye(self.residuals.shape[1])
        start = 0
        for block in self._leverage_blocks():
            rows = slice(start, start + len(block))
            own = self.residuals[rows, :, None]
            rescaled[rows] = np.linalg.solve(unit - block, own)[:, :, 0]
            start += len(block)
        return rescaled

    def loss_changes(self, gradients: np.ndarray, residuals: np.ndarray) -> np.ndarray:
        """Nats (T, n) that targets' losses rise by when each example alone is left out.

        Takes targets' gradients (T, c d), and `residuals` for influence or `rescaled_residuals`
        for the Newton step of each example. First order in the targets' loss.
        """
        solved = self.solve(gradients)
        changes = np.empty((len(gradients), len(residuals)))
        for rows in blocks(len(residuals), gradients.shape[1]):
            changes[:, rows] = solved @ outer(residuals[rows], self.features[rows]).T
        return changes

    def _total(self, residuals: np.ndarray, counts: np.ndarray) -> np.ndarray:
        return ((residuals * (1 - counts)[:, None]).T @ self.features).ravel()

    def _leverage_blocks(self) -> Iterator[np.ndarray]:
        """`leverages` of some rows after the other."""
        c, d = self.head.weights.shape
        inverse = self.solve(np.eye(c * d)).reshape(c, d, c, d)
        for rows in blocks(len(self.features), c * c):
            x = self.features[rows]
            seen = np.empty((len(x), c, c))
            for a in range(c):
                for b in range(a + 1):
                    seen[:, a, b] = seen[:, b, a] = ((x @ inverse[a, :, b]) * x).sum(axis=1)
            yield self.head.curvatures(x) @ seen

    def _woodbury(self, changed: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """(H - U D U^T)^-1 U r = H^-1 U (I - D U^T H^-1 U)^-1 r, with U of m c columns."""
        m, c = len(changed), self.residuals.shape[1]
        x, share = self.features[changed], (1 - counts)[changed]
        columns = outer(np.tile(np.eye(c), (m, 1)), np.repeat(x, c, axis=0))
        solved = self.solve(columns)
        between = (solved @ columns.T).reshape(m, c, m * c)
        scaled = share[:, None, None] * self.head.curvatures(x) @ between
        right = (share[:, None] * self.residuals[changed]).ravel()
        return solve(np.eye(m * c) - scaled.reshape(m * c, m * c), right) @ solved

    def _dense(self, counts: np.ndarray) -> np.ndarray:
        kept = np.flatnonzero(counts)
        hessian = self.head.hessian(self.features[kept], counts[kept])
        return cho_solve(factor_hessian(hessian), self._total(self.residuals, counts))
