"""The frozen lower part of a language model, run once: its activations stand for it afterwards."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from airrep.examples import InputError, TokenizedExample, length_sorted_batches, pad
from airrep.lm import find_blocks
from airrep.response_batch import ResponseBatch, response_batch

BATCH = 32
TOLERANCE = 1e-3
PROBES = 2  # examples the cut model is compared with the whole one on


class Trunk:
    """Cuts a causal LM in place: its first blocks give back activations stored for each example.

    Only the last blocks and the final norm are trained afterwards. Memory: tokens x hidden size
    x 4 bytes.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: int,
        examples: Sequence[TokenizedExample],
        show_progress: bool = False,
    ) -> None:
        """Runs the trunk over the examples and cuts the model above `layers` blocks.

        Raises InputError when the model has too few blocks, or when the cut model does not
        compute what the whole one does (an architecture this does not fit).
        """
        blocks = _blocks(model, layers)
        self.device = next(model.parameters()).device
        self.lengths = np.asarray([len(example) for example in examples])
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths)])
        stored = _StoredActivations(blocks[0])
        probes = examples[:PROBES]
        whole = self._last_logits(model, probes)
        self.activations = self._run(model, blocks, layers, examples, show_progress)
        freeze_below(model, layers)
        # The list keeps its length: masks and rotary tables are looked up by a block's number.
        for number in range(len(blocks) - layers):
            blocks[number] = _Passing(blocks[number]) if number else stored
        self.stored = stored
        self.put(np.arange(len(probes)), response_batch([probes]).to(self.device))
        _check_same(model, whole, self._last_logits(model, probes))

    def put(self, rows: np.ndarray, batch: ResponseBatch) -> None:
        """Sets the activations of the next forward pass, of a batch of the rows' examples."""
        # Padding takes the first token's: no real token looks at it.
        starts = torch.from_numpy(self.offsets[:-1][rows]).to(batch.texts.device)
        places = starts[batch.texts.clamp(min=0)] + batch.offsets
        self.stored.hidden = self.activations[places]

    def _run(
        self,
        model: nn.Module,
        blocks: nn.ModuleList,
        layers: int,
        examples: Sequence[TokenizedExample],
        show_progress: bool,
    ) -> torch.Tensor:
        """Activations (tokens, hidden) that enter the first trained block."""
        caught: list[torch.Tensor] = []

        def catch(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            caught.append(args[0] if args else kwargs["hidden_states"])
            raise _Enough

        total = torch.empty(0)
        batches = length_sorted_batches(self.lengths, BATCH)
        bar = tqdm(total=len(examples), desc="frozen layers", disable=not show_progress)
        hook = blocks[len(blocks) - layers].register_forward_pre_hook(catch, with_kwargs=True)
        try:
            for rows in batches:
                ids, _ = pad([examples[row] for row in rows], pad_id=0)
                caught.clear()
                _forward(model, ids.to(self.device))
                hidden = caught[0]
                if not len(total):
                    total = hidden.new_empty(int(self.offsets[-1]), hidden.shape[-1])
                for row, states in zip(rows, hidden, strict=True):
                    total[self.offsets[row] : self.offsets[row + 1]] = states[: self.lengths[row]]
                bar.update(len(rows))
        finally:
            hook.remove()
            bar.close()
        return total

    def _last_logits(self, model: nn.Module, probes: Sequence[TokenizedExample]) -> torch.Tensor:
        """Logits (probes, vocabulary) behind each probe's last token."""
        ids, _ = pad(probes, pad_id=0)
        logits = _forward(model, ids.to(self.device))
        assert logits is not None
        last = torch.tensor([len(example) - 1 for example in probes])
        return logits[torch.arange(len(probes)), last]


def freeze_below(model: nn.Module, layers: int) -> None:
    """Lets only the last `layers` blocks and the norms outside of blocks train."""
    blocks = _blocks(model, layers)
    model.requires_grad_(False)
    for module in (*blocks[len(blocks) - layers :], *_norms_outside(model, blocks)):
        module.requires_grad_(True)


def _blocks(model: nn.Module, layers: int) -> nn.ModuleList:
    """The model's blocks; raises InputError when `layers` of them cannot be told apart."""
    blocks = find_blocks(model)
    if blocks is None:
        raise InputError(
            f"{type(model).__name__} has no list of its blocks to cut between; "
            'use recipe.train "lora" or "all".'
        )
    if not 1 <= layers <= len(blocks):
        raise InputError(
            f"recipe.layers is {layers}, but {type(model).__name__} has {len(blocks)} blocks; "
            f"give 1 to {len(blocks)}."
        )
    return blocks


class _Enough(Exception):
    """The wanted activations are caught: the rest of the forward pass need not run."""


class _Passing(nn.Module):
    """Stands where a frozen block stood: passes on what it gets."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.attention_type = getattr(block, "attention_type", None)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states


class _StoredActivations(_Passing):
    """Stands where the first block stood: gives the stored activations instead of its input."""

    hidden: torch.Tensor

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.hidden


def _norms_outside(model: nn.Module, blocks: nn.ModuleList) -> list[nn.Module]:
    """The norms that are in no block: the last one, before the head, among them."""
    inside = set(blocks.modules())
    return [
        module
        for module in model.modules()
        if module not in inside and type(module).__name__.lower().endswith("norm")
    ]


@torch.no_grad()
def _forward(model: nn.Module, ids: torch.Tensor) -> torch.Tensor | None:
    try:
        return model(input_ids=ids, use_cache=False).logits
    except _Enough:
        return None


def _check_same(model: nn.Module, whole: torch.Tensor, cut: torch.Tensor) -> None:
    """Raises InputError unless the cut model gives the whole one's logits."""
    worst = float((cut - whole).abs().max() / whole.abs().max())
    if not worst < TOLERANCE:
        raise InputError(
            f"{type(model).__name__} does not compute the same when its lower blocks are "
            f"replaced by stored activations (relative difference {worst:.1e}); "
            'use recipe.train "lora" or "all".'
        )
