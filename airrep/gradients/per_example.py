"""The gradient of every example of a batch, from one backward pass through activations alone."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import nn
from torch.nn import functional as F

from airrep.choices import check_choice
from airrep.examples import InputError, TokenizedExample
from airrep.gradients.layer_gradient import LayerGradient, times, wide
from airrep.gradients.layers import weight_shape
from airrep.lm import ResponseModel, mean_by_row
from airrep.response_batch import ResponseBatch, response_batch

OUTPUTS = ("loss", "mean_loss", "margin")
PRECISIONS = ("fp32", "bf16")

# Of each layer by name: (d_out, r_out) and (d_in, r_in).
Projections = Mapping[str, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class BatchGradients:
    """What one backward pass gave: gradients by layer, in the order of the batch's examples.

    `doubt` (B,): 1 - p, with p the probability of the response's tokens, averaged over them.
    """

    layers: dict[str, LayerGradient]
    doubt: torch.Tensor


class GradientModel:
    """A causal LM that gives the per-example gradients of some of its layers' weights.

    `layers` is what `linear_layers` found. `output`, of one example: "loss" is the cross-entropy
    summed over the response's tokens, "mean_loss" its mean over them, "margin" the sum over them
    of log(p / (1 - p)). `precision`: "fp32", or "bf16" for the passes through the model
    (autocast). `projections` (p_out, p_in by layer) make every `LayerGradient` one of P_out^T G
    P_in; tokens are projected as they come, which bounds the memory for many layers.

    Weights have requires_grad off until `close`: no gradient of a weight is computed, and nothing
    below the lowest chosen layer has a graph. The head and the last block's feed-forward part run
    at response positions only (`ResponseModel`); their gradients have L of the longest response.
    `shapes`: (d_out, d_in) of every weight, in the order of `BatchGradients.layers`.
    Raises InputError for an unknown output or precision.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        output: str = "loss",
        precision: str = "fp32",
        projections: Projections | None = None,
    ) -> None:
        check_choice("output", output, OUTPUTS)
        check_choice("precision", precision, PRECISIONS)
        self.model, self.output, self.precision = model, output, precision
        self.projections = projections or {}
        self.device = next(model.parameters()).device
        self._was_training = model.training
        self._trainable = [weight for weight in model.parameters() if weight.requires_grad]
        model.requires_grad_(False)
        model.eval()
        self._respond = ResponseModel(model)
        self._layout: _Layout | None = None
        self._caught: dict[str, list[LayerGradient]] = {}
        first: dict[int, str] = {}  # of the layers that share a weight
        names = {name: first.setdefault(id(layer.weight), name) for name, layer in layers.items()}
        self.shapes = {name: weight_shape(layers[name]) for name in first.values()}
        self._hooks = [
            layer.register_forward_hook(partial(self._watch, names[name]))
            for name, layer in layers.items()
        ]

    def backward(
        self, examples: Sequence[TokenizedExample], sampler: torch.Generator | None = None
    ) -> BatchGradients:
        """The gradients of every example of a batch.

        With a `sampler` (a generator on the model's device) each response token is drawn from the
        model's own distribution in place of the example's: gradients of the true Fisher matrix.
        Raises InputError for a layer that has no gradient of its own for every example.
        """
        batch = response_batch([examples]).to(self.device)
        self._layout = _Layout(batch)
        self._caught = {name: [] for name in self.shapes}
        try:
            with torch.enable_grad():
                with autocast(self.device, self.precision):
                    logits = wide(self._respond.logits(batch)[0])  # (R, V)
                tokens = batch.tokens[0] if sampler is None else _draw(logits, sampler)
                losses = F.cross_entropy(logits, tokens, reduction="none")
                values = losses if self.output != "margin" else _margins(logits, tokens)
                if self.output == "mean_loss":
                    values = values / self._layout.counts[batch.rows[0]]
                if values.requires_grad:
                    values.sum().backward()
        finally:
            self._layout = None
        doubts = -torch.expm1(-losses.detach())[None]
        doubt = mean_by_row(doubts, batch.rows, len(examples))[0].nan_to_num()
        return BatchGradients({name: self._gathered(name) for name in self.shapes}, doubt)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives the model back as it was."""
        for hook in self._hooks:
            hook.remove()
        self._respond.close()
        for weight in self._trainable:
            weight.requires_grad_(True)
        self.model.train(self._was_training)

    def _watch(self, name: str, layer: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        """Keeps a layer's inputs, and the gradients of its outputs when they come."""
        layout = self._layout
        if layout is None:
            return
        # Where nothing below needs a gradient, the graph begins here.
        output.requires_grad_(True)
        p_out, p_in = self.projections.get(name, (None, None))
        if isinstance(layer, nn.Embedding):
            # Seen from the side of a head: the gradient's rows are of tokens.
            outer = layout.by_example(name, _rows_of(inputs[0], layer.weight, p_out))
            outer = outer * layout.mask[..., None]

            def keep(gradient: torch.Tensor) -> None:
                inner = layout.by_example(name, times(gradient, p_in))
                self._caught[name].append(LayerGradient(inner, outer, layout.mask))
        else:
            inner = layout.by_example(name, times(inputs[0].detach(), p_in))

            def keep(gradient: torch.Tensor) -> None:
                outer = layout.by_example(name, times(gradient, p_out))
                mask = layout.mask_of(outer)
                self._caught[name].append(LayerGradient(inner, outer, mask))

        output.register_hook(keep)

    def _gathered(self, name: str) -> LayerGradient:
        """A layer's gradients; a weight used more than once has the tokens of all its uses."""
        parts = self._caught.pop(name)
        if not parts:
            raise InputError(f"The layer {name} has no part in the loss; leave it out.")
        if len(parts) == 1:
            return parts[0]
        return LayerGradient(
            torch.cat([part.inputs for part in parts], dim=1),
            torch.cat([part.output_gradients for part in parts], dim=1),
            torch.cat([part.mask for part in parts], dim=1),
        )


