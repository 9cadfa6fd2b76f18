"""TracIn: Grad-Dot, summed over the checkpoints of a training run."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from airrep.attributors.grad_dot import GradDotAttributor
from airrep.attributors.language_model import checked_checkpoints, checked_rates


@dataclass(eq=False, repr=False)
class TracInAttributor(GradDotAttributor):
    """score(x, z) = sum over checkpoints of learning rate x <G(x), G(z)> (arXiv 2002.08484).

    `checkpoints` (None: `lm` alone) have a learning rate each; without `learning_rates` all count
    the same.
    """

    name = "tracin"

    _: KW_ONLY
    checkpoints: Sequence[str | Path] | None = None
    learning_rates: Sequence[float] | None = None

    def _draws(self) -> list[tuple[str | Path, str]]:
        found = checked_checkpoints(self.lm, self.checkpoints)
        return [(checkpoint, f"{self.seed}/0") for checkpoint in found]

    def _weights(self) -> list[float]:
        return checked_rates(len(self._draws()), self.learning_rates)
