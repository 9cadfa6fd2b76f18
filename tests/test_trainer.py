"""Training finds a planted signal, chooses by held-out labels only, and survives being killed."""

import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from train_in_process import settings_of, train
from training_task import files_in, planted_answers, planted_examples, planted_labels

import airrep.trainer
from airrep import stages
from airrep.checkpoint import Checkpoint, newest_checkpoint, write_checkpoint
from airrep.config import RunConfig
from airrep.device import peak_memory
from airrep.encoder import AirRepEncoder
from airrep.examples import InputError, fingerprint_examples, write_examples
from airrep.holdout import held_out_labels, hold_out
from airrep.label_store import Labels, LabelStore
from airrep.objectives import standardise_labels
from airrep.reliability import reliability_weights
from airrep.run_folder import RunFolder
from airrep.train_settings import TrainSettings
from airrep.train_state import layer_depths
from airrep.trainer import TrainResult, train_encoder

pytestmark = pytest.mark.usefixtures("on_cpu")

HERE = Path(__file__).parent
POOL, TARGETS = planted_examples(48, seed=1), planted_examples(24, seed=2)
LABELS = planted_labels(POOL, TARGETS, subsets=40, size=12)
QUICK = TrainSettings(learning_rate=3e-3, warmup_steps=2, max_steps=6, show_progress=False)
# One step that moves nothing: the encoder as training starts it.
STILL = replace(
    QUICK, learning_rate=1e-12, scale_learning_rate=None, max_steps=1, validation_subsets=0.0
)


@pytest.fixture
def run(base: Path) -> Callable[..., TrainResult]:
    def run(settings: TrainSettings = QUICK, labels: Labels = LABELS, **others: Any) -> TrainResult:
        encoder = AirRepEncoder.from_base(base)
        arguments = {"pool": POOL, "targets": TARGETS, "output": None, **others}
        return train_encoder(encoder, labels=labels, settings=settings, **arguments)

    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "encoder" / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def history(result: TrainResult, *keys: str) -> list[tuple[Any, ...]]:
    return [tuple(entry[key] for key in keys) for entry in result.history]


def turned_round(settings: TrainSettings, labels: Labels = LABELS) -> Labels:
    """Labels whose held-out part says the opposite of the rest."""
    split = hold_out(labels, settings)
    losses = labels.losses.copy()
    losses[np.ix_(split.held_targets, split.held_subsets)] *= -1
    return replace(labels, losses=losses)


def test_a_planted_signal_is_learned(run: Callable[..., TrainResult]) -> None:
    settings = replace(QUICK, max_steps=28, evaluate_every=4, response_words=False)
    result = run(settings)
    assert not result.encoder.config.response_words
    assert result.history[0]["validation_lds"] < 0.3
    assert result.validation_lds is not None
    assert result.validation_lds > 0.7
    assert result.history[-1]["loss"] < 0.5 * result.history[1]["loss"]
    # The encoder that comes back is the one of the best step: its LDS can be measured again.
    split = hold_out(LABELS, settings)
    from airrep.attributors.airrep import AirRepAttributor
    from airrep.metrics import lds_per_target

    scores = (
        AirRepAttributor(result.encoder)
        .fit(POOL)
        .score_subsets(
            [TARGETS[row] for row in split.held_targets],
            [LABELS.subsets[column] for column in split.held_subsets],
        )
    )
    lds, _ = lds_per_target(scores, LABELS.losses[np.ix_(split.held_targets, split.held_subsets)])
    assert lds.mean() == pytest.approx(result.validation_lds, abs=0.02)


def test_answers_that_long_prompts_hide_are_learned_from_their_words(base: Path) -> None:
    pool, targets = planted_answers(48, seed=1), planted_answers(24, seed=2)
    labels = planted_labels(pool, targets, subsets=40, size=12)
    found = {}
    for words in (True, False):
        settings = replace(QUICK, trainable_layers=0, response_words=words, marks=False)
        encoder = AirRepEncoder.from_base(base)
        found[words] = train_encoder(encoder, pool, targets, labels, settings, None)
    with_words, without = (found[words].validation_lds or 0.0 for words in (True, False))
    assert with_words > 0.8
    assert without < with_words - 0.3


