"""What interventions show, from the losses of the retrained models (seeds, targets, models)."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from airrep.metrics import data_selection, leave_one_out_correlation, noise_ceiling, tail_removal
from data_builders.intervention_plan import EVERYTHING, Plan


def summarise_removal(
    plan: Plan, groups: Mapping[str, np.ndarray], losses: np.ndarray, draws: int, seed: int
) -> dict[str, Any]:
    """For every method and k, `airrep.metrics.tail_removal` of the mean change over seeds.

    Changes are the loss without the chosen examples minus the loss with everything, in nats, of
    one seed. Controls are all targets outside a target's group; null where there are none.
    """
    changes = losses - losses[:, :, [EVERYTHING]]
    mean = changes.mean(axis=0)
    rows = np.concatenate(list(groups.values()))
    others = {name: np.setdiff1d(np.arange(len(mean)), own) for name, own in groups.items()}
    has_controls = all(map(len, others.values()))
    found = []
    for method, k in _comparisons(plan):
        numbers, random = _numbers(plan, method, k, groups), _random(plan, k)
        per_group = zip(groups, groups.values(), numbers, strict=True)
        control = [
            np.full(len(own), mean[others[name], number].mean())
            for name, own, number in per_group
            if has_controls
        ]
        removed = _of_own_model(changes, groups, numbers)
        by_random = changes[:, rows][:, :, random]
        summary = tail_removal(
            removed.mean(axis=0),
            mean[rows][:, random],
            draws,
            np.random.default_rng(seed),
            control=np.concatenate(control)[:, None] if control else None,
        )
        by_seed = removed.mean(axis=1) - by_random.mean(axis=(1, 2))
        found.append({"method": method, "k": k} | summary | {"by_seed": by_seed.tolist()})
    return {"comparisons": found}


def summarise_selection(
    plan: Plan,
    groups: Mapping[str, np.ndarray],
    losses: np.ndarray,
    matches: np.ndarray,
    draws: int,
    seed: int,
) -> dict[str, Any]:
    """For every method and k, `airrep.metrics.data_selection` of the means over seeds.

    `everything` is the mean loss and exact match of the same targets after training on the
    whole base. `by_seed` is the difference in loss from random examples.
    """
    rows = np.concatenate(list(groups.values()))
    found = []
    for method, k in _comparisons(plan):
        numbers, random = _numbers(plan, method, k, groups), _random(plan, k)
        selected = _of_own_model(losses, groups, numbers)
        by_random = losses[:, rows][:, :, random]
        summary = data_selection(
            selected.mean(axis=0),
            by_random.mean(axis=0),
            draws,
            np.random.default_rng(seed),
            matches=_of_own_model(matches, groups, numbers).mean(axis=0),
            random_matches=matches[:, rows][:, :, random].mean(axis=0),
        )
        by_seed = selected.mean(axis=1) - by_random.mean(axis=(1, 2))
        found.append({"method": method, "k": k} | summary | {"by_seed": by_seed.tolist()})
    everything = {
        "loss": float(losses[:, rows, EVERYTHING].mean()),
        "exact_match": float(matches[:, rows, EVERYTHING].mean()),
    }
    return {"comparisons": found, "everything": everything}


def summarise_leave_one_out(
    plan: Plan, scores: Mapping[str, np.ndarray], losses: np.ndarray, draws: int, seed: int
) -> dict[str, Any]:
    """For every method, `airrep.metrics.leave_one_out_correlation` over all targets.

    `rows` are the pool rows left out; `reliability` is the mean rank correlation between the
    changes of the first half of the seeds and of the rest, null with one seed.
    """
    rows = plan.left_out()
    changes = losses[:, :, 1:] - losses[:, :, [EVERYTHING]]
    half = len(changes) // 2
    reliability = None
    if half:
        halves = changes[:half].mean(axis=0), changes[half:].mean(axis=0)
        reliability = noise_ceiling(*halves)["reliability"]
    found = []
    for method, matrix in scores.items():
        rng = np.random.default_rng(seed)
        summary = leave_one_out_correlation(matrix, changes.mean(axis=0), rows, draws, rng)
        kept = {name: {"mean": row["mean"], "ci95": row["ci95"]} for name, row in summary.items()}
        found.append({"method": method} | kept)
    return {"comparisons": found, "rows": rows.tolist(), "reliability": reliability}


def describe(found: Mapping[str, Any]) -> list[str]:
    """A summary as lines for people: each comparison, then what it is to be held against."""
    lines = []
    for row in found["comparisons"]:
        name = f"{row['method']}, k = {row['k']}" if "k" in row else row["method"]
        if "random" in row:
            beyond, control = row["random"], row["control"]
            text = f"{beyond['mean']:+.4f} nats, {_against(beyond)} beyond random removals"
            text += f"; other targets {control['random']:+.4f}" if control else ""
        elif "loss" in row:
            loss, match = row["loss"], row["exact_match"]
            text = f"loss {loss['mean']:.4f} nats, {_against(loss)} against random examples; "
            text += f"exact match {match['mean']:.3f}, {_against(match)}"
        else:
            rho, (low, high) = row["spearman"]["mean"], row["spearman"]["ci95"]
            text = f"rank correlation {rho:.3f} ({low:.3f} to {high:.3f})"
        lines.append(f"{name}: {text}")
    if "everything" in found:
        whole = found["everything"]
        lines.append(
            f"everything: loss {whole['loss']:.4f}, exact match {whole['exact_match']:.3f}"
        )
    if found.get("reliability") is not None:
        lines.append(f"rank correlation between halves of the seeds: {found['reliability']:.3f}")
    return lines


def _against(row: Mapping[str, Any]) -> str:
    low, high = row["ci95"]
    return f"{row['difference']:+.4f} ({low:+.4f} to {high:+.4f})"


def _comparisons(plan: Plan) -> list[tuple[str, int]]:
    """Every method and k of a plan, in its order."""
    named = [(trial.method, trial.k) for trial in plan.trials if trial.method is not None]
    return list(dict.fromkeys(named))


def _numbers(plan: Plan, method: str, k: int, groups: Mapping[str, np.ndarray]) -> list[int]:
    """The model of each group that a method chose k examples for."""
    found = {t.group: t.number for t in plan.trials if (t.method, t.k) == (method, k)}
    return [found[name] for name in groups]


def _random(plan: Plan, k: int) -> list[int]:
    return [trial.number for trial in plan.trials if trial.method is None and trial.k == k]


def _of_own_model(
    values: np.ndarray, groups: Mapping[str, np.ndarray], numbers: list[int]
) -> np.ndarray:
    """Values (seeds, targets of all groups), each target's of its own group's model."""
    parts = zip(groups.values(), numbers, strict=True)
    return np.concatenate([values[:, own, number] for own, number in parts], axis=1)
