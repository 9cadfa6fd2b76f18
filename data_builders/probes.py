"""Whether an engine computes what the plain model does: tried on the longest examples."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from airrep.examples import InputError, TokenizedExample
from airrep.lm import mean_by_row
from airrep.response_batch import ResponseBatch, response_batch
from data_builders.stacked import Stack

TOLERANCE = 1e-3  # of a probe's loss, between an engine and the plain model
PROBES = 4


class Probes:
    """The longest examples, where an engine would go wrong first."""

    def __init__(
        self,
        model: nn.Module,
        examples: Sequence[TokenizedExample],
        token_losses: Callable[[np.ndarray, ResponseBatch], torch.Tensor],
    ) -> None:
        """`token_losses` gives the token losses (K, R) of a batch of rows of the examples."""
        self.model = model
        self.examples = examples
        self.token_losses = token_losses
        self.device = next(model.parameters()).device
        self.rows = np.argsort([-len(example) for example in examples], kind="stable")[:PROBES]

    def check_packing(self) -> None:
        """Raises InputError unless packed rows give the losses of padded ones; not all models can
        tell examples in a row apart, or look as far back as the longest row is."""
        if not _same(self._losses([self.rows]), self._losses([self.rows], packs=True)):
            raise InputError(f"{self._name} cannot take packed rows; each example has its own.")

    def stack(self) -> Stack:
        """The model's stack; raises InputError where it would not compute the same."""
        groups = [self.rows[:1], self.rows[1:]] if len(self.rows) > 1 else [self.rows]
        alone = torch.cat([self._losses([group]) for group in groups])
        stack = Stack(self.model)
        stack.reset(len(groups))
        if _same(alone, self._losses(groups)):
            return stack
        stack.close()
        raise InputError(f"{self._name} does not compute the same in a stack.")

    @torch.no_grad()
    def _losses(self, groups: Sequence[np.ndarray], packs: bool = False) -> torch.Tensor:
        """Mean losses (n,) of the examples of all groups, each group under a model of its own."""
        examples = [[self.examples[row] for row in group] for group in groups]
        batch = response_batch(examples, 2 * len(examples[0][0]) if packs else None)
        batch, rows = batch.to(self.device), np.concatenate(groups)
        losses = self.token_losses(rows, batch)
        return mean_by_row(losses, batch.rows, len(rows)).nansum(dim=0)

    @property
    def _name(self) -> str:
        model: Any = self.model
        return type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__


def _same(losses: torch.Tensor, others: torch.Tensor) -> bool:
    return bool(((losses - others).abs() < TOLERANCE * losses.abs()).all())
