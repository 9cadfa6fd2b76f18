"""Training the encoder on the whole pool, with held-out labels, early stopping and resume."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from airrep.checkpoint import write_checkpoint
from airrep.device import GPU_ENCODER_TOKENS, peak_memory, tokens_at_once
from airrep.encoder import HEADS, AirRepEncoder, add_lora, evaluating, merge_lora, training_mode
from airrep.examples import Example, InputError
from airrep.full_pool import FullPool
from airrep.holdout import check_labels, few_held_out, more_labels, training_labels
from airrep.label_store import Labels
from airrep.metrics import lds_per_target
from airrep.objectives import make_objective
from airrep.pooling import Membership, membership
from airrep.reliability import reliability_weights
from airrep.streaming_pool import attention_pool_embeddings
from airrep.train_log import TrainLog
from airrep.train_run import HISTORY, TrainRun, fingerprint_run
from airrep.train_settings import TrainSettings, check_settings
from airrep.train_start import give_start
from airrep.train_state import TrainState
from airrep.trunk import prepare_texts, trainable_parameters

SAMPLES = 2  # keeps the random numbers of samples and dropout apart from those of the split
DROPOUT = 3
CPU_GRAPH_TOKENS = 65536
GRAPH_BYTES = 80  # of a token's activations in a layer, per hidden unit; half as many in bf16
GRAPH_SHARE = 0.5  # of the free memory
MOST_JUDGED = 2**20  # training labels that an evaluation ranks


@dataclass(frozen=True)
class TrainResult:
    """The encoder at its best step, and how it got there.

    `history` has one entry a step from 0 (untrained): step, loss, gradient_norm, learning_rate,
    train_lds and validation_lds (None between evaluations), seconds since the start,
    examples_per_second (None at step 0) and peak_memory_gib. The rate is over all processes, of
    the pool and target examples that the step took its gradient from, without evaluation; memory
    is that of `airrep.device.peak_memory`, in this process.
    `validation_lds` is the best step's, None when nothing was held out. `dropped_targets` counts
    training targets whose labels do not vary.
    """

    encoder: AirRepEncoder
    best_step: int
    validation_lds: float | None
    history: list[dict[str, Any]]
    dropped_targets: int


def train_encoder(
    encoder: AirRepEncoder,
    pool: Sequence[Example],
    targets: Sequence[Example],
    labels: Labels,
    settings: TrainSettings,
    output: Path | None,
    accelerator: Accelerator | None = None,
    target_weights: np.ndarray | None = None,
    others: Sequence[Labels] = (),
) -> TrainResult:
    """Trains the encoder, in place, to rank the label subsets for every target.

    `labels.losses` is (targets, subsets) with subsets of pool rows; `target_weights` (targets,)
    weighs the targets in the objective. Give it training labels only: it holds out some subsets
    and some targets itself, and returns the step whose LDS on those is best. Held-out labels
    touch nothing but that choice. `others` are labels of the same pool and targets, from other
    language models, recipes or seeds, to learn from beside these; the subsets and targets that
    are held out are held out of them too, and nothing else. With an `output` folder a killed run
    goes on where its last checkpoint was (on a CPU bit by bit as if never killed), and a finished
    one is read back.
    Under several processes all must call it; the first one writes. Raises InputError for inputs
    that do not fit together, an output folder of another run, and a loss that is not finite.
    """
    check_settings(settings)
    for some in (labels, *others):
        check_labels(pool, targets, some, target_weights)
    accelerator = Accelerator() if accelerator is None else accelerator
    fingerprint = fingerprint_run(encoder, pool, targets, labels, target_weights, settings, others)
    run = TrainRun(None if output is None else Path(output), fingerprint)
    done = run.finished()
    if done is not None and run.output is not None:
        return TrainResult(
            AirRepEncoder.from_pretrained(run.output / "encoder").to(accelerator.device),
            done["best_step"],
            done["validation_lds"],
            run.read_history(),
            done["dropped_targets"],
        )
    trainer = Trainer(
        encoder, pool, targets, labels, settings, run, accelerator, target_weights, others
    )
    return trainer.train()


class Trainer:
    """One run of `train_encoder`; texts are numbered pool rows first, then targets."""

    def __init__(
        self,
        encoder: AirRepEncoder,
        pool: Sequence[Example],
        targets: Sequence[Example],
        labels: Labels,
        settings: TrainSettings,
        run: TrainRun,
        accelerator: Accelerator,
        target_weights: np.ndarray | None = None,
        others: Sequence[Labels] = (),
    ) -> None:
        self.settings, self.run, self.accelerator = settings, run, accelerator
        self.encoder = encoder.to(accelerator.device)
        self.losses = labels.losses
        self.holdout, self.labels, self.dropped = training_labels(labels, settings)
        self.weights = np.ones(len(targets)) if target_weights is None else target_weights
        if settings.target_weighting == "reliability":
            self.weights = self.weights.astype(np.float64)
            self.weights[self.holdout.train_targets] *= reliability_weights(self.labels)
        more, values = more_labels(self.holdout, labels, others)
        # Labels (train targets, trained subsets), and which of all subsets those are.
        self.labels = np.concatenate([self.labels, values], axis=1)
        self.trained = np.concatenate(
            [self.holdout.train_subsets, len(labels.subsets) + np.arange(len(more))]
        )
        # Pool rows outside every subset have no label to learn from: they are never encoded.
        used = np.unique(np.concatenate([*labels.subsets, *more]))
        self.pool_size = len(used)
        self.subsets = [np.searchsorted(used, subset) for subset in (*labels.subsets, *more)]
        self.objective = make_objective(settings.objective)
        if accelerator.is_main_process and (warning := few_held_out(self.holdout)) is not None:
            print(warning)
        if settings.response_words and encoder.words_projector is None:
            encoder.add_response_words(settings.marks)
        if settings.trainable_layers != 0:
            encoder.means = None  # the base changes
        parameters = _trained(encoder, settings)
        graph_tokens = settings.max_graph_tokens
        if graph_tokens is None:
            graph_tokens = _graph_tokens(encoder, accelerator.device)
        chunk_tokens = settings.chunk_tokens or _chunk_tokens(
            encoder, accelerator.device, graph_tokens
        )
        self.full_pool = FullPool(
            prepare_texts(
                encoder,
                encoder.tokenize([*(pool[row] for row in used), *targets]),
                settings.trainable_layers,
                chunk_tokens,
                settings.show_progress and accelerator.is_main_process,
            ),
            list(parameters.values()),
            accelerator,
            chunk_tokens,
            graph_tokens,
            bf16=settings.mixed_precision == "bf16",
        )
        every = np.arange(len(self.full_pool.texts.lengths))
        rows = self.pool_size + self.holdout.train_targets
        give_start(
            encoder,
            lambda: self.full_pool.embed(every),
            self.pool_size,
            rows,
            settings.start_scale,
        )
        self.state = TrainState(parameters, settings)

    def train(self) -> TrainResult:
        """Steps until the last one or until patience is lost; the best step's weights stay."""
        checkpoint = self.run.resume_point()
        if checkpoint is not None:
            self.state.restore(checkpoint)
        main = self.accelerator.is_main_process
        path = None if self.run.output is None else self.run.output / HISTORY
        with (
            training_mode(self.encoder, self.state.parameters, self.settings.dropout),
            TrainLog(path, self.settings, self.state.history, main) as log,
        ):
            self._run_steps(log)
        self.state.load(self.state.best)
        if self.settings.lora_rank is not None:
            merge_lora(self.encoder)
        self.encoder.eval()
        outcome = {
            "best_step": self.state.best_step,
            "validation_lds": self.state.best_lds,
            "steps": self.state.step,
            "seconds": self.state.history[-1]["seconds"],
            "dropped_targets": self.dropped,
            "processes": self.accelerator.num_processes,
        }
        if main:
            self.run.finish(self.encoder, self.settings, outcome)
        self.accelerator.wait_for_everyone()
        return TrainResult(
            self.encoder,
            self.state.best_step,
            self.state.best_lds,
            self.state.history,
            self.dropped,
        )

    def _run_steps(self, log: TrainLog) -> None:
        state, settings = self.state, self.settings
        before = state.history[-1]["seconds"] if state.history else 0.0
        self._started = time.perf_counter() - before
        if not state.history:
            self._record(log)
        while not state.exhausted():
            start = time.perf_counter()
            loss, examples = self._take_gradient()
            norm = state.update()
            self._record(log, loss, norm, examples / (time.perf_counter() - start))
            if settings.checkpoint_every and state.step % settings.checkpoint_every == 0:
                self._write_checkpoint()

    def _take_gradient(self) -> tuple[float, int]:
        """Loss of the coming step, and how many examples it encoded, each counted once.

        The gradient is left in the parameters.
        """
        step = self.state.step + 1
        columns, picked = self._sample(step)
        subsets = [self.subsets[column] for column in self.trained[columns]]
        rows, members = self._encoded(subsets)
        targets = self.holdout.train_targets[picked]
        labels = torch.from_numpy(self.labels[np.ix_(picked, columns)]).to(self.accelerator.device)
        weights = torch.from_numpy(self.weights[targets]).to(labels)

        def objective(embeddings: torch.Tensor) -> torch.Tensor:
            pool, chosen = embeddings.split([len(rows), len(targets)])
            return self.objective(attention_pool_embeddings(chosen, pool, members), labels, weights)

        drawn = (self.settings.seed, DROPOUT, step) if self.settings.dropout else None
        loss = self.full_pool.backward(
            np.concatenate([rows, self.pool_size + targets]), objective, drawn
        )
        if not np.isfinite(loss):
            raise _not_finite("loss", step, loss, self.settings)
        return loss, len(rows) + len(targets)

    def _encoded(self, subsets: Sequence[np.ndarray]) -> tuple[np.ndarray, Membership]:
        """Pool rows that a step encodes, each once, and where the subsets are among them.

        Rows of no drawn subset are left out: a sample of subsets is a sample of the pool.
        """
        rows = np.unique(np.concatenate(subsets))
        return rows, membership([np.searchsorted(rows, subset) for subset in subsets], len(rows))

    def _sample(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Columns and rows of `self.labels` for this step: everything, or a seeded sample.

        They depend on the step's number alone, so a resumed run draws what it would have drawn.
        """
        rng = np.random.default_rng([self.settings.seed, SAMPLES, step])
        target_count, subset_count = self.labels.shape
        columns = _draw(rng, subset_count, self.settings.subsets_per_step)
        return columns, _draw(rng, target_count, self.settings.targets_per_step)

    def _record(
        self,
        log: TrainLog,
        loss: float | None = None,
        norm: float | None = None,
        rate: float | None = None,
    ) -> None:
        state = self.state
        train_lds, validation_lds = None, None
        due = state.step % self.settings.evaluate_every == 0
        if due or state.step == self.settings.max_steps:
            train_lds, validation_lds = self._evaluate()
            state.judge(validation_lds)
        entry = {
            "step": state.step,
            "loss": loss,
            "gradient_norm": norm,
            "learning_rate": state.learning_rate,
            "train_lds": train_lds,
            "validation_lds": validation_lds,
            "seconds": round(time.perf_counter() - self._started, 3),
            "examples_per_second": None if rate is None else round(rate, 1),
            "peak_memory_gib": round(peak_memory(self.accelerator.device) / 2**30, 3),
        }
        state.history.append(entry)
        log.add(entry)

    def _evaluate(self) -> tuple[float, float | None]:
        """LDS on the training labels (where there are many, of some targets), and on the held-out
        ones if there are any."""
        with evaluating(self.encoder), self.state.judged_weights():
            every = np.arange(len(self.full_pool.texts.lengths))
            embeddings = self.full_pool.embed(every)
        if not torch.isfinite(embeddings).all():
            raise _not_finite("embeddings", self.state.step, float("nan"), self.settings)
        split = self.holdout
        some = -(-len(split.train_targets) * len(split.train_subsets) // MOST_JUDGED)
        train = self._lds(embeddings, split.train_targets[::some], split.train_subsets)
        if not len(split.held_subsets):
            return train, None
        return train, self._lds(embeddings, split.held_targets, split.held_subsets)

    def _lds(self, embeddings: torch.Tensor, targets: np.ndarray, columns: np.ndarray) -> float:
        members = membership([self.subsets[column] for column in columns], self.pool_size)
        rows = torch.from_numpy(self.pool_size + targets).to(embeddings.device)
        pool = embeddings[: self.pool_size]
        pooled = attention_pool_embeddings(embeddings[rows], pool, members).cpu().numpy()
        return float(lds_per_target(pooled, self.losses[np.ix_(targets, columns)])[0].mean())

    def _write_checkpoint(self) -> None:
        if self.run.checkpoints is not None and self.accelerator.is_main_process:
            write_checkpoint(self.run.checkpoints, self.state.checkpoint(self.run.fingerprint))


def _not_finite(what: str, step: int, value: float, settings: TrainSettings) -> InputError:
    """The error for a number of a step that is not finite."""
    return InputError(
        f"The {what} at step {step} came out as {value}: training diverged; lower the "
        f"learning_rate (now {settings.learning_rate:g}) or the scale_learning_rate (now "
        f"{settings.scale_learning_rate}) and start again in another folder."
    )


def _draw(rng: np.random.Generator, count: int, size: int | None) -> np.ndarray:
    if size is None or size >= count:
        return np.arange(count)
    return np.sort(rng.choice(count, size, replace=False))


def _graph_tokens(encoder: AirRepEncoder, device: torch.device) -> int:
    """For how many tokens, times layers, to keep activations."""
    if device.type != "cuda":
        return CPU_GRAPH_TOKENS
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(GRAPH_SHARE * free / (GRAPH_BYTES * encoder.projector.in_features))


def _chunk_tokens(encoder: AirRepEncoder, device: torch.device, graph_tokens: int) -> int:
    """Tokens of a chunk, whose activations all layers keep while its gradient is taken."""
    most = tokens_at_once(device, GPU_ENCODER_TOKENS)
    layers = int(getattr(encoder.base.config, "num_hidden_layers", 1))
    return most if device.type == "cpu" else int(np.clip(graph_tokens // layers, 2048, most))


def _trained(encoder: AirRepEncoder, settings: TrainSettings) -> dict[str, nn.Parameter]:
    """The parameters that train, by name; adapters are put on for `lora_rank`."""
    if settings.lora_rank is None:
        return trainable_parameters(encoder, settings.trainable_layers)
    add_lora(encoder, settings.lora_rank, settings.seed)
    named = trainable_parameters(encoder, settings.trainable_layers)
    return {
        name: parameter
        for name, parameter in named.items()
        if "lora_" in name or name.startswith(HEADS)
    }
