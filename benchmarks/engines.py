"""Label engines side by side: seconds a label, operations, and agreement with the plain loop.

    python benchmarks/engines.py --config configs/demo.yaml --engines eager cached_trunk batched:4
    python benchmarks/engines.py --config configs/minimix.yaml --recipe.precision bf16 \\
        --engines eager batched:1 batched:8 batched:16

Every engine makes the labels of the same first training subsets, in one process, after one label
that is not timed. `batched:8` trains 8 models at once. Agreement is with the first engine named:
rank correlation over targets (mean over subsets) and mean absolute difference; the last line
gives the same between two seeds of that engine, which is what there is to lose.
"""

import time
from dataclasses import dataclass

import numpy as np
import torch
from jsonargparse import ArgumentParser
from scipy.stats import spearmanr

from airrep.config import RunConfig
from airrep.device import pick_device
from airrep.examples import lm_template, tokenize_examples
from airrep.lm import find_blocks, load_lm
from airrep.weights import plain_weights, resolve_model
from data_builders.finetune import FineTuner
from data_builders.run_data import read_run_data


@dataclass
class Made:
    """What one engine made: losses (labels, targets), seconds a label, bytes at most."""

    losses: np.ndarray
    seconds: float
    setup: float
    memory: float


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--config", action="config")
    parser.add_argument("--engines", nargs="+", default=["eager", "batched"])
    parser.add_argument("--labels", type=int, default=4)
    parser.add_argument("--targets", type=int, default=0, help="0: all of both splits")
    parser.add_class_arguments(RunConfig)
    values = vars(parser.instantiate(parser.parse_args()))
    values.pop("config")
    engines, labels, count = (values.pop(key) for key in ("engines", "labels", "targets"))
    config = RunConfig(**values)
    data = read_run_data(config)
    device = pick_device(config.device)
    targets = [*data.targets["train"], *data.targets["test"]][: count or None]
    subsets = data.subsets["train"][:labels]

    def make(name: str, seed: int = 0) -> Made:
        engine, _, models = name.partition(":")
        model, tokenizer = load_lm(plain_weights(resolve_model(config.lm)), device)
        template = lm_template(tokenizer, config.recipe.template)
        pool, measured = (
            tokenize_examples(examples, tokenizer, template, config.recipe.max_length)
            for examples in (data.pool, targets)
        )
        if device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        tuner = FineTuner(
            model,
            pool,
            measured,
            config.recipe,
            engine=engine,  # type: ignore[arg-type]
            most_models=int(models) if models else None,
        )
        setup = time.perf_counter() - start
        rows, size = np.arange(len(measured)), tuner.most_models
        generators = [np.random.default_rng([seed, number]) for number in range(labels)]
        warm = [np.random.default_rng(0)] * size
        tuner.losses_of([subsets[0]] * size, rows[:64], warm)
        start = time.perf_counter()
        parts = [
            tuner.losses_of(subsets[i : i + size], rows, generators[i : i + size])
            for i in range(0, labels, size)
        ]
        seconds = (time.perf_counter() - start) / labels
        memory = torch.cuda.max_memory_allocated() / 2**30 if device.startswith("cuda") else 0.0
        if not operations:
            operations.append(_operations(tuner, subsets[0], config))
        print(f"# {name}: {tuner.engine}, {size} at once {' '.join(tuner.notes)}", flush=True)
        return Made(np.concatenate(parts), seconds, setup, memory)

    operations: list[float] = []
    made = {name: make(name) for name in engines}
    first = made[engines[0]]
    print(f"{labels} labels, {len(targets)} targets, {device}, {config.recipe}")
    print("engine          s/label  ratio  TFLOP/s  rank corr.  |diff|  setup s  GPU GiB")
    for name, result in made.items():
        rate = operations[0] / result.seconds / 1e12
        print(
            f"{name:14s} {result.seconds:8.3f} {first.seconds / result.seconds:6.2f} {rate:8.3f} "
            f"{_agreement(first, result)} {result.setup:8.1f} {result.memory:8.1f}"
        )
    print(f"two seeds of {engines[0]}: {_agreement(first, make(engines[0], seed=1))}")


def _agreement(one: Made, other: Made) -> str:
    pairs = zip(one.losses, other.losses, strict=True)
    rho = np.mean([spearmanr(a, b).statistic for a, b in pairs])
    return f"{rho:11.4f} {np.abs(one.losses - other.losses).mean():7.4f}"


def _operations(tuner: FineTuner, subset: np.ndarray, config: RunConfig) -> float:
    """Multiplications and additions of one label by the plain loop without padding.

    A weight of a block costs 2 a token forward, 2 more for the gradient of its input and 2 for its
    own where it trains; the head counts at response tokens. Attention scores are left out.
    """
    blocks = find_blocks(tuner.respond.model)
    assert blocks is not None
    trained = config.recipe.train == "all"
    depth = config.recipe.layers if config.recipe.train == "last_layers" else len(blocks)
    block = sum(p.numel() for p in blocks[-1].parameters()) / max(1, tuner.models)
    head = tuner.respond.model.get_output_embeddings().weight  # type: ignore[operator]
    vocabulary = head.shape[-2] * head.shape[-1]
    seen = config.recipe.epochs * sum(len(tuner.examples[row]) for row in subset)
    answered = config.recipe.epochs * int(tuner.responses[subset].sum())
    measured = tuner.examples[tuner.pool_size :]
    passes = 6 if trained or config.recipe.train == "last_layers" else 4
    return (passes * seen + 2 * sum(map(len, measured))) * block * depth + (
        (6 if trained else 4) * answered + 2 * int(tuner.responses[tuner.pool_size :].sum())
    ) * vocabulary


if __name__ == "__main__":
    main()
