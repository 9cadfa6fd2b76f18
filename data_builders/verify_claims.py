"""Claims about scores, tried on subsets that nobody has seen before the draw."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from airrep.attributor import POOLINGS, subset_scores_of
from airrep.attributors.given import GivenAttributor
from airrep.examples import Example, InputError
from airrep.label_store import Labels
from airrep.provenance import hash_files
from airrep.run_folder import RunFolder
from airrep.score_files import GivenScores, read_scores
from airrep.verification import (
    LEAST,
    ClaimKind,
    claim_error,
    claim_margin,
    claim_value,
    is_accepted,
)
from data_builders.subsets import make_plan

FILES = (".npy", ".safetensors")


@dataclass(frozen=True)
class ClaimedScores:
    """Scores of one method, the file they are in, and what is claimed of them."""

    name: str
    path: Path
    given: GivenScores
    pooling: str
    claims: Mapping[ClaimKind, float]

    def commitment(self) -> str:
        """Text that changes when the scores or the claims do."""
        return f"{self.name} {self.pooling} {dict(self.claims)} {hash_files([self.path])}"


def read_claims(
    folder: RunFolder,
    pool: Sequence[Example],
    targets: Sequence[Example],
    methods: str | None,
    claims: Mapping[ClaimKind, float],
) -> list[ClaimedScores]:
    """Scores with what is claimed of them: `claims` of the one method named, or results.json's.

    `methods` a,b,c are names in results.json or files of scores; None is all of results.json
    whose examples' scores say what a fresh subset's are (not an ensemble's), none where there is
    no such file. Raises InputError for scores of which nothing is claimed,
    that are not there, or that are of another pool or other targets.
    """
    rows = _claimed_rows(folder)
    fresh = [name for name, row in rows.items() if row.get("pooling", "sum") in POOLINGS]
    names = fresh if methods is None else methods.split(",")
    if claims and len(names) != 1:
        raise InputError(f"Claims were given for {len(names)} methods; name one with --methods.")
    found = []
    for name in names:
        row = rows.get(name, {})
        claimed = claims or _claims_of(row)
        if not claimed:
            raise InputError(
                f"Nothing is claimed of {name}, which {folder.results_file} does not hold; give "
                "what is claimed with --lds, --slope and --gap."
            )
        is_own = row.get("pooling", "sum") not in POOLINGS
        stored = folder.scores_file(subset_scores_of(name) if is_own else name)
        path = Path(name) if name.endswith(FILES) else stored
        given = read_scores(path)
        given.check_exact(targets, pool)
        pooling = given.pooling or ("sum" if is_own else row.get("pooling", "sum"))
        found.append(ClaimedScores(name, path, given, pooling, claimed))
    return found


def check_enough(scores: Sequence[ClaimedScores], again: int, fresh: int = LEAST) -> None:
    """Raises InputError where scores would be tried on fewer than LEAST labels: files of pairs on
    `fresh` ones, files of subset scores on labels trained `again`."""
    for one in scores:
        count = again if one.given.scores is None else fresh
        if count < LEAST:
            raise InputError(
                f"{one.path} would be tried on {count} labels, not counting second seeds; train at "
                f"least {LEAST} again, with --count."
            )


def fresh_plan(
    known: Sequence[np.ndarray], pool_size: int, count: int, seed: int
) -> list[np.ndarray]:
    """`count` new subsets of the pool's rows, drawn as the known ones seem to be."""
    sizes = [len(subset) for subset in known]
    is_fixed = min(sizes) == max(sizes)
    return make_plan(
        range(pool_size),
        count,
        size=sizes[0] if is_fixed else None,
        fraction=None if is_fixed else float(np.mean(sizes)) / pool_size,
        kind="fixed" if is_fixed else "bernoulli",
        seed=seed,
        exclude_plans=[known],
    )


def check_claims(
    scores: Sequence[ClaimedScores],
    pool: Sequence[Example],
    targets: Sequence[Example],
    plan: Sequence[np.ndarray],
    stored: Labels,
    fresh: Labels,
    again: Labels,
    epsilon: float,
    confidence: float,
) -> list[dict[str, Any]]:
    """A row a claim: what is claimed, what the labels give, and whether it is accepted.

    A claim must hold within `epsilon` on the `stored` labels, as they are, and on the `fresh`
    ones with the margin that the number of both leaves: what is claimed is an estimate too. With
    fewer than LEAST stored labels that margin means nothing, and `accepted` is None. A file of
    subset scores of the stored `plan` says nothing of fresh subsets: it is tried on stored ones
    trained `again`, where scores that were fitted to the stored labels cannot be told. All claims
    together are judged with `confidence`. Raises InputError for fewer than LEAST labels to try a
    file on.
    """
    check_enough(scores, len(again.subsets), len(fresh.subsets))
    each = 1 - (1 - confidence) / max(1, sum(len(one.claims) for one in scores))
    rows = []
    for one in scores:
        is_fresh = one.given.scores is not None
        unseen = fresh if is_fresh else again
        # An evaluation knows only the subsets that had labels.
        columns = None if is_fresh else one.given.subset_scores.shape[1]  # type: ignore[union-attr]
        known = stored.subsets if columns == len(stored.subsets) else plan
        attributor = GivenAttributor(one.given, one.pooling, known).fit(pool)
        pair = [
            (attributor.score_subsets(targets, labels.subsets), labels)
            for labels in (stored, unseen)
        ]
        rows += [
            {"method": one.name, "fresh": is_fresh}
            | _row(one, kind, pair[0], pair[1], len(pool), epsilon, each)
            for kind in one.claims
        ]
    return rows


def _row(
    one: ClaimedScores,
    kind: ClaimKind,
    on_stored: tuple[np.ndarray, Labels],
    on_unseen: tuple[np.ndarray, Labels],
    pool_size: int,
    epsilon: float,
    confidence: float,
) -> dict[str, Any]:
    claimed, slope = one.claims[kind], one.claims.get("slope", 1.0)
    old, new = (
        (scores, labels.losses, labels.subsets, pool_size, slope)
        for scores, labels in (on_stored, on_unseen)
    )
    stored, measured = claim_value(kind, *old), claim_value(kind, *new)
    counts = [len(labels.subsets) for _, labels in (on_stored, on_unseen)]
    error = math.hypot(claim_error(kind, *old), claim_error(kind, *new))
    margin = claim_margin(kind, error, min(counts), confidence)
    accepted: bool | None = is_accepted(kind, claimed, stored, epsilon)
    if accepted:
        is_enough = min(counts) >= LEAST
        accepted = is_accepted(kind, claimed, measured, epsilon, margin) if is_enough else None
    row = {
        "claim": kind,
        "claimed": claimed,
        "stored": stored,
        "measured": measured,
        "margin": margin,
        "subsets": counts[1],
        "stored_subsets": counts[0],
        "accepted": accepted,
    }
    if kind == "slope":
        residual = claim_value("residual", *new)
        row |= {"residual": residual, "best_residual": residual - claim_value("gap", *new)}
    return row


def describe_claim(row: Mapping[str, Any]) -> str:
    """A row of `check_claims` in a line for the terminal."""
    where = "fresh subsets" if row["fresh"] else "published subsets trained again"
    residual = ""
    if "residual" in row:
        residual = (
            f" (as a prediction it leaves {row['residual']:.3g} of the variance, the best linear "
            f"one about {row['best_residual']:.3g})"
        )
    return (
        f"{row['method']}: {row['claim']} {row['claimed']:.3g} claimed, {row['stored']:.3g} on "
        f"the stored labels, {row['measured']:.3g} ± {row['margin']:.2g} on {row['subsets']} "
        f"{where}{residual}: {_fate(row)}"
    )


def _fate(row: Mapping[str, Any]) -> str:
    if row["accepted"] is None:
        return (
            f"cannot be judged, for it rests on {row['stored_subsets']} stored labels, and at "
            f"least {LEAST} are needed"
        )
    return "accepted" if row["accepted"] else "REJECTED"


def _claimed_rows(folder: RunFolder) -> dict[str, dict[str, Any]]:
    try:
        results = json.loads(folder.results_file.read_text(encoding="utf-8"))
        return {row["name"]: row for row in results["methods"]}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder.results_file} cannot be read as results ({error!r}); "
            "run `airrep evaluate` again."
        ) from None


def _claims_of(row: Mapping[str, Any]) -> dict[ClaimKind, float]:
    """What a row of results.json claims."""
    claims: dict[ClaimKind, float] = {}
    if "lds" in row:
        claims["lds"] = row["lds"]
    if row.get("calibration"):
        claims["slope"] = row["calibration"]["slope"]
        if row.get("linear_gap"):
            claims["gap"] = row["linear_gap"]["share"]
    return claims
