"""Grad-Dot: products of the gradients of a target's loss and a pool example's."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from airrep.attributor import pack_text, unpack_text
from airrep.attributors.gradient import Arrays, FeatureAttributor
from airrep.attributors.language_model import restore_tokens, tokens_state
from airrep.examples import Example
from airrep.gradients.exact import exact_products


@dataclass(eq=False, repr=False)
class GradDotAttributor(FeatureAttributor):
    """score(x, z) = <G(x), G(z)>, of summed response losses, over the chosen layers' weights.

    With `projection_rank` None products are exact: nothing is stored but the pool's tokens, and
    every call of `score` runs the pool backward once for each batch of targets. With a rank they
    are of random projections, which are kept.
    """

    name = "grad_dot"
    cosine: ClassVar[bool] = False

    _: KW_ONLY
    projection_rank: int | None = None

    @property
    def fits_late(self) -> bool:
        return self.projection_rank is None

    def _fit(self, pool: Sequence[Example]) -> None:
        if self.projection_rank is not None:
            super()._fit(pool)
            return
        self.features_ = []
        draws = zip(self._draws(), self._weights(), strict=True)
        self.lms_ = [self._open(checkpoint).fingerprint for (checkpoint, _), _ in draws]
        self.tokens_ = self._tokenize(pool, self._open(self._draws()[-1][0]).tokenizer)

    def _score(self, targets: Sequence[Example]) -> np.ndarray:
        if self.projection_rank is not None:
            return super()._score(targets)
        total = np.zeros((len(targets), len(self.tokens_)), dtype=np.float32)
        parts = zip(self._draws(), self._weights(), self.lms_, strict=True)
        for (checkpoint, _), weight, fingerprint in parts:
            total += np.float32(weight) * self._exact(checkpoint, fingerprint, targets)
        return total

    def _exact(
        self, checkpoint: str | Path, fingerprint: str, targets: Sequence[Example]
    ) -> np.ndarray:
        # By itself, so that one checkpoint is let go of before the next is opened.
        opened = self._open(checkpoint)
        self._check_same(opened, fingerprint)
        tokens = self._tokenize(targets, opened.tokenizer)
        with self._gradient_model(opened) as model:
            return exact_products(model, tokens, self.tokens_, self._batches, self.cosine)

    def _state(self) -> Arrays:
        if self.projection_rank is not None:
            return super()._state()
        return {"lms": pack_text(self.lms_), **tokens_state(self.tokens_)}

    def _restore(self, state: Arrays) -> None:
        if self.projection_rank is not None:
            super()._restore(state)
            return
        self.features_ = []
        self.lms_ = unpack_text(state["lms"])
        self.tokens_ = restore_tokens(state)
