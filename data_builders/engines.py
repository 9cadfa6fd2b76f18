"""Which label engine to use, and how many models it can train at once."""

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from torch import nn

from airrep.examples import InputError, TokenizedExample
from data_builders.recipes import Recipe

MOST_MODELS = 32  # by then kernels are large enough
BYTES_PER_WEIGHT = 22  # weight, gradient, two moments, a half-precision copy, one for clipping
BYTES_PER_ACTIVATION = 60  # of a token in a block, per hidden unit; measured: 45 in bf16
FREE_SHARE = 0.8
EngineName = Literal["auto", "eager", "cached_trunk", "batched"]


def pick_engine(engine: EngineName, recipe: Recipe, device: torch.device) -> EngineName:
    """The engine that a name means for a recipe; raises InputError where they do not go."""
    if engine not in get_args(EngineName):
        raise InputError(f"engine is {engine!r}; choose one of {', '.join(get_args(EngineName))}.")
    has_trunk = recipe.train == "last_layers"
    if engine == "cached_trunk" and not has_trunk:
        raise InputError(
            f'engine cached_trunk needs recipe.train "last_layers", which is {recipe.train!r}; '
            "use auto, eager or batched."
        )
    if engine == "auto":
        return "cached_trunk" if has_trunk and device.type == "cpu" else "batched"
    return engine


def models_that_fit(
    model: nn.Module,
    trained: Sequence[nn.Parameter],
    recipe: Recipe,
    examples: Sequence[TokenizedExample],
) -> int:
    """How many models to train at once: what a GPU's free memory holds, by an estimate.

    `trained` are stacked parameters (K, ...). A CPU gains nothing from more than one. Too many are
    halved when memory runs out.
    """
    device = trained[0].device
    if device.type != "cuda":
        return 1
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    weights = sum(parameter[0].numel() for parameter in trained)
    tokens = recipe.batch_size * np.mean([len(example) for example in examples])
    activations = tokens * config.num_hidden_layers * config.hidden_size
    each = BYTES_PER_WEIGHT * weights + BYTES_PER_ACTIVATION * activations
    free, _ = torch.cuda.mem_get_info(device)
    return int(np.clip(FREE_SHARE * free / each, 1, MOST_MODELS))
