"""The report: one file, no network, hostile text shown as text, everything promised on it."""

import base64
import copy
import gzip
import hashlib
import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from planted import HOSTILE, planted_benchmark, planted_methods

from airrep.attributors import make_attributor
from airrep.attributors.given import GivenAttributor
from airrep.evaluation import evaluate
from airrep.examples import InputError
from airrep.report import TEMPLATES, explorer_page, write_report
from airrep.report_charts import bar_chart, plots, task_table
from airrep.report_data import EXAMPLES_A_BLOCK, TARGETS_A_BLOCK, TEXT_LIMIT, explorer_blocks
from airrep.report_tables import amount, cost_table, quality_table
from airrep.score_files import GivenScores

BENCHMARK = planted_benchmark()
VOID = {"meta", "input", "link", "br", "img", "hr"}


class Page(HTMLParser):
    """Tags, their attributes and texts; fails on tags that do not nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data):
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)

    def text(self) -> str:
        return " ".join(
            text for tag, texts in self.texts.items() if tag != "script" for text in texts
        )


def evaluated(methods=None, **arguments):
    return evaluate(
        planted_methods(BENCHMARK.truth) if methods is None else methods,
        BENCHMARK.pool,
        BENCHMARK.targets,
        BENCHMARK.labels,
        **{"benchmark": "planted <b>", "repeat_labels": BENCHMARK.repeats, "draws": 100}
        | arguments,
    )


@pytest.fixture(scope="module", autouse=True)
def short_library():
    """Packing plotly takes longer than all the rest; the tests in the browser use the real one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("plotly.offline.get_plotlyjs", lambda: "globalThis.Plotly = null;")
        yield


@pytest.fixture(scope="module")
def results():
    return evaluated(config={"note": "</pre><script>"})


