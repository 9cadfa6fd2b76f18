"""Labels of a store, trained again from a draw that its maker could not foresee."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np

from airrep.config import RunConfig
from airrep.examples import Example, InputError, fingerprint_examples
from airrep.label_manifest import check_same
from airrep.label_store import LabelStore, fingerprint_plan
from airrep.verification import (
    Comparison,
    compare_exact,
    compare_seeds,
    forged_bound,
    is_reproduced,
)
from airrep.weights import cache_folder, fingerprint_weights, resolve_model
from data_builders.finetune import FineTuner
from data_builders.labels import LabelJob, make_labels
from data_builders.recipes import Recipe

REPEATS = (0, 1)  # seeds that a store's labels have
NEW_SEED = 2  # the repeat that the verifier alone has

Agreement = Literal["auto", "exact", "seeds"]
Label = tuple[int, int]  # number of the subset, repeat
LoadTuner = Callable[[Sequence[Example], Sequence[Example]], FineTuner]
Train = Callable[[LabelStore, Sequence[Label]], None]


@dataclass(frozen=True)
class WantedLabels(LabelJob):
    """Labels of any number and repeat."""

    wanted: Sequence[Label] = ()

    def missing(self) -> list[Label]:
        done = {repeat: self.store.done(repeat) for _, repeat in self.wanted}
        return [label for label in dict.fromkeys(self.wanted) if label[0] not in done[label[1]]]


class Retrainer:
    """Trains for the verifier: in stores outside the run's folder, with one loaded model."""

    def __init__(
        self,
        config: RunConfig,
        store: LabelStore,
        pool: Sequence[Example],
        targets: Sequence[Example],
        load_tuner: LoadTuner,
        show_progress: bool,
    ) -> None:
        """Raises InputError where the configuration is not that of the store's labels."""
        self.about = {"lm": config.lm, "recipe": config.recipe.relevant(), "seed": config.seed}
        self.fingerprint = _fingerprint(config, store, pool, targets, self.about)
        self.pool, self.targets = pool, targets
        self.seed = config.seed
        self.tuner = cache(lambda: load_tuner(pool, targets))
        self.show_progress = show_progress
        self.made = self.reused = 0  # labels
        root = cache_folder()
        folder = _sha256(str(store.path.resolve()) + self._digest(store.subsets))
        self.work = root / "verification" / folder[:16]

    def open_store(self, name: str, plan: Sequence[np.ndarray]) -> LabelStore:
        path = self.work / f"{name}-{self._digest(plan)[:16]}"
        return LabelStore.create(path, self.fingerprint, plan, len(self.targets), self.about)

    def train(self, store: LabelStore, wanted: Sequence[Label]) -> None:
        """Makes the labels wanted that the store lacks."""
        job = WantedLabels(store, np.arange(len(self.targets)), wanted=wanted)
        self.reused += len(set(wanted)) - len(job.missing())
        self.made += make_labels([job], self.tuner, self.seed, show_progress=self.show_progress)

    def _digest(self, plan: Sequence[np.ndarray]) -> str:
        return _sha256(f"{sorted(self.fingerprint.items())} {fingerprint_plan(plan)}")


def _fingerprint(
    config: RunConfig,
    store: LabelStore,
    pool: Sequence[Example],
    targets: Sequence[Example],
    about: Mapping[str, Any],
) -> dict[str, str]:
    """What the retrained labels are of; InputError where the store's are of something else."""
    config.recipe.check()
    imported = config.imported is not None
    if imported and config.lm == RunConfig.lm and config.recipe == Recipe():
        raise InputError(
            "Imported labels do not say which model and recipe made them, and the configuration "
            "names neither; write lm and recipe into it, and their labels can be trained again."
        )
    examples = {
        "examples": fingerprint_examples(pool),
        "targets": fingerprint_examples(targets),
    }
    made_with = {
        "lm": fingerprint_weights(resolve_model(config.lm)),
        "recipe": config.recipe.fingerprint(),
        "seed": _sha256(str(config.seed)),
    }
    known = store.fingerprint
    claimed = {key: known[key] for key in made_with} if imported else made_with
    check_same(
        store.path,
        store.manifest,
        {**examples, **claimed, "plan": known["plan"]},
        len(targets),
        about,
    )
    return examples | made_with


