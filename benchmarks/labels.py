"""Label engines side by side: seconds a label, the floor, agreement, and what `plan` foretold.

    python benchmarks/labels.py --config configs/tiny.yaml
    python benchmarks/labels.py --config configs/demo.yaml --engines eager cached_trunk batched:4
    python benchmarks/labels.py --config configs/minimix.yaml --recipe.precision bf16 \\
        --engines script eager batched:1 batched:8 batched:16 --labels 16 --slow-labels 2

Every engine makes the labels of the same first training subsets, in one process, after one label
that is not timed; those that train one model at a time make `--slow-labels` of them. `batched:8`
trains 8 models at once, `batched:8+compile` with compiled blocks (a number of labels that 8 does
not divide times compiling for the rest, too). `script` is what a fine-tuning script does that
knows nothing of labels: it loads the model for every subset, pads every batch, and computes logits
at every position. The first engine named is what the others are compared with: rank correlation
over targets (mean over subsets) and mean absolute difference; the last line gives the same between
two seeds of one engine, which is what there is to lose. The floor is a label's operations at the
rate of large matrix products in the recipe's precision, measured in the same run. `plan` is what
`airrep plan` foretells for the engine, over what it took.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jsonargparse import ArgumentParser
from scipy.stats import spearmanr
from torch.nn import functional as F

from airrep.config import RunConfig
from airrep.device import peak_memory, pick_device
from airrep.examples import TokenizedExample, lm_template, pad, tokenize_examples
from airrep.lm import find_blocks, load_lm
from airrep.weights import plain_weights, resolve_model
from data_builders.finetune import FineTuner
from data_builders.plan import plan_labels
from data_builders.recipes import Recipe, batches, schedule
from data_builders.run_data import read_run_data


@dataclass
class Made:
    """What one engine made: losses (labels, targets), seconds a label, foretold ones, GiB."""

    losses: np.ndarray
    seconds: float
    setup: float
    memory: float
    foretold: float


class Setting:
    """One run's data as tokens, and what loads its model."""

    def __init__(
        self, config: RunConfig, labels: int, slow_labels: int, targets: int, no_plan: bool
    ) -> None:
        data = read_run_data(config)
        self.config, self.recipe = config, config.recipe
        self.path = plain_weights(resolve_model(config.lm))
        self.device = pick_device(config.device)
        self.subsets = data.subsets["train"][:labels]
        self.slow_labels = slow_labels or labels
        self.plans = not no_plan
        model, tokenizer = load_lm(self.path, self.device)
        template = lm_template(tokenizer, self.recipe.template)
        chosen = [*data.targets["train"], *data.targets["test"]][: targets or None]
        self.pool, self.targets = (
            tokenize_examples(examples, tokenizer, template, self.recipe.max_length)
            for examples in (data.pool, chosen)
        )
        self.operations = _operations(model, self)

    def generators(self, count: int, seed: int = 0) -> list[np.random.Generator]:
        return [np.random.default_rng([seed, number]) for number in range(count)]

    def make(self, name: str, seed: int = 0) -> Made:
        """The labels of an engine, or of `script`."""
        if name == "script":
            return self._by_script(seed)
        plain, _, compiles = name.partition("+")
        engine, _, models = plain.partition(":")
        if compiles not in ("", "compile"):
            raise SystemExit(f"{name}: what may follow the engine is +compile")

        def tuner(
            pool: Sequence[TokenizedExample], targets: Sequence[TokenizedExample]
        ) -> FineTuner:
            model, _ = load_lm(self.path, self.device)
            most = int(models) if models else None
            return FineTuner(
                model,
                pool,
                targets,
                self.recipe,
                engine=engine,  # type: ignore[arg-type]
                most_models=most,
                compiles=bool(compiles),
            )

        foretold = float("nan")
        if self.plans:
            size = [len(self.subsets)]
            foretold = plan_labels(
                tuner, self.pool, [self.targets], self.subsets[0], size
            ).seconds_per_label
        _forget_peak(self.device)
        start = time.perf_counter()
        made = tuner(self.pool, self.targets)
        setup = time.perf_counter() - start
        rows, size = np.arange(len(self.targets)), made.most_models
        subsets = self.subsets if size > 1 else self.subsets[: self.slow_labels]
        generators = self.generators(len(subsets), seed)
        warm = [np.random.default_rng(0)] * size
        made.losses_of([self.subsets[0]] * size, rows[:64], warm)
        start = time.perf_counter()
        parts = [
            made.losses_of(subsets[i : i + size], rows, generators[i : i + size])
            for i in range(0, len(subsets), size)
        ]
        seconds = (time.perf_counter() - start) / len(subsets)
        print(f"# {name}: {made.engine}, {size} at once {' '.join(made.notes)}", flush=True)
        memory = peak_memory(torch.device(self.device)) / 2**30
        return Made(np.concatenate(parts), seconds, setup, memory, foretold)

    def _by_script(self, seed: int) -> Made:
        _forget_peak(self.device)
        losses = []
        subsets = self.subsets[: self.slow_labels]
        start = time.perf_counter()
        for subset, generator in zip(subsets, self.generators(len(subsets), seed), strict=True):
            losses.append(self._fine_tune(subset, generator))
        seconds = (time.perf_counter() - start) / len(subsets)
        memory = peak_memory(torch.device(self.device)) / 2**30
        return Made(np.stack(losses), seconds, 0.0, memory, float("nan"))

    def _fine_tune(self, subset: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        recipe = self.recipe
        model, _ = load_lm(self.path, self.device)
        if recipe.train != "all":
            raise SystemExit("script trains all weights; give --recipe.train all")
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )
        plan = batches(subset, recipe, generator)
        for step, rows in enumerate(plan):
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * schedule(step, len(plan), recipe)
            token_losses, counted = self._token_losses(model, [self.pool[row] for row in rows])
            (token_losses.sum() / counted.sum()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
        measured = []
        with torch.no_grad():
            for first in range(0, len(self.targets), recipe.batch_size):
                part = self.targets[first : first + recipe.batch_size]
                token_losses, counted = self._token_losses(model, part)
                measured.append((token_losses.sum(dim=1) / counted.sum(dim=1)).cpu().numpy())
        return np.concatenate(measured)

    def _token_losses(
        self, model: torch.nn.Module, examples: Sequence[TokenizedExample]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses (B, L - 1) of response tokens, 0 elsewhere, and which those are."""
        ids, mask = (tensor.to(self.device) for tensor in pad(examples, pad_id=0))
        with torch.autocast(
            torch.device(self.device).type, torch.bfloat16, enabled=self.recipe.precision == "bf16"
        ):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        starts = torch.tensor([max(e.response_start, 1) for e in examples], device=ids.device)
        place = torch.arange(1, ids.shape[1], device=ids.device)
        counted = (place >= starts[:, None]) & mask[:, 1:].bool()
        losses = F.cross_entropy(logits[:, :-1].float().mT, ids[:, 1:], reduction="none")
        return losses * counted, counted


def main() -> None:
    """Runs the comparison and prints its table."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--config", action="config")
    parser.add_argument("--engines", nargs="+", default=["eager", "batched"])
    parser.add_argument("--labels", type=int, default=4)
    parser.add_argument("--slow-labels", type=int, default=0, help="0: as many as the others")
    parser.add_argument("--targets", type=int, default=0, help="0: all of both splits")
    parser.add_argument("--no-plan", action="store_true", help="leave out what plan foretells")
    parser.add_class_arguments(RunConfig)
    values = vars(parser.instantiate(parser.parse_args()))
    values.pop("config")
    own = ("engines", "labels", "slow_labels", "targets", "no_plan")
    engines, labels, slow_labels, count, no_plan = (values.pop(key) for key in own)
    setting = Setting(RunConfig(**values), labels, slow_labels, count, no_plan)
    rate = product_rate(setting.device, setting.recipe)
    made = {name: setting.make(name) for name in engines}
    first, floor = made[engines[0]], setting.operations / rate
    print(f"{labels} labels, {len(setting.targets)} targets, {setting.device}, {setting.recipe}")
    print(
        f"a label: {setting.operations:.2e} operations, at {rate / 1e12:.3g} TFLOP/s {floor:.3g} s"
    )
    print(
        f"{'engine':18s}  s/label  ratio  TFLOP/s  floor  rank corr.  |diff|  setup s    GiB  plan"
    )
    for name, result in made.items():
        reached = setting.operations / result.seconds
        print(
            f"{name:18s} {result.seconds:8.3f} {first.seconds / result.seconds:6.2f} "
            f"{reached / 1e12:8.3f} {reached / rate:6.0%} {_agreement(first, result)} "
            f"{result.setup:8.1f} {result.memory:6.1f} {result.foretold / result.seconds:5.2f}"
        )
    last = engines[-1]
    print(f"two seeds of {last}: {_agreement(made[last], setting.make(last, seed=1))}")


def product_rate(device: str, recipe: Recipe, size: int = 4096) -> float:
    """Operations a second of the best of five large matrix products in the recipe's precision."""
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        float((a @ b)[0, 0])  # waits for the device
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def _agreement(one: Made, other: Made) -> str:
    count = min(len(one.losses), len(other.losses))  # the slow ones made fewer
    a, b = one.losses[:count], other.losses[:count]
    rho = np.mean([spearmanr(*pair).statistic for pair in zip(a, b, strict=True)])
    return f"{rho:11.4f} {np.abs(a - b).mean():7.4f}"


def _forget_peak(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()


def _operations(model: torch.nn.Module, setting: Setting) -> float:
    """Multiplications and additions of one label without padding, by whatever engine runs only
    what has to run.

    A weight of a block costs 2 a token forward, 2 more for the gradient of its input and 2 for its
    own where it trains; frozen blocks below the first that trains are left out, and so are the
    scores of attention. The head counts at response tokens.
    """
    blocks = find_blocks(model)
    assert blocks is not None
    recipe, subset = setting.recipe, setting.subsets[0]
    depth = recipe.layers if recipe.train == "last_layers" else len(blocks)
    block = sum(parameter.numel() for parameter in blocks[-1].parameters())
    head = model.get_output_embeddings().weight.numel()  # type: ignore[operator]
    pool = [setting.pool[row] for row in subset]

    def tokens(examples: Sequence[TokenizedExample]) -> int:
        return sum(map(len, examples))

    def answers(examples: Sequence[TokenizedExample]) -> int:
        return sum(len(example) - max(example.response_start, 1) for example in examples)

    in_block = 4 if recipe.train == "lora" else 6
    in_head = 6 if recipe.train == "all" else 4
    return (
        in_block * recipe.epochs * tokens(pool) + 2 * tokens(setting.targets)
    ) * block * depth + (
        in_head * recipe.epochs * answers(pool) + 2 * answers(setting.targets)
    ) * head


if __name__ == "__main__":
    main()
