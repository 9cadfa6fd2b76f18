"""One self-contained page from an evaluation: what won, by how much, and which examples matter."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from airrep.examples import Example, InputError
from airrep.label_store import Labels
from airrep.provenance import write_bytes_atomic
from airrep.report_charts import bar_chart, plots, task_table
from airrep.report_data import explorer_blocks, explorer_settings, pack
from airrep.report_retraining import intervention_findings, verification_findings
from airrep.report_tables import cost_table, quality_table
from airrep.verdict import FEW_REPEATS, NOTES, TERMS, key_figures, label, verdict

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).parent / "templates"
NEEDS = "The page needs {}; run `pip install jinja2 plotly`."


def write_report(
    path: str | Path,
    results: Mapping[str, Any],
    pool: Sequence[Example],
    targets: Sequence[Example],
    labels: Labels,
    scores: Mapping[str, np.ndarray],
    *,
    per_target: int = 5,
) -> None:
    """Writes a page (HTML, no network) of what `airrep.evaluation.evaluate` returned.

    Shows quality with intervals and ceiling, cost, calibration, LDS by task, and an explorer: for
    every target, the `per_target` most helpful and most harmful examples of every method, and
    predicted against measured losses. Under "learning_curve", "interventions" and "verification"
    the results may hold the points of learning_curve.json, and what the other two files hold.
    Numbers that the results lack are left out. Needs jinja2 and plotly
    (`pip install jinja2 plotly`). Raises InputError where they are not there, and when the
    parts do not belong together.
    """
    _check(results, pool, targets, labels, scores, per_target)
    methods = sorted(results["methods"], key=lambda row: -row["lds"])
    first = _first_shown(results, methods)
    explored = sorted(methods, key=lambda row: row["name"] != first)
    script = _text("explorer.js", "charts.js", "report.js")
    plotly = _plotly()
    page = _environment().get_template("report.html").render(
        results=results,
        methods=methods,
        first=first,
        verdict=verdict(results),
        figures=key_figures(results),
        chart=bar_chart(methods, results["noise_ceiling"]),
        quality=quality_table(results, methods, first),
        cost=cost_table(methods),
        tasks=task_table(methods, first, [target.task for target in targets]),
        interventions=intervention_findings(results.get("interventions") or {}),
        verification=(
            verification_findings(results["verification"]) if results.get("verification") else []
        ),
        plots=(charts := plots(results, methods, first)),
        data=explorer_settings(explored) | {"plots": charts},
        blocks=explorer_blocks(explored, pool, targets, labels, scores, per_target)
        | {"plotly": pack(plotly.encode())},
        style=_text("report.css"),
        script=script,
        # Only these very scripts may run: markup in training text could not, were it ever let in.
        hashes=[_hash(script), _hash(plotly)],
    )  # fmt: skip
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_bytes_atomic(path, page.encode("utf-8", "replace"))


def explorer_page(title: str) -> str:
    """The explorer alone, as HTML: it reads its data from the server that serves it.

    Asks GET /api/targets, GET /api/target/<row> and POST /api/score; an answer with an error
    status is {"error": sentence}, which is shown. Needs jinja2; raises InputError without it.
    """
    script = _text("explorer.js", "server.js")
    return _environment().get_template("server.html").render(
        title=title, style=_text("report.css"), script=script, hashes=[_hash(script)]
    )  # fmt: skip


def _check(
    results: Mapping[str, Any],
    pool: Sequence[Example],
    targets: Sequence[Example],
    labels: Labels,
    scores: Mapping[str, np.ndarray],
    per_target: int,
) -> None:
    if per_target < 1:
        raise InputError(f"The page got per_target = {per_target}; give at least one.")
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


def _first_shown(results: Mapping[str, Any], methods: Sequence[Mapping[str, Any]]) -> str:
    """The method that the page opens with: the learned one, else the best."""
    comparison = results["comparison"]
    return comparison["method"] if comparison else methods[0]["name"]


def _environment() -> Environment:
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError:
        raise InputError(NEEDS.format("jinja2")) from None
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"label": label}
    environment.globals |= {"notes": NOTES, "terms": TERMS, "few_repeats": FEW_REPEATS}
    return environment


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise InputError(NEEDS.format("plotly")) from None
    return get_plotlyjs()


def _text(*names: str) -> str:
    return "\n".join((TEMPLATES / name).read_text(encoding="utf-8") for name in names)


def _hash(script: str) -> str:
    """How a content security policy names a script that may run."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
