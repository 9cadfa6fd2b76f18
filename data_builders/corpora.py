"""The demo corpus: instruction data of more than 40 tasks, made from facts that pip packages ship.

    corpus = make_corpus(pool_size=900, target_size=200, seed=0)

A target either asks a fact that the pool states in other words (its proponents are then known),
or a fact that no pool example states. The same arguments give the same corpus everywhere.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from airrep.examples import Example, InputError
from data_builders.corpus_tasks import TASKS, Item, Task, task_items

__all__ = ["TASKS", "Corpus", "make_corpus"]


@dataclass(frozen=True)
class Corpus:
    """Training examples and the targets whose loss they change, in random order."""

    pool: list[Example]
    targets: list[Example]


@dataclass(frozen=True)
class _Statement:
    """One item in one wording: a prompt and its right answer."""

    task: Task
    item: Item
    wording: int

    @property
    def prompt(self) -> str:
        return self.task.wordings[self.wording].format(*self.item.slots)


@dataclass
class _Plan:
    """What one task asks and states.

    `unseen` facts are stated nowhere in the pool, `reworded` ones in another wording of this
    task, `related` ones only by another task. `needed` facts must be in this task's pool, the
    `free` ones may be.
    """

    unseen: list[str] = field(default_factory=list)
    reworded: list[str] = field(default_factory=list)
    related: list[str] = field(default_factory=list)
    needed: list[str] = field(default_factory=list)
    free: list[str] = field(default_factory=list)


def make_corpus(
    pool_size: int,
    target_size: int,
    seed: int,
    proponent_share: float = 0.3,
    flip_share: float = 0.0,
    tasks: Sequence[str] | None = None,
) -> Corpus:
    """A pool and its targets, spread over the tasks as evenly as their facts allow.

    About `proponent_share` of the targets carry meta {"proponents": [pool ids]}: every pool
    example that states the target's fact. Where a related task exists, half of these targets
    find their fact in that task's form only. The other targets' facts are stated nowhere in
    the pool. `flip_share` of the pool has another answer of its task in place of the right one
    and meta {"flipped": True}; a proponent is never flipped. Pool prompts and targets do not
    depend on `flip_share`.
    `tasks` names the tasks to use, all when None.

    Raises InputError when an argument is out of range, when the facts do not suffice (naming the
    maximum), or when a package of the extra `demo` is absent.
    """
    chosen = _chosen_tasks(tasks)
    _check_arguments(pool_size, target_size, seed, proponent_share, flip_share, chosen)
    items = {task.name: {item.fact: item for item in task_items(task.name)} for task in chosen}
    rng = np.random.default_rng([seed, 0])
    plans = _plan(chosen, items, target_size, proponent_share, rng)
    pool, targets = _draw_statements(chosen, items, plans, pool_size, rng)
    answered = {statement.item.fact for statement, known in targets if known}
    flipped = _draw_flips(pool, answered, flip_share, np.random.default_rng([seed, 1]))
    return _to_corpus(pool, targets, flipped)


def _chosen_tasks(names: Sequence[str] | None) -> list[Task]:
    if names is None:
        return list(TASKS.values())
    unknown = sorted(set(names) - set(TASKS))
    if unknown or not names:
        raise InputError(
            f"tasks is {list(names)}, of which {unknown} are not tasks of the demo corpus; "
            f"name some of {', '.join(TASKS)}"
        )
    return [task for task in TASKS.values() if task.name in names]


def _check_arguments(
    pool_size: int,
    target_size: int,
    seed: int,
    proponent_share: float,
    flip_share: float,
    tasks: Sequence[Task],
) -> None:
    for name, value, least in (
        ("pool_size", pool_size, len(tasks)),
        ("target_size", target_size, 1),
        ("seed", seed, 0),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            why = ", one for each task" if name == "pool_size" else ""
            raise InputError(f"{name} is {value!r}; give a whole number of at least {least}{why}")
    for name, share in (("proponent_share", proponent_share), ("flip_share", flip_share)):
        if not 0 <= share <= 1:
            raise InputError(f"{name} is {share!r}; give a number from 0 to 1")


def _plan(
    tasks: Sequence[Task],
    items: Mapping[str, Mapping[str, Item]],
    target_size: int,
    proponent_share: float,
    rng: np.random.Generator,
) -> dict[str, _Plan]:
    """Divides the facts between targets and pool, one table of facts at a time."""
    order = rng.permutation(len(tasks))
    # Half of a task's facts at most: the pool must have some to teach the task with.
    quotas = _spread_evenly(
        "target_size", target_size, [(0, len(items[task.name]) // 2) for task in tasks], order
    )
    known = _spread_evenly(
        "proponent_share",
        round(proponent_share * target_size),
        [(0, quota) for quota in quotas],
        order[::-1],
    )
    plans = {task.name: _Plan() for task in tasks}
    tables: dict[str, list[tuple[str, int, int]]] = defaultdict(list)
    for task, quota, with_proponents in zip(tasks, quotas, known, strict=True):
        tables[task.table].append((task.name, quota - with_proponents, with_proponents))
    for table in tables.values():
        _plan_table(table, items, plans, rng)
    return plans


def _plan_table(
    table: Sequence[tuple[str, int, int]],
    items: Mapping[str, Mapping[str, Item]],
    plans: dict[str, _Plan],
    rng: np.random.Generator,
) -> None:
    """Plans the tasks that share one table: (name, unseen targets, targets with proponents)."""
    facts = list(dict.fromkeys(fact for name, _, _ in table for fact in items[name]))
    facts = [facts[i] for i in rng.permutation(len(facts))]
    names = [name for name, _, _ in table]
    for name, unseen, _ in table:
        plans[name].unseen = [fact for fact in facts if fact in items[name]][:unseen]
    held_out = {fact for name in names for fact in plans[name].unseen}
    taken = set(held_out)
    for name, _, with_proponents in table:
        _plan_proponents(name, names, with_proponents, facts, taken, items, plans)
    for name in names:
        plan = plans[name]
        closed = held_out.union(plan.related, plan.needed)
        free = [fact for fact in items[name] if fact not in closed]
        plan.free = [free[i] for i in rng.permutation(len(free))]


def _plan_proponents(
    name: str,
    names: Sequence[str],
    count: int,
    facts: Sequence[str],
    taken: set[str],
    items: Mapping[str, Mapping[str, Item]],
    plans: dict[str, _Plan],
) -> None:
    """Picks `count` facts for targets of `name`: half from a related task, if there is one."""
    plan = plans[name]
    unseen = {fact for other in names for fact in plans[other].unseen}
    # Facts that no other target asks come first; a large share of proponents needs the rest too.
    fresh = [fact for fact in facts if fact not in taken]
    for fact in fresh + [fact for fact in facts if fact in taken - unseen]:
        if len(plan.related) + len(plan.reworded) == count:
            break
        if fact not in items[name]:
            continue
        others = [other for other in names if other != name and fact in items[other]]
        if others and fact not in taken and len(plan.related) < (count + 1) // 2:
            plan.related.append(fact)
            fewest = min(others, key=lambda other: len(plans[other].needed))
            plans[fewest].needed.append(fact)
        else:
            plan.reworded.append(fact)
            if fact not in plan.needed:
                plan.needed.append(fact)
        taken.add(fact)


def _draw_statements(
    tasks: Sequence[Task],
    items: Mapping[str, Mapping[str, Item]],
    plans: Mapping[str, _Plan],
    pool_size: int,
    rng: np.random.Generator,
) -> tuple[list[_Statement], list[tuple[_Statement, bool]]]:
    """The pool, and the targets each with whether the pool states its fact; both shuffled."""
    candidates: list[list[_Statement]] = []
    targets: list[tuple[_Statement, bool]] = []
    for task in tasks:
        plan = plans[task.name]
        for_pool, for_targets = _word(task, items[task.name], plan, rng)
        candidates.append(for_pool)
        targets += for_targets
    bounds = [
        (len(plans[task.name].needed), len(statements))
        for task, statements in zip(tasks, candidates, strict=True)
    ]
    quotas = _spread_evenly("pool_size", pool_size, bounds, rng.permutation(len(tasks)))
    pool = [
        statement
        for statements, quota in zip(candidates, quotas, strict=True)
        for statement in statements[:quota]
    ]
    return (
        [pool[i] for i in rng.permutation(len(pool))],
        [targets[i] for i in rng.permutation(len(targets))],
    )


def _word(
    task: Task, items: Mapping[str, Item], plan: _Plan, rng: np.random.Generator
) -> tuple[list[_Statement], list[tuple[_Statement, bool]]]:
    """A task's pool statements, every fact once before any comes again, and its targets."""
    wordings = len(task.wordings)
    facts = [*plan.needed, *plan.free]
    orders = rng.permuted(np.tile(np.arange(wordings), (len(facts), 1)), axis=1)
    asked = dict(zip(facts, orders[:, -1].tolist(), strict=True))
    reworded = set(plan.reworded)
    pool = [
        _Statement(task, items[fact], wording)
        for turn in range(wordings)
        for fact, wording in zip(facts, orders[:, turn].tolist(), strict=True)
        # The last wording of a fact that a target asks in other words is the target's.
        if turn < wordings - 1 or fact not in reworded
    ]
    targets = [(_Statement(task, items[fact], asked[fact]), True) for fact in plan.reworded]
    for known, apart in ((True, plan.related), (False, plan.unseen)):
        for fact, wording in zip(apart, rng.integers(wordings, size=len(apart)), strict=True):
            targets.append((_Statement(task, items[fact], int(wording)), known))
    return pool, targets


