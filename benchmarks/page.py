"""How large is the page, and how long does a browser take to open it?

    python -m benchmarks.page                      # made up: 520 targets, 12 methods
    python -m benchmarks.page --page out/demo/index.html

Opens the page several times in headless Chromium. All times are seconds since the navigation
began: first paint, loaded, the explorer showing a target's examples, all charts drawn. The first
opening has a fresh profile.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from airrep.attributor import Attributor
from airrep.attributors.random import RandomAttributor
from airrep.evaluation import evaluate
from airrep.examples import Example
from airrep.label_store import Labels
from airrep.report import write_report
from tests.browser import Browser

WORDS = ("river", "green", "seven", "under", "paper", "almost", "glass", "window", "north", "salt")
TASKS = 65


def main() -> None:
    """Opens the page and prints a row an opening."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", type=Path, help="a page to open; one is made up without it")
    parser.add_argument("--targets", type=int, default=520)
    parser.add_argument("--pool", type=int, default=9750)
    parser.add_argument("--methods", type=int, default=12)
    parser.add_argument("--subsets", type=int, default=100)
    parser.add_argument("--openings", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        page = options.page or make_up(Path(folder) / "index.html", options)
        print(f"{page.stat().st_size / 1e6:.1f} MB", flush=True)
        print("opening  first paint  loaded  explorer  all charts")
        browser = Browser(Path(folder) / "profile")
        for number in range(options.openings):
            seconds = open_once(browser, page)
            print(f"{number + 1:7d}" + "".join(f"{value:11.2f}" for value in seconds), flush=True)
        browser.close()


def open_once(browser: Browser, page: Path) -> tuple[float, float, float, float]:
    """Seconds until first paint, loading, the explorer and the charts."""
    browser.open(page.resolve().as_uri())
    browser.wait("document.querySelectorAll('.views .card').length > 0")
    explorer = browser.run("performance.now()")
    browser.run("document.querySelectorAll('.plot').forEach(e => e.scrollIntoView())")
    browser.wait("[...document.querySelectorAll('.plot')].every(e => e.querySelector('.main-svg'))")
    charts = browser.run("performance.now()")
    paint = browser.run("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    loaded = browser.run("performance.getEntriesByType('navigation')[0].loadEventEnd")
    return tuple(value / 1000 for value in (paint, loaded, explorer, charts))  # type: ignore[return-value]


def make_up(path: Path, options: argparse.Namespace) -> Path:
    """A page of random scores and losses."""
    rng = np.random.default_rng(options.seed)
    pool, targets = (
        [_example(f"{side}-{number}", rng) for number in range(count)]
        for side, count in (("pool", options.pool), ("target", options.targets))
    )
    subsets = [
        np.sort(rng.choice(options.pool, min(500, options.pool), replace=False))
        for _ in range(options.subsets)
    ]
    losses = rng.gamma(2.0, size=(options.targets, options.subsets)).astype(np.float32)
    labels = Labels(subsets, losses, np.arange(options.subsets))
    methods: Mapping[str, Attributor] = {
        f"random {number}": RandomAttributor(seed=number) for number in range(options.methods)
    }
    results, scores = evaluate(methods, pool, targets, labels, benchmark="made up", draws=50)
    write_report(path, results, pool, targets, labels, scores)
    return path


def _example(name: str, rng: np.random.Generator) -> Example:
    words = rng.choice(WORDS, 60)
    task = f"task {rng.integers(TASKS)}"
    return Example(name, " ".join(words[:50]), " ".join(words[50:]), task)


if __name__ == "__main__":
    main()
