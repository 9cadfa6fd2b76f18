"""The warm-up model: the language model after training on a part of the pool.

Gradients of attribution methods are taken there. The folder `warm_up` of a run:

    warm_up/warm_up.json                   settings, checkpoints, the loss of every step
    warm_up/checkpoint-1, ..., final       the model and its tokenizer, as Hugging Face writes them
    warm_up/final/optimizer.safetensors    Adam's moments there, if asked for

The folder has its name once it is whole.
"""

import json
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from airrep.checkpoint import optimizer_tensors, replaced_folder
from airrep.config import RunConfig
from airrep.device import pick_device
from airrep.examples import (
    Example,
    InputError,
    fingerprint_examples,
    lm_template,
    tokenize_examples,
)
from airrep.lm import find_blocks, load_lm
from airrep.provenance import (
    clear_save_errors,
    git_revision,
    installed_versions,
    write_json_atomic,
)
from airrep.run_folder import RunFolder
from airrep.weights import MOMENTS_FILE, fingerprint_weights, plain_weights, resolve_model
from data_builders.adapters import merged
from data_builders.engines import pick_engine
from data_builders.finetune import FineTuner
from data_builders.recipes import batches


@dataclass(frozen=True)
class Checkpoint:
    """A model on the way: its folder, and how many steps it has trained.

    `learning_rate` is that of its last step; `mean_learning_rate` the mean over the steps since
    the checkpoint before. `layers` is the pattern (`linear_layers`) of those that trained, None
    for all.
    """

    path: Path
    step: int
    learning_rate: float
    mean_learning_rate: float
    layers: str | None = None


def warm_up(
    config: RunConfig,
    checkpoints: int = 1,
    moments: bool = False,
    examples: int | None = None,
    show_progress: bool = True,
) -> Path:
    """Trains the run's language model on a part of its pool by its recipe; returns the last model.

    `examples`: how many, drawn by the run's first seed; None for as many as a training subset has
    (the median; the whole pool where there is no plan). Labels are losses of models that saw no
    more, and at a model that saw much more gradients say far less of them. Keeps `checkpoints`
    models, the last one among them, at equal distances. With the whole pool, its order is that of
    a retraining with the same seed (`data_builders.retraining`), so that it is the very model that
    interventions leave examples out of. `moments` keeps Adam's moments of every trained parameter,
    by its name, at each checkpoint. LoRA's adapters are merged into the weights.

    A finished warm-up of the same model, pool, recipe and seed is returned as it is; one that was
    killed starts again. Raises InputError for a folder of other things, for more checkpoints than
    steps, for more examples than the pool has, for moments of adapters (they are of no weight that
    is kept), and when training diverges.
    """
    folder = RunFolder(Path(config.output))
    path, pool = folder.warm_up, folder.read_pool()
    if examples is None:
        examples = _subset_size(folder) or len(pool)
    own = {"checkpoints": checkpoints, "moments": moments, "examples": examples}
    inputs = _inputs(config, pool) | own
    if path.exists():
        _check_same(path, inputs)
        print(f"{path} is there already")
        return path / "final"
    if moments and config.recipe.train == "lora":
        raise InputError(
            "recipe.train is 'lora': Adam's moments would be of the adapters, which are merged "
            'into the weights; leave out moments, or train "all" or "last_layers".'
        )
    if not 1 <= examples <= len(pool):
        raise InputError(
            f"examples is {examples}, of a pool of {len(pool)}; give 1 to {len(pool)}."
        )
    started = time.perf_counter()
    with replaced_folder(path) as unfinished:
        training = _Training(config, pool, unfinished, moments, examples, show_progress)
        about = {
            "inputs": inputs,
            "lm": config.lm,
            "checkpoints": training.run(checkpoints),
            "losses": training.losses,
            "engine": training.tuner.engine,
            "seconds": time.perf_counter() - started,
            "versions": installed_versions(),
            "git_revision": git_revision(),
        }
        write_json_atomic(unfinished / "warm_up.json", about)
    return path / "final"


