"""What the page says of models that were trained again: interventions, and verification."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from airrep.report_tables import interval_text
from airrep.verdict import label

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Finding:
    """A small table of texts, the sentence that says what it shows, and a note below it."""

    name: str
    meaning: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def intervention_findings(found: Row) -> list[Finding]:
    """A table for each kind of intervention in interventions.json."""
    makers = {"removal": _removal, "selection": _selection, "leave_one_out": _leave_one_out}
    return [make(found[kind]) for kind, make in makers.items() if kind in found]


def verification_findings(found: Row) -> list[Finding]:
    """The tables of verification.json: labels, and claims where some were tried."""
    labels = found["labels"]
    tables = [
        Finding(
            "Labels",
            "Labels drawn at random, so that nobody could foresee which, were made again. "
            + (
                "They must come out the same."
                if labels["agreement"] == "exact"
                else "They must be as alike as two seeds of one subset are."
            ),
            ["Labels", "Drawn", "Inconsistent", "Inconsistent among all, at most"],
            [
                [
                    f"{labels['labels']:,}",
                    f"{len(labels['reruns']):,}",
                    str(labels["inconsistent"]),
                    f"{labels['inconsistent_at_most']:.1%}",
                ]
            ],
            f"The bound holds with confidence {found['settings']['confidence']:g}.",
        )
    ]
    if found["claims"]:
        tables.append(_claims(found["claims"]))
    return tables


def _removal(found: Row) -> Finding:
    return Finding(
        "Removing the most helpful examples",
        "How much a target's loss rises, in nats, when the model is trained without a method's "
        "k most helpful examples. A good method does more damage than removing k random ones, "
        "and more than to other targets: both differences are above 0.",
        ["Method", "k", "Rise", "Random k", "Difference", "Minus other targets"],
        [
            [
                label(row["method"]),
                str(row["k"]),
                f"{row['random']['mean']:+.4f}",
                f"{row['random']['random']:+.4f}",
                _difference(row["random"]),
                _difference(row["control"]),
            ]
            for row in found["comparisons"]
        ],
        _trainings(found),
    )


def _selection(found: Row) -> Finding:
    everything = found["everything"]
    return Finding(
        "Training on the most helpful examples alone",
        "The targets' loss, in nats, after training on a method's k best examples and nothing "
        "else. A good selection beats k random ones: its difference in loss is below 0.",
        ["Method", "k", "Loss", "Random k", "Difference", "Difference in exact matches"],
        [
            [
                label(row["method"]),
                str(row["k"]),
                f"{row['loss']['mean']:.4f}",
                f"{row['loss']['random']:.4f}",
                _difference(row["loss"]),
                _difference(row["exact_match"], "+.3f"),
            ]
            for row in found["comparisons"]
        ],
        f"Training on everything gives {everything['loss']:.4f}. {_trainings(found)}",
    )


def _leave_one_out(found: Row) -> Finding:
    reliability = found["reliability"]
    agreement = "" if reliability is None else (
        f"Two halves of the seeds agree with a rank correlation of {reliability:.2f}: no score "
        "can be expected to agree with them much better. "
    )  # fmt: skip
    return Finding(
        "Leaving out one example",
        "Rank correlation between a method's score and how much the loss rises when the model is "
        "trained without that one example; 1 is perfect, 0 is chance.",
        ["Method", "Rank correlation", "95% interval"],
        [
            [
                label(row["method"]),
                f"{row['spearman']['mean']:.3f}",
                interval_text(row["spearman"]["ci95"], ".3f"),
            ]
            for row in found["comparisons"]
        ],
        f"{agreement}{len(found['rows']):,} examples were left out. {_trainings(found)}",
    )


def _claims(rows: Sequence[Row]) -> Finding:
    fates = {True: "accepted", False: "REJECTED", None: "cannot be judged"}
    return Finding(
        "Claims about scores",
        "What is claimed, what the stored labels say, and what labels say that were made after "
        "the scores. A claim is refused when it is better than they allow.",
        ["Method", "Claim", "Claimed", "Stored labels", "New labels", "Verdict"],
        [
            [
                label(row["method"]),
                row["claim"],
                f"{row['claimed']:.3g}",
                f"{row['stored']:.3g}",
                f"{row['measured']:.3g} ± {row['margin']:.2g}",
                fates[row["accepted"]],
            ]
            for row in rows
        ],
        f"New labels are of {rows[0]['subsets']:,} subsets.",
    )


def _trainings(found: Row) -> str:
    return f"Means over {found['settings']['seeds']} seeds; differences with their 95% intervals."


def _difference(row: Row | None, form: str = "+.4f") -> str:
    if row is None:
        return "–"
    return f"{row['difference']:{form}} ({interval_text(row['ci95'], form)})"
