"""One self-contained page from an evaluation: what won, by how much, and which examples matter."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from airrep.examples import Example, InputError
from airrep.label_store import Labels
from airrep.metrics import lds_per_target
from airrep.pooling import attention_pool, membership
from airrep.provenance import write_bytes_atomic
from airrep.verdict import NOTES, key_figures, label, verdict

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).parent / "templates"
TICK_STEPS = (0.05, 0.1, 0.2, 0.5)


def write_report(
    path: str | Path,
    results: Mapping[str, Any],
    pool: Sequence[Example],
    targets: Sequence[Example],
    labels: Labels,
    scores: Mapping[str, np.ndarray],
    *,
    target_count: int = 10,
    per_target: int = 5,
) -> None:
    """Writes a page (HTML, no network) of what `airrep.evaluation.evaluate` returned.

    Shows the LDS of all methods with intervals and ceiling, cost and retrieval, predicted
    against measured losses, and for `target_count` targets, spread over the tasks, the
    `per_target` most helpful and most harmful examples of every method in full text.
    Needs jinja2 (`pip install airrep[report]`). Raises InputError when the parts do not belong
    together.
    """
    _check(results, pool, targets, labels, scores)
    if target_count < 1 or per_target < 1:
        raise InputError(
            f"The page got target_count = {target_count} and per_target = {per_target}; "
            "give at least one of each."
        )
    rows = pick_targets(targets, target_count)
    methods = sorted(results["methods"], key=lambda row: -row["lds"])
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    page = _environment().get_template("report.html").render(
        results=results,
        methods=methods,
        first=_first_shown(results, methods),
        verdict=verdict(results),
        figures=key_figures(results),
        chart=_chart(methods, results["noise_ceiling"]),
        differences={row["baseline"]: row for row in results["differences"]},
        tasks=sorted(set().union(*(row["per_task"] for row in methods))),
        shown=[targets[row] for row in rows],
        data=_data(methods, pool, targets, labels, scores, rows, per_target),
        style=(TEMPLATES / "report.css").read_text(encoding="utf-8"),
        script=script,
        # Only this very script may run: markup in training text could not, were it ever let in.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )  # fmt: skip
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_bytes_atomic(path, page.encode("utf-8", "replace"))


def pick_targets(targets: Sequence[Example], count: int) -> list[int]:
    """Rows of `count` targets: tasks evenly spaced in order of name, then more of each task.

    Chosen by task and place alone, never by how well a method does on them.
    """
    by_task: dict[str, list[int]] = {}
    for row, target in enumerate(targets):
        by_task.setdefault(target.task or "", []).append(row)
    groups = [by_task[task] for task in sorted(by_task)]
    picked: list[int] = []
    for turn in range(max(map(len, groups))):
        rows = [group[turn] for group in groups if len(group) > turn]
        wanted = min(count - len(picked), len(rows))
        picked += [rows[place * len(rows) // wanted] for place in range(wanted)]
    return picked


def _check(
    results: Mapping[str, Any],
    pool: Sequence[Example],
    targets: Sequence[Example],
    labels: Labels,
    scores: Mapping[str, np.ndarray],
) -> None:
    if len(labels.losses) != len(targets):
        raise InputError(
            f"The labels hold {len(labels.losses)} targets, but {len(targets)} were given; "
            "give the targets the results were made from."
        )
    for row in results["methods"]:
        if row["name"] not in scores:
            raise InputError(f"There are no scores of the method {row['name']!r}; give them all.")
        found, wanted = np.shape(scores[row["name"]]), (len(targets), len(pool))
        if found != wanted:
            raise InputError(
                f"The scores of {row['name']!r} have shape {found}, but targets and pool are "
                f"{wanted}; give the scores of this very evaluation."
            )


def _environment() -> Environment:
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError:
        raise InputError("The page needs jinja2; run `pip install airrep[report]`.") from None
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"label": label, "amount": _amount}
    environment.globals |= {"notes": NOTES}
    return environment


def _amount(value: float) -> str:
    """Three significant digits, with thousands separators and never an exponent."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.4f}" if 0 < value < 0.01 else f"{value:.3g}"


