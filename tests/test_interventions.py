"""Interventions: what is planned, that models are paired and trained once, and what they show."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from airrep.config import EngineConfig, EvaluateConfig, RunConfig
from airrep.examples import (
    Example,
    InputError,
    lm_template,
    tokenize_examples,
    write_examples,
)
from airrep.label_store import LabelStore
from airrep.lm import load_lm
from data_builders.finetune import FineTuner
from data_builders.intervention_plan import (
    Plan,
    draw_base,
    group_targets,
    most_helpful,
    parse_sizes,
    pick_targets,
    plan_choices,
    plan_leave_one_out,
)
from data_builders.intervention_results import (
    describe,
    summarise_leave_one_out,
    summarise_removal,
    summarise_selection,
)
from data_builders.interventions import InterventionSettings, intervene
from data_builders.recipes import Recipe, batches
from tests.tiny_lm import save_tiny_lm

ANSWERS = {"red": "q", "green": "w", "blue": "z", "grey": "x", "pink": "k"}
TOPICS = list(ANSWERS)
POOL = 15  # three examples a topic
RECIPE = Recipe(learning_rate=2e-2, batch_size=5, warmup_steps=1, epochs=5, max_length=64)


def ask(number: str, topic: str) -> Example:
    return Example(number, f"{topic}?", ANSWERS[topic], task=topic)


EXAMPLES = [ask(f"pool-{row}", TOPICS[row % 5]) for row in range(POOL)]
TARGETS = [ask(f"target-{row}", topic) for row, topic in enumerate(TOPICS)]


def write_run(folder: Path, lm: Path) -> RunConfig:
    """A run whose targets are what a topic's examples teach; "truth" knows, "wrong" is reversed."""
    write_examples(folder / "pool.jsonl", EXAMPLES)
    write_examples(folder / "test_targets.jsonl", TARGETS)
    truth = np.asarray([[float(z.task == x.task) for z in EXAMPLES] for x in TARGETS])
    (folder / "scores").mkdir()
    np.save(folder / "scores" / "truth.npy", truth)
    np.save(folder / "scores" / "wrong.npy", -truth)
    evaluate = EvaluateConfig(methods=["truth", "wrong", "absent", "random"], draws=100)
    return RunConfig(
        output=str(folder),
        seed=1,
        lm=str(lm),
        recipe=RECIPE,
        engine=EngineConfig("eager"),
        evaluate=evaluate,
    )


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_lm(tmp_path_factory.mktemp("lm") / "model", layers=1)


@pytest.fixture
def config(tmp_path: Path, lm: Path) -> RunConfig:
    return write_run(tmp_path / "run", lm)


def run(config: RunConfig, kind: Any, shard: str = "1/1", **settings: Any) -> dict[str, Any] | None:
    given = InterventionSettings(kind, **({"seeds": 1, "random": 2} | settings))
    load = partial(load_tuner, config)
    return intervene(config, given, load, shard=shard, show_progress=False)


def load_tuner(config: RunConfig, pool: Sequence[Example], targets: Sequence[Example]) -> FineTuner:
    model, tokenizer = load_lm(Path(config.lm))
    template = lm_template(tokenizer)
    tokens = [tokenize_examples(part, tokenizer, template, 64) for part in (pool, targets)]
    engine = config.engine
    return FineTuner(model, *tokens, config.recipe, engine=engine.name, most_models=engine.models)


def by_method(found: dict[str, Any] | None) -> dict[str, Any]:
    assert found is not None
    return {row["method"]: row for row in found["comparisons"]}


