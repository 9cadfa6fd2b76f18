"""Rescaled influence through the last layer: what an example's own leverage hides is put back."""

import numpy as np

from airrep.attributors.influence import InfluenceAttributor


class RescaledInfluenceAttributor(InfluenceAttributor):
    """score(x, z) = the nats that x's loss rises by when z is left out, by z's own Newton step.

    Influence takes the Hessian of the whole pool, which z itself has stiffened; here z is taken
    out of it (arXiv 2506.06656; for several classes as in `airrep.gradients.linear_influence`).
    The larger an example's leverage, the more influence misses. What the features are, what pools
    it is for and what it raises: see `InfluenceAttributor`. Subset scores are sums.
    """

    name = "rescaled_influence"

    def _pool_residuals(self) -> np.ndarray:
        return self.influence_.rescaled_residuals