def spread_of(encoder: AirRepEncoder, settings: TrainSettings, pool=POOL, targets=TARGETS) -> float:
    """Standard deviation of the scores of the pool's used rows for training targets."""
    rows = hold_out(LABELS, settings).train_targets
    used = [pool[row] for row in np.unique(np.concatenate(LABELS.subsets))]
    embeddings = encoder.encode([*used, *(targets[row] for row in rows)])
    centred = embeddings - embeddings[: len(used)].mean(dim=0)
    return float((centred[len(used) :] @ centred[: len(used)].T).std())


@pytest.mark.parametrize("scale", [0.3, None])
def test_response_words_start_with_twice_the_texts_part(
    base: Path, run: Callable[..., TrainResult], scale: float | None
) -> None:
    still = replace(STILL, start_scale=scale, marks=False)
    encoder = run(still).encoder
    if scale is not None:
        assert spread_of(encoder, still) == pytest.approx(scale, rel=1e-3)
    words = encoder.words_projector
    assert words is not None
    turn = words.weight.detach() @ words.weight.detach().T
    torch.testing.assert_close(turn / turn[0, 0], torch.eye(32), atol=1e-4, rtol=0)
    encoder.words_projector = torch.nn.Linear(32, 32, bias=False)
    torch.nn.init.zeros_(encoder.words_projector.weight)
    text = spread_of(encoder, still)
    if scale is None:
        untouched = AirRepEncoder.from_base(base)
        untouched.add_response_words(with_marks=False)
        assert text == pytest.approx(spread_of(untouched, still), rel=1e-3)
    encoder.words_projector = words
    torch.nn.init.zeros_(encoder.projector.weight)
    assert spread_of(encoder, still) == pytest.approx(2 * text, rel=1e-3)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_equal_responses_get_no_part_from_rounding(
    run: Callable[..., TrainResult], precision: Any
) -> None:
    pool, targets = ([replace(one, response="red") for one in some] for some in (POOL, TARGETS))
    still = replace(STILL, mixed_precision=precision, start_scale=0.6, marks=False)
    encoder = run(still, pool=pool, targets=targets).encoder
    assert spread_of(encoder, still, pool, targets) == pytest.approx(0.6, rel=0.05)
    assert encoder.words_projector is not None
    words, projector = encoder.words_projector.weight.norm(), encoder.projector.weight.norm()
    torch.testing.assert_close(words, projector, rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("objective", ["pairwise_ranking", "soft_spearman"])
def test_other_objectives_train(run: Callable[..., TrainResult], objective: Any) -> None:
    result = run(replace(QUICK, objective=objective))
    assert result.history[-1]["loss"] < result.history[1]["loss"]


def test_an_encoder_that_was_refused_starts_as_a_fresh_one(base: Path) -> None:
    encoder = AirRepEncoder.from_base(base)
    settings = replace(QUICK, max_steps=1)
    with pytest.raises(InputError, match="trainable_layers is 9"):
        train_encoder(encoder, POOL, TARGETS, LABELS, replace(settings, trainable_layers=9), None)
    again = train_encoder(encoder, POOL, TARGETS, LABELS, settings, None)
    fresh = train_encoder(AirRepEncoder.from_base(base), POOL, TARGETS, LABELS, settings, None)
    assert same(again.encoder.state_dict(), fresh.encoder.state_dict())


def test_held_out_labels_only_choose_the_step(run: Callable[..., TrainResult]) -> None:
    """Labels of held-out subsets or targets change the choice, never a loss or a gradient."""
    settings = replace(QUICK, response_words=False, start_scale=0.3)  # responses are noise here
    split = hold_out(LABELS, settings)
    rng = np.random.default_rng(0)
    losses = rng.normal(3, 1, LABELS.losses.shape).astype(np.float32)
    kept = np.ix_(split.train_targets, split.train_subsets)
    losses[kept] = LABELS.losses[kept]
    first, second = run(settings), run(settings, replace(LABELS, losses=losses))
    trained = ("step", "loss", "gradient_norm", "train_lds")
    assert history(first, *trained) == history(second, *trained)
    assert history(first, "validation_lds") != history(second, "validation_lds")
    # And the choice does follow them.
    assert run(settings, turned_round(settings)).best_step < first.best_step


def test_the_training_gradient_does_see_training_labels(run: Callable[..., TrainResult]) -> None:
    """Guards the test above: it would pass as well if no label mattered."""
    split = hold_out(LABELS, QUICK)
    losses = LABELS.losses.copy()
    losses[split.train_targets[0], split.train_subsets[0]] += 1
    changed = run(labels=replace(LABELS, losses=losses))
    assert changed.history[1]["loss"] != run().history[1]["loss"]


def test_patience_ends_training(run: Callable[..., TrainResult]) -> None:
    settings = replace(QUICK, max_steps=30, evaluate_every=2, patience=2)
    result = run(settings, turned_round(settings))
    assert result.history[-1]["step"] == result.best_step + 4 < 30
    judged = [entry["validation_lds"] for entry in result.history[::2]]
    assert result.validation_lds == max(judged) == judged[result.best_step // 2]


def test_nothing_held_out_takes_the_last_step(run: Callable[..., TrainResult]) -> None:
    result = run(replace(QUICK, validation_subsets=0.0, validation_targets=0.0, max_steps=3))
    assert (result.best_step, result.validation_lds) == (3, None)
    assert result.history[-1]["train_lds"] is not None


def test_missing_labels_and_flat_targets(run: Callable[..., TrainResult]) -> None:
    losses = LABELS.losses.copy()
    losses[np.random.default_rng(0).random(losses.shape) < 0.1] = np.nan
    split = hold_out(LABELS, QUICK)
    losses[split.train_targets[:2]] = 1.5
    result = run(labels=replace(LABELS, losses=losses))
    assert result.dropped_targets == 2
    assert np.isfinite([entry["loss"] for entry in result.history[1:]]).all()


def test_target_weights(run: Callable[..., TrainResult]) -> None:
    split = hold_out(LABELS, QUICK)
    losses = LABELS.losses.copy()
    losses[split.train_targets[0]] = np.random.default_rng(0).normal(3, 1, losses.shape[1])
    without_it = np.ones(len(TARGETS))
    without_it[split.train_targets[0]] = 0
    trained = ("loss", "gradient_norm")
    a = run(target_weights=without_it)
    b = run(labels=replace(LABELS, losses=losses), target_weights=without_it)
    assert history(a, *trained) == history(b, *trained)
    assert history(a, *trained) != history(run(), *trained)


def test_unreliable_targets_weigh_less(run: Callable[..., TrainResult]) -> None:
    """A training target of noise alone nearly leaves the objective; nothing held out is read."""
    settings = replace(QUICK, target_weighting="reliability")
    split = hold_out(LABELS, settings)
    losses = LABELS.losses.copy()
    losses[split.train_targets[0]] = np.random.default_rng(0).normal(3, 1, losses.shape[1])
    noisy = replace(LABELS, losses=losses)
    trained = ("loss", "gradient_norm")
    weights = np.ones(len(TARGETS))
    kept = np.ix_(split.train_targets, split.train_subsets)
    weights[split.train_targets] = reliability_weights(standardise_labels(losses[kept])[0])
    assert weights[split.train_targets[0]] < 0.3 < 0.5 < weights[split.train_targets[1:]].min()
    weighed = run(settings, noisy)
    assert history(weighed, *trained) == history(
        run(QUICK, noisy, target_weights=weights), *trained
    )
    assert history(weighed, *trained) != history(run(QUICK, noisy), *trained)
    again = run(settings, replace(noisy, losses=turned_round(settings, noisy).losses))
    assert history(again, *trained) == history(weighed, *trained)
    # Weights that are given count on top.
    half = run(settings, noisy, target_weights=np.full(len(TARGETS), 0.5))
    assert history(half, "loss")[1][0] == pytest.approx(history(weighed, "loss")[1][0], rel=1e-5)


def test_scores_start_centred_and_scaled(run: Callable[..., TrainResult]) -> None:
    settings = replace(STILL, start_scale=0.7)
    encoder = run(settings).encoder
    pool, targets = encoder.encode(POOL), encoder.encode(TARGETS)
    scores = targets[hold_out(LABELS, settings).train_targets] @ pool.T
    assert float(scores.std()) == pytest.approx(0.7, rel=1e-4)
    torch.testing.assert_close(pool.mean(dim=0), torch.zeros(pool.shape[1]), atol=1e-5, rtol=0)
    untouched = run(replace(STILL, start_scale=None)).encoder.encode(POOL)
    assert float(untouched.mean(dim=0).abs().max()) > 1e-3


def test_the_parts_scales_alone_make_the_loss_fall(run: Callable[..., TrainResult]) -> None:
    alone = replace(STILL, warmup_steps=0, scale_learning_rate=0.1)  # no weight moves for itself
    before, after = run(STILL).encoder, run(alone).encoder
    heads = [(before.projector, after.projector)]
    heads.append((before.words_projector, after.words_projector))  # type: ignore[arg-type]
    for one, other in heads:
        factor = (other.weight.norm() / one.weight.norm()).detach()
        assert abs(float(factor.log())) == pytest.approx(0.1, rel=0.01)
        torch.testing.assert_close(other.weight, factor * one.weight)
    for start in (0.05, 3.0):
        losses = history(run(replace(alone, start_scale=start, max_steps=25)), "loss")[1:]
        assert losses[-1][0] < losses[0][0] - 0.01


def test_an_objective_that_is_blind_to_scale_leaves_it(run: Callable[..., TrainResult]) -> None:
    """Every subset is one example: attention has nothing to weigh, correlation has no unit."""
    losses = np.random.default_rng(0).normal(size=(len(TARGETS), len(POOL)))
    singles = Labels(list(np.arange(len(POOL))[:, None]), losses, np.arange(len(POOL)))
    settings = replace(STILL, scale_learning_rate=0.1, max_steps=20, warmup_steps=0)
    settings = replace(settings, response_words=False)
    after = spread_of(run(settings, singles).encoder, settings)
    before = spread_of(run(replace(settings, scale_learning_rate=None), singles).encoder, settings)
    assert after == pytest.approx(before, rel=0.01)


@pytest.mark.parametrize("trainable_layers", [None, 0])
def test_weights_of_half_precision_train(base: Path, trainable_layers: int | None) -> None:
    encoder = AirRepEncoder.from_base(base, dtype=torch.bfloat16)
    settings = replace(QUICK, trainable_layers=trainable_layers, max_steps=2)
    result = train_encoder(encoder, POOL, TARGETS, LABELS, settings, None)
    assert result.encoder.projector.weight.dtype == torch.bfloat16
    assert history(result, "loss")[2][0] is not None


@pytest.mark.parametrize("trainable_layers", [0, 1])
def test_frozen_layers_stay_as_they_were(
    base: Path, run: Callable[..., TrainResult], trainable_layers: int
) -> None:
    start = AirRepEncoder.from_base(base).state_dict()
    settings = replace(QUICK, trainable_layers=trainable_layers, validation_subsets=0.0)
    after = run(settings).encoder.state_dict()
    changed = {name for name in start if not torch.equal(start[name], after[name])}
    assert {"projector.weight", "projector.bias"} <= changed
    assert all(name.startswith(("projector.", "base.encoder.layer.2.")) for name in changed)
    assert (len(changed) > 2) == (trainable_layers == 1)


@pytest.mark.parametrize("trainable_layers", [0, 1])
def test_means_of_a_base_outlive_trainings_that_leave_it_as_it_is(
    base: Path, run: Callable[..., TrainResult], trainable_layers: int
) -> None:
    settings = replace(QUICK, trainable_layers=trainable_layers)
    expected = run(settings).encoder.encode(POOL)
    means: dict[bytes, torch.Tensor] = {}
    for _ in range(2):
        encoder = AirRepEncoder.from_base(base)
        encoder.means = means
        train_encoder(encoder, POOL, TARGETS, LABELS, settings, None)
        torch.testing.assert_close(encoder.encode(POOL), expected)
        assert bool(means) == (trainable_layers == 0)


@pytest.mark.parametrize("trainable_layers", [None, 1])
def test_lora_changes_weights_by_a_low_rank_and_leaves_a_plain_encoder(
    base: Path, run: Callable[..., TrainResult], tmp_path: Path, trainable_layers: int | None
) -> None:
    start = AirRepEncoder.from_base(base).state_dict()
    settings = replace(
        QUICK, lora_rank=2, trainable_layers=trainable_layers, validation_subsets=0.0
    )
    result = run(settings, output=tmp_path)
    assert result.history[-1]["loss"] < result.history[1]["loss"]
    assert same(weights(tmp_path), result.encoder.state_dict())
    assert weights(tmp_path).keys() == {*start, "words_projector.weight"}
    assert all(parameter.requires_grad for parameter in result.encoder.parameters())
    layers = "base.encoder.layer." if trainable_layers is None else "base.encoder.layer.2."
    for name, after in result.encoder.state_dict().items():
        if name == "words_projector.weight":
            continue
        change = (after - start[name]).double()
        if name.startswith(layers) and name.endswith("weight") and "LayerNorm" not in name:
            values = torch.linalg.svdvals(change)
            assert values[0] > 1e-6
            assert values[2] < 1e-3 * values[0]
        elif not name.startswith("projector."):
            assert not change.any(), name
    # What was judged is what was merged.
    again = train_encoder(
        AirRepEncoder.from_base(base), POOL, TARGETS, LABELS, settings, output=tmp_path
    )
    torch.testing.assert_close(again.encoder.encode(POOL), result.encoder.encode(POOL))


def test_lora_resumes_bit_by_bit(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(settings_of(1, dropout=True), lora_rank=2)
    with monkeypatch.context() as patch:
        patch.setattr(airrep.trainer.TrainRun, "finish", lambda *_: None)  # as if killed there
        whole = train(base, tmp_path, settings)
    shutil.rmtree(tmp_path / "checkpoints/step-000008")
    resumed = train(base, tmp_path, settings)
    assert same(weights(tmp_path), whole.encoder.state_dict())
    assert history(resumed, "loss") == history(whole, "loss")


def test_lower_layers_learn_more_slowly(base: Path, run: Callable[..., TrainResult]) -> None:
    """One step of Adam moves every weight by about its learning rate."""
    start = AirRepEncoder.from_base(base).state_dict()
    settings = replace(
        STILL,
        learning_rate=3e-3,
        warmup_steps=0,
        start_scale=None,
        weight_decay=0.0,
        layer_decay=0.5,
    )
    after = run(settings).encoder.state_dict()
    for name, share in {
        "projector.weight": 1.0,
        "base.encoder.layer.2.output.dense.weight": 0.5,
        "base.encoder.layer.0.output.dense.weight": 0.125,
        "base.embeddings.LayerNorm.weight": 0.0625,
    }.items():
        moved = (after[name] - start[name]).abs().max()
        assert float(moved) == pytest.approx(3e-3 * share, rel=0.02)


def test_layers_are_told_by_name() -> None:
    names = ["base.embed.weight", "base.layer.0.a.1.weight", "base.layer.1.b", "base.norm.weight"]
    depths = layer_depths([*names, "projector.weight"])
    assert list(depths.values()) == [0, 1, 2, 2, 3]
    assert layer_depths(["projector.weight", "projector.bias"]) == {
        "projector.weight": 1,
        "projector.bias": 1,
    }


def test_few_held_out_labels_are_said(
    run: Callable[..., TrainResult], capsys: pytest.CaptureFixture[str]
) -> None:
    run(replace(QUICK, max_steps=1))  # 8 subsets and 5 targets
    assert capsys.readouterr().out == ""
    run(replace(QUICK, max_steps=1, validation_targets=0.16))
    message = "The step is chosen on 8 held-out subsets and 4 targets, which is little"
    assert message in capsys.readouterr().out
    run(replace(QUICK, max_steps=1, validation_subsets=0.1))
    assert "on 4 held-out subsets and 5 targets" in capsys.readouterr().out
    run(replace(QUICK, max_steps=1, validation_subsets=0.0))
    assert capsys.readouterr().out == ""


def test_held_out_labels_are_those_that_never_train() -> None:
    rows, labels = held_out_labels(LABELS, QUICK)
    split = hold_out(LABELS, QUICK)
    assert rows.tolist() == split.held_targets.tolist()
    assert labels.numbers.tolist() == split.held_subsets.tolist()
    np.testing.assert_array_equal(labels.losses, LABELS.losses[np.ix_(rows, split.held_subsets)])
    assert all(
        np.array_equal(subset, LABELS.subsets[column])
        for subset, column in zip(labels.subsets, split.held_subsets, strict=True)
    )
    with pytest.raises(InputError, match="validation_subsets is 0, so no label is held out"):
        held_out_labels(LABELS, replace(QUICK, validation_subsets=0.0))


def test_the_train_stage_never_reads_test_labels(base: Path, tmp_path: Path) -> None:
    """A run whose test labels are poison trains the same encoder, bit by bit."""
    config = RunConfig("", encoder=str(base), device="cpu", train=QUICK)
    for name in ("good", "bad"):
        folder = RunFolder(tmp_path / name)
        folder.path.mkdir()
        write_examples(folder.pool_file, POOL)
        for split in ("train", "test"):
            write_examples(folder.targets_file(split), TARGETS)
            store = LabelStore.create(
                folder.labels(split),
                {"examples": fingerprint_examples(POOL), "targets": fingerprint_examples(TARGETS)},
                LABELS.subsets,
                len(TARGETS),
                {},
            )
            store.add_merged(dict(enumerate(LABELS.losses.T)))
    poisoned = RunFolder(tmp_path / "bad")
    poisoned.targets_file("test").write_bytes(b"not JSON")
    for file in poisoned.labels("test").rglob("*"):
        if file.is_file():
            file.write_bytes(b"poison")
    for name in ("good", "bad"):
        stages.train(replace(config, output=str(tmp_path / name)))
    assert same(weights(tmp_path / "good"), weights(tmp_path / "bad"))
    with pytest.raises(InputError, match="manifest.json"):
        poisoned.open_labels("test")


def test_finished_runs_are_read_back(run: Callable[..., TrainResult], tmp_path: Path) -> None:
    first = run(output=tmp_path)
    assert files_in(tmp_path) == [
        "encoder/config.json",
        "encoder/model.safetensors",
        "encoder/tokenizer.json",
        "encoder/tokenizer_config.json",
        "history.jsonl",
        "train.json",
    ]
    about = json.loads((tmp_path / "train.json").read_text())
    assert about["best_step"] == first.best_step
    assert about["settings"]["learning_rate"] == 3e-3
    assert {"versions", "git_revision", "validation_lds"} <= about.keys()
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    again = run(output=tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == times
    assert (again.best_step, again.validation_lds) == (first.best_step, first.validation_lds)
    assert again.history == first.history
    assert same(again.encoder.state_dict(), first.encoder.state_dict())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "train.json",
            b'{"fingerprint": 3}',
            r"train\.json cannot be read \('best_step'\); delete",
        ),
        ("train.json", b"[]", r"train\.json cannot be read .* delete it to train again"),
        ("train.json", b"\xff", r"train\.json cannot be read .* delete it to train again"),
        ("history.jsonl", b'{"step"', r"history\.jsonl cannot be read .* without the curves"),
    ],
)
def test_damaged_files_of_a_finished_run_are_named(
    run: Callable[..., TrainResult], tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    run(output=tmp_path)
    about = json.loads((tmp_path / "train.json").read_text())
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        run(output=tmp_path)
    (tmp_path / "train.json").write_text(json.dumps(about | {"fingerprint": 3}))
    with pytest.raises(InputError, match=r"train\.json does not say which training run it belongs"):
        run(output=tmp_path)


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, Checkpoint(2, {}, {"a/b": torch.zeros(9)}))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*step-000004'"):
            write_checkpoint(tmp_path, Checkpoint(4, {}, {"a/b": torch.zeros(9000)}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files_in(tmp_path) == ["step-000002/state.json", "step-000002/tensors.safetensors"]


def test_texts_that_all_look_the_same_are_not_called_divergence(
    run: Callable[..., TrainResult],
) -> None:
    same = [replace(example, prompt="the apple", response="is red") for example in POOL]
    with pytest.raises(InputError, match="All texts look the same .* check that its tokenizer"):
        run(replace(QUICK, start_scale=0.3), pool=same)


def test_another_run_is_refused(run: Callable[..., TrainResult], tmp_path: Path) -> None:
    run(output=tmp_path)
    with pytest.raises(InputError, match=r"another training run \(learning_rate: 0.003 there, 0.1"):
        run(replace(QUICK, learning_rate=0.1), output=tmp_path)
    losses = LABELS.losses + np.float32(0.1)
    with pytest.raises(InputError, match=r"losses: '?\w{12}'? there, \w{12} now"):
        run(labels=replace(LABELS, losses=losses), output=tmp_path)
    with pytest.raises(InputError, match=r"pool: \w{12} there, \w{12} now"):
        run(pool=[*POOL[1:], POOL[0]], output=tmp_path)


def test_an_encoder_of_unknown_origin_is_not_overwritten(
    base: Path, run: Callable[..., TrainResult], tmp_path: Path
) -> None:
    AirRepEncoder.from_base(base).save_pretrained(tmp_path / "encoder")
    with pytest.raises(InputError, match=r"encoder exists, but no train.json beside it"):
        run(output=tmp_path)


def test_a_checkpoint_of_another_run_is_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(airrep.trainer.TrainRun, "finish", lambda *_: None)  # as if killed there
    train(base, tmp_path, settings_of(0, dropout=False))
    with pytest.raises(InputError, match=r"checkpoints belongs to another .*seed: 0 there, 1 now"):
        train(base, tmp_path, replace(settings_of(0, dropout=False), seed=1))
    for content in ("{", "[]", "null", "3"):
        for path in (tmp_path / "checkpoints").glob("*/state.json"):
            path.write_text(content)
        with pytest.raises(InputError, match="delete that folder to start again"):
            train(base, tmp_path, settings_of(0, dropout=False))
    for path in (tmp_path / "checkpoints").glob("*/state.json"):
        path.write_text('{"step": 6}')
    with pytest.raises(InputError, match="does not say which training run it belongs to; delete"):
        train(base, tmp_path, settings_of(0, dropout=False))


def test_a_damaged_newest_checkpoint_falls_back(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(0, dropout=False)
    whole = train(base, tmp_path / "whole", settings)
    with monkeypatch.context() as patch:
        patch.setattr(airrep.trainer.TrainRun, "finish", lambda *_: None)
        train(base, tmp_path / "hurt", settings)
    os.truncate(tmp_path / "hurt/checkpoints/step-000008/tensors.safetensors", 50)
    found = newest_checkpoint(tmp_path / "hurt/checkpoints")
    assert found is not None
    assert found.step == 6
    resumed = train(base, tmp_path / "hurt", settings)
    assert same(weights(tmp_path / "hurt"), weights(tmp_path / "whole"))
    numbers = ("step", "loss", "validation_lds")
    assert history(resumed, *numbers) == history(whole, *numbers)


def launch(*arguments: str, **environment: str) -> tuple[int, str]:
    """Exit status and standard error of a Python process; none of its children outlives it."""
    path = os.pathsep.join([str(HERE.parent), str(HERE)])
    process = subprocess.Popen(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": path, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        _, error = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, error


def test_resume_after_a_kill_is_bit_identical(base: Path, tmp_path: Path) -> None:
    script, threads = str(HERE / "train_in_process.py"), str(torch.get_num_threads())
    output = tmp_path / "killed"
    status, error = launch(script, str(base), str(output), threads, "3", "2", "dropout")
    assert status == -signal.SIGKILL, error
    names = sorted(path.name for path in (output / "checkpoints").iterdir())
    assert names == ["step-000002", "step-000004", "step-000006.partial"]
    assert not (output / "encoder").exists()

    settings = settings_of(2, dropout=True)
    resumed = train(base, output, settings)
    whole = train(base, tmp_path / "whole", settings)
    assert same(weights(output), weights(tmp_path / "whole"))
    numbers = ("step", "loss", "gradient_norm", "train_lds", "validation_lds")
    assert history(resumed, *numbers) == history(whole, *numbers)
    lines = (output / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(9))
    assert "checkpoints" not in {path.name for path in output.iterdir()}


def test_two_processes_equal_one(base: Path, tmp_path: Path) -> None:
    status, error = launch(
        *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
        *(str(HERE / "train_in_process.py"), str(base), str(tmp_path / "two")),
        *("1", "0", "all", "dropout"),
        OMP_NUM_THREADS="1",
    )
    assert status == 0, error[-3000:]
    one = train(base, tmp_path / "one", settings_of(None, dropout=True))
    two = weights(tmp_path / "two")
    for name, weight in weights(tmp_path / "one").items():
        # Softmax does not see a key's bias: its gradient is rounding, which Adam makes large.
        if not name.endswith("key.bias"):
            torch.testing.assert_close(two[name], weight, rtol=1e-4, atol=1e-4)
    encoder = AirRepEncoder.from_pretrained(tmp_path / "two" / "encoder")
    torch.testing.assert_close(encoder.encode(POOL), one.encoder.encode(POOL), rtol=1e-4, atol=1e-4)
    about = json.loads((tmp_path / "two" / "train.json").read_text())
    assert about["best_step"] == one.best_step
    assert about["processes"] == 2


def test_a_loss_that_is_not_finite(run: Callable[..., TrainResult]) -> None:
    with pytest.raises(InputError, match=r"at step \d+ .* lower the learning_rate \(now 1e\+30\)"):
        run(replace(QUICK, learning_rate=1e30))


def test_wandb_offline_stays_offline(
    run: Callable[..., TrainResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[tuple[dict[str, Any], int]] = []

    class FakeRun:
        def log(self, entry: dict[str, Any], step: int) -> None:
            logged.append((entry, step))

        def finish(self, exit_code: int) -> None:
            logged.append(({"exit_code": exit_code}, -1))

    opened: dict[str, Any] = {}

    def init(**arguments: Any) -> FakeRun:
        opened.update(arguments)
        return FakeRun()

    monkeypatch.setattr("wandb.init", init)
    run(replace(QUICK, wandb="offline", max_steps=2), output=tmp_path)
    assert (opened["mode"], opened["dir"]) == ("offline", str(tmp_path))
    assert [step for _, step in logged] == [0, 1, 2, -1]
    assert logged[2][0]["validation_lds"] is not None
    measured = {"train_lds", "validation_lds", "loss", "gradient_norm"}
    assert measured | {"examples_per_second", "peak_memory_gib"} <= logged[2][0].keys()
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    for line, (entry, _) in zip(lines, logged, strict=False):
        stored = json.loads(line)
        assert {key: value for key, value in stored.items() if value is not None} == entry


def test_examples_per_second_counts_what_a_step_encodes(
    run: Callable[..., TrainResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that goes on by half a second whenever it is read."""
    ticks = itertools.count(0, 0.5)
    clock = SimpleNamespace(perf_counter=lambda: next(ticks))
    monkeypatch.setattr(airrep.trainer, "time", clock)
    split = hold_out(LABELS, QUICK)
    rows = {row for column in split.train_subsets for row in LABELS.subsets[column]}
    rates = [rate for (rate,) in history(run(), "examples_per_second")]
    assert rates == [None] + 6 * [2 * (len(rows) + len(split.train_targets))]
    sampled = run(replace(QUICK, targets_per_step=3, subsets_per_step=2))
    for (rate,) in history(sampled, "examples_per_second")[1:]:
        assert 2 * (3 + 12) <= rate <= 2 * (3 + 24)  # two subsets of 12 pool rows
    assert all(entry["seconds"] > 0 for entry in sampled.history)


def test_peak_memory(run: Callable[..., TrainResult], monkeypatch: pytest.MonkeyPatch) -> None:
    held = np.ones(2**28, dtype=np.uint8)  # a quarter of a GiB, written
    peaks = [peak for (peak,) in history(run(), "peak_memory_gib")]
    assert held.nbytes / 2**30 < peaks[0]
    assert peaks[-1] < 100  # GiB, not MiB
    assert peaks == sorted(peaks)
    assert peaks[-1] <= round(peak_memory(torch.device("cpu")) / 2**30, 3)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**29)
    assert peak_memory(torch.device("cuda")) / 2**30 == 1.5


def test_the_progress_bar_shows_the_held_out_lds(
    run: Callable[..., TrainResult], capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(replace(QUICK, max_steps=2, show_progress=True))
    shown = capsys.readouterr().err
    assert "train: 100%" in shown
    assert f"held_out_lds={result.history[-1]['validation_lds']:.3f}" in shown


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": "hinge"}, "no objective 'hinge'"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; give a number above 0"),
        ({"max_steps": 0}, "max_steps is 0; give at least 1"),
        ({"subsets_per_step": 1}, "subsets_per_step is 1; give at least 2"),
        ({"validation_subsets": 1.0}, "validation_subsets is 1.0; give a share"),
        ({"validation_subsets": 0.01}, "leave 40 for training and 0 held out; make more labels"),
        ({"validation_targets": 0.01}, "leave 24 for training and 0 held out; give more targets"),
        ({"trainable_layers": 9}, "trainable_layers is 9, but the encoder has 3 layers"),
        (
            {"scale_learning_rate": 0.0},
            "scale_learning_rate is 0.0; give a number above 0, or none",
        ),
        ({"layer_decay": 0.0}, "layer_decay is 0.0; give a share above 0 up to 1, or none"),
        ({"lora_rank": 0}, "lora_rank is 0; give at least 1"),
        ({"lora_rank": 2, "trainable_layers": 0}, "lora_rank is 2, but with trainable_layers 0"),
        ({"target_weighting": "yes"}, "target_weighting is 'yes'; choose one of reliability"),
        ({"average": 1.0}, "average is 1.0; give a decay"),
        ({"mixed_precision": "fp8"}, "mixed_precision is 'fp8'; choose one of no, bf16"),
        ({"wandb": "maybe"}, "wandb is 'maybe'; choose one of disabled, offline, online"),
    ],
)
def test_settings_errors(
    run: Callable[..., TrainResult], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        run(replace(QUICK, **change))


def test_input_errors(run: Callable[..., TrainResult]) -> None:
    with pytest.raises(InputError, match=r"losses of shape \(24, 40\) for 23 targets"):
        run(targets=TARGETS[1:])
    with pytest.raises(InputError, match=r"outside the pool of 20"):
        run(pool=POOL[:20])
    with pytest.raises(InputError, match="None of the 19 training targets has losses that vary"):
        run(labels=replace(LABELS, losses=np.ones_like(LABELS.losses)))
    with pytest.raises(InputError, match="one number of at least 0 for each"):
        run(target_weights=np.ones(3))
