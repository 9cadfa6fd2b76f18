"""What an evaluation says, in plain words: the sentences at the head of the report."""

from collections.abc import Mapping
from typing import Any

LABELS = {
    "airrep": "AirRep",
    "embedding": "Untrained encoder",
    "bm25": "BM25",
    "tfidf": "TF-IDF",
    "same_task": "Same-task count",
    "random": "Random",
}
NOTES = {
    "airrep": "learned from fine-tuning runs",
    "embedding": "the encoder before training, cosine",
    "bm25": "word overlap",
    "tfidf": "word overlap, cosine",
    "same_task": "counts examples of the target's task",
    "random": "no knowledge at all",
}
TERMS = {
    "Score": "How helpful a training example is for a target: higher means that training on it is "
    "expected to lower the target's loss. Its size means nothing between methods.",
    "Loss": "Mean cross-entropy over the tokens of a target's response, in nats.",
    "Subset": "Some of the training pool, drawn at random. The language model is trained on it, "
    "and then the loss of every target is measured.",
    "Noise ceiling": "Training twice on one subset gives two losses. How well they agree bounds "
    "the LDS of any method: it is the square root of their reliability.",
    "Oracle": "Is told something that other methods must find in the text, such as the task.",
    "Known proponent": "A training example that is known to state what a target asks.",
}


def label(name: str) -> str:
    """A method's name for readers."""
    return LABELS.get(name, name)


def verdict(results: Mapping[str, Any]) -> dict[str, str]:
    """`title`: does the learned method beat the baselines; `lead`: by how much, with interval."""
    best = max(results["methods"], key=lambda row: row["lds"])
    overall, plain = results["comparison"], results["comparison_without_oracles"]
    if overall is None:
        title = f"{label(best['name'])} ranks training subsets best; nothing was compared with it"
        if len(results["methods"]) > 1:
            title = f"No learned method ran; {label(best['name'])} ranks training subsets best"
        return {"title": title, "lead": f"{_scene(results)} {_lds_of(best)} {_ceiling(results)}"}
    return {
        "title": _title(overall, plain),
        "lead": f"{_scene(results)} {_numbers(results, overall, plain)} {_ceiling(results)}",
    }


def key_figures(results: Mapping[str, Any]) -> list[dict[str, str]]:
    """The few numbers worth a glance: name, value and a note each."""
    by_name = {row["name"]: row for row in results["methods"]}
    overall = results["comparison"]
    main = (
        by_name[overall["method"]]
        if overall
        else max(results["methods"], key=lambda row: row["lds"])
    )
    low, high = main["ci95"]
    figures = [
        _figure(f"LDS of {label(main['name'])}", f"{main['lds']:.2f}", f"{low:.2f} to {high:.2f}")
    ]
    if overall:
        best = by_name[overall["best_baseline"]]
        note = label(best["name"]) + (" (oracle)" if best["oracle"] else "")
        figures.append(_figure("LDS of the best baseline", f"{best['lds']:.2f}", note))
    ceiling = results["noise_ceiling"]
    if ceiling and ceiling["lds"] > 0:
        share = main["lds"] / ceiling["lds"]
        figures.append(
            _figure("Share of the noise ceiling", f"{share:.0%}", f"ceiling {ceiling['lds']:.2f}")
        )
    rate = f"{main['examples_per_second']:,.0f}"
    figures.append(_figure("Examples a second", rate, "preparing the pool, on this machine"))
    found = main["retrieval"]
    if found:
        note = f"known proponents, {_count(found['targets'], 'target')}"
        figures.append(_figure("Recall at 10", f"{found['recall_at_10']:.0%}", note))
    return figures


def _title(overall: Mapping[str, Any], plain: Mapping[str, Any] | None) -> str:
    name, best = label(overall["method"]), label(overall["best_baseline"])
    if overall["wins"]:
        return f"{name} beats every baseline at predicting what training data does"
    if plain is None or plain["best_baseline"] == overall["best_baseline"]:
        return f"{name} {_verb(overall)} {best}"
    if plain["wins"]:
        return f"{name} beats every baseline that reads only text, but {_verb(overall)} {best}"
    other = label(plain["best_baseline"])
    return f"{name} {_verb(overall)} {best} and {_verb(plain)} {other}"


def _verb(comparison: Mapping[str, Any]) -> str:
    return "does worse than" if comparison["ci95"][1] < 0 else "is not clearly better than"


def _scene(results: Mapping[str, Any]) -> str:
    subsets = _count(results["subsets"], "held-out subset")
    targets = _count(results["targets"], "held-out target")
    return (
        f"On {results['benchmark']}, each method predicts which of {subsets} of the training pool "
        f"lower the loss of {targets} most."
    )


def _numbers(
    results: Mapping[str, Any], overall: Mapping[str, Any], plain: Mapping[str, Any] | None
) -> str:
    by_name = {row["name"]: row for row in results["methods"]}
    text = f"{_lds_of(by_name[overall['method']])} {_against(by_name, overall)}"
    if plain is not None and plain["best_baseline"] != overall["best_baseline"]:
        text += f" {_against(by_name, plain)}"
    return text


def _against(by_name: Mapping[str, Any], comparison: Mapping[str, Any]) -> str:
    best = by_name[comparison["best_baseline"]]
    low, high = comparison["ci95"]
    oracle = ", an oracle that is told the tasks," if best["oracle"] else ""
    clear = "" if low > 0 or high < 0 else ", so the two cannot be told apart here"
    return (
        f"{label(best['name'])}{oracle} reaches {best['lds']:.2f}: a difference of "
        f"{comparison['difference']:+.2f} (95% interval {low:+.2f} to {high:+.2f}){clear}."
    )


def _lds_of(row: Mapping[str, Any]) -> str:
    return f"{label(row['name'])} reaches a rank correlation (LDS) of {row['lds']:.2f}."


def _ceiling(results: Mapping[str, Any]) -> str:
    ceiling = results["noise_ceiling"]
    if ceiling is None:
        return "How far label noise lets any method come was not measured."
    return f"Label noise keeps any method below about {ceiling['lds']:.2f}."


def _figure(name: str, value: str, note: str) -> dict[str, str]:
    return {"name": name, "value": value, "note": note}


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
