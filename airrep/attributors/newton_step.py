"""Newton step through the last layer: a subset is scored as a whole, not as a sum."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import numpy as np
from numpy.typing import ArrayLike

from airrep.attributor import POOLINGS, check_subsets
from airrep.attributors.rescaled_influence import RescaledInfluenceAttributor
from airrep.examples import Example


@dataclass(eq=False, repr=False)
class NewtonStepAttributor(RescaledInfluenceAttributor):
    """Single examples score as in `RescaledInfluenceAttributor`, subsets by their own Newton step.

    The score of a subset is the nats that a target's loss under one Newton step from the pool's
    head to the subset's lies below its loss under the pool's head (mostly negative: less data). It
    is not additive: that is the pooling "step"; "sum" and "attention" pool single scores as with
    any method.
    """

    name = "newton_step"
    poolings = ("step", *POOLINGS)

    _: KW_ONLY
    pooling: str = "step"

    def score_subsets(
        self,
        targets: Sequence[Example],
        subsets: Sequence[ArrayLike],
        scores: np.ndarray | None = None,
    ) -> np.ndarray:
        """Scores (targets, subsets), float32; see the class."""
        if self.pooling != "step":
            return super().score_subsets(targets, subsets, scores)
        self._check_fitted()
        rows = check_subsets(subsets, self.pool_size_)
        features, labels, known = self._targets(targets)
        head = self.influence_.head
        steps = (
            self.influence_.newton_step(np.bincount(subset, minlength=self.pool_size_))
            for subset in rows
        )
        losses = np.stack([head.moved(step).losses(features, labels) for step in steps], axis=1)
        falls = head.losses(features, labels)[:, None] - losses
        return (falls * known[:, None]).astype(np.float32)
