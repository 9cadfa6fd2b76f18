"""Fine-tuning one model again and again, each time from the same start on another subset."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from airrep.examples import InputError, TokenizedExample
from airrep.lm import ResponseModel, mean_losses
from airrep.response_batch import ResponseBatch, response_batch
from data_builders.adapters import with_adapters
from data_builders.engines import EngineName, models_that_fit, pick_engine
from data_builders.probes import Probes
from data_builders.recipes import Recipe, batches, schedule
from data_builders.stacked import Stack, clip_gradients
from data_builders.trunk import Trunk, freeze_below

EVAL_BATCH = 64
PACKED_TOKENS = 256  # the mask of a row grows with the square of its length
Result = TypeVar("Result")


class FineTuner:
    """Fine-tunes a causal LM on subsets of a pool and measures targets, by one of these engines.

    eager: the plain reference: one model, one example a row, every layer in every step.
    cached_trunk: for the recipe "last_layers": frozen layers run once; rows are packed.
    batched: several models in lock-step (see `Stack`) on packed rows; frozen layers run once
        where the recipe has any below those that train.

    The model is loaded once; its trained weights are set back in place before every subset.
    Losses depend on the weights, the recipe, the subset and the generator only: engines, and any
    number of models at once, agree up to rounding.
    """

    def __init__(
        self,
        model: nn.Module,
        pool: Sequence[TokenizedExample],
        targets: Sequence[TokenizedExample],
        recipe: Recipe,
        show_progress: bool = False,
        seed: int = 0,
        engine: EngineName = "auto",
        most_models: int | None = None,
        compiles: bool = False,
    ) -> None:
        """Takes the tokenised pool and all targets; `seed` draws LoRA's start.

        `most_models` is how many the batched engine trains at once; None chooses from the free
        memory. "auto" is cached_trunk where the recipe has a trunk and the model is on a CPU, else
        batched. `compiles` has the batched engine's blocks compiled: a minute or so for each
        number of models at once. Where the architecture does not fit an engine, or the compiler
        fails, something plainer is used; `engine` names the one in use and `notes` say why.
        Raises InputError for a recipe this model cannot follow.
        """
        recipe.check()
        self.recipe = recipe
        self.device = next(model.parameters()).device
        self.examples = [*pool, *targets]
        self.pool_size = len(pool)
        self.engine = pick_engine(engine, recipe, self.device)
        self.notes: list[str] = []
        self.trunk: Trunk | None = None
        if recipe.train == "lora":
            model = with_adapters(model, recipe, seed)
        elif recipe.train == "last_layers":
            if self.engine == "eager":
                freeze_below(model, recipe.layers)
            else:
                self.trunk = Trunk(model, recipe.layers, self.examples, show_progress)
        self.respond = ResponseModel(model)
        self.stack: Stack | None = None
        self.packs = False
        # Engines compute the same but for rounding, which half precision would take for more.
        self._start_engine(Probes(model, self.examples, self._exact_token_losses))
        if compiles:
            self._compile()
        if self.stack is None:
            self.trained = [p for p in model.parameters() if p.requires_grad]
            self.start = [parameter.detach().clone() for parameter in self.trained]
        else:
            self.trained = self.stack.parameters
        self.target_lengths = np.asarray([len(example) for example in targets])
        # How many response tokens of an example count, as `airrep.response_batch` has it.
        self.responses = np.asarray([len(e) - max(e.response_start, 1) for e in self.examples])
        self.most_models = 1
        if self.stack is not None:
            self.most_models = most_models or models_that_fit(
                model, self.trained, self.recipe, self.examples
            )
        self.parts = 1  # a step's batch is taken in so many parts, for the memory's sake
        self.eval_batch = EVAL_BATCH

    def _start_engine(self, probes: Probes) -> None:
        """Packs and stacks as the engine does, as far as the model computes the same then."""
        if self.engine == "eager":
            return
        try:
            probes.check_packing()
            self.packs = True
        except InputError as error:
            self.notes.append(str(error))
        if self.engine != "batched":
            return
        try:
            self.stack = probes.stack()
        except InputError as error:
            self.engine = "eager" if self.trunk is None else "cached_trunk"
            self.notes.append(f"{error} Models are trained one at a time.")

    def _compile(self) -> None:
        if self.stack is None:
            self.notes.append("Only the batched engine compiles.")
            return
        try:
            self.stack.compile(self.respond.model)
        except Exception as error:  # not every Python and system has a compiler
            self._go_on_uncompiled(error)

    def _go_on_uncompiled(self, error: Exception) -> None:
        assert self.stack is not None
        self.stack.uncompile()
        reason = str(error).strip().partition("\n")[0]
        self.notes.append(f"Blocks are not compiled: {type(error).__name__}: {reason}")

    def _uncompiled_if_it_fails(self, run: Callable[[], Result]) -> Result:
        """What `run` gives; run again with plain blocks where it fails with compiled ones."""
        try:
            return run()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler raises anything, at a shape that is new to it
            if self.stack is None or not self.stack.is_compiled:
                raise
            self._go_on_uncompiled(error)
        return run()

    def losses(
        self, subset: np.ndarray, target_rows: np.ndarray, generator: np.random.Generator
    ) -> np.ndarray:
        """Mean response loss (T,) float32 of the targets after fine-tuning on the pool rows."""
        return self.losses_of([subset], target_rows, [generator])[0]

    def losses_of(
        self,
        subsets: Sequence[np.ndarray],
        target_rows: np.ndarray,
        generators: Sequence[np.random.Generator],
    ) -> np.ndarray:
        """The same (K, T) for several subsets, all at once where the engine can.

        Subsets that need different numbers of steps are trained one number after the other.
        """
        plans = [
            batches(subset, self.recipe, generator)
            for subset, generator in zip(subsets, generators, strict=True)
        ]
        return self.losses_after(plans, target_rows)

    def losses_after(self, plans: list[list[np.ndarray]], target_rows: np.ndarray) -> np.ndarray:
        """The same (K, T) after training on each plan: the pool rows of every step.

        NaN where training diverged.
        """
        lengths = np.asarray([len(plan) for plan in plans])
        losses = np.empty((len(plans), len(target_rows)), dtype=np.float32)
        groups = (
            [np.flatnonzero(lengths == length) for length in np.unique(lengths)]
            if self.stack is not None
            else [np.asarray([number]) for number in range(len(plans))]
        )
        for group in groups:
            done = 0
            while done < len(group):
                some = group[done : done + self.most_models]  # fewer after memory ran out
                losses[some] = self._fit_in_memory([plans[n] for n in some], target_rows)
                done += len(some)
        # A model that answers everything alike was destroyed by its training.
        destroyed = (losses == losses[:, :1]).all(axis=1) & (losses.shape[1] > 1)
        losses[destroyed] = np.nan
        return losses

    def _fit_in_memory(
        self, plans: Sequence[Sequence[np.ndarray]], target_rows: np.ndarray
    ) -> np.ndarray:
        """Losses (K, T) of models trained on each plan; with fewer at once, and then smaller
        parts of a step at once, where memory runs out. The arithmetic stays the same."""
        try:
            self._train(plans)
            return self._measure(target_rows)
        except torch.OutOfMemoryError as error:
            half = len(plans) // 2
            self._reset(1)  # drops gradients and all sets but one
            if not half:
                self.halve_parts(error)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if not half:
            return self._fit_in_memory(plans, target_rows)
        self.most_models = min(self.most_models, half)
        parts = [self._fit_in_memory(some, target_rows) for some in (plans[:half], plans[half:])]
        return np.concatenate(parts)

    def halve_parts(self, error: torch.OutOfMemoryError) -> None:
        """Takes half as many examples at once from now on; InputError where it was one."""
        if self.parts >= self.recipe.batch_size:
            raise InputError(
                f"Memory runs out with one example at a time ({error}); use a smaller model "
                'or recipe.max_length, or recipe.train "lora" or "last_layers".'
            ) from None
        self.parts, self.eval_batch = 2 * self.parts, max(1, self.eval_batch // 2)

    def measure(self, target_rows: np.ndarray) -> np.ndarray:
        """Mean response loss (T,) float32 of the targets under the present weights."""
        return self._measure(target_rows)[0]

    def exact_matches(self, target_rows: np.ndarray) -> np.ndarray:
        """Whether greedy decoding gives each target's response: (T,) float32 of 0 and 1.

        Under the present weights (of the first model, where there are several). Decoding follows
        the response, to its end token, for as long as every token of it is the likeliest after
        those before: one pass over the response tells, without generating.
        """
        likeliest: list[torch.Tensor] = []
        hook = self.respond.model.get_output_embeddings().register_forward_hook(  # type: ignore[operator]
            lambda module, inputs, logits: likeliest.append(logits.argmax(dim=-1))
        )

        def compute(rows: np.ndarray) -> tuple[ResponseBatch, torch.Tensor]:
            batch, _ = self._target_losses(target_rows[rows])
            missed = likeliest.pop().view_as(batch.tokens) != batch.tokens
            return batch, missed.float()

        try:
            missed = self._means(target_rows, compute)
        finally:
            hook.remove()
        return (missed[0] == 0).astype(np.float32)

    @property
    def models(self) -> int:
        """How many models are trained at present."""
        return 1 if self.stack is None else len(self.trained[0])

    def _measure(self, target_rows: np.ndarray) -> np.ndarray:
        return self._means(target_rows, lambda rows: self._target_losses(target_rows[rows]))

    def _means(
        self,
        target_rows: np.ndarray,
        compute: Callable[[np.ndarray], tuple[ResponseBatch, torch.Tensor]],
    ) -> np.ndarray:
        """Means (K, T) over each target's response of what `compute` gives for its tokens."""
        lengths = self.target_lengths[target_rows]
        return self._uncompiled_if_it_fails(lambda: mean_losses(lengths, self.eval_batch, compute))

    def _target_losses(self, target_rows: np.ndarray) -> tuple[ResponseBatch, torch.Tensor]:
        """A batch of some targets for each model, and its token losses (K, R)."""
        rows = self.pool_size + target_rows
        batch = self._batch([rows], packs=False).repeat(self.models)
        return batch, self._token_losses(rows, batch)

    def _train(self, plans: Sequence[Sequence[np.ndarray]]) -> None:
        """Trains a model on each plan: the pool rows of every step."""

        def run() -> None:
            for _ in self.steps(plans):
                pass

        self._uncompiled_if_it_fails(run)

    def steps(
        self, plans: Sequence[Sequence[np.ndarray]]
    ) -> Iterator[tuple[torch.Tensor, torch.optim.Optimizer]]:
        """Trains a model on each plan from the start, and pauses after every step.

        Yields each model's loss (K,) before the step, and the optimiser after it.
        """
        recipe = self.recipe
        self._reset(len(plans))
        optimizer = torch.optim.AdamW(
            self.trained, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
        )
        optimizer.zero_grad()  # what a step left behind that memory was too small for
        steps = len(plans[0])
        for step, rows in enumerate(zip(*plans, strict=True)):
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * schedule(step, steps, recipe)
            losses = self._backward(rows)
            if self.stack is None:
                nn.utils.clip_grad_norm_(self.trained, recipe.clip_norm)
            else:
                clip_gradients(self.trained, recipe.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            yield losses, optimizer

    def _reset(self, models: int) -> None:
        if self.stack is not None:
            self.stack.reset(models)
            return
        with torch.no_grad():
            for parameter, start in zip(self.trained, self.start, strict=True):
                parameter.copy_(start)

    def _backward(self, rows: Sequence[np.ndarray]) -> torch.Tensor:
        """Adds the gradient of each model's mean token loss (K,) over its rows of this step."""
        counts = torch.tensor([int(self.responses[own].sum()) for own in rows]).to(self.device)
        total = torch.zeros(len(rows), device=self.device)
        for part in range(min(self.parts, max(map(len, rows)))):
            taken = [own[part :: self.parts] for own in rows]
            losses = self._token_losses(np.concatenate(taken), self._batch(taken, self.packs))
            means = losses.sum(dim=1) / counts
            means.sum().backward()
            total += means.detach()
        return total

    def _width(self, groups: Sequence[Sequence[TokenizedExample]]) -> int:
        """Tokens of a packed row: room for two of the longest, as far as that is not long."""
        longest = max(len(example) for group in groups for example in group)
        return -(-max(longest, min(2 * longest, PACKED_TOKENS)) // 8) * 8  # kernels want eights

    def _batch(self, rows: Sequence[np.ndarray], packs: bool) -> ResponseBatch:
        """A batch of some examples (pool rows, then targets), a group a model."""
        groups = [[self.examples[row] for row in own] for own in rows]
        return response_batch(groups, self._width(groups) if packs else None).to(self.device)

    def _token_losses(self, rows: np.ndarray, batch: ResponseBatch) -> torch.Tensor:
        """Token losses (K, R) of a batch of examples (pool rows, then targets)."""
        with self._autocast():
            return self._exact_token_losses(rows, batch)

    def _exact_token_losses(self, rows: np.ndarray, batch: ResponseBatch) -> torch.Tensor:
        """The same in the weights' own precision, unless autocast is on."""
        if self.trunk is not None:
            self.trunk.put(rows, batch)
        return self.respond.token_losses(batch)

    def _autocast(self) -> AbstractContextManager:
        if self.recipe.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)
