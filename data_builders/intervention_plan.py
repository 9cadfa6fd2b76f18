"""Which parts of the pool an intervention trains on: without chosen examples, or on them alone."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from airrep.attributor import top_rows
from airrep.examples import Example, InputError

GROUPINGS = ("target", "task", "all")
EVERYTHING = 0  # the number of the model trained on the whole base


@dataclass(frozen=True)
class Trial:
    """One choice of k pool rows: a method's for a group of targets, or a random one (None)."""

    method: str | None
    group: str | None
    k: int
    number: int


class Plan:
    """The pool rows that each model is trained on, sorted int64; the first has the whole base.

    Equal subsets are in it once, so several trials may name one number.
    """

    def __init__(self, base: np.ndarray) -> None:
        self.base = base
        self.subsets = [base]
        self.trials: list[Trial] = []
        self._numbers = {base.tobytes(): EVERYTHING}

    def add(self, method: str | None, group: str | None, chosen: np.ndarray, keep: bool) -> None:
        """Adds the model trained on the chosen rows alone (keep), or on all others."""
        subset = np.sort(chosen) if keep else np.setdiff1d(self.base, chosen)
        number = self._numbers.setdefault(subset.tobytes(), len(self.subsets))
        if number == len(self.subsets):
            self.subsets.append(subset)
        self.trials.append(Trial(method, group, len(chosen), number))

    def left_out(self) -> np.ndarray:
        """The one row (n,) that each model but the first was trained without."""
        return np.asarray([np.setdiff1d(self.base, s).item() for s in self.subsets[1:]])


def plan_choices(
    base: np.ndarray,
    scores: Mapping[str, np.ndarray],
    groups: Mapping[str, np.ndarray],
    sizes: Sequence[int],
    draws: int,
    seed: int,
    keep: bool,
) -> Plan:
    """Every method's top k of the base for every group of targets, and `draws` random k.

    `scores` are (targets, pool) by method, `groups` rows of targets by name.
    """
    plan = Plan(base)
    for k in sizes:
        for draw in range(draws):
            rows = np.random.default_rng([seed, 1, k, draw]).choice(base, k, replace=False)
            plan.add(None, None, rows, keep)
        for method, matrix in scores.items():
            for group, targets in groups.items():
                plan.add(method, group, most_helpful(matrix[targets], base, k, seed), keep)
    return plan


def plan_leave_one_out(
    base: np.ndarray,
    scores: Mapping[str, np.ndarray],
    groups: Mapping[str, np.ndarray],
    k: int,
    draws: int,
    seed: int,
) -> Plan:
    """The base without one row: `draws` random rows, and the top k of every method and group."""
    plan = Plan(base)
    for row in np.random.default_rng([seed, 1]).choice(base, draws, replace=False):
        plan.add(None, None, row[None], keep=False)
    for method, matrix in scores.items():
        for group, targets in groups.items():
            for row in most_helpful(matrix[targets], base, k, seed):
                plan.add(method, group, row[None], keep=False)
    return plan


def draw_base(pool_size: int, size: int | None, seed: int) -> np.ndarray:
    """All pool rows, or `size` random ones, sorted; raises InputError for an impossible size."""
    if size is None:
        return np.arange(pool_size)
    if not 2 <= size <= pool_size:
        raise InputError(
            f"base is {size}, of {pool_size} pool examples; give a number from 2 to {pool_size}."
        )
    return np.sort(np.random.default_rng([seed, 0]).permutation(pool_size)[:size])


def group_targets(targets: Sequence[Example], by: str, count: int) -> dict[str, np.ndarray]:
    """Rows of the targets that share a choice of examples, by the group's name.

    "target": `count` single targets, by id; "task": all targets of the tasks of these; "all":
    one group of all targets. Chosen by task and place, never by how well a method does on them.
    Raises InputError for another `by`, fewer than one, and targets without tasks.
    """
    if by not in GROUPINGS:
        raise InputError(f"by is {by!r}; choose one of {', '.join(GROUPINGS)}.")
    if count < 1:
        raise InputError(f"targets is {count}; take at least one.")
    if by == "all":
        return {"all": np.arange(len(targets))}
    picked = [targets[row] for row in pick_targets(targets, count)]
    if by == "target":
        names, wanted = [target.id for target in targets], [target.id for target in picked]
    else:
        names = [target.task or "" for target in targets]
        wanted = [target.task or "" for target in picked]
        if not any(wanted):
            raise InputError('The targets have no tasks; give by "target" or "all".')
    return {name: np.flatnonzero(np.asarray(names) == name) for name in wanted}


def pick_targets(targets: Sequence[Example], count: int) -> list[int]:
    """Rows of `count` targets: tasks evenly spaced in order of name, then more of each task."""
    turns: dict[int, list[int]] = defaultdict(list)
    seen: Counter[str] = Counter()
    for row in sorted(range(len(targets)), key=lambda row: targets[row].task or ""):
        task = targets[row].task or ""
        turns[seen[task]].append(row)
        seen[task] += 1
    picked: list[int] = []
    for rows in turns.values():
        wanted = min(count - len(picked), len(rows))
        picked += [rows[place * len(rows) // wanted] for place in range(wanted)]
    return picked


def parse_sizes(text: str, base_size: int) -> list[int]:
    """Numbers of examples from "5,20,5%"; a percentage is of the base, and at least one example.

    Raises InputError for what is no number, and for none or all of the base.
    """
    sizes = []
    for part in text.split(","):
        number = part.strip().removesuffix("%")
        try:
            size = max(1, round(float(number) / 100 * base_size)) if "%" in part else int(number)
        except (ValueError, OverflowError):
            raise InputError(f'k is {text!r}; give numbers or shares, such as "5,20,5%".') from None
        if not 1 <= size < base_size or number.startswith("-"):
            raise InputError(
                f"k is {part.strip()}, of {base_size} examples; give from 1 to {base_size - 1}."
            )
        sizes.append(size)
    return list(dict.fromkeys(sizes))


def most_helpful(scores: np.ndarray, base: np.ndarray, k: int, seed: int) -> np.ndarray:
    """The k rows of the base with the highest mean over targets of scores (targets, pool).

    Scores are standardised per target first, so that each target counts the same; one whose
    scores do not vary does not count. Equal scores are in random order, the same for all methods.
    """
    order = np.random.default_rng([seed, 2]).permutation(base)
    shuffled = np.asarray(scores, dtype=float)[:, order]
    centred = shuffled - shuffled.mean(axis=1, keepdims=True)
    spread = centred.std(axis=1, keepdims=True)
    standard = np.divide(centred, spread, out=np.zeros_like(centred), where=spread > 0)
    return order[top_rows(standard.mean(axis=0), k)]
