"""Plans of labels: what a probe predicts, and what it does with it."""

from pathlib import Path

import numpy as np
import pytest

from airrep.cli import main
from data_builders.finetune import FineTuner
from data_builders.plan import LabelPlan, plan_labels
from tests.test_cli import models, write_config  # noqa: F401
from tests.test_engines import RECIPE, build

PLAN = LabelPlan(
    labels=100,
    engine="batched",
    models=4,
    setup_seconds=400.0,
    label_seconds=3200.0,
    memory_bytes=3 * 2**30,
    memory_limit_bytes=4 * 2**30,
    disk_bytes=2**20,
    notes=("A note.",),
)


def test_a_plan_in_words() -> None:
    assert PLAN.seconds_per_label == 32
    assert PLAN.hours == 1
    assert PLAN.labels_within(0.5) == 43  # (1800 - 400) / 32
    assert PLAN.labels_within(0.1) == 0
    assert PLAN.describe(price=2.0, hours=0.5).splitlines() == [
        "A note.",
        "engine batched, 4 models at once: 32 s a label",
        "100 labels: 1 hours of one such machine, 2.00 at 2 an hour; "
        "400 s of that before the first",
        "memory: 3.0 of 4.0 GiB; disk: 1.0 MiB",
        "0.5 hours buy 43 labels, 1.00 at 2 an hour",
    ]


def test_a_plan_warns_before_memory_runs_out() -> None:
    tight = LabelPlan(**{**vars(PLAN), "memory_limit_bytes": 3 * 2**30})
    assert tight.describe().splitlines()[-1].startswith("Memory may run out: lower")


def test_the_probe_scales_to_all_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    model, pool, targets = build("Llama")
    train, measure = FineTuner._train, FineTuner._measure

    def slow_train(self: FineTuner, plans: object) -> None:
        clock[0] += 5.0
        train(self, plans)  # type: ignore[arg-type]

    def slow_measure(self: FineTuner, rows: np.ndarray) -> np.ndarray:
        clock[0] += 0.5 * sum(len(self.examples[self.pool_size + row]) for row in rows)
        return measure(self, rows)

    monkeypatch.setattr(FineTuner, "_train", slow_train)
    monkeypatch.setattr(FineTuner, "_measure", slow_measure)
    monkeypatch.setattr("data_builders.plan.PROBE_TARGETS", 2)
    plan = plan_labels(
        lambda some, measured: FineTuner(model, some, measured, RECIPE, engine="eager"),
        pool,
        [targets[:4], targets[4:]],
        np.arange(5),
        [10, 3],
        loading_seconds=7.0,
    )
    tokens = [sum(map(len, store)) for store in (targets[:4], targets[4:])]
    expected = 10 * (5 + 0.5 * tokens[0]) + 3 * (5 + 0.5 * tokens[1])
    assert plan.label_seconds == pytest.approx(expected)
    assert plan.setup_seconds == 7
    assert plan.labels == 13
    assert plan.disk_bytes == 4 * (10 * 4 + 3 * 2)
    assert 0 < plan.memory_bytes < plan.memory_limit_bytes


def test_the_command_writes_nothing(
    tmp_path: Path,
    models: dict[str, str],  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = write_config(tmp_path, models)
    assert main(["plan", "--config", config, "--price", "3", "--hours", "1"]) == 0
    said = capsys.readouterr().out
    assert "14 labels: " in said  # 8 for training, 4 for the test, 2 of them twice
    assert "1 hours buy" in said
    assert not (tmp_path / "run").exists()
