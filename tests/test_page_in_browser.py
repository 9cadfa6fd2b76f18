"""The pages as a reader meets them: in headless Chromium, from a file, without a network."""

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from browser import CHROMIUM, Browser
from planted import HOSTILE, planted_benchmark, planted_methods

from airrep.evaluation import evaluate
from airrep.report import explorer_page, write_report

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome on the PATH")

NASTY = (
    "<script>window.hit = 1</script><img src=x onerror='window.hit = 2'></script>\u2028\ud800\0 end"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    made = Browser(tmp_path_factory.mktemp("profile"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a report whose texts try to run scripts."""
    planted = planted_benchmark(subset_count=12)
    pool = [replace(one, prompt=f"{one.prompt} {NASTY}") for one in planted.pool]
    targets = [replace(one, response=f"{one.response} {NASTY}") for one in planted.targets]
    results, scores = evaluate(
        planted_methods(planted.truth), pool, targets, planted.labels, benchmark=NASTY, draws=20
    )
    results["learning_curve"] = [
        {"labels": 10, "lds": 0.3, "ci95": [0.2, 0.4], "by_seed": [0.28, 0.32]},
        {"labels": 20, "lds": 0.5, "ci95": [0.4, 0.6], "by_seed": [0.5, 0.5]},
    ]
    path = tmp_path_factory.mktemp("page") / "index.html"
    write_report(path, results, pool, targets, planted.labels, scores)
    return path.as_uri()


@pytest.fixture
def opened(browser: Browser, page: str) -> Browser:
    browser.call("Emulation.setEmulatedMedia", features=[])
    browser.open(page)
    browser.wait("document.querySelectorAll('.views .card').length === 20")
    return browser


def text(browser: Browser, selector: str) -> str:
    return browser.run(f"document.querySelector({json.dumps(selector)}).textContent")


def count(browser: Browser, selector: str) -> int:
    return browser.run(f"document.querySelectorAll({json.dumps(selector)}).length")


def test_the_page_opens_alone_and_draws(opened: Browser, page: str) -> None:
    opened.wait("document.querySelectorAll('#plot-cost .point').length === 4")
    opened.wait("document.querySelectorAll('.views .scatter .point').length === 24")
    opened.wait("document.querySelectorAll('#plot-learning .point').length === 4 + 2")
    assert opened.requests() == [page]
    assert opened.complaints() == []
    assert count(opened, "#targets input") == 24
    label = opened.run("document.getElementById('plot-cost').ariaLabel")
    assert label.startswith("LDS at examples a second")


def test_text_that_would_run_is_shown(opened: Browser) -> None:
    shown = text(opened, "#target .response")
    # A lone surrogate shows as the replacement character, as in any text.
    assert shown.replace("\ufffd", "\ud800") == f"Target answer 0. {NASTY}"
    assert HOSTILE in text(opened, ".helpful .card .prompt")
    assert "<img src=x" in text(opened, ".eyebrow")
    assert opened.run("typeof window.hit") == "undefined"
    assert count(opened, "img, .explorer script, .explorer b b") == 0
    assert opened.complaints() == []


def test_a_target_is_found_by_text_and_keys(opened: Browser) -> None:
    opened.type("find", "Question 17?")
    opened.wait("document.querySelectorAll('#targets input').length === 1")
    assert text(opened, "#found") == "1 of 24 targets"
    opened.press("ArrowDown")
    opened.wait("document.querySelector('#target .id').textContent === 'target-17'")
    assert opened.run("document.activeElement.name") == "target"
    opened.run("document.getElementById('find').value = ''")
    opened.type("find", "numbers")
    opened.wait("document.querySelectorAll('#targets input').length === 6")
    opened.press("ArrowDown")
    opened.press("ArrowDown")
    opened.wait("document.querySelector('#target .id').textContent === 'target-21'")
    assert opened.run("document.querySelector('#targets :checked').value") == "21"
    opened.type("find", " nothing like it")
    opened.wait("document.getElementById('found').textContent === '0 of 24 targets'")


def test_a_task_and_an_order_are_chosen(opened: Browser) -> None:
    def choose(field: str, value: str) -> None:
        opened.run(
            f"{{ const field = document.getElementById('{field}'); field.value = '{value}';"
            "field.dispatchEvent(new Event('input', { bubbles: true })); }"
        )

    choose("task", "words")
    assert count(opened, "#targets input") == 6
    choose("order", "worst")
    read = (
        "[...document.querySelectorAll('#targets b')]"
        ".map((one) => Number(one.textContent.slice(2)))"
    )
    worst = opened.run(read)
    choose("order", "best")
    assert worst == sorted(worst)
    assert opened.run(read) == worst[::-1]


def test_methods_stand_side_by_side_and_examples_are_filtered(opened: Browser) -> None:
    left, right = opened.run(
        "[...document.querySelectorAll('.method')].map((one) => one.getBoundingClientRect().top)"
    )
    assert left == right
    for _ in range(2):
        opened.run("document.querySelector('#methods input[value=random]').click()")
    opened.run("document.querySelector('#methods input[value=airrep]').click()")
    assert count(opened, ".method") == 1
    wanted = text(opened, ".helpful .card .id")
    opened.type("filter", f"{wanted} ASK")
    opened.wait("document.querySelectorAll('.views .card').length === 1")
    assert text(opened, "#matching") == "1 of 10 examples"
    assert text(opened, ".harmful .none") == "No example matches."
    opened.run("document.querySelector('#methods input:checked').click()")
    assert text(opened, "#matching") == "Choose at least one method."


def test_known_proponents_are_marked(opened: Browser) -> None:
    opened.run("document.querySelectorAll('#targets input')[1].click()")
    opened.wait("document.querySelector('#target .id').textContent === 'target-1'")
    assert count(opened, ".proponent") >= 1
    assert "known proponent" in text(opened, ".proponent")


def test_tasks_are_sorted_by_a_column(opened: Browser) -> None:
    opened.run("document.querySelectorAll('#task-table thead button')[3].click()")
    values = opened.run(
        "[...document.querySelectorAll('#task-table tbody tr')]"
        ".map((row) => Number(row.cells[3].dataset.value))"
    )
    assert values == sorted(values, reverse=True)
    assert opened.run("document.querySelectorAll('#task-table th')[3].ariaSort") == "descending"


def test_charts_follow_the_colour_scheme(opened: Browser) -> None:
    opened.wait("document.querySelector('#plot-cost .xtick text')")
    read = "getComputedStyle(document.querySelector('#plot-cost .xtick text')).fill"
    light = opened.run(read)
    opened.call(
        "Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}]
    )
    opened.wait(f"{read} !== {json.dumps(light)}")
    assert opened.run(read) != light


def test_a_narrow_screen_stacks_and_does_not_scroll_sideways(browser: Browser, page: str) -> None:
    browser.open(page, width=360)
    browser.wait("document.querySelectorAll('.views .scatter .point').length === 24")
    first, second = browser.run(
        "[...document.querySelectorAll('.method')].map((one) => one.getBoundingClientRect().top)"
    )
    assert second > first
    assert browser.run("document.documentElement.scrollWidth") <= 360
    assert browser.complaints() == []


class Served(BaseHTTPRequestHandler):
    """The explorer's page and a server behind it that knows one target."""

    def do_GET(self) -> None:
        if self.path == "/":
            self._send(200, explorer_page("Explore").encode(), "text/html; charset=utf-8")
        elif self.path == "/api/targets":
            row = {"row": 0, "id": "first", "task": None, "text": NASTY, "loss": None}
            self._send(200, {"targets": [row]})
        elif self.path == "/api/target/0":
            self._send(200, self._view(NASTY))
        else:
            self._send(204, b"", "text/plain")

    def do_POST(self) -> None:
        sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if sent["prompt"]:
            self._send(200, self._view(sent["prompt"]))
        else:
            self._send(400, {"error": "The prompt is empty; <b>write</b> one."})

    def _view(self, prompt: str) -> dict[str, Any]:
        example = {"id": "pool-1", "task": None, "prompt": NASTY, "response": "r", "score": 0.5}
        method = {"name": "airrep", "label": "AirRep", "helpful": [example], "harmful": [example]}
        target = {"id": "first", "task": None, "prompt": prompt, "response": "r", "loss": 1.25}
        return {"target": target, "methods": [method]}

    def _send(self, status: int, body: Any, kind: str = "application/json") -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    served = ThreadingHTTPServer(("127.0.0.1", 0), Served)
    thread = threading.Thread(target=served.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{served.server_port}/"
    served.shutdown()
    thread.join()
    served.server_close()


def test_the_served_explorer_shows_its_servers_answers(browser: Browser, server: str) -> None:
    browser.open(server)
    browser.wait("document.querySelectorAll('.views .card').length === 2")
    assert "window.hit = 1" in text(browser, ".helpful .card .prompt")
    assert text(browser, ".measured") == "Loss: 1.25 nats."
    assert browser.run("typeof window.hit") == "undefined"
    assert browser.run("document.getElementById('order-field').hidden")
    assert browser.complaints() == []
    send = "document.querySelector('#own-target button').click()"
    browser.type("own-prompt", "Which <b>one</b>?")
    browser.type("own-response", "this")
    browser.run(send)
    browser.wait("document.querySelector('#target .prompt').textContent === 'Which <b>one</b>?'")
    browser.run("document.getElementById('own-prompt').value = ''")
    browser.run(send)
    browser.wait("!document.getElementById('problem').hidden")
    assert text(browser, "#problem") == "The prompt is empty; <b>write</b> one."
