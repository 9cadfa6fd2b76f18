"""The learning curve: nested parts, judged on what no part has, and nothing trained twice."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training_task import planted_examples, planted_labels

import airrep.learning_curve
from airrep.attributors.airrep import AirRepAttributor
from airrep.encoder import AirRepEncoder, sharing_means
from airrep.examples import InputError
from airrep.holdout import hold_out
from airrep.learning_curve import (
    describe_curve,
    learning_curve,
    pick_counts,
    read_curve,
    split_for_curve,
)
from airrep.metrics import lds_per_target
from airrep.train_settings import TrainSettings
from airrep.trainer import train_encoder

pytestmark = pytest.mark.usefixtures("on_cpu")

POOL, TARGETS = planted_examples(32, seed=1), planted_examples(20, seed=2)
LABELS = planted_labels(POOL, TARGETS, subsets=40, size=10)
QUICK = TrainSettings(
    learning_rate=3e-3, warmup_steps=1, max_steps=2, trainable_layers=0, show_progress=False
)
DATA = split_for_curve(POOL, TARGETS, LABELS, QUICK)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The arguments of every training."""
    calls: list[tuple[Any, ...]] = []

    def record(*arguments: Any) -> Any:
        calls.append(arguments)
        return train_encoder(*arguments)

    monkeypatch.setattr(airrep.learning_curve, "train_encoder", record)
    return calls


def curve(path: Path, base: Path, counts: list[int], seeds: int = 1, **changes: Any) -> Any:
    given: dict[str, Any] = {"data": DATA, "settings": QUICK, "inputs": {"of": "this"}} | changes
    return learning_curve(
        path / "curve.json",
        sharing_means(base),
        counts=counts,
        seeds=seeds,
        draws=50,
        **given,
    )


def test_parts_are_nested_and_hold_nothing_that_judges() -> None:
    split = hold_out(LABELS, QUICK)
    judged_targets, judged = DATA.judged()
    assert judged.numbers.tolist() == split.held_subsets.tolist()
    assert len(judged_targets) == 4
    for seed in (0, 1):
        before: set[int] = set()
        for count in (8, 20, 32):
            targets, labels = DATA.part(count, seed)
            numbers = set(labels.numbers.tolist())
            assert len(numbers) == count
            assert before < numbers
            assert not numbers & set(judged.numbers.tolist())
            assert not {t.id for t in targets} & {t.id for t in judged_targets}
            np.testing.assert_array_equal(
                labels.losses, LABELS.losses[np.ix_(split.train_targets, sorted(numbers))]
            )
            before = numbers
    assert set(DATA.part(8, 0)[1].numbers) != set(DATA.part(8, 1)[1].numbers)


def test_more_labels_help_and_the_figures_are_those_of_held_out_labels(
    tmp_path: Path, base: Path
) -> None:
    settings = replace(QUICK, max_steps=12, evaluate_every=4)
    found = curve(tmp_path, base, [8, 32], seeds=2, settings=settings)
    few, many = found["points"]
    assert (few["labels"], many["labels"]) == (8, 32)
    assert many["lds"] > few["lds"]
    assert many["ci95"][0] < many["lds"] < many["ci95"][1]
    assert many["lds"] == pytest.approx(np.mean(many["by_seed"]))
    targets, labels = DATA.part(32, 0)
    encoder = AirRepEncoder.from_base(base)
    result = train_encoder(encoder, POOL, targets, labels, settings, None)
    judged, held_out = DATA.judged()
    scores = AirRepAttributor(result.encoder).fit(POOL).score_subsets(judged, held_out.subsets)
    assert many["by_seed"][0] == pytest.approx(lds_per_target(scores, held_out.losses)[0].mean())
    assert read_curve(tmp_path / "curve.json") == json.loads(json.dumps(found))
    assert describe_curve(found)[1].startswith(f"    32 labels: LDS {many['lds']:.3f} (")


