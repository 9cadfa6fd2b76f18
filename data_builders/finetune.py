"""Fine-tuning one model again and again, each time from the same start on another subset."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import nn

from airrep.examples import InputError, TokenizedExample
from airrep.lm import ResponseBatch, ResponseModel, mean_losses, response_batch
from data_builders.recipes import Recipe
from data_builders.trunk import Trunk

EVAL_BATCH = 64


class FineTuner:
    """Fine-tunes a causal LM on subsets of a pool and measures targets; the plain reference.

    The model is loaded once; its trained weights are set back in place before every subset.
    Losses depend on the weights, the recipe, the subset and the generator only.
    """

    def __init__(
        self,
        model: nn.Module,
        pool: Sequence[TokenizedExample],
        targets: Sequence[TokenizedExample],
        recipe: Recipe,
        show_progress: bool = False,
        seed: int = 0,
    ) -> None:
        """Takes the tokenised pool and all targets; `seed` draws LoRA's start.

        Raises InputError for a recipe this model cannot follow.
        """
        recipe.check()
        self.recipe = recipe
        self.device = next(model.parameters()).device
        self.examples = [*pool, *targets]
        self.pool_size = len(pool)
        self.trunk: Trunk | None = None
        if recipe.train == "lora":
            model = _with_adapters(model, recipe, seed)
        elif recipe.train == "last_layers":
            self.trunk = Trunk(model, recipe.layers, self.examples, show_progress=show_progress)
        self.respond = ResponseModel(model)
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.start = [parameter.detach().clone() for parameter in self.trained]
        self.target_lengths = np.asarray([len(example) for example in targets])

    def losses(
        self, subset: np.ndarray, target_rows: np.ndarray, generator: np.random.Generator
    ) -> np.ndarray:
        """Mean response loss (T,) float32 of the targets after fine-tuning on the pool rows."""
        self._train(subset, generator)
        return self.measure(target_rows)

    def measure(self, target_rows: np.ndarray) -> np.ndarray:
        """Mean response loss (T,) float32, of the targets under the present weights."""

        def compute(rows: np.ndarray) -> tuple[ResponseBatch, torch.Tensor]:
            return self._run_batch(self.pool_size + target_rows[rows])

        return mean_losses(self.target_lengths[target_rows], EVAL_BATCH, compute)

    def _train(self, subset: np.ndarray, generator: np.random.Generator) -> None:
        recipe = self.recipe
        with torch.no_grad():
            for parameter, start in zip(self.trained, self.start, strict=True):
                parameter.copy_(start)
        optimizer = torch.optim.AdamW(
            self.trained, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
        )
        batches = _batches(subset, recipe, generator)
        for step, rows in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * _schedule(step, len(batches), recipe)
            self._run_batch(rows)[1].mean().backward()
            nn.utils.clip_grad_norm_(self.trained, recipe.clip_norm)
            optimizer.step()
            optimizer.zero_grad()

    def _run_batch(self, rows: np.ndarray) -> tuple[ResponseBatch, torch.Tensor]:
        """The batch of some examples (pool rows, then targets) and its token losses (R,)."""
        batch = response_batch([self.examples[row] for row in rows]).to(self.device)
        if self.trunk is not None:
            self.trunk.put(rows, batch.ids.shape[1])
        with self._autocast():
            return batch, self.respond.token_losses(batch)

    def _autocast(self) -> AbstractContextManager:
        if self.recipe.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


def _batches(
    subset: np.ndarray, recipe: Recipe, generator: np.random.Generator
) -> list[np.ndarray]:
    """The subset's rows, shuffled anew every epoch, in batches."""
    orders = [generator.permutation(subset) for _ in range(recipe.epochs)]
    size = recipe.batch_size
    return [order[i : i + size] for order in orders for i in range(0, len(order), size)]


def _schedule(step: int, steps: int, recipe: Recipe) -> float:
    """Share of the learning rate at a step: linear warm-up, then linear to 0."""
    if step < recipe.warmup_steps:
        return step / recipe.warmup_steps
    return (steps - step) / max(1, steps - recipe.warmup_steps)


def _with_adapters(model: nn.Module, recipe: Recipe, seed: int) -> nn.Module:
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
