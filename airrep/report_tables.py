"""The tables of the report: each column's name, its one-line meaning and its cells."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from airrep.verdict import label

Row = Mapping[str, Any]

RECALL_AT = (1, 5, 10, 50)


@dataclass(frozen=True)
class Cell:
    """A number as text, a smaller note beside it, and whether it is the one that counts."""

    text: str
    note: str = ""
    used: bool = False


@dataclass(frozen=True)
class Column:
    """`cell` reads a method's row of results.json; None where the row has no such number."""

    name: str
    meaning: str
    cell: Callable[[Row], Cell | None]


@dataclass(frozen=True)
class Table:
    """Columns that at least one method fills, and the methods' cells in the same order."""

    columns: list[Column]
    rows: list[tuple[Row, list[Cell | None]]]


def quality_table(results: Row, methods: Sequence[Row], first: str) -> Table:
    """How well each method predicts; `first` is the method the others are compared with."""
    differences = {row["baseline"]: row for row in results["differences"]}
    return _filled(
        [
            Column(
                "LDS",
                "Rank correlation between predicted score and negated loss over the held-out "
                "subsets, mean over targets; 1 is perfect, 0 is chance.",
                lambda row: Cell(f"{row['lds']:.3f}"),
            ),
            Column(
                "95% interval",
                "Of the LDS, by bootstrap over targets and subsets together.",
                lambda row: Cell(interval_text(row["ci95"], ".3f")),
            ),
            Column(
                "Share of ceiling",
                "LDS divided by the noise ceiling, the most that label noise lets a method reach.",
                lambda row: _with_interval(row.get("lds_of_ceiling"), "share", ".0%"),
            ),
            Column(
                f"{label(first)} minus this",
                "Difference of LDS; both methods see the same resamples of targets and subsets.",
                lambda row: _with_interval(differences.get(row["name"]), "difference", "+.3f"),
            ),
            Column(
                f"{label(first)} wins : loses",
                "Targets that the one and the other predict better, and the p-value of the sign "
                "test, which is too small because targets share their subsets.",
                lambda row: _sign_test(differences.get(row["name"])),
            ),
            Column(
                "LDS, additive",
                "A subset's score is the sum of its examples' scores. Underlined: the method's "
                "own way of pooling (an ensemble pools each member in that member's way).",
                lambda row: Cell(f"{row['lds_sum']:.3f}", used=row["pooling"] == "sum"),
            ),
            Column(
                "LDS, attention",
                "A subset's score is its examples' mean score, weighted by softmax |score|.",
                lambda row: Cell(f"{row['lds_attention']:.3f}", used=row["pooling"] == "attention"),
            ),
            Column(
                "Held-out slope",
                "Measured loss change per predicted change, the scale fitted on half the subsets "
                "and checked on the other half; 1 is perfect.",
                lambda row: _plain(row.get("calibration"), "slope_on_held_out", ".2f"),
            ),
            Column(
                "Linear gap",
                "Share of the losses' variance that some additive score could still explain and "
                "this one does not; 0 is best.",
                lambda row: _with_interval(row.get("linear_gap"), "share", ".0%"),
            ),
            Column(
                "Constant targets",
                "Targets whose scores or losses do not vary over the subsets; each counts 0.",
                lambda row: Cell(str(row["constant_targets"])),
            ),
        ],
        methods,
    )


def cost_table(methods: Sequence[Row]) -> Table:
    """What each method costs, and how well it finds examples that are known to matter."""
    return _filled(
        [
            Column(
                "Learning, s",
                "Seconds of making labels and training behind a learned method, done once.",
                lambda row: _amount_of(row, "prepare_seconds"),
            ),
            Column(
                "Pool prepared, s",
                "Seconds to prepare the whole pool, on the machine that ran the evaluation.",
                lambda row: _amount_of(row, "fit_seconds"),
            ),
            Column(
                "Examples/s",
                "Pool examples prepared a second.",
                lambda row: _amount_of(row, "examples_per_second"),
            ),
            Column(
                "Query, ms a target",
                "Milliseconds to score the whole pool for one target.",
                lambda row: _amount_of(row, "query_seconds", 1000),
            ),
            Column(
                "Bytes an example",
                "What must be kept of each pool example.",
                lambda row: _amount_of(row, "bytes_per_example"),
            ),
            Column(
                "Pays off at",
                "Pool examples from which on learning once is quicker than each slower method.",
                _break_even,
            ),
            *map(_recall, RECALL_AT),
            Column(
                "nDCG at 10",
                "How near the top of the first ten the known proponents stand; 1 is best.",
                lambda row: _plain(row.get("retrieval"), "ndcg_at_10", ".2f"),
            ),
            Column(
                "MRR",
                "Mean over targets of 1 divided by the rank of the first known proponent.",
                lambda row: _plain(row.get("retrieval"), "mrr", ".2f"),
            ),
            Column(
                "Mislabel AUC",
                "Chance that a training example made wrong on purpose looks more harmful than "
                "another; 0.5 is chance.",
                lambda row: _with_interval(row.get("mislabel"), "auc", ".2f"),
            ),
        ],
        methods,
    )


def amount(value: float) -> str:
    """Three significant digits, with thousands separators and never an exponent."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.4f}" if 0 < value < 0.01 else f"{value:.3g}"


def _filled(columns: Sequence[Column], methods: Sequence[Row]) -> Table:
    cells = [[column.cell(row) for row in methods] for column in columns]
    kept = [place for place, found in enumerate(cells) if any(found)]
    return Table(
        [columns[place] for place in kept],
        [(row, [cells[place][at] for place in kept]) for at, row in enumerate(methods)],
    )


def interval_text(bounds: Sequence[float], form: str) -> str:
    """Both ends in a format such as ".3f"."""
    return f"{bounds[0]:{form}} to {bounds[1]:{form}}"


def _plain(part: Row | None, name: str, form: str) -> Cell | None:
    value = (part or {}).get(name)
    return None if value is None else Cell(f"{value:{form}}")


def _with_interval(part: Row | None, name: str, form: str) -> Cell | None:
    cell = _plain(part, name, form)
    bounds = (part or {}).get("ci95")
    return Cell(cell.text, f"({interval_text(bounds, form)})") if cell and bounds else cell


def _amount_of(row: Row, name: str, times: float = 1) -> Cell | None:
    value = row.get(name)
    return None if value is None else Cell(amount(value * times))


def _sign_test(difference: Row | None) -> Cell | None:
    test = (difference or {}).get("sign_test")
    if test is None:
        return None
    p = "p < 0.001" if test["p"] < 0.001 else f"p = {test['p']:.3f}"
    return Cell(f"{test['wins']} : {test['losses']}", f"({p})")


def _recall(k: int) -> Column:
    return Column(
        f"Recall at {k}",
        f"Share of a target's known proponents within the {k} highest scores.",
        lambda row: _plain(row.get("retrieval"), f"recall_at_{k}", ".2f"),
    )


def _break_even(row: Row) -> Cell | None:
    counts = row.get("break_even_examples") or {}
    found = [f"{amount(count)} ({label(name)})" for name, count in counts.items()]
    return Cell(", ".join(found)) if found else None