def _spread_evenly(
    name: str, total: int, bounds: Sequence[tuple[int, int]], order: np.ndarray
) -> list[int]:
    """Splits `total` over tasks with (least, most), all as near to one level as these allow.

    What is left over when no whole level fits goes one each to the tasks in `order`. Raises
    InputError under the argument's `name` when the bounds leave no room for `total`.
    """
    least, most = np.asarray(bounds, dtype=int).T
    if total > most.sum():
        raise InputError(
            f"{name} asks for {total} examples, but the demo corpus has facts for "
            f"at most {most.sum()} beside the other arguments; ask for fewer"
        )
    if total < least.sum():
        raise InputError(
            f"{name} asks for {total} examples, but the targets' proponents alone are "
            f"{least.sum()}; ask for more, or lower proponent_share or target_size"
        )
    low, high = 0, int(most.max()) + 1
    while high - low > 1:
        middle = (low + high) // 2
        if np.clip(middle, least, most).sum() <= total:
            low = middle
        else:
            high = middle
    quotas = np.clip(low, least, most)
    growing = [task for task in order if least[task] <= quotas[task] == low < most[task]]
    quotas[growing[: total - quotas.sum()]] += 1
    return [int(quota) for quota in quotas]


def _draw_flips(
    pool: Sequence[_Statement], answered: set[str], share: float, rng: np.random.Generator
) -> dict[int, str]:
    """Wrong answers by pool row: `share` of the rows, none of which is a proponent."""
    count = round(share * len(pool))
    rows = [row for row, statement in enumerate(pool) if statement.item.fact not in answered]
    if count > len(rows):
        raise InputError(
            f"flip_share is {share}, but only {len(rows)} of the {len(pool)} pool examples are "
            "no target's proponents; lower flip_share, proponent_share or target_size"
        )
    flipped = {}
    for i in sorted(rng.permutation(len(rows))[:count]):
        item, name = pool[rows[i]].item, pool[rows[i]].task.name
        answers = sorted({other.answer for other in task_items(name)} - {item.answer})
        flipped[rows[i]] = answers[int(rng.integers(len(answers)))]
    return flipped


def _to_corpus(
    pool: Sequence[_Statement],
    targets: Sequence[tuple[_Statement, bool]],
    flipped: Mapping[int, str],
) -> Corpus:
    proponents: dict[str, list[str]] = defaultdict(list)
    pool_examples = []
    for row, statement in enumerate(pool):
        example = Example(
            id=f"pool-{row:05d}",
            prompt=statement.prompt,
            response=flipped.get(row, statement.item.answer),
            task=statement.task.name,
            meta={"flipped": True} if row in flipped else {},
        )
        pool_examples.append(example)
        proponents[statement.item.fact].append(example.id)
    target_examples = [
        Example(
            id=f"target-{row:05d}",
            prompt=statement.prompt,
            response=statement.item.answer,
            task=statement.task.name,
            meta={"proponents": proponents[statement.item.fact]} if known else {},
        )
        for row, (statement, known) in enumerate(targets)
    ]
    return Corpus(pool_examples, target_examples)
