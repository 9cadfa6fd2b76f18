"""What several test files share: tiny models in folders, and where the minimix data lies."""

import os
import signal
from pathlib import Path

import pytest
from tiny_lm import save_tiny_lm
from tiny_models import tiny_encoder

ROOT = Path(__file__).resolve().parents[1]
MINIMIX = Path(os.environ.get("AIRREP_MINIMIX", ROOT.parent / "shared" / "minimix"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if (MINIMIX / "train.jsonl").is_file():
        return
    absent = pytest.mark.skip(reason=f"no minimix data in {MINIMIX}; set AIRREP_MINIMIX")
    for item in items:
        if item.get_closest_marker("minimix"):
            item.add_marker(absent)


@pytest.fixture(scope="session")
def minimix() -> Path:
    """The folder of the minimix data; mark tests that use it with `minimix`."""
    return MINIMIX


@pytest.fixture(scope="session")
def tiny_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny causal language model and its tokenizer; do not write into it."""
    return save_tiny_lm(tmp_path_factory.mktemp("models") / "tiny-lm")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny text encoder and its tokenizer; do not write into it."""
    return tiny_encoder(tmp_path_factory.mktemp("models") / "tiny-encoder")


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training takes no GPU: bit-identical is a promise of the CPU."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture(autouse=True, scope="session")
def _interrupts() -> None:
    """Ctrl-C interrupts, even where the tests run in a background that ignores it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