def open_warm_up(config: RunConfig) -> list[Checkpoint]:
    """The checkpoints of a run's warm-up, in the order of training.

    Raises InputError when there is none, or one of another model, pool, recipe or seed.
    """
    path = _folder(config)
    if not path.exists():
        raise InputError(f"{path} is not there yet; run `airrep warm-up` first.")
    about = _check_same(path, _inputs(config, RunFolder(Path(config.output)).read_pool()))
    try:
        return [Checkpoint(path / row.pop("folder"), **row) for row in about["checkpoints"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from None


class _Training:
    """One training of the language model on so many of the pool, and its checkpoints."""

    def __init__(
        self,
        config: RunConfig,
        pool: Sequence[Example],
        folder: Path,
        moments: bool,
        examples: int,
        show_progress: bool,
    ) -> None:
        recipe, device = config.recipe, pick_device(config.device)
        self.folder, self.moments, self.show_progress = folder, moments, show_progress
        model, self.tokenizer = load_lm(plain_weights(resolve_model(config.lm)), device)
        self.blocks = find_blocks(model) or nn.ModuleList()
        self.whole = list(self.blocks)
        template = lm_template(self.tokenizer, recipe.template)
        rows = np.sort(np.random.default_rng(config.seed).permutation(len(pool))[:examples])
        some = [pool[row] for row in rows]
        tokens = tokenize_examples(some, self.tokenizer, template, recipe.max_length)
        engine = pick_engine(config.engine.name, recipe, torch.device(device))
        # One model is to be trained: a stack of models has nothing to offer.
        engine = "eager" if engine == "batched" else engine
        self.tuner = FineTuner(model, tokens, [], recipe, show_progress, config.seed, engine)
        self.plan = batches(np.arange(len(some)), recipe, np.random.default_rng([config.seed, 0]))
        self.losses: list[float] = []

    def run(self, checkpoints: int) -> list[dict[str, Any]]:
        """Trains; returns a row of each checkpoint written."""
        if not 1 <= checkpoints <= len(self.plan):
            raise InputError(
                f"checkpoints is {checkpoints}, of {len(self.plan)} training steps; give 1 to "
                f"{len(self.plan)}."
            )
        ends = [len(self.plan) * number // checkpoints for number in range(1, checkpoints + 1)]
        while True:
            try:
                return self._train(ends)
            except torch.OutOfMemoryError as error:
                self.tuner.halve_parts(error)

    def _train(self, ends: Sequence[int]) -> list[dict[str, Any]]:
        self.losses.clear()
        rates: list[float] = []
        rows: list[dict[str, Any]] = []
        bar = tqdm(
            total=len(self.plan), desc="warm-up", unit="step", disable=not self.show_progress
        )
        with bar:
            for loss, optimizer in self.tuner.steps([self.plan]):
                self.losses.append(float(loss))
                rates.append(optimizer.param_groups[0]["lr"])
                if not math.isfinite(self.losses[-1]):
                    raise InputError(
                        f"Training diverged: the loss of step {len(rates)} is {self.losses[-1]}; "
                        f"lower recipe.learning_rate ({self.tuner.recipe.learning_rate:g})."
                    )
                bar.set_postfix(loss=f"{self.losses[-1]:.3f}", refresh=False)
                bar.update()
                if len(rates) in ends:
                    folder = self._save(len(rows) + 1, len(rates) == len(self.plan), optimizer)
                    since = rates[rows[-1]["step"] if rows else 0 :]
                    rows.append(
                        {
                            "folder": folder.name,
                            "step": len(rates),
                            "learning_rate": rates[-1],
                            "mean_learning_rate": float(np.mean(since)),
                            "layers": self._trained_layers(),
                        }
                    )
        return rows

    def _trained_layers(self) -> str | None:
        recipe = self.tuner.recipe
        if recipe.train != "last_layers":
            return None
        modules = self.tuner.respond.model.named_modules()
        name = next(name for name, module in modules if module is self.blocks)
        last = range(len(self.blocks) - recipe.layers, len(self.blocks))
        return rf"^{re.escape(name)}\.({'|'.join(map(str, last))})\."

    def _save(self, number: int, is_last: bool, optimizer: torch.optim.Optimizer) -> Path:
        folder = self.folder / ("final" if is_last else f"checkpoint-{number}")
        with self._uncut() as model, clear_save_errors(folder):
            merged(model).save_pretrained(folder)  # type: ignore[operator]
            self.tokenizer.save_pretrained(folder)
            if self.moments:
                trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
                save_file(optimizer_tensors(optimizer, trained), folder / MOMENTS_FILE)
        return folder

    @contextmanager
    def _uncut(self) -> Iterator[nn.Module]:
        """The model with all its blocks, some of which a trunk stands for while it trains."""
        cut = list(self.blocks)
        self._put(self.whole)
        try:
            yield self.tuner.respond.model
        finally:
            self._put(cut)

    def _put(self, blocks: Sequence[nn.Module]) -> None:
        for number, block in enumerate(blocks):
            self.blocks[number] = block


def _folder(config: RunConfig) -> Path:
    return RunFolder(Path(config.output)).warm_up


def _subset_size(folder: RunFolder) -> int | None:
    """How many examples a training subset has (the median), where there is a plan."""
    if not folder.labels("train").is_dir():
        return None
    return int(np.median([len(subset) for subset in folder.open_labels("train").subsets]))


def _inputs(config: RunConfig, pool: Sequence[Example]) -> dict[str, Any]:
    """All that decides the models."""
    return {
        "lm": fingerprint_weights(resolve_model(config.lm)),
        "pool": fingerprint_examples(pool),
        "seed": config.seed,
        **{f"recipe.{key}": value for key, value in config.recipe.relevant().items()},
    }


def _check_same(path: Path, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """warm_up.json; raises InputError, with both sides, unless it was made from these inputs."""
    file = path / "warm_up.json"
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        known = about["inputs"]
        differences = [
            f"{key} is {known.get(key)} in the folder, {value} now"
            for key, value in inputs.items()
            if known.get(key) != value
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from None
    if differences:
        raise InputError(
            f"The warm-up in {path} is of something else: {'; '.join(differences)}. Delete it, or "
            "give another output."
        )
    return about


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(
        f"{path / 'warm_up.json'} cannot be read ({error}); delete {path} and run "
        "`airrep warm-up` again."
    )
