"""LoRA adapters: put on a model's linear layers, and merged into its weights afterwards."""

import copy
from typing import Any

import torch
from torch import nn

from airrep.examples import InputError
from data_builders.recipes import Recipe


def with_adapters(model: nn.Module, recipe: Recipe, seed: int) -> nn.Module:
    """The model with a recipe's adapters, which alone train; `seed` draws their start.

    Raises InputError for a model that has no layers they fit on.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,
        target_modules="all-linear",
    )
    # peft draws A from the global generator; its state is put back afterwards.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return get_peft_model(model, config)
        except ValueError as error:
            raise InputError(f"LoRA cannot be put on {type(model).__name__}: {error}") from error


def merged(model: nn.Module) -> nn.Module:
    """A copy of the model with its adapters inside the weights; a model without any as it is."""
    adapted: Any = model
    if not hasattr(adapted, "merge_and_unload"):
        return model
    # Taking adapters out of the weights again would leave rounding behind, hence the copy.
    return copy.deepcopy(adapted).merge_and_unload()