@pytest.fixture(scope="module")
def html(results, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "new" / "index.html"
    write(path, *results)
    return path.read_text(encoding="utf-8")


def write(path, results, scores, **arguments):
    targets = arguments.pop("targets", BENCHMARK.targets)
    write_report(path, results, BENCHMARK.pool, targets, BENCHMARK.labels, scores, **arguments)


def block_of(html: str, name: str):
    found = re.search(f'id="block-{name}">([A-Za-z0-9+/=]+)</script>', html)
    return json.loads(gzip.decompress(base64.b64decode(found.group(1))))


def every(html: str, kind: str) -> list:
    """The blocks of a kind, one after the other."""
    return [
        entry
        for number in range(html.count(f'id="block-{kind}-'))
        for entry in block_of(html, f"{kind}-{number}")
    ]


def settings_of(html: str) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    return json.loads(found.group(1))


def with_everything(results: dict) -> dict:
    """The results with every optional number, whatever the evaluation gave."""
    results = copy.deepcopy(results)
    bins = [
        {"predicted": x, "measured": x / 2, "low": x / 2 - 0.1, "high": x / 2 + 0.1, "count": 24}
        for x in (-0.25, 0.0, 0.25)
    ]
    for row in results["methods"]:
        row["lds_of_ceiling"] = {"share": 0.583, "ci95": [0.5, 0.66]}
        row["calibration"] = {"slope_on_held_out": 0.931, "bins": bins}
        row["linear_gap"] = {"share": 0.121, "ci95": [0.05, 0.2]}
        row["retrieval"]["ndcg_at_10"] = 0.717
        row["mislabel"] = {"auc": 0.813, "ci95": [0.7, 0.9], "flipped": 12}
    results["methods"][0]["prepare_seconds"] = 377.0
    results["methods"][0]["break_even_examples"] = {"tfidf": 15432, "later": 7}
    for row in results["differences"]:
        row["sign_test"] = {"wins": 18, "losses": 6, "ties": 0, "p": 0.0227}
    results["learning_curve"] = [
        {"labels": 1200, "lds": 0.44, "ci95": [0.4, 0.5], "by_seed": [0.43, 0.45]},
        {"labels": 600, "lds": 0.31, "ci95": [0.2, 0.4], "by_seed": [0.31]},
    ]
    results["interventions"] = INTERVENTIONS
    results["verification"] = VERIFICATION
    return results


BEYOND = {"mean": 0.0512, "random": 0.0102, "difference": 0.041, "ci95": [0.01, 0.07], "targets": 5}
INTERVENTIONS = {
    "removal": {
        "comparisons": [
            {"method": "airrep", "k": 20, "random": BEYOND, "control": {**BEYOND, "ci95": [0, 1]}},
            {"method": "<i>", "k": 5, "random": BEYOND, "control": None},
        ],
        "settings": {"seeds": 3},
    },
    "selection": {
        "comparisons": [
            {"method": "bm25", "k": 52, "exact_match": BEYOND,
             "loss": {**BEYOND, "difference": -0.2}}
        ],
        "everything": {"loss": 1.2345, "exact_match": 0.5},
        "settings": {"seeds": 2},
    },
    "leave_one_out": {
        "comparisons": [{"method": "tfidf", "spearman": {"mean": 0.111, "ci95": [-0.05, 0.25]}}],
        "rows": list(range(33)),
        "reliability": 0.37,
        "settings": {"seeds": 4},
    },
}  # fmt: skip
CLAIM = {"method": "airrep", "claim": "lds", "claimed": 0.506, "stored": 0.505, "measured": 0.47,
         "margin": 0.061, "subsets": 32, "accepted": True}  # fmt: skip
VERIFICATION = {
    "accepted": False,
    "labels": {
        "agreement": "seeds", "labels": 58, "reruns": [{}] * 41, "inconsistent": 1,
        "inconsistent_at_most": 0.0512,
    },
    "claims": [CLAIM, CLAIM | {"claim": "slope", "accepted": False}, CLAIM | {"accepted": None}],
    "settings": {"confidence": 0.95},
}  # fmt: skip


OPTIONAL = (
    "58%", "0.93", "12%", "0.72", "0.81", "377", "15,432 (TF-IDF), 7 (later)", "18 : 6",
    "(p = 0.023)", "+0.125", "1,200", "0.430, 0.450",
    "+0.0512 +0.0102 +0.0410 (+0.0100 to +0.0700) +0.0410 (+0.0000 to +1.0000)",
    "Means over 3 seeds", "-0.2000 (+0.0100 to +0.0700) +0.041 (+0.010 to +0.070)",
    "Training on everything gives 1.2345. Means over 2 seeds", "0.111 -0.050 to 0.250",
    "agree with a rank correlation of 0.37", "33 examples were left out",
    "Verified by training again: rejected", "58 41 1 5.1%", "as alike as two seeds",
    "lds 0.506 0.505 0.47 ± 0.061 accepted", "slope 0.506 0.505 0.47 ± 0.061 REJECTED",
    "cannot be judged", "New labels are of 32 subsets",
)  # fmt: skip


def test_the_page_needs_nothing_else(html):
    page = Page(html)
    assert len(html.encode()) < 400_000
    for tag, attributes in page.tags:
        assert tag not in {"link", "img", "iframe", "object", "base"}
        assert not {"src", "onclick", "onload", "onerror"} & set(attributes)
        if tag == "a":
            assert attributes["href"].startswith("#")
    assert re.findall(r"https?://", html) == []
    assert "@import" not in html
    assert "url(" not in html


def test_hostile_text_stays_text(html):
    page = Page(html)
    kinds = [attributes.get("type") for tag, attributes in page.tags if tag == "script"]
    assert set(kinds) == {"application/json", "application/octet-stream", None}
    assert kinds.count(None) == 1
    assert "<b>bold</b>" not in html
    assert "alert('x')</script>" not in html
    assert "planted <b>" not in html
    assert "49" not in {text.strip() for texts in page.texts.values() for text in texts}
    assert '"note": "</pre><script>"' not in html
    assert all(HOSTILE in one["prompt"] for one in block_of(html, "index"))
    assert all(HOSTILE in one["prompt"] for one in every(html, "examples"))


def test_the_policy_allows_two_known_scripts_alone(html):
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html).group(1)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    packed = re.search('id="block-plotly">([^<]*)<', html).group(1)
    scripts = [
        re.search(r"<script>(.*?)</script>", html, re.S).group(1).encode(),
        gzip.decompress(base64.b64decode(packed)),
    ]
    hashes = [base64.b64encode(hashlib.sha256(text).digest()).decode() for text in scripts]
    assert rules == {
        "default-src": "'none'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "style-src": "'unsafe-inline'",
        "script-src": " ".join(f"'sha256-{digest}'" for digest in hashes),
        "img-src": "data:",
    }


def test_every_target_is_in_the_explorer(html):
    index = block_of(html, "index")
    assert [(one["id"], one["task"], one["prompt"], one["response"]) for one in index] == [
        (one.id, one.task, one.prompt, one.response) for one in BENCHMARK.targets
    ]
    assert index[1]["proponents"] == BENCHMARK.targets[1].meta["proponents"]
    spread = BENCHMARK.labels.losses.astype(float).std(axis=1)
    assert [one["spread"] for one in index] == pytest.approx(spread.tolist(), rel=1e-3)


