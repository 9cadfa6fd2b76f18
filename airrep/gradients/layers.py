"""Which linear layers of a language model have their gradients taken."""

import re
from itertools import islice

from torch import nn
from transformers.pytorch_utils import Conv1D

from airrep.examples import InputError
from airrep.lm import find_blocks

SHOWN = 6  # names in an error


def linear_layers(model: nn.Module, pattern: str | None = None) -> dict[str, nn.Module]:
    """The linear layers whose qualified name matches the regular expression (`re.search`).

    Linear layers are nn.Linear and transformers' Conv1D; of each, the weight counts and the bias
    does not. None: those of the transformer blocks, so without the head. A pattern can also match
    the head and the input embedding, which is a linear layer of one-hot inputs. Layers that
    share a weight (a tied head) count as one in `airrep.gradients.per_example`: with the head
    alone the gradient is the head's part, with the embedding too it is the whole weight's.

    Raises InputError for a pattern that is no regular expression or matches no layer.
    """
    layers: dict[str, nn.Module] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }
    if pattern is None:
        return _inside_blocks(model, layers)
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    if type(embedding) is nn.Embedding:  # a subclass may do more than look up
        layers |= {name: module for name, module in model.named_modules() if module is embedding}
    try:
        found = {name: layer for name, layer in layers.items() if re.search(pattern, name)}
    except re.error as error:
        raise InputError(f"layers {pattern!r} is not a regular expression: {error}.") from None
    if not found:
        some = ", ".join(islice(layers, SHOWN))
        raise InputError(
            f"layers {pattern!r} matches none of the {len(layers)} linear layers of "
            f"{type(model).__name__}; they have names such as {some}."
        )
    return found


def weight_shape(layer: nn.Module) -> tuple[int, int]:
    """(d_out, d_in) of a layer's weight; an embedding counts as a head, (vocabulary, d)."""
    rows, columns = layer.weight.shape  # type: ignore[misc]
    return (columns, rows) if isinstance(layer, Conv1D) else (rows, columns)


def _inside_blocks(model: nn.Module, layers: dict[str, nn.Module]) -> dict[str, nn.Module]:
    blocks = find_blocks(model)
    inside = set(model.modules() if blocks is None else blocks.modules())
    inside.discard(model.get_output_embeddings())  # type: ignore[operator]
    return {name: layer for name, layer in layers.items() if layer in inside}
