"""What the charts of the report show: numbers and words, no drawing."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from airrep.report_tables import amount
from airrep.verdict import label

Row = Mapping[str, Any]

TICK_STEPS = (0.05, 0.1, 0.2, 0.5)


def bar_chart(methods: Sequence[Row], ceiling: Row | None) -> dict[str, Any]:
    """LDS bars. Places are percent of the chart's width: one bar a method, ticks, the ceiling."""
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


def plots(results: Row, methods: Sequence[Row], first: str) -> dict[str, Any]:
    """The data of the drawn charts by name; a chart without data is left out.

    Each has `about`, its content in words for readers who cannot see it.
    """
    found = {
        "cost": _cost(methods, first),
        "calibration": _calibration(methods, first),
        "learning": _learning(results),
    }
    return {name: chart for name, chart in found.items() if chart is not None}


def _cost(methods: Sequence[Row], first: str) -> dict[str, Any] | None:
    timed = [row for row in methods if row["examples_per_second"] is not None]
    if not timed:
        return None
    points = [
        {
            "label": label(row["name"]),
            "kind": "oracle" if row["oracle"] else "learned" if row["name"] == first else "plain",
            "rate": row["examples_per_second"],
            "lds": row["lds"],
            "ci95": row["ci95"],
        }
        for row in sorted(timed, key=lambda row: row["examples_per_second"])
    ]
    words = (f"{p['label']} {p['lds']:.2f} at {amount(p['rate'])}" for p in points)
    return {"points": points, "about": f"LDS at examples a second: {', '.join(words)}."}


def _calibration(methods: Sequence[Row], first: str) -> dict[str, Any] | None:
    lines = [
        {
            "label": label(row["name"]),
            "shown": row["name"] == first,
            "bins": row["calibration"]["bins"],
        }
        for row in sorted(methods, key=lambda row: row["name"] != first)
        if (row.get("calibration") or {}).get("bins")
    ]
    if not lines:
        return None
    lines[0]["shown"] = True
    ends = (
        f"{line['label']} from {line['bins'][0]['measured']:.3f} to "
        f"{line['bins'][-1]['measured']:.3f}"
        for line in lines
    )
    return {
        "lines": lines,
        "about": "Measured loss change in nats, from the lowest to the highest bin of the "
        f"predicted change: {', '.join(ends)}.",
    }


def _learning(results: Row) -> dict[str, Any] | None:
    points = sorted(results.get("learning_curve") or [], key=lambda point: point["labels"])
    if not points:
        return None
    ceiling = results["noise_ceiling"]
    words = (f"{point['lds']:.2f} with {point['labels']:,}" for point in points)
    return {
        "points": points,
        "ceiling": ceiling["lds"] if ceiling else None,
        "about": f"LDS by number of training labels: {', '.join(words)}.",
    }


def task_table(methods: Sequence[Row], first: str, tasks: Sequence[str | None]) -> dict[str, Any]:
    """Mean LDS by task and method, and how far `first` leads the best other method.

    `tasks` are those of all targets. A cell's heat is in percent of the largest LDS there is.
    """
    values = {
        task: [row["per_task"].get(task) for row in methods]
        for task in sorted(set().union(*(row["per_task"] for row in methods)))
    }
    largest = max((abs(value) for row in values.values() for value in row if value), default=1)
    at = [row["name"] for row in methods].index(first)

    def lead(row: Sequence[float | None]) -> float | None:
        others = [value for place, value in enumerate(row) if place != at and value is not None]
        own = row[at]
        return own - max(others) if others and own is not None else None

    return {
        "leads": len(methods) > 1,
        "rows": [
            {
                "task": task,
                "targets": tasks.count(task),
                "lead": lead(row),
                "cells": [
                    {"value": value, "heat": round(100 * abs(value or 0) / largest)}
                    for value in row
                ],
            }
            for task, row in values.items()
        ],
    }