def test_every_method_shows_its_ends_with_scores(html, results):
    targets, examples = every(html, "targets"), every(html, "examples")
    methods = [method["name"] for method in settings_of(html)["methods"]]
    assert methods[0] == "airrep"
    assert set(methods) == set(results[1])
    assert len(targets) == len(BENCHMARK.targets)
    for row, target in enumerate(targets):
        for name, view in zip(methods, target["views"], strict=True):
            scores = results[1][name][row]
            ids = [examples[place]["id"] for place, _ in view["helpful"]]
            best = np.argsort(-scores, kind="stable")[:5]
            assert ids == [BENCHMARK.pool[place].id for place in best]
            worst = [score for _, score in view["harmful"]]
            assert worst == pytest.approx(np.sort(scores)[:5].tolist(), rel=1e-3)
    texts = [(one["id"], one["prompt"], one["response"]) for one in examples]
    assert set(texts) <= {(one.id, one.prompt, one.response) for one in BENCHMARK.pool}
    assert len(set(texts)) == len(texts)


def test_predicted_scores_are_those_that_were_evaluated(html, results):
    method = planted_methods(BENCHMARK.truth)["airrep"].fit(BENCHMARK.pool)
    expected = method.score_subsets(BENCHMARK.targets, BENCHMARK.labels.subsets)
    views = [target["views"][0] for target in every(html, "targets")]
    np.testing.assert_allclose(
        [view["predicted"] for view in views], expected, rtol=1e-3, atol=1e-4
    )
    learned = next(row for row in results[0]["methods"] if row["name"] == "airrep")
    assert np.mean([view["lds"] for view in views]) == pytest.approx(learned["lds"], abs=1e-3)


def test_blocks_hold_what_follows_the_block_before():
    targets = [replace(BENCHMARK.targets[0], id=f"target-{row}") for row in range(120)]
    pool = [replace(BENCHMARK.pool[0], id=f"pool-{row}") for row in range(600)]
    scores = np.random.default_rng(0).normal(size=(120, 600)).astype(np.float32)
    labels = replace(BENCHMARK.labels, losses=np.ones((120, 30)))
    blocks = explorer_blocks(
        [{"name": "m", "pooling": "attention"}], pool, targets, labels, {"m": scores}, 10
    )
    content = {
        name: json.loads(gzip.decompress(base64.b64decode(packed)))
        for name, packed in blocks.items()
    }
    assert [len(content[f"targets-{number}"]) for number in range(3)] == [50, 50, 20]
    assert TARGETS_A_BLOCK == 50
    row = 77
    for place, score in content["targets-1"][row - 50]["views"][0]["helpful"]:
        block, inside = divmod(place, EXAMPLES_A_BLOCK)
        found = content[f"examples-{block}"][inside]["id"]
        assert scores[row, int(found.split("-")[1])] == pytest.approx(score, rel=1e-3)


def test_the_headline_and_all_numbers_are_there(html, results):
    text = " ".join(Page(html).text().split())
    assert "AirRep beats every baseline" in text
    assert "95% interval" in text
    assert "noise ceiling" in text
    for method in results[0]["methods"]:
        assert f"{method['lds']:.3f}" in text
        assert f"{method['ci95'][0]:.3f} to {method['ci95'][1]:.3f}" in text
        assert f"{method['retrieval']['mrr']:.2f}" in text
        for value in method["per_task"].values():
            assert f"{value:.2f}" in text
    assert text.count("oracle") >= 2


def test_optional_numbers_are_shown_and_explained(results, tmp_path):
    path = tmp_path / "index.html"
    write(path, with_everything(results[0]), results[1])
    html = path.read_text(encoding="utf-8")
    # In the page's order, with the texts of a table's cells side by side.
    text = " ".join(re.sub(r"<[^>]*>", " ", html.split("<main")[1].split("<script")[0]).split())
    for number in OPTIONAL:
        assert number in text, number
    assert "Nothing here was checked by removing" not in text
    assert "<i>" not in html
    page = Page(html)
    heads = [
        attributes["title"]
        for tag, attributes in page.tags
        if attributes.get("scope") == "col" and "title" in attributes
    ]
    assert len(heads) == 23
    for meaning in heads:
        assert meaning in page.texts["dd"]
    assert set(settings_of(html)["plots"]) == {"cost", "calibration", "learning"}


