"""What an evaluation says, in plain words: the sentences at the head of the report."""

from collections.abc import Iterator, Mapping
from typing import Any

FEW_REPEATS = 5  # subsets trained twice, below which the noise ceiling is hardly more than a guess

LABELS = {
    "airrep": "AirRep",
    "embedding": "Untrained encoder",
    "response_embedding": "Untrained, with responses",
    "bm25": "BM25",
    "tfidf": "TF-IDF",
    "response_tfidf": "TF-IDF of responses",
    "same_task": "Same-task count",
    "random": "Random",
    "grad_dot": "Grad-Dot",
    "grad_cos": "Grad-Cos",
    "tracin": "TracIn",
    "trak": "TRAK",
    "logra": "LoGra",
    "ekfac": "EK-FAC",
    "datainf": "DataInf",
    "less": "LESS",
    "repsim": "Hidden states",
    "influence": "Influence (last layer)",
    "rescaled_influence": "Rescaled influence (last layer)",
    "newton_step": "Newton step (last layer)",
    "kernels": "Kernels",
    "ensemble": "Ensemble",
}
NOTES = {
    "airrep": "learned from fine-tuning runs",
    "embedding": "the encoder before training, cosine",
    "response_embedding": "where training starts: text and response's words",
    "bm25": "word overlap",
    "tfidf": "word overlap, cosine",
    "response_tfidf": "word overlap of the responses alone",
    "same_task": "counts examples of the target's task",
    "random": "no knowledge at all",
    "grad_dot": "products of gradients",
    "grad_cos": "cosines of gradients",
    "tracin": "products of gradients, over checkpoints",
    "trak": "a linear model in projected gradients",
    "logra": "influence in low-rank gradients",
    "ekfac": "influence by EK-FAC curvature",
    "datainf": "influence by DataInf's closed form",
    "less": "gradients as Adam steps along them",
    "repsim": "cosines of the model's hidden states",
    "influence": "exact, of a head on hidden states",
    "rescaled_influence": "exact for one example at a time",
    "newton_step": "a step of Newton for each subset",
    "kernels": "likenesses weighed for each target, learned from fine-tuning runs",
    "ensemble": "several methods together",
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
        return {"title": title, "lead": f"{_scene(results)} {_lds_of(best)} {ceiling(results)}"}
    numbers = _numbers(results, overall, plain)
    return {
        "title": _title(overall, plain),
        "lead": " ".join(
            filter(
                None,
                [
                    _scene(results),
                    numbers,
                    _better_learned(results, overall),
                    ceiling(results),
                    _learning(results, overall),
                ],
            )
        ),
    }


def describe(results: Mapping[str, Any]) -> Iterator[str]:
    """Results in lines for the terminal: the methods, best first, and the verdict."""
    yield "LDS on held-out subsets, 95% interval"
    for row in sorted(results["methods"], key=lambda row: -row["lds"]):
        low, high = row["ci95"]
        yield f"{row['lds']:+.3f}  {low:+.3f} to {high:+.3f}  {row['name']}"
    for row in results["skipped"]:
        yield f"skipped {row['name']}: {row['reason']}"
    said = verdict(results)
    yield f"{said['title']}. {said['lead']}"


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
    noise = results["noise_ceiling"]
    if noise and noise["lds"] > 0:
        share = main["lds"] / noise["lds"]
        note = f"ceiling {noise['lds']:.2f}"
        if noise["subsets"] < FEW_REPEATS:
            note += f", from only {noise['subsets']} repeated subsets"
        figures.append(_figure("Share of the noise ceiling", f"{share:.0%}", note))
    if main["examples_per_second"] is not None:
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


def _better_learned(results: Mapping[str, Any], overall: Mapping[str, Any]) -> str:
    """What else learned from the labels and is ahead, if anything."""
    learned = [row for row in results["methods"] if row.get("learns")]
    best = max(learned, key=lambda row: row["lds"], default={"name": overall["method"]})
    if best["name"] == overall["method"]:
        return ""
    found = next(one for one in results["differences"] if one["baseline"] == best["name"])
    (low, high), behind = found["ci95"], -found["difference"]
    clear = "" if high < 0 else ", so the two cannot be told apart here"
    return (
        f"{label(best['name'])}, which learned from the labels too, reaches {best['lds']:.2f}: "
        f"{behind:+.2f} (95% interval {-high:+.2f} to {-low:+.2f}){clear}."
    )


def _lds_of(row: Mapping[str, Any]) -> str:
    return f"{label(row['name'])} reaches a rank correlation (LDS) of {row['lds']:.2f}."


def ceiling(results: Mapping[str, Any]) -> str:
    """How far label noise lets any method come, with a warning where few repeats say it."""
    noise = results["noise_ceiling"]
    if noise is None:
        return "How far label noise lets any method come was not measured."
    text = f"Label noise keeps any method below about {noise['lds']:.2f}"
    if noise["subsets"] >= FEW_REPEATS:
        return f"{text}."
    low, high = noise["ci95"]
    return (
        f"{text}, but only {noise['subsets']} subsets were trained twice (95% interval {low:.2f} "
        f"to {high:.2f}): take that ceiling, and shares of it, as a guess."
    )


def _learning(results: Mapping[str, Any], overall: Mapping[str, Any]) -> str:
    """What the learned method costs before it starts, and the pool sizes where that pays off."""
    row = next(row for row in results["methods"] if row["name"] == overall["method"])
    name, seconds = label(row["name"]), row.get("prepare_seconds")
    if seconds is None:
        return f"What its labels and training cost is not known, nor when {name} pays off in time."
    text = f"Labels and training took {seconds:,.0f} s"
    sizes = row.get("break_even_examples") or {}
    if not sizes:
        return f"{text}; {name} prepares a pool no faster than any of these, so it pays in quality."
    sized = sorted(sizes.items(), key=lambda item: item[1])
    others = ", ".join(f"{size:,} against {label(other)}" for other, size in sized)
    return f"{text}, which pays off in time from this number of pool examples on: {others}."


def _figure(name: str, value: str, note: str) -> dict[str, str]:
    return {"name": name, "value": value, "note": note}


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
