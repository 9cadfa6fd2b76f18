"""The report: one file, no network, hostile text shown as text, everything promised on it."""

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from planted import HOSTILE, planted_benchmark, planted_methods

from airrep.attributors import make_attributor
from airrep.evaluation import evaluate
from airrep.examples import InputError
from airrep.report import pick_targets, write_report

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


def data_of(html: str) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    return json.loads(found.group(1))


def test_the_page_needs_nothing_else(html):
    page = Page(html)
    assert len(html.encode()) < 400_000
    for tag, attributes in page.tags:
        assert tag not in {"link", "img", "iframe", "object", "base"}
        assert not {"src", "onclick", "onload", "onerror"} & set(attributes)
        if tag == "a":
            assert attributes["href"].startswith("#")
    # The one address is the SVG name space, which nothing fetches.
    assert set(re.findall(r"https?://[^\s\"')]+", html)) == {"http://www.w3.org/2000/svg"}
    assert "@import" not in html
    assert "url(" not in html
    assert "Content-Security-Policy" in html


def test_hostile_text_stays_text(html):
    page = Page(html)
    assert [dict(attributes).get("type") for tag, attributes in page.tags if tag == "script"] == [
        "application/json", None
    ]  # fmt: skip
    assert "<b>bold</b>" not in html
    assert "alert('x')</script>" not in html
    assert "planted <b>" not in html
    assert page.text().count(HOSTILE) >= 10
    assert "49" not in {text.strip() for texts in page.texts.values() for text in texts}
    assert any(HOSTILE in example["prompt"] for example in data_of(html)["examples"])
    assert '"note": "</pre><script>"' not in html


def test_the_policy_allows_the_pages_own_script_alone(html):
    scripts = re.findall(r"<script>(.*?)</script>", html, re.S)
    assert len(scripts) == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in html


def test_ten_targets_over_all_tasks_are_shown_in_full(html):
    page = Page(html)
    shown = [dict(a)["data-target"] for tag, a in page.tags if tag == "article"]
    assert shown == [str(number) for number in range(10)]
    rows = pick_targets(BENCHMARK.targets, 10)
    text = page.text()
    for row in rows:
        assert BENCHMARK.targets[row].prompt in text
        assert BENCHMARK.targets[row].response in text
    assert {BENCHMARK.targets[row].task for row in rows} == {one.task for one in BENCHMARK.targets}


def test_every_method_shows_its_ends_with_scores(html, results):
    data = data_of(html)
    assert {method["name"] for method in data["methods"]} == set(results[1])
    for name, views in data["views"].items():
        for row, view in zip(pick_targets(BENCHMARK.targets, 10), views, strict=True):
            scores = results[1][name][row]
            ids = [data["examples"][place]["id"] for place, _ in view["helpful"]]
            best = np.argsort(-scores, kind="stable")[:5]
            assert ids == [BENCHMARK.pool[place].id for place in best]
            worst = [score for _, score in view["harmful"]]
            assert worst == pytest.approx(np.sort(scores)[:5].tolist(), rel=1e-4)
            assert len(view["predicted"]) == len(BENCHMARK.labels.subsets)
    texts = {(one["id"], one["prompt"], one["response"]) for one in data["examples"]}
    assert texts <= {(one.id, one.prompt, one.response) for one in BENCHMARK.pool}


def test_predicted_scores_are_those_that_were_evaluated(html, results):
    method = planted_methods(BENCHMARK.truth)["airrep"].fit(BENCHMARK.pool)
    expected = method.score_subsets(BENCHMARK.targets, BENCHMARK.labels.subsets)
    for row, view in zip(
        pick_targets(BENCHMARK.targets, 10), data_of(html)["views"]["airrep"], strict=True
    ):
        np.testing.assert_allclose(view["predicted"], expected[row], rtol=1e-3, atol=1e-4)


def test_the_headline_and_all_numbers_are_there(html, results):
    text = " ".join(Page(html).text().split())
    assert "AirRep beats every baseline" in text
    assert "95% interval" in text
    assert "noise ceiling" in text
    for method in results[0]["methods"]:
        assert f"{method['lds']:.3f}" in text
        assert f"{method['ci95'][0]:.3f} to {method['ci95'][1]:.3f}" in text
        assert f"{method['retrieval']['mrr']:.2f}" in text
    assert text.count("oracle") >= 2


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


def test_missing_losses_are_null_in_the_page(results, tmp_path):
    losses = BENCHMARK.labels.losses.copy()
    losses[:, 0] = np.nan
    labels = replace(BENCHMARK.labels, losses=losses)
    write_report(
        tmp_path / "p.html", results[0], BENCHMARK.pool, BENCHMARK.targets, labels, results[1]
    )
    data = data_of((tmp_path / "p.html").read_text(encoding="utf-8"))
    assert all(target["losses"][0] is None for target in data["targets"])


def test_the_page_is_the_same_for_the_same_results(html, results, tmp_path):
    write(tmp_path / "again.html", *results)
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == html


def test_lone_surrogates_do_not_stop_the_page(results, tmp_path):
    odd = [replace(one, prompt="broken \ud800 text") for one in BENCHMARK.targets]
    write(tmp_path / "odd.html", *results, targets=odd)
    assert "broken ? text" in (tmp_path / "odd.html").read_text(encoding="utf-8")


def test_fewer_targets_and_examples_than_asked_for(results, tmp_path):
    write(tmp_path / "all.html", *results, target_count=500, per_target=500)
    data = data_of((tmp_path / "all.html").read_text(encoding="utf-8"))
    assert len(data["targets"]) == len(BENCHMARK.targets)
    assert len(data["views"]["random"][0]["helpful"]) == len(BENCHMARK.pool)


def test_targets_are_picked_over_tasks_without_repeats():
    picked = pick_targets(BENCHMARK.targets, 10)
    assert len(set(picked)) == 10
    assert pick_targets(BENCHMARK.targets, 2) == [0, 2]  # tasks evenly spaced: 1st and 3rd of 4
    assert sorted(pick_targets(BENCHMARK.targets, 999)) == list(range(24))


def test_parts_that_do_not_belong_together_are_named(results, tmp_path):
    found, scores = results
    path = tmp_path / "index.html"
    with pytest.raises(InputError, match="labels hold 24 targets, but 3 were given"):
        write(path, found, scores, targets=BENCHMARK.targets[:3])
    with pytest.raises(InputError, match="no scores of the method 'airrep'"):
        write(path, found, {})
    with pytest.raises(InputError, match=r"'airrep' have shape \(24, 5\)"):
        write(path, found, scores | {"airrep": scores["airrep"][:, :5]})
    with pytest.raises(InputError, match="target_count = 0"):
        write(path, found, scores, target_count=0)
    assert not path.exists()