def whole_labels(store: LabelStore, repeats: Sequence[int] = REPEATS) -> dict[Label, np.ndarray]:
    """Losses (T,), in double precision, of every label that lacks no target's, in order."""
    found = {}
    for repeat in repeats:
        labels = store.read(repeat)
        for number, losses in zip(labels.numbers.tolist(), labels.losses.T, strict=True):
            if np.isfinite(losses).all():
                found[number, repeat] = losses.astype(float)
    return found


def draw_labels(labels: Sequence[Label], count: int, entropy: int) -> list[Label]:
    """Labels drawn without replacement; a larger count begins with those of a smaller one.

    Raises InputError for a count that is not from 1 to their number.
    """
    if not 1 <= count <= len(labels):
        raise InputError(f"count is {count}, of {len(labels)} whole labels; give 1 to that many.")
    order = np.random.default_rng(entropy).permutation(len(labels))
    return [labels[place] for place in order[:count]]


def check_labels(
    known: Mapping[Label, np.ndarray],
    drawn: Sequence[Label],
    again: LabelStore,
    train: Train,
    agreement: Agreement,
    tolerance: float,
    confidence: float,
) -> dict[str, Any]:
    """Trains the drawn ones of the known labels into `again`, and holds those known against them.

    Returns how each compares, how many are inconsistent, and which share of the known labels may
    be so, at most, with `confidence`. Raises InputError as `compare_seeds` does.
    """
    train(again, drawn)
    stored = np.stack([known[label] for label in drawn], axis=1)
    rerun = _losses(again, drawn)
    is_exact = agreement == "exact" or (
        agreement == "auto" and is_reproduced(stored, rerun, tolerance)
    )
    if is_exact:
        compared = compare_exact(stored, rerun, tolerance)
    else:
        other_seed = [(number, NEW_SEED) for number, _ in drawn]
        train(again, other_seed)
        compared = compare_seeds(stored, rerun, _losses(again, other_seed), 1 - confidence)
    inconsistent = int((~compared.consistent).sum())
    return {
        "agreement": compared.kind,
        "limits": {name: list(limit) for name, limit in compared.limits.items()},
        "false_alarm": 0.0 if is_exact else 1 - confidence,
        "labels": len(known),
        "inconsistent": inconsistent,
        "inconsistent_at_most": forged_bound(len(known), len(drawn), inconsistent, confidence),
        "reruns": [
            _row(compared, place, number, repeat) for place, (number, repeat) in enumerate(drawn)
        ],
    }


def describe_labels(labels: Mapping[str, Any], confidence: float) -> Iterator[str]:
    """What `check_labels` returns, in lines for the terminal."""
    for row in labels["reruns"]:
        values = ", ".join(f"{name} {value:.3g}" for name, value in row["values"].items())
        verdict = "consistent" if row["consistent"] else "INCONSISTENT"
        yield f"subset {row['subset']}, repeat {row['repeat']}: {values}: {verdict}"
    limits = ", ".join(
        f"{name} {low:.3g} to {high:.3g}" for name, (low, high) in labels["limits"].items()
    )
    yield f"limits ({labels['agreement']}): {limits}"
    yield (
        f"{len(labels['reruns'])} of {labels['labels']} labels held against training again, "
        f"{labels['inconsistent']} inconsistent: at most {labels['inconsistent_at_most']:.1%} of "
        f"all labels are, with confidence {confidence:g}"
    )


def _row(compared: Comparison, place: int, number: int, repeat: int) -> dict[str, Any]:
    return {
        "subset": number,
        "repeat": repeat,
        "values": {name: float(found[place]) for name, found in compared.values.items()},
        "consistent": bool(compared.consistent[place]),
    }


def _losses(store: LabelStore, labels: Sequence[Label]) -> np.ndarray:
    """Losses (T, labels)."""
    known = whole_labels(store, sorted({repeat for _, repeat in labels}))
    return np.stack([known[label] for label in labels], axis=1)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
