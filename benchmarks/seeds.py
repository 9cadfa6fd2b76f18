"""Learned encoders of several seeds against gradient methods, and both together.

    airrep labels --config configs/minimix.yaml
    python benchmarks/seeds.py --config configs/minimix.yaml --variants base,text_alone
    python benchmarks/seeds.py --config configs/minimix.yaml --variants distilled \
        --distil.teacher logra --final

Trains the encoder of a run's configuration once a seed and variant, and scores the run's targets by
the gradient methods. Without `--final` it says how good the encoders are on the training labels
that each held out, which is what variants are chosen by; with it the test labels are read: LDS of
the encoders, of the gradient methods and of ensembles, whose weights are fitted on held-out
training labels. 95% intervals are bootstrapped over targets and subsets. Everything made is kept
in the folder `seeds` of the run, under its settings, so a stopped benchmark goes on; delete it to
start again. The methods' parameters are those that `airrep tune` chose, if it ran.
"""

import json
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from jsonargparse import ArgumentParser

from airrep.attributor import Attributor
from airrep.attributors import method_class
from airrep.attributors.ensemble import fit_weights, mix, reference_subsets, standardise
from airrep.config import RunConfig, check_methods
from airrep.device import pick_device
from airrep.distillation import Lesson, distil_encoder, taught_settings
from airrep.encoder import sharing_means
from airrep.examples import Example
from airrep.holdout import held_out_labels
from airrep.label_store import Labels
from airrep.metrics import Resamples, bootstrap_lds, interval, lds_per_target, resampled_lds
from airrep.pooling import membership, pool_scores
from airrep.provenance import git_revision, installed_versions, write_json_atomic
from airrep.run_folder import RunFolder
from airrep.run_methods import (
    fingerprint_models,
    make_methods,
    method_arguments,
    needs_warm_up,
)
from airrep.train_settings import TrainSettings
from airrep.trainer import train_encoder
from airrep.tuning import WITHOUT_EFFECT
from airrep.weights import fingerprint_weights, resolve_model
from data_builders.warm_up import warm_up