class _Layout:
    """Where a batch's tokens are: of every example, or those that predict its response."""

    def __init__(self, batch: ResponseBatch) -> None:
        self.mask = batch.texts >= 0  # (B, L)
        rows = batch.rows[0]  # (R,), ascending
        self.counts = torch.bincount(rows, minlength=len(self.mask))
        starts = self.counts.cumsum(0) - self.counts
        steps = torch.arange(len(rows), device=rows.device) - starts[rows]
        self.width = int(self.counts.max())
        self.places = rows * self.width + steps
        self.response_mask = torch.arange(self.width, device=rows.device) < self.counts[:, None]

    def by_example(self, name: str, states: torch.Tensor) -> torch.Tensor:
        """States of a layer as (B, L, d); InputError when they are not one row an example."""
        if states.shape[:-1] == self.mask.shape:
            return states
        if states.shape[:-1] != (1, len(self.places)):
            raise InputError(
                f"The layer {name} is given tensors of shape {tuple(states.shape)}, which are not "
                "one row of tokens for each example; leave it out."
            )
        size, width = self.response_mask.shape
        whole = states.new_zeros(size * width, states.shape[-1])
        return whole.index_copy(0, self.places, states[0]).view(size, width, states.shape[-1])

    def mask_of(self, states: torch.Tensor) -> torch.Tensor:
        """The mask (B, L) of what `by_example` gave."""
        return self.mask if states.shape[:2] == self.mask.shape else self.response_mask


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """The passes through a model in this precision; InputError for an unknown one."""
    check_choice("precision", precision, PRECISIONS)
    enabled = precision == "bf16"
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def _draw(logits: torch.Tensor, sampler: torch.Generator) -> torch.Tensor:
    """A token (R,) of each row's distribution."""
    return torch.multinomial(logits.detach().softmax(-1), 1, generator=sampler)[:, 0]


def _margins(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """log(p / (1 - p)) (R,) of the tokens; from logits, as p may round to 1."""
    own = logits.gather(1, tokens[:, None])
    others = logits.scatter(1, tokens[:, None], -torch.inf)
    return own[:, 0] - others.logsumexp(1)


def _rows_of(ids: torch.Tensor, weight: torch.Tensor, p_out: torch.Tensor | None) -> torch.Tensor:
    """One-hot ids (B, L, V), projected if need be."""
    if p_out is not None:
        return p_out.to(weight.dtype)[ids]
    ones = weight.new_zeros(*ids.shape, len(weight))
    return ones.scatter_(-1, ids[..., None], 1)
