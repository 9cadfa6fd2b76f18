"""Labels of other runs are learned from, and nothing that is held out leaks through them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from training_task import planted_examples, planted_labels

from airrep import stages
from airrep.config import RunConfig, check_run
from airrep.encoder import AirRepEncoder
from airrep.examples import InputError, fingerprint_examples, write_examples
from airrep.holdout import hold_out, more_labels
from airrep.label_store import Labels, LabelStore
from airrep.run_costs import learning_seconds, preparing_seconds
from airrep.run_folder import RunFolder
from airrep.train_settings import TrainSettings
from airrep.trainer import TrainResult, train_encoder

pytestmark = pytest.mark.usefixtures("on_cpu")

POOL, TARGETS = planted_examples(48, seed=1), planted_examples(24, seed=2)
OWN = planted_labels(POOL, TARGETS, subsets=20, size=12)
OTHER = planted_labels(POOL, TARGETS, subsets=40, size=12, seed=7)
SETTINGS = TrainSettings(
    learning_rate=3e-3,
    warmup_steps=2,
    max_steps=24,
    evaluate_every=4,
    response_words=False,
    show_progress=False,
)


def train(base: Path, own: Labels, *others: Labels) -> TrainResult:
    encoder = AirRepEncoder.from_base(base)
    return train_encoder(encoder, POOL, TARGETS, own, SETTINGS, None, others=others)


def test_each_ones_losses_are_standardised_by_themselves() -> None:
    split = hold_out(OWN, SETTINGS)
    louder = replace(OTHER, losses=5 + 100 * OTHER.losses)
    subsets, values = more_labels(split, OWN, [OTHER, louder])
    assert len(subsets) == 80
    assert values.shape == (len(split.train_targets), 80)
    np.testing.assert_allclose(values[:, :40], values[:, 40:], atol=1e-4)
    np.testing.assert_allclose(values[:, :40].mean(axis=1), 0, atol=1e-5)
    few = OTHER.losses[split.train_targets]
    assert all(np.corrcoef(a, b)[0, 1] < -0.999 for a, b in zip(values[:, :40], few, strict=True))
    subsets, values = more_labels(split, OWN, [])
    assert (subsets, values.shape) == ([], (len(split.train_targets), 0))


def test_held_out_subsets_are_not_learned_from_another_run() -> None:
    """In any order of their rows; the others of the same plan are."""
    split = hold_out(OWN, SETTINGS)
    turned = replace(OWN, subsets=[subset[::-1] for subset in OWN.subsets])
    subsets, values = more_labels(split, OWN, [turned])
    assert len(subsets) == values.shape[1] == len(split.train_subsets)
    kept = {tuple(sorted(subset)) for subset in subsets}
    assert kept == {tuple(sorted(OWN.subsets[column])) for column in split.train_subsets}


def test_held_out_labels_of_another_run_change_nothing(base: Path) -> None:
    split = hold_out(OWN, SETTINGS)
    losses = OTHER.losses.copy()
    losses[split.held_targets] = 0.0
    poisoned = train(base, OWN, replace(OTHER, losses=losses))
    plain = train(base, OWN, OTHER)
    losses[split.train_targets[0]] += np.arange(40)
    changed = train(base, OWN, replace(OTHER, losses=losses))
    first, second, third = ([e["loss"] for e in one.history] for one in (plain, poisoned, changed))
    assert first == second
    assert first != third  # guards the line above


def test_more_labels_teach_what_few_of_ones_own_cannot(base: Path) -> None:
    rng = np.random.default_rng(0)
    noisy = replace(OWN, losses=OWN.losses + rng.normal(0, 8, OWN.losses.shape))
    split = hold_out(OWN, SETTINGS)
    held = np.ix_(split.held_targets, split.held_subsets)
    noisy.losses[held] = OWN.losses[held]  # judged without noise
    alone, helped = train(base, noisy), train(base, noisy, OTHER)
    assert helped.validation_lds is not None
    assert alone.validation_lds is not None
    assert helped.validation_lds > alone.validation_lds + 0.2


def run_folder(path: Path, labels: Labels, pool: list, made: int | None = None) -> RunFolder:
    folder = RunFolder(path)
    folder.path.mkdir()
    write_examples(folder.pool_file, pool)
    write_examples(folder.targets_file("train"), TARGETS)
    about = {"examples": fingerprint_examples(pool), "targets": fingerprint_examples(TARGETS)}
    store = LabelStore.create(folder.labels("train"), about, labels.subsets, len(TARGETS), {})
    if made != 0:
        store.add_merged(dict(list(enumerate(labels.losses.T))[:made]))
    return folder


def test_the_train_stage_reads_other_runs(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = run_folder(tmp_path / "own", OWN, POOL)
    run_folder(tmp_path / "other", OTHER, POOL)
    run_folder(tmp_path / "foreign", OTHER, POOL[::-1])
    run_folder(tmp_path / "empty", OTHER, POOL, made=0)
    config = RunConfig(str(own.path), encoder=str(base), device="cpu", train=SETTINGS)
    for name, message in {
        "foreign": r"foreign/train_labels are of another pool than those in .*own",
        "empty": r"empty/train_labels holds no labels yet",
        "nowhere": r"nowhere/train_labels is not there yet",
    }.items():
        with pytest.raises(InputError, match=message):
            stages.train(replace(config, more_labels=[str(tmp_path / name)]))
    stages.train(replace(config, more_labels=[str(tmp_path / "other")]))
    shown = capsys.readouterr().out
    expected = train(base, OWN, OTHER).validation_lds
    assert f"LDS {expected:.3f} on held-out" in shown
    assert "missing" not in shown
    with pytest.raises(InputError, match="more_labels"):
        stages.train(config)  # the folder has an encoder of other labels


def test_missing_labels_of_another_run_are_told(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = run_folder(tmp_path / "own", OWN, POOL)
    count = len(OTHER.subsets)
    other = run_folder(tmp_path / "other", OTHER, POOL, made=count - 2)
    others = [str(other.path)]
    config = RunConfig(
        str(own.path), encoder=str(base), device="cpu", train=SETTINGS, more_labels=others
    )
    stages.train(config)
    told = f"2 of {count} training labels in {other.labels('train')} are missing"
    assert told in capsys.readouterr().out


def test_what_learning_cost_counts_the_labels_of_other_runs(tmp_path: Path) -> None:
    own, other = (run_folder(tmp_path / name, OWN, POOL, made=0) for name in ("own", "other"))
    for folder, seconds in ((own, 1.0), (other, 100.0)):
        store = folder.open_labels("train")
        for number, losses in enumerate(OWN.losses.T):
            store.write(number, losses, seconds=seconds)
    (own.path / "train.json").write_text('{"seconds": 5.0}')
    assert learning_seconds(own, []) == pytest.approx(25.0)
    assert learning_seconds(own, [str(other.path)]) == pytest.approx(2025.0)
    kernels = {"labels": object(), "members": [("tfidf", {})]}
    arguments = {
        "kernels": kernels,
        "ensemble": {"members": [("kernels", kernels), ("airrep", {})]},
        "tfidf": {},
    }
    spent = preparing_seconds(own, [], arguments)
    assert spent == pytest.approx({"kernels": 20.0, "ensemble": 25.0})


def test_other_runs_are_checked_before_the_slow_stages(tmp_path: Path, base: Path) -> None:
    config = RunConfig(str(tmp_path / "own"), encoder=str(base), device="cpu")
    with pytest.raises(InputError, match="nowhere/train_labels is not there yet"):
        stages.run(replace(config, more_labels=[str(tmp_path / "nowhere")]))
    assert not (tmp_path / "own").exists()
    for twice in (["a", "./a"], [str(tmp_path / "other/../own")]):
        with pytest.raises(InputError, match="a run is named twice"):
            check_run(replace(config, more_labels=twice))