@dataclass(frozen=True)
class Variant:
    """A change of the configuration's training, and whether a teacher comes first."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    distils: bool = False


VARIANTS = {
    "base": Variant(),
    "text_alone": Variant({"response_words": False}),
    "no_marks": Variant({"marks": False}),
    "reliability": Variant({"target_weighting": "reliability"}),
    "dropout": Variant({"dropout": True}),
    "average": Variant({"average": 0.8}),
    "slow": Variant({"learning_rate": 5e-5}),
    "distilled": Variant(distils=True),
}


class Bench:
    """A run's data, and what was made of it so far."""

    def __init__(self, config: RunConfig, options: SimpleNamespace) -> None:
        self.config, self.options = config, options
        folder = RunFolder(Path(config.output))
        self.folder, self.warm_up = folder.path / "seeds", folder.warm_up
        train, test = folder.open_labels("train"), folder.open_labels("test")
        self.pool, self.targets = folder.read_labelled("train", train)
        _, self.tests = folder.read_labelled("test", test)
        self.labels, self.test_labels = train.read(), test.read()
        self.device = pick_device(config.device)
        base = resolve_model(config.encoder)
        self.new_encoder, self.encoder_fingerprint = sharing_means(base), fingerprint_weights(base)
        self.made: dict[str, Attributor] = {}
        self.files: dict[tuple[str, int], Path] = {}
        self.folder.mkdir(exist_ok=True)

    @cached_property
    def everyone(self) -> list[Example]:
        """The training targets, then the test targets."""
        return [*self.targets, *self.tests]

    def settings(self, variant: str, seed: int) -> TrainSettings:
        changes = VARIANTS[variant].settings
        return replace(self.config.train, seed=seed, checkpoint_every=0, **changes)

    def method(self, name: str, seed: int) -> np.ndarray:
        """A method's scores (training and test targets, pool); the seed is for what it learns."""
        if (name, seed) not in self.files:
            self.files[name, seed] = self._scored(name, seed)
        return np.load(self.files[name, seed])

    def _arguments(self, name: str, seed: int) -> dict[str, dict[str, Any]]:
        config = replace(self.config, train=replace(self.config.train, seed=seed))
        if needs_warm_up(config, [name]) and not self.warm_up.exists():
            warm_up(config)
        return method_arguments(config, [name])

    def _fitted(self, name: str, arguments: Mapping[str, dict[str, Any]]) -> Attributor:
        attributor = self.made.setdefault(name, make_methods(arguments)[name])
        for given, value in arguments[name].items():  # of this seed; what it has read stays
            setattr(attributor, given, value)
        return attributor.fit(self.pool)

    def _scored(self, name: str, seed: int) -> Path:
        learns = "labels" in signature(method_class(name)).parameters
        arguments = self._arguments(name, seed)
        decides = [deciding(arguments[name]), fingerprint_models(arguments)]
        path = self._path(f"{name}-{seed}" if learns else name, decides)
        if not path.exists():
            start = time.perf_counter()
            attributor = self._fitted(name, arguments)
            fitted = time.perf_counter()
            scores = attributor.score(self.everyone)
            about = {
                "fit_seconds": fitted - start,
                "score_seconds": time.perf_counter() - fitted,
                "bytes_per_example": attributor.bytes_per_example,
            }
            self._write(path, about, scores)
        return path

    def pooled(self, name: str, seed: int, rows: slice | np.ndarray, labels: Labels) -> np.ndarray:
        """A method's standardised scores (rows of targets, subsets): by the pooling that the
        configuration gives it, or by attention, if it can."""
        own = self.config.evaluate.params.get(name, {})
        pooling = own.get("pooling", method_class(name).poolings[-1])
        return pooled(self.method(name, seed)[rows], labels, pooling)

    def encoder(self, variant: str, seed: int) -> tuple[dict[str, Any], np.ndarray]:
        """How the training went, and embeddings (pool, training and test targets)."""
        settings = self.settings(variant, seed)
        decides = [deciding(asdict(settings)), self.labels.fingerprint, self.encoder_fingerprint]
        distil = self.config.distil if VARIANTS[variant].distils else None
        if distil is not None:
            arguments = self._arguments(distil.teacher, seed)
            decides += [asdict(distil), deciding(arguments[distil.teacher])]
            decides.append(fingerprint_models(arguments))
        path = self._path(f"{variant}-{seed}", decides)
        if not path.exists():
            accelerator = Accelerator()
            start = time.perf_counter()
            encoder = self.new_encoder()
            about: dict[str, Any] = {}
            if distil is not None:
                lesson = Lesson.choose(self.pool, self.targets, self.labels, settings, distil)
                scores = lesson.scores(self._fitted(distil.teacher, arguments))
                start = time.perf_counter()
                taught = distil_encoder(
                    encoder, lesson, scores, settings, distil, None, accelerator
                )
                encoder, settings = taught.encoder, taught_settings(settings)
                about["distil_seconds"] = time.perf_counter() - start
                about["distil_correlation"] = taught.validation_lds
            result = train_encoder(
                encoder, self.pool, self.targets, self.labels, settings, None, accelerator
            )
            last = result.history[-1]
            about |= {
                "held_out_lds": result.validation_lds,
                "best_step": result.best_step,
                "steps": last["step"],
                "seconds": time.perf_counter() - start,
                "training_seconds": last["seconds"],
                "best_seconds": result.history[result.best_step]["seconds"],
                "peak_memory_gib": last["peak_memory_gib"],
                "held_out_curve": [
                    [entry["step"], entry["seconds"], entry["validation_lds"]]
                    for entry in result.history
                    if entry["validation_lds"] is not None
                ],
                "settings": asdict(settings),
            }
            embeddings = result.encoder.encode([*self.pool, *self.everyone]).numpy()
            self._write(path, about, embeddings)
        return json.loads(path.with_suffix(".json").read_text(encoding="utf-8")), np.load(path)

    def learned(self, variant: str, seed: int) -> np.ndarray:
        """An encoder's scores (training and test targets, pool)."""
        _, embeddings = self.encoder(variant, seed)
        pool, others = np.split(embeddings, [len(self.pool)])
        return others @ pool.T

    def held_out(
        self, variant: str, seed: int, methods: Sequence[str]
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """Scores of an encoder and of methods for what the encoder's training held out, and the
        losses there."""
        rows, held = held_out_labels(self.labels, self.settings(variant, seed))
        learned = pooled(self.learned(variant, seed)[rows], held)
        return [learned, *(self.pooled(name, seed, rows, held) for name in methods)], held.losses

    def weights(self, variant: str, seed: int, methods: Sequence[str]) -> np.ndarray:
        """Weights of an encoder and of methods, fitted on what the encoder's training held out."""
        return fit_weights(*self.held_out(variant, seed, methods))

    def _path(self, name: str, decides: Any) -> Path:
        """The file of what is made by these settings."""
        text = json.dumps(decides, sort_keys=True, default=str)
        return self.folder / f"{name}-{sha256(text.encode()).hexdigest()[:8]}.npy"

    def _write(self, path: Path, about: dict[str, Any], array: np.ndarray) -> None:
        write_json_atomic(
            path.with_suffix(".json"),
            {**about, "versions": installed_versions(), "git_revision": git_revision()},
        )
        unfinished = path.with_name(f".{path.name}")
        np.save(unfinished, array)
        unfinished.rename(path)


def deciding(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that change what comes of them, of members too."""
    kept = {key: value for key, value in arguments.items() if key not in WITHOUT_EFFECT}
    if "members" in kept:
        kept["members"] = [[name, deciding(own)] for name, own in kept["members"]]
    return kept


def main() -> None:
    """Makes what is missing, and prints the tables."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--config", action="config")
    parser.add_argument("--variants", default="base", help=f"of {', '.join(VARIANTS)}: a,b,c")
    parser.add_argument("--methods", default="logra", help="gradient and other methods: a,b,c")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--final", action="store_true", help="read the test labels")
    parser.add_class_arguments(RunConfig)
    values = vars(parser.instantiate(parser.parse_args()))
    values.pop("config")
    own = ("variants", "methods", "seeds", "final")
    options = SimpleNamespace(**{key: values.pop(key) for key in own})
    bench = Bench(RunConfig(**values), options)
    variants, methods = options.variants.split(","), options.methods.split(",")
    if unknown := [name for name in variants if name not in VARIANTS]:
        parser.error(f"there is no variant {unknown[0]!r}; choose from {', '.join(VARIANTS)}")
    if options.seeds < 1:
        parser.error("give at least one seed")
    if any(VARIANTS[name].distils for name in variants) and bench.config.distil is None:
        parser.error("name the method to distil from: --distil.teacher logra")
    check_methods(methods)
    print(f"{len(bench.labels.subsets)} training labels, {options.seeds} seeds, {bench.device}\n")
    print("| variant | held-out LDS, mean | each | best step | s to it | s in all | GiB |")
    print("|---|---|---|---|---|---|---|")
    for variant in variants:
        show_training(variant, [bench.encoder(variant, seed)[0] for seed in range(options.seeds)])
    show_held_out(bench, variants, methods, range(options.seeds))
    if options.final:
        show_test(bench, variants, methods, range(options.seeds))


def show_training(variant: str, runs: Sequence[Mapping[str, Any]]) -> None:
    """A row of the table of held-out training labels."""

    def mean(key: str) -> float:
        return float(np.mean([run[key] for run in runs]))

    each = ", ".join(f"{run['held_out_lds']:.3f}" for run in runs)
    print(
        f"| {variant} | {mean('held_out_lds'):.3f} | {each} | {mean('best_step'):.0f} "
        f"| {mean('best_seconds'):.0f} | {mean('seconds'):.0f} | {mean('peak_memory_gib'):.1f} |",
        flush=True,
    )


def show_held_out(
    bench: Bench, variants: Sequence[str], methods: Sequence[str], seeds: Sequence[int]
) -> None:
    """The table of methods and ensembles on what each seed held out of the training labels, by
    which the ensembles' weights are fitted too."""
    found = defaultdict(list)
    for seed in seeds:
        shown = {}
        for variant in variants:
            given, losses = bench.held_out(variant, seed, methods)
            shown |= dict(zip(methods, given[1:], strict=True))
            shown[f"{variant} with {', '.join(methods)}"] = mix(given, fit_weights(given, losses))
        for name, own in shown.items():
            found[name].append(float(lds_per_target(own, losses)[0].mean()))
    print("\n| method | held-out LDS, mean | each |\n|---|---|---|")
    for name, each in found.items():
        print(f"| {name} | {np.mean(each):.3f} | {', '.join(f'{one:.3f}' for one in each)} |")


def show_test(
    bench: Bench, variants: Sequence[str], methods: Sequence[str], seeds: Sequence[int]
) -> None:
    """The table of the test labels."""
    tests = slice(len(bench.targets), None)
    print("\n| method | LDS on test labels | each seed |\n|---|---|---|", flush=True)
    others = [
        [bench.pooled(name, seed, tests, bench.test_labels) for name in methods] for seed in seeds
    ]
    for name, scores in zip(methods, zip(*others, strict=True), strict=True):
        print(f"| {name} | {judged(scores, bench.test_labels)} |", flush=True)
    means = [np.mean(scores, axis=0) for scores in zip(*others, strict=True)]
    for variant in variants:
        learned = [pooled(bench.learned(variant, seed)[tests], bench.test_labels) for seed in seeds]
        weights = [bench.weights(variant, seed, methods) for seed in seeds]
        both = [
            mix([one, *some], own) for one, some, own in zip(learned, others, weights, strict=True)
        ]
        together = mix(learned, np.ones(len(learned)))
        mean = np.mean(weights, axis=0)
        shown = " ".join(f"{weight:.2f}" for weight in mean)
        rows = {
            variant: learned,
            f"{variant}, all seeds together": [together],
            f"{variant} with {', '.join(methods)} (weights {shown})": both,
            "all of these together": [mix([together, *means], mean)],
        }
        for name, scores in rows.items():
            print(f"| {name} | {judged(scores, bench.test_labels)} |", flush=True)
        first = [learned[0], both[0], *others[0]]
        drawn = resampled_lds(
            first,
            bench.test_labels.losses,
            Resamples.draw(bench.test_labels.losses.shape, 1000, np.random.default_rng(0)),
        )["both"]
        print("\nFirst seed, paired, 95% intervals:")
        print(f"- ensemble minus {variant}: {difference(drawn[1] - drawn[0])}")
        for name, one in zip(methods, drawn[2:], strict=True):
            print(f"- {variant} minus {name}: {difference(drawn[0] - one)}")


def difference(drawn: np.ndarray) -> str:
    """The mean of resampled differences, and their interval."""
    low, high = interval(drawn)
    return f"{drawn.mean():+.3f} ({low:+.3f} to {high:+.3f})"


def pooled(scores: np.ndarray, labels: Labels, pooling: str = "attention") -> np.ndarray:
    """Scores (T, N) as standardised scores (T, M) of the labels' subsets."""
    scores = np.asarray(scores, dtype=np.float32)
    reference = reference_subsets(labels.subsets, scores.shape[1])
    members = membership([*labels.subsets, *reference], scores.shape[1])
    both = pool_scores(torch.from_numpy(scores), members, pooling).numpy()
    return standardise(*np.split(both, [len(labels.subsets)], axis=1))


def judged(scores: Sequence[np.ndarray], labels: Labels) -> str:
    """Mean LDS of subsets' scores (T, M), the first one's interval, and each."""
    each = [float(lds_per_target(one, labels.losses)[0].mean()) for one in scores]
    low, high = bootstrap_lds(scores[0], labels.losses, 1000, np.random.default_rng(0))
    text = f"{np.mean(each):.3f} (first {low:.3f} to {high:.3f})"
    return f"{text} | {', '.join(f'{one:.3f}' for one in each)}"


if __name__ == "__main__":
    main()