def test_results_without_the_optional_numbers_have_no_empty_columns(results):
    bare = copy.deepcopy(results[0])
    for row in bare["methods"]:
        for name in ("lds_of_ceiling", "calibration", "linear_gap", "mislabel", "retrieval"):
            row[name] = None
        row.pop("prepare_seconds", None)
        row.pop("break_even_examples", None)
    for row in bare["differences"]:
        row.pop("sign_test", None)
    quality = quality_table(bare, bare["methods"], "airrep")
    assert [column.name for column in quality.columns] == [
        "LDS", "95% interval", "AirRep minus this", "LDS, additive", "LDS, attention",
        "Constant targets",
    ]  # fmt: skip
    assert [column.name for column in cost_table(bare["methods"]).columns] == [
        "Pool prepared, s", "Examples/s", "Query, ms a target", "Bytes an example",
    ]  # fmt: skip
    assert set(plots(bare, bare["methods"], "airrep")) == {"cost"}


def test_charts_say_in_words_what_they_show():
    rows = [
        {"name": "airrep", "oracle": False, "lds": 0.5, "ci95": [0.4, 0.6],
         "examples_per_second": 12_345.6, "calibration": None},
        {"name": "bm25", "oracle": False, "lds": 0.25, "ci95": [0.2, 0.3],
         "examples_per_second": 50.0, "calibration": {"bins": [
             {"predicted": -1, "measured": -0.5, "low": -1, "high": 0, "count": 3},
             {"predicted": 1, "measured": 0.75, "low": 0, "high": 1, "count": 3}]}},
    ]  # fmt: skip
    curve = [
        {"labels": 2000, "lds": 0.5, "ci95": [0, 1], "by_seed": [0.5]},
        {"labels": 50, "lds": 0.1, "ci95": [0, 1], "by_seed": [0.1]},
    ]
    found = plots({"learning_curve": curve, "noise_ceiling": None}, rows, "airrep")
    assert (
        found["cost"]["about"]
        == "LDS at examples a second: BM25 0.25 at 50, AirRep 0.50 at 12,346."
    )
    assert "BM25 from -0.500 to 0.750" in found["calibration"]["about"]
    assert found["calibration"]["lines"][0]["shown"]
    assert found["learning"]["about"].endswith("0.10 with 50, 0.50 with 2,000.")
    assert found["learning"]["ceiling"] is None


def test_the_task_table_by_hand():
    rows = [
        {"name": "airrep", "per_task": {"a": 0.5, "b": -0.2}},
        {"name": "bm25", "per_task": {"a": 0.3, "b": 0.1}},
        {"name": "late", "per_task": {"a": 0.4}},
    ]
    first, second = task_table(rows, "airrep", ["b", "a", "a", None])["rows"]
    assert (first["task"], first["targets"], first["lead"]) == ("a", 2, pytest.approx(0.1))
    assert [cell["heat"] for cell in first["cells"]] == [100, 60, 80]
    assert (second["targets"], second["lead"]) == (1, pytest.approx(-0.3))
    assert second["cells"][2] == {"value": None, "heat": 0}
    alone = task_table(rows[:1], "airrep", ["a"])
    assert not alone["leads"]
    assert alone["rows"][0]["lead"] is None


def test_bars_by_hand():
    chart = bar_chart([{"lds": 0.2, "ci95": [-0.1, 0.3]}], {"lds": 0.8})
    assert [tick["text"] for tick in chart["ticks"]] == [
        "-0.2",
        "0",
        "0.2",
        "0.4",
        "0.6",
        "0.8",
        "1",
    ]
    bar = chart["bars"][0]
    assert (bar["left"], bar["width"]) == (16.67, 16.66)
    assert (bar["low"], bar["spread"]) == (8.33, 33.34)
    assert chart["ceiling"] == 83.33


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.00123, "0.0012"), (0.5, "0.5"), (12.345, "12.3"), (1234567.8, "1,234,568")],
)
def test_amounts_are_plain(value, text):
    assert amount(value) == text


def test_a_page_without_ceiling_comparison_tasks_or_retrieval(tmp_path):
    bare = [replace(target, task=None, meta={}) for target in BENCHMARK.targets]
    methods = {name: make_attributor(name) for name in ("random", "same_task")}
    results, scores = evaluate(
        methods, BENCHMARK.pool, bare, BENCHMARK.labels, benchmark="bare", draws=20
    )
    write(tmp_path / "index.html", results, scores, targets=bare)
    text = Page((tmp_path / "index.html").read_text(encoding="utf-8")).text()
    assert "was skipped: same_task needs tasks" in text
    assert "MRR" not in text
    assert "LDS by task" not in text
    assert "minus" not in text