def _first_shown(results: Mapping[str, Any], methods: Sequence[Mapping[str, Any]]) -> str:
    """The method whose examples the page opens with: the learned one, else the best."""
    comparison = results["comparison"]
    return comparison["method"] if comparison else methods[0]["name"]


def _chart(
    methods: Sequence[Mapping[str, Any]], ceiling: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Places in percent of the chart's width: one bar a method, ticks, the ceiling."""
    highest = max([row["ci95"][1] for row in methods] + ([ceiling["lds"]] if ceiling else []))
    lowest = min(0.0, *(row["ci95"][0] for row in methods))
    step = next((s for s in TICK_STEPS if (highest - lowest) / s <= 7), TICK_STEPS[-1])
    low = np.floor(lowest / step) * step
    high = max(np.ceil(highest / step + 0.1) * step, step)

    def place(value: float) -> float:
        return round(float((value - low) / (high - low) * 100), 2)

    bars = [
        {
            "row": row,
            "left": place(min(row["lds"], 0)),
            "width": round(abs(place(row["lds"]) - place(0)), 2),
            "low": place(row["ci95"][0]),
            "spread": round(place(row["ci95"][1]) - place(row["ci95"][0]), 2),
        }
        for row in methods
    ]
    ticks = [
        {"text": f"{value:.2f}".rstrip("0").rstrip(".") or "0", "place": place(value)}
        for value in np.arange(round((high - low) / step) + 1) * step + low + 0.0
    ]
    return {"bars": bars, "ticks": ticks, "ceiling": place(ceiling["lds"]) if ceiling else None}


def _data(
    methods: Sequence[Mapping[str, Any]],
    pool: Sequence[Example],
    targets: Sequence[Example],
    labels: Labels,
    scores: Mapping[str, np.ndarray],
    rows: Sequence[int],
    per_target: int,
) -> dict[str, Any]:
    """What the page's script draws; every pool example that is shown stands in it once."""
    members = membership(labels.subsets, len(pool))
    losses = np.asarray(labels.losses, dtype=float)[rows]
    places: dict[int, int] = {}
    views = {}
    for method in methods:
        shown = np.asarray(scores[method["name"]], dtype=np.float32)[rows]
        pooled = _pool(shown, members, method["pooling"])
        lds, _ = lds_per_target(pooled, losses)
        views[method["name"]] = [
            {
                "lds": _short(lds[row]),
                "predicted": [_short(value) for value in pooled[row]],
                "helpful": _ends(-shown[row], shown[row], per_target, places),
                "harmful": _ends(shown[row], shown[row], per_target, places),
            }
            for row in range(len(rows))
        ]
    return {
        "methods": [{"name": m["name"], "label": label(m["name"])} for m in methods],
        "examples": [_texts(pool[row]) for row in places],
        "targets": [
            {
                "task": targets[row].task,
                "losses": [_short(value) if np.isfinite(value) else None for value in losses[at]],
                "proponents": list(targets[row].meta.get("proponents") or []),
            }
            for at, row in enumerate(rows)
        ],
        "views": views,
    }


def _pool(scores: np.ndarray, members: torch.Tensor, pooling: str) -> np.ndarray:
    given = torch.from_numpy(np.ascontiguousarray(scores))
    return (attention_pool(given, members) if pooling == "attention" else given @ members).numpy()


def _ends(
    keys: np.ndarray, scores: np.ndarray, count: int, places: dict[int, int]
) -> list[tuple[int, float]]:
    """The `count` rows of the lowest keys: their place among the shown examples, and score."""
    order = np.argsort(keys, kind="stable")[:count].tolist()
    return [(places.setdefault(row, len(places)), _short(scores[row])) for row in order]


def _texts(example: Example) -> dict[str, Any]:
    return {
        "id": example.id,
        "task": example.task,
        "prompt": example.prompt,
        "response": example.response,
    }


def _short(value: float) -> float:
    return float(f"{value:.5g}")