def test_a_frozen_base_reads_every_text_once(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, read = AirRepEncoder.pool, []

    def recorded(self: AirRepEncoder, ids: Any, mask: Any) -> Any:
        read.append(len(ids))
        return pool(self, ids, mask)

    monkeypatch.setattr(AirRepEncoder, "pool", recorded)
    curve(tmp_path, base, [8, 16], seeds=2)
    targets = [TARGETS[row] for row in DATA.split.train_targets]
    texts = AirRepEncoder.from_base(base).tokenize([*POOL, *targets, *DATA.judged()[0]])
    assert sum(read) == len({text.ids.tobytes() for text in texts})


def test_held_out_losses_reach_no_training(
    tmp_path: Path, base: Path, trained: list[tuple[Any, ...]]
) -> None:
    split = DATA.split
    losses = LABELS.losses.copy()
    losses[split.held_targets] = np.random.default_rng(0).normal(size=losses[0].shape)
    losses[:, split.held_subsets] = 7.0
    poisoned = split_for_curve(POOL, TARGETS, replace(LABELS, losses=losses), QUICK)
    curve(tmp_path, base, [10])
    (tmp_path / "curve.json").unlink()
    curve(tmp_path, base, [10], data=poisoned)
    one, other = trained
    np.testing.assert_array_equal(one[3].losses, other[3].losses)


def test_a_killed_curve_goes_on_and_trains_nothing_twice(
    tmp_path: Path, base: Path, trained: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = curve(tmp_path, base, [8, 16], seeds=2)
    assert len(trained) == 4
    (tmp_path / "curve.json").unlink()
    trained.clear()
    recorded = airrep.learning_curve.train_encoder

    def killed(*arguments: Any) -> Any:
        if len(trained) == 3:
            raise KeyboardInterrupt
        return recorded(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(airrep.learning_curve, "train_encoder", killed)
        with pytest.raises(KeyboardInterrupt):
            curve(tmp_path, base, [8, 16], seeds=2)
    again = curve(tmp_path, base, [8, 16], seeds=2)
    assert len(trained) == 4
    assert again["points"] == whole["points"]
    assert len(curve(tmp_path, base, [12])["points"]) == 3
    assert len(trained) == 5
    with pytest.raises(InputError, match="is of other labels, settings or another encoder"):
        curve(tmp_path, base, [8], inputs={"of": "that"})


def test_counts() -> None:
    assert pick_counts(DATA, QUICK) == [8, 16, 32]  # 4 leave one label to choose the step by
    assert pick_counts(DATA, QUICK, "32, 10,10") == [10, 32]
    for counts, message in (
        ("10,many", "counts is '10,many'; give whole numbers"),
        ("33", "counts has 33; 32 training labels are there beside the 8 held-out ones"),
        ("0", "counts has 0"),
        ("5", "leaves fewer than 2 labels to train on, or to choose the step by"),
    ):
        with pytest.raises(InputError, match=message):
            pick_counts(DATA, QUICK, counts)


@pytest.mark.parametrize("name", ["validation_subsets", "validation_targets"])
def test_nothing_held_out_is_refused(name: str) -> None:
    settings = replace(QUICK, **{name: 0.0})
    with pytest.raises(InputError, match=f"judged on held-out labels, and train.{name} is 0"):
        split_for_curve(POOL, TARGETS, LABELS, settings)


@pytest.mark.parametrize("content", ["{", "[]", '{"points": [3]}', '{"points": [{"lds": 1}]}'])
def test_a_damaged_file_is_named(tmp_path: Path, base: Path, content: str) -> None:
    (tmp_path / "curve.json").write_text(content)
    with pytest.raises(InputError, match=r"curve\.json is not a learning curve; delete it"):
        curve(tmp_path, base, [8])
    with pytest.raises(InputError, match="seeds is 0; give at least 1"):
        curve(tmp_path, base, [8], seeds=0)