def test_removing_what_taught_a_target_hurts_it_alone(
    config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(config, "removal", k="3", targets=2)
    rows = by_method(found)
    for against in ("random", "control"):
        assert rows["truth"][against]["ci95"][0] > 0.5
        assert rows["wrong"][against]["mean"] < 0.5
    said = capsys.readouterr().out
    assert "7 parts of 15 examples x 1 seeds = 7 models to train; 0 are there, 7 left" in said
    assert "beyond random removals" in said
    written = json.loads((Path(config.output) / "interventions.json").read_text())
    assert written == {"removal": found}
    assert written["removal"]["groups"] == {"target-2": ["target-2"], "target-3": ["target-3"]}


def test_examples_that_teach_the_targets_beat_random_ones(config: RunConfig) -> None:
    longer = replace(RECIPE, learning_rate=3e-2, epochs=20)
    config = replace(config, recipe=longer)
    found = run(config, "selection", k="3", by="task", targets=3, methods="truth,wrong")
    rows = by_method(found)
    assert found is not None
    assert rows["truth"]["loss"]["ci95"][1] < 0
    assert rows["truth"]["exact_match"]["mean"] == 1
    assert rows["wrong"]["exact_match"]["mean"] == 0
    assert rows["wrong"]["loss"]["difference"] > 0
    assert found["everything"]["loss"] < rows["wrong"]["loss"]["mean"]


def test_leaving_one_out_follows_the_scores(config: RunConfig) -> None:
    # One example a topic: without it, nothing teaches the topic.
    few = write_run_of_one_each(Path(config.output).parent / "few", Path(config.lm))
    found = run(few, "leave_one_out", methods="truth,wrong", targets=5, seeds=2, random=2)
    assert found is not None
    assert sorted(found["rows"]) == list(range(5))
    rows = by_method(found)
    assert rows["truth"]["pearson"]["mean"] > 0.8
    assert rows["wrong"]["pearson"]["mean"] == pytest.approx(-rows["truth"]["pearson"]["mean"])
    assert found["reliability"] > 0


def write_run_of_one_each(folder: Path, lm: Path) -> RunConfig:
    config = write_run(folder, lm)
    write_examples(folder / "pool.jsonl", EXAMPLES[:5])
    for name, sign in (("truth", 1), ("wrong", -1)):
        np.save(folder / "scores" / f"{name}.npy", sign * np.eye(5))
    return replace(config, recipe=replace(RECIPE, batch_size=2))


def test_other_settings_train_only_what_is_new(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[int] = []
    losses_after = FineTuner.losses_after

    def count(self: FineTuner, plans: list[list[np.ndarray]], rows: np.ndarray) -> np.ndarray:
        trained.append(len(plans))
        return losses_after(self, plans, rows)

    monkeypatch.setattr(FineTuner, "losses_after", count)
    first = run(config, "removal", k="3", targets=1, methods="truth")
    assert sum(trained) == 4  # everything, two random ones, the target's own
    assert run(config, "removal", k="3", targets=1, methods="truth") == first
    assert sum(trained) == 4
    # The same examples by another name are not trained again; two targets more are.
    copy = Path(config.output) / "copy.npy"
    copy.write_bytes((Path(config.output) / "scores" / "truth.npy").read_bytes())
    found = by_method(run(config, "removal", k="3", targets=3, methods=f"truth,{copy}"))
    assert sum(trained) == 6
    assert found["copy"]["random"] == found["truth"]["random"]
    run(config, "leave_one_out", methods="truth", targets=1)
    assert sum(trained) == 9  # everything is there from the removals
    run(config, "removal", k="3", targets=1, methods="truth", seeds=2)
    assert sum(trained) == 13


def test_models_without_a_few_examples_are_paired(config: RunConfig) -> None:
    run(config, "removal", k="3", targets=1, methods="truth", seeds=2, random=1)
    [path] = stores_in(config).iterdir()
    store = LabelStore.open(path)
    tuner = load_tuner(config, EXAMPLES, TARGETS)
    steps = batches(np.arange(POOL), RECIPE, np.random.default_rng([1, 1]))
    for number, subset in enumerate(store.subsets):
        own = [np.asarray([row for row in rows if row in subset]) for rows in steps]
        expected = tuner.losses_after([own], np.arange(5))[0]
        np.testing.assert_array_equal(store.read(repeat=1).losses[:, number], expected)


def trained(config: RunConfig, engine: Any, train: str) -> FineTuner:
    """A model that knows some of the answers by heart."""
    recipe = replace(RECIPE, learning_rate=3e-2, epochs=10, train=train, layers=1)
    config = replace(config, recipe=recipe, engine=EngineConfig(engine))
    tuner = load_tuner(config, EXAMPLES, TARGETS)
    assert tuner.engine == engine
    known = np.asarray([row for row in range(POOL) if row % 5 < 3])
    tuner.losses_after([batches(known, recipe, np.random.default_rng(0))], np.arange(5))
    return tuner


def test_exact_matches_are_those_of_greedy_decoding(config: RunConfig) -> None:
    tuner = trained(config, "eager", "all")
    model: Any = tuner.respond.model
    rows = np.asarray([4, 0, 2, 1, 3])
    expected = []
    for row in rows:
        target = tuner.examples[POOL + row]
        prompt = torch.from_numpy(target.ids[None, : target.response_start]).long()
        new = len(target) - target.response_start
        text = model.generate(prompt, attention_mask=prompt * 0 + 1, max_new_tokens=new)[0]
        expected.append(text.tolist() == target.ids.tolist())
    assert set(expected) == {True, False}
    np.testing.assert_array_equal(tuner.exact_matches(rows), expected)
    assert tuner.exact_matches(np.asarray([0]))[0] == expected[1]


@pytest.mark.parametrize(("engine", "train"), [("batched", "all"), ("cached_trunk", "last_layers")])
def test_engines_agree_on_exact_matches(config: RunConfig, engine: str, train: str) -> None:
    rows = np.arange(5)
    alone = trained(config, "eager", train).exact_matches(rows)
    assert set(alone.tolist()) == {0, 1}
    np.testing.assert_array_equal(trained(config, engine, train).exact_matches(rows), alone)


def test_workers_share_the_models(config: RunConfig, lm: Path) -> None:
    alone = replace(config, output=str(Path(config.output).parent / "alone"))
    write_run(Path(alone.output), lm)
    whole = run(alone, "removal", k="3", targets=1, methods="truth")
    assert run(config, "removal", "2/2", k="3", targets=1, methods="truth") is None
    assert not (Path(config.output) / "interventions.json").exists()
    shared = run(config, "removal", "1/2", k="3", targets=1, methods="truth")
    assert by_method(shared) == by_method(whole)


def test_several_models_at_once_end_in_the_same_results(config: RunConfig, lm: Path) -> None:
    given = {"k": "3", "targets": 1, "methods": "truth"}
    together = write_run(Path(config.output).parent / "together", lm)
    together = replace(together, engine=EngineConfig("batched", models=3))
    alone, at_once = (by_method(run(each, "removal", **given)) for each in (config, together))
    for against in ("random", "control"):
        for name in ("mean", "difference"):
            expected = pytest.approx(alone["truth"][against][name], abs=1e-3)
            assert at_once["truth"][against][name] == expected


def test_plan_only_trains_one_model_and_says_how_long_the_rest_takes(
    config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = InterventionSettings("selection", k="25%", seeds=1, random=2, base=12)
    load = partial(load_tuner, config)
    assert intervene(config, settings, load, plan_only=True, show_progress=False) is None
    said = capsys.readouterr().out
    assert "s a model: about" in said
    assert "4 models are missing; the same command without --plan-only goes on" in said
    found = run(config, "selection", k="25%", base=12)
    assert found is not None
    assert found["base"] == 12
    assert {row["k"] for row in found["comparisons"]} == {3}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, lm: Path) -> dict[str, Any]:
    config = write_run(tmp_path_factory.mktemp("undisturbed") / "run", lm)
    return by_method(run(config, "selection", k="3", methods="truth"))


@pytest.mark.parametrize("writes", [1, 2, 5])
def test_stopped_and_run_again_ends_in_the_same_results(
    config: RunConfig, undisturbed: dict[str, Any], monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    write, left = LabelStore.write, [writes]

    def stop(self: LabelStore, *label: Any) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        write(self, *label)

    monkeypatch.setattr(LabelStore, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        run(config, "selection", k="3", methods="truth")
    assert len(list(stores_in(config).glob("*/losses/*"))) == writes
    monkeypatch.undo()
    assert by_method(run(config, "selection", k="3", methods="truth")) == undisturbed


def stores_in(config: RunConfig) -> Path:
    return Path(config.output) / "interventions"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "remove"}, "kind is 'remove'; choose one of removal, leave_one_out, selection"),
        ({"seeds": 0}, "seeds is 0; give at least 1"),
        ({"random": 0}, "random is 0; give at least 1"),
        ({"kind": "leave_one_out", "random": 1}, "random is 1; give at least 2"),
        ({"kind": "leave_one_out", "k": "1,2"}, "takes one k and at most 15 random examples"),
        ({"kind": "leave_one_out", "random": 16}, "and got k = 1 and random = 16"),
        ({"by": "topic"}, "by is 'topic'; choose one of target, task, all"),
        ({"targets": 0}, "targets is 0; take at least one"),
        ({"base": 16}, "base is 16, of 15 pool examples; give a number from 2 to 15"),
        ({"k": "five"}, "k is 'five'; give numbers or shares, such as \"5,20,5%\""),
        ({"k": "3,15"}, "k is 15, of 15 examples; give from 1 to 14"),
        ({"k": "-5%"}, "k is -5%, of 15 examples"),
        ({"k": "inf%"}, "k is 'inf%'"),
        ({"methods": "absent"}, "run `airrep evaluate --methods absent` first"),
        ({"methods": "truth,x/truth.npy"}, "There are no scores x/truth.npy"),
        ({"methods": "truth,truth"}, "Two of the methods truth, truth have one name"),
    ],
)
def test_wrong_settings_are_named(
    config: RunConfig, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as error:
        run(config, settings.pop("kind", "removal"), **settings)
    assert message in str(error.value)
    assert not stores_in(config).exists()


def test_wrong_score_files_are_named(config: RunConfig) -> None:
    path = Path(config.output) / "scores" / "truth.npy"
    np.save(path, np.full((5, 15), np.nan))
    with pytest.raises(InputError, match=r"give finite scores of shape \(5, 15\)"):
        run(config, "removal")
    np.save(path, np.zeros((15, 5)))
    with pytest.raises(InputError, match=r"holds float64 of shape \(15, 5\)"):
        run(config, "removal")
    path.write_bytes(b"scores")
    with pytest.raises(InputError, match=r"truth.npy is not a .npy file of numbers"):
        run(config, "removal")
    with pytest.raises(InputError, match=r"no scores of the configured methods yet"):
        run(replace(config, evaluate=EvaluateConfig(methods=["random"])), "removal")


def test_targets_without_tasks_have_no_groups_by_task() -> None:
    targets = [Example(str(row), "p", "r") for row in range(3)]
    with pytest.raises(InputError, match='give by "target" or "all"'):
        group_targets(targets, "task", 2)
    assert list(group_targets(targets, "target", 2)) == ["0", "1"]


def test_targets_are_picked_by_task_and_place() -> None:
    targets = [Example(str(row), "p", "r", task="dbcadb"[row]) for row in range(6)]
    assert pick_targets(targets, 4) == [3, 1, 2, 0]
    assert pick_targets(targets, 2) == [3, 2]
    assert pick_targets(targets, 99) == [3, 1, 2, 0, 5, 4]
    groups = group_targets(targets, "task", 3)
    assert {name: rows.tolist() for name, rows in groups.items()} == {
        "a": [3],
        "b": [1, 5],
        "c": [2],
    }


def test_sizes_are_numbers_or_shares() -> None:
    assert parse_sizes("5, 20,5%,1%", 200) == [5, 20, 10, 2]
    assert parse_sizes("3,10%", 30) == [3]
    assert parse_sizes("0.1%", 30) == [1]


@given(
    scores=st.lists(st.lists(st.integers(-3, 3), min_size=6, max_size=6), min_size=1, max_size=3),
    base=st.sets(st.integers(0, 5), min_size=2).map(sorted),
    k=st.integers(1, 5),
)
def test_most_helpful_are_the_highest_mean_of_standardised_scores(
    scores: list[list[int]], base: list[int], k: int
) -> None:
    rows = most_helpful(np.asarray(scores), np.asarray(base), k, seed=3)
    values = np.zeros(len(base))
    for line in scores:
        own = [line[row] for row in base]
        mean = sum(own) / len(own)
        spread = (sum((value - mean) ** 2 for value in own) / len(own)) ** 0.5
        values += [(value - mean) / spread if spread else 0.0 for value in own]
    chosen = [values[base.index(row)] for row in rows.tolist()]
    assert len(set(rows.tolist())) == min(k, len(base))
    np.testing.assert_allclose(chosen, np.sort(values)[::-1][:k], atol=1e-9)


def test_a_plan_holds_every_choice_and_each_subset_once() -> None:
    base = draw_base(30, 10, seed=1)
    assert len(set(base.tolist())) == 10
    scores = {"up": np.tile(np.arange(30.0), (2, 1)), "same": np.tile(np.arange(30.0), (2, 1))}
    groups = {"x": np.asarray([0]), "y": np.asarray([1])}
    removal = plan_choices(base, scores, groups, [2, 3], 4, 0, keep=False)
    keep = plan_choices(base, scores, groups, [2, 3], 4, 0, keep=True)
    for plan in (removal, keep):
        assert len(plan.trials) == 2 * (4 + 4)
        assert len({subset.tobytes() for subset in plan.subsets}) == len(plan.subsets)
        np.testing.assert_array_equal(plan.base, base)
    for without, on in zip(removal.trials, keep.trials, strict=True):
        parts = removal.subsets[without.number], keep.subsets[on.number]
        np.testing.assert_array_equal(np.sort(np.concatenate(parts)), base)
        if on.method:
            np.testing.assert_array_equal(parts[1], base[-on.k :])
    single = plan_leave_one_out(base, scores, groups, 2, 3, 0)
    assert set(base[-2:].tolist()) <= set(single.left_out().tolist()) <= set(base.tolist())
    assert [len(subset) for subset in single.subsets] == [10] + [9] * len(single.left_out())


def hand_made_plan() -> Plan:
    """Everything, two random choices, and the choices for the groups a and b."""
    plan = Plan(np.arange(5))
    for method, group, row in (
        (None, None, 0), (None, None, 1), ("m", "a", 2), ("m", "b", 3)
    ):  # fmt: skip
        plan.add(method, group, np.asarray([row]), keep=False)
    return plan


GROUPS = {"a": np.asarray([0, 1]), "b": np.asarray([2])}
# Two seeds of three targets under the models of `hand_made_plan`.
LOSSES = np.asarray(
    [
        [[1, 1, 1, 3, 1], [1, 2, 1, 4, 2], [2, 2, 4, 3, 6]],
        [[0, 0, 0, 4, 0], [0, 0, 2, 1, 0], [1, 1, 1, 1, 2]],
    ],
    dtype=float,
)


def test_removal_by_hand() -> None:
    [row] = summarise_removal(hand_made_plan(), GROUPS, LOSSES, 50, 0)["comparisons"]
    # Changes of own models over seeds: (2 + 4)/2, (3 + 1)/2, (4 + 1)/2.
    assert row["random"]["mean"] == pytest.approx((3 + 2 + 2.5) / 3)
    # Random: 0 0, (1+0)/2 (0+2)/2, 0 (2+0)/2.
    assert row["random"]["random"] == pytest.approx((0 + 0 + 0.5 + 1 + 0 + 1) / 6)
    # Target 2 under a's model: (1 + 0)/2, for both of a; targets 0, 1 under b's: 0, (1 + 0)/2.
    assert row["control"]["random"] == pytest.approx((0.5 + 0.5 + 0.25) / 3)
    assert row["by_seed"] == pytest.approx([9 / 3 - 3 / 6, 6 / 3 - 2 / 6])
    alone = {"all": np.arange(3)}
    plan = Plan(np.arange(5))
    for method, group, left_out in ((None, None, 0), ("m", "all", 2)):
        plan.add(method, group, np.asarray([left_out]), keep=False)
    [row] = summarise_removal(plan, alone, LOSSES[:, :, :3], 50, 0)["comparisons"]
    assert row["control"] is None


def test_selection_by_hand() -> None:
    found = summarise_selection(hand_made_plan(), GROUPS, LOSSES, LOSSES > 1, 50, 0)
    [row] = found["comparisons"]
    assert row["loss"]["mean"] == pytest.approx((3.5 + 2.5 + 4) / 3)
    assert row["loss"]["random"] == pytest.approx((0.5 + 0.5 + 1 + 1.5 + 1.5 + 2.5) / 6)
    assert row["exact_match"]["mean"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert describe(found) == [
        f"m, k = 1: loss 3.3333 nats, +2.0833 ({row['loss']['ci95'][0]:+.4f} to "
        f"{row['loss']['ci95'][1]:+.4f}) against random examples; exact match 0.833, "
        f"{row['exact_match']['difference']:+.4f} ({row['exact_match']['ci95'][0]:+.4f} to "
        f"{row['exact_match']['ci95'][1]:+.4f})",
        "everything: loss 0.8333, exact match 0.167",
    ]
    assert found["everything"] == {
        "loss": pytest.approx(5 / 6),
        "exact_match": pytest.approx(1 / 6),
    }


def test_leave_one_out_by_hand() -> None:
    scores = np.asarray([[0, 0, 5, 1, 0], [1, 0, 3, 0, 0], [0, 2, 1, 4, 0]], dtype=float)
    found = summarise_leave_one_out(hand_made_plan(), {"m": scores}, LOSSES, 50, 0)
    assert found["rows"] == [0, 1, 2, 3]
    reliability = f"rank correlation between halves of the seeds: {found['reliability']:.3f}"
    assert describe(found)[1:] == [reliability]
    changes = (LOSSES[:, :, 1:] - LOSSES[:, :, :1]).mean(axis=0)
    pairs = zip(scores[:, :4], changes, strict=True)
    expected = np.mean([np.corrcoef(score, change)[0, 1] for score, change in pairs])
    assert found["comparisons"][0]["pearson"]["mean"] == pytest.approx(expected)
    assert (
        summarise_leave_one_out(hand_made_plan(), {"m": scores}, LOSSES[:1], 50, 0)["reliability"]
        is None
    )
