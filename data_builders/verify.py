"""`airrep verify`: labels are trained again, scores are tried on subsets that nobody has seen."""

import hashlib
import json
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from airrep.config import RunConfig
from airrep.examples import InputError
from airrep.label_store import Labels, LabelStore, fingerprint_labels
from airrep.provenance import git_revision, installed_versions, write_json_atomic
from airrep.run_folder import RunFolder
from airrep.verification import LEAST, ClaimKind, reruns_needed
from data_builders.run_data import SPLITS
from data_builders.verify_claims import (
    ClaimedScores,
    check_claims,
    check_enough,
    describe_claim,
    fresh_plan,
    read_claims,
)
from data_builders.verify_labels import (
    REPEATS,
    Agreement,
    LoadTuner,
    Retrainer,
    check_labels,
    describe_labels,
    draw_labels,
    whole_labels,
)


@dataclass(frozen=True)
class VerifySettings:
    """What is verified, and how surely.

    Args:
        split: whose labels: "test" or "train". Scores are verified with "test" only.
        share: share of forged labels that is to be found; decides how many are trained again.
        confidence: chance of finding it, and of not refusing a true claim.
        count: labels to train again, in place of what share and confidence need.
        agreement: "exact": labels must come out the same; "seeds": as alike as two seeds of one
            subset; "auto": exact where most labels come out the same, as on a machine of the
            same kind.
        tolerance: root mean square difference in nats that is rounding.
        methods: a,b,c: methods whose scores are verified, or .npy or .safetensors files of
            scores; all in results.json when not given.
        fresh: new subsets to try scores on; 0 leaves scores alone.
        epsilon: how much too good a claim may be: of LDS and gap; as a share, of slope.
        lds: LDS claimed for the one method given, in place of what results.json says.
        slope: its slope, nats that the loss falls by for a unit of score.
        gap: its error in nats² over that of the best linear score, as a share of the labels'
            variance; 0 claims to be the best.
        entropy: number that decides the draws, from an earlier verification.json; drawn from the
            operating system when not given.
    """

    split: Literal["test", "train"] = "test"
    share: float = 0.05
    confidence: float = 0.95
    count: int | None = None
    agreement: Agreement = "auto"
    tolerance: float = 0.01
    methods: str | None = None
    fresh: int = 32
    epsilon: float = 0.05
    lds: float | None = None
    slope: float | None = None
    gap: float | None = None
    entropy: int | None = None

    def check(self) -> None:
        """Raises InputError for a value out of range, naming it."""
        for name in ("share", "confidence"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; give more than 0, less than 1.")
        for name, known in (("split", SPLITS), ("agreement", get_args(Agreement))):
            if getattr(self, name) not in known:
                raise InputError(f"{name} is {getattr(self, name)!r}; give {' or '.join(known)}.")
        if self.count is not None and self.count < 1:
            raise InputError(f"count is {self.count}; give at least 1.")
        for name in ("tolerance", "epsilon", "entropy"):
            if (getattr(self, name) or 0) < 0:
                raise InputError(f"{name} is {getattr(self, name)}; give 0 or more.")
        if self.fresh and self.fresh < LEAST:
            raise InputError(f"fresh is {self.fresh}; give at least {LEAST}, or 0 for none.")
        if self.gap is not None and self.slope is None:
            raise InputError("A gap is that of predictions in nats; give the slope of the scores.")

    def tries_scores(self) -> bool:
        """Whether scores are verified; InputError where they are named and cannot be."""
        tries = self.split == "test" and self.fresh > 0
        if not tries and (self.methods or self.claims):
            raise InputError("Scores are verified with split test and fresh subsets; ask for both.")
        return tries

    @property
    def claims(self) -> dict[ClaimKind, float]:
        given: dict[ClaimKind, float | None] = {
            "lds": self.lds,
            "slope": self.slope,
            "gap": self.gap,
        }
        return {kind: value for kind, value in given.items() if value is not None}


def verify(
    config: RunConfig,
    settings: VerifySettings,
    load_tuner: LoadTuner,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Verifies a run's labels and scores; writes verification.json and returns what is in it.

    `accepted` is the verdict: no label that was trained again is inconsistent, and no claim is
    more than epsilon better than what fresh subsets say. A claim that rests on too few labels is
    neither accepted nor refused. Labels and subsets are drawn from
    entropy of the operating system, after a hash of labels and scores is taken, so that their
    maker could not foresee them; where labels or scores have changed since, they are drawn anew.
    What is trained is kept below $AIRREP_CACHE (~/.cache/airrep), not in the run's folder, which
    is the maker's: a killed verification goes on from there. `load_tuner` gives the language
    model, ready for some pool and targets; it is called once, and only when a label is missing.
    Raises InputError for settings out of range, another model, recipe or data than the labels
    are of, and labels or scores that are not there.
    """
    settings.check()
    folder = RunFolder(Path(config.output))
    pool, targets = folder.read_pool(), folder.read_targets(settings.split)
    store = folder.open_labels(settings.split)
    known, stored = whole_labels(store), store.read()
    if not known:
        raise InputError(f"{store.path} has no label that lacks no loss; make labels first.")
    count = settings.count or reruns_needed(len(known), settings.share, settings.confidence)
    trainer = Retrainer(config, store, pool, targets, load_tuner, show_progress)
    scores: list[ClaimedScores] = []
    if settings.tries_scores():
        scores = read_claims(folder, pool, targets, settings.methods, settings.claims)
    labels_sha256 = fingerprint_labels(store, map(store.read, REPEATS))
    commitment = _commitment(labels_sha256, scores)
    drawing = trainer.work / "draw.json"
    entropy = _entropy(drawing, commitment, settings.entropy)
    drawn = draw_labels(list(known), count, entropy)
    again = trainer.open_store("again", store.subsets)
    # Before the training, not after it. Scores are tried on first seeds alone.
    seen = {number for number, repeat in drawn if repeat == 0} | set(again.read().numbers.tolist())
    check_enough(scores, len(seen))
    fresh = f" and {settings.fresh} fresh subsets" if scores else ""
    print(f"drawn: {count} of {len(known)} labels{fresh}; what is not in the cache is trained now")
    started = time.perf_counter()
    labels = check_labels(
        known,
        drawn,
        again,
        trainer.train,
        settings.agreement,
        settings.tolerance,
        settings.confidence,
    )
    claims = _try_scores(settings, scores, trainer, store, stored, again, entropy)
    found = {
        "accepted": labels["inconsistent"] == 0
        and all(row["accepted"] is not False for row in claims),
        "labels": labels,
        "claims": claims,
        "trained": trainer.made,
        "reused": trainer.reused,
        "seconds": time.perf_counter() - started,
        "entropy": str(entropy),  # too long for many readers of JSON numbers
        "entropy_given": settings.entropy is not None,
        "commitment": commitment,
        # As results.json has it of the labels it was measured on.
        "labels_sha256": labels_sha256,
        "settings": asdict(replace(settings, entropy=None)),
        **trainer.about,
        "versions": installed_versions(),
        "git_revision": git_revision(),
    }
    write_json_atomic(folder.path / "verification.json", found)
    drawing.unlink(missing_ok=True)
    print(*describe(found), sep="\n")
    return found


def _try_scores(
    settings: VerifySettings,
    scores: Sequence[ClaimedScores],
    trainer: Retrainer,
    store: LabelStore,
    stored: Labels,
    again: LabelStore,
    entropy: int,
) -> list[dict[str, Any]]:
    """Trains on fresh subsets and holds the claims against them: a row a claim."""
    if not scores:
        return []
    plan = fresh_plan(store.subsets, len(trainer.pool), settings.fresh, entropy)
    fresh = trainer.open_store("fresh", plan)
    if any(one.given.scores is not None for one in scores):
        trainer.train(fresh, [(number, 0) for number in range(settings.fresh)])
    return check_claims(
        scores,
        trainer.pool,
        trainer.targets,
        store.subsets,
        stored,
        fresh.read(),
        again.read(),
        settings.epsilon,
        settings.confidence,
    )


def describe(found: Mapping[str, Any]) -> Iterator[str]:
    """What verification.json says, in lines for the terminal."""
    yield from describe_labels(found["labels"], found["settings"]["confidence"])
    yield from map(describe_claim, found["claims"])
    verdict = "ACCEPTED" if found["accepted"] else "REJECTED"
    unjudged = sum(row["accepted"] is None for row in found["claims"])
    open_ends = f" ({unjudged} claims cannot be judged)" if unjudged else ""
    yield (
        f"{verdict}{open_ends}: {found['trained']} labels trained now in {found['seconds']:.0f} s, "
        f"{found['reused']} taken from the cache; --entropy {found['entropy']} draws the same again"
    )


def _commitment(labels_sha256: str, scores: Sequence[ClaimedScores]) -> str:
    """sha256 of the labels and scores that are verified."""
    parts = [labels_sha256, *(one.commitment() for one in scores)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _entropy(drawing: Path, commitment: str, given: int | None) -> int:
    """The number that decides the draws: given, that of a killed verification, or new."""
    if given is not None:
        return given
    if drawing.is_file():
        drawn = json.loads(drawing.read_text(encoding="utf-8"))
        if drawn["commitment"] == commitment:
            return int(drawn["entropy"])
        print("labels or scores have changed since the draw: drawing anew")
    entropy = secrets.randbits(128)
    drawing.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(drawing, {"commitment": commitment, "entropy": str(entropy)})
    return entropy