def test_missing_losses_are_null_in_the_page(results, tmp_path):
    losses = BENCHMARK.labels.losses.copy()
    losses[:, 0] = np.nan
    losses[3] = np.nan
    labels = replace(BENCHMARK.labels, losses=losses)
    write_report(
        tmp_path / "p.html", results[0], BENCHMARK.pool, BENCHMARK.targets, labels, results[1]
    )
    html = (tmp_path / "p.html").read_text(encoding="utf-8")
    targets = every(html, "targets")
    assert all(target["losses"][0] is None for target in targets)
    assert targets[0]["losses"][1] is not None
    assert block_of(html, "index")[3]["spread"] is None


def test_the_page_is_the_same_for_the_same_results(html, results, tmp_path):
    write(tmp_path / "again.html", *results)
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == html


def test_odd_characters_and_long_texts(results, tmp_path):
    odd = "broken \ud800 \0 \u2028 text"
    targets = [replace(one, prompt=odd, response="x" * 5000) for one in BENCHMARK.targets]
    write(tmp_path / "odd.html", *results, targets=targets)
    found = block_of((tmp_path / "odd.html").read_text(encoding="utf-8"), "index")[0]
    assert found["prompt"] == odd
    assert found["response"] == "x" * TEXT_LIMIT + "… (1,000 more characters)"


def test_fewer_examples_than_asked_for(results, tmp_path):
    write(tmp_path / "all.html", *results, per_target=500)
    target = every((tmp_path / "all.html").read_text(encoding="utf-8"), "targets")[0]
    assert len(target["views"][0]["helpful"]) == len(BENCHMARK.pool)


def test_the_served_page_asks_only_its_server():
    html = explorer_page('Pool <of> & "all"')
    page = Page(html)
    assert 'Pool <of> & "all"' in page.text()
    assert "<of>" not in html
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html).group(1)
    assert "connect-src 'self'" in policy
    assert "img-src" not in policy
    assert re.findall(r"https?://", html) == []
    script = re.search(r"<script>(.*?)</script>", html, re.S).group(1)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    ]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_colours_are_readable_in_light_and_dark():
    css = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", part)) for part in css.split("@media", 2)[:2]
    )
    for colours in (light, light | dark):
        for text in ("ink", "soft", "accent", "oracle", "ceiling", "harm"):
            for ground in ("page", "card"):
                assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
        for text in ("ink", "accent"):
            assert contrast(colours[text], colours["accent-soft"]) >= 4.5, text
        for text in ("hero-ink", "hero-soft"):
            assert contrast(colours[text], colours["hero"]) >= 4.5, text
        for shape in ("bar", "edge", *(f"hue-{number}" for number in range(5))):
            assert contrast(colours[shape], colours["card"]) >= 3, shape


def test_parts_that_do_not_belong_together_are_named(results, tmp_path):
    found, scores = results
    path = tmp_path / "index.html"
    with pytest.raises(InputError, match="labels hold 24 targets, but 3 were given"):
        write(path, found, scores, targets=BENCHMARK.targets[:3])
    with pytest.raises(InputError, match="no scores of the method 'airrep'"):
        write(path, found, {})
    with pytest.raises(InputError, match=r"'airrep' have shape \(24, 5\)"):
        write(path, found, scores | {"airrep": scores["airrep"][:, :5]})
    with pytest.raises(InputError, match="per_target = 0"):
        write(path, found, scores, per_target=0)
    assert not path.exists()


@pytest.mark.parametrize(("module", "name"), [("jinja2", "jinja2"), ("plotly.offline", "plotly")])
def test_a_package_that_is_missing_is_named(results, tmp_path, monkeypatch, module, name):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=rf"needs {name}; run `pip install jinja2 plotly`"):
        write(tmp_path / "index.html", *results)


def test_a_page_of_given_scores_with_a_ceiling_from_few_repeats(tmp_path):
    given = GivenScores("a file", BENCHMARK.truth.astype(np.float32))
    repeats = replace(
        BENCHMARK.repeats,
        subsets=BENCHMARK.repeats.subsets[:3],
        losses=BENCHMARK.repeats.losses[:, :3],
        numbers=BENCHMARK.repeats.numbers[:3],
    )
    results, scores = evaluated({"mine": GivenAttributor(given)}, repeat_labels=repeats)
    write(tmp_path / "index.html", results, scores)
    html = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "cost" not in settings_of(html)["plots"]
    text = " ".join(Page(html).text().split())
    assert "Fewer than 5 repeated subsets: the ceiling" in text
    assert "take that ceiling, and shares of it, as a guess" in text
    assert "Examples/s" not in text
