"""Evaluation: a planted method wins, chance does not, and every number means what it says."""

import copy
import json
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from planted import Planted, planted_benchmark, planted_methods
from tiny_models import tiny_encoder

from airrep.attributors import make_attributor
from airrep.attributors.given import GivenAttributor
from airrep.benchmark import write_results
from airrep.encoder import AirRepEncoder
from airrep.evaluation import evaluate
from airrep.evaluation_rows import NOTICEABLE, MethodRun, preparation
from airrep.examples import InputError
from airrep.known_runs import KnownRuns
from airrep.metrics import (
    Resamples,
    bootstrap_lds,
    break_even,
    calibration,
    harmfulness,
    lds_per_target,
    linear_gap,
    noise_ceiling,
)
from airrep.run_folder import RunFolder
from airrep.score_files import GivenScores
from airrep.verdict import FEW_REPEATS, describe, key_figures, verdict

BENCHMARK = planted_benchmark()


def run(methods=None, benchmark=BENCHMARK, **arguments):
    return evaluate(
        planted_methods(benchmark.truth) if methods is None else methods,
        benchmark.pool,
        benchmark.targets,
        arguments.pop("labels", benchmark.labels),
        **{"benchmark": "planted", "repeat_labels": benchmark.repeats, "draws": 200} | arguments,
    )


@pytest.fixture(scope="module")
def evaluated():
    return run(config={"lm": "planted", "rate": 0.1})


def row(results, name):
    return next(one for one in results["methods"] if one["name"] == name)


def test_results_hold_what_the_design_promises_as_finite_json(evaluated):
    results, scores = evaluated
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    assert results["benchmark"] == "planted"
    assert (results["targets"], results["subsets"], results["pool"]) == (24, 30, 60)
    assert results["config"] == {"lm": "planted", "rate": 0.1}
    assert "torch" in results["versions"]
    assert results["skipped"] == []
    promised = {"name", "pooling", "lds", "ci95", "fit_seconds", "examples_per_second"}
    for method in results["methods"]:
        assert promised | {"bytes_per_example", "query_seconds", "oracle"} <= set(method)
        assert method["ci95"][0] <= method["lds"] <= method["ci95"][1]
        assert method["fit_seconds"] > 0
        assert method["examples_per_second"] == pytest.approx(60 / method["fit_seconds"])
        assert scores[method["name"]].shape == (24, 60)


def test_the_planted_method_wins_and_random_does_not(evaluated):
    results, _ = evaluated
    ceiling = results["noise_ceiling"]["lds"]
    assert 0.7 < row(results, "airrep")["lds"] < ceiling < 1
    low, high = row(results, "random")["ci95"]
    assert low < 0 < high
    for key in ("comparison", "comparison_without_oracles"):
        assert results[key]["method"] == "airrep"
        assert results[key]["wins"]
        assert results[key]["share_not_better"] == 0
    assert [one["baseline"] for one in results["differences"]] == ["tfidf", "same_task", "random"]
    assert verdict(results)["title"].startswith("AirRep beats every baseline")


def test_chance_does_not_win():
    methods = {
        "airrep": Planted(np.random.default_rng(9).normal(size=BENCHMARK.truth.shape)),
        "random": make_attributor("random"),
    }
    results, _ = run(methods)
    assert not results["comparison"]["wins"]
    assert results["comparison"]["ci95"][0] < 0
    assert verdict(results)["title"] == "AirRep is not clearly better than Random"


def test_an_oracle_that_wins_is_named():
    methods = {
        "airrep": Planted(BENCHMARK.truth, noise=1.0),
        "random": make_attributor("random"),
        "same_task": Planted(BENCHMARK.truth),
    }
    oracle = type("Oracle", (Planted,), {"name": "same_task", "oracle": True, "learns": False})
    methods["same_task"] = oracle(BENCHMARK.truth)
    results, _ = run(methods)
    assert results["comparison"]["best_baseline"] == "same_task"
    assert not results["comparison"]["wins"]
    assert results["comparison_without_oracles"]["best_baseline"] == "random"
    assert results["comparison_without_oracles"]["wins"]
    said = verdict(results)
    assert said["title"] == (
        "AirRep beats every baseline that reads only text, but does worse than Same-task count"
    )
    assert "an oracle that is told the tasks" in said["lead"]


def test_numbers_are_those_of_the_metrics(evaluated):
    results, scores = evaluated
    attributor = Planted(BENCHMARK.truth, 0.3).fit(BENCHMARK.pool)
    subset_scores = attributor.score_subsets(BENCHMARK.targets, BENCHMARK.labels.subsets)
    lds, _ = lds_per_target(subset_scores, BENCHMARK.labels.losses)
    found = row(results, "airrep")
    np.testing.assert_array_equal(scores["airrep"], attributor.score(BENCHMARK.targets))
    assert found["lds"] == found["lds_sum"] == pytest.approx(lds.mean())
    attributor.pooling = "attention"
    attended = attributor.score_subsets(BENCHMARK.targets, BENCHMARK.labels.subsets)
    attended_lds, _ = lds_per_target(attended, BENCHMARK.labels.losses)
    assert found["lds_attention"] == pytest.approx(attended_lds.mean())
    for task, value in found["per_task"].items():
        rows = [i for i, target in enumerate(BENCHMARK.targets) if target.task == task]
        assert value == pytest.approx(lds[rows].mean())
    rng, _ = np.random.default_rng(0).spawn(2)
    interval = bootstrap_lds(subset_scores, BENCHMARK.labels.losses, 200, rng)
    assert found["ci95"] == pytest.approx(interval)
    rng, _ = np.random.default_rng(0).spawn(2)
    resamples = Resamples.draw(BENCHMARK.labels.losses.shape, 200, rng)
    calibrated = calibration(subset_scores, BENCHMARK.labels.losses, resamples)
    assert {key: found["calibration"][key] for key in calibrated} == calibrated
    predicted = calibrated["slope"] * subset_scores
    labels = BENCHMARK.labels
    assert found["linear_gap"] == linear_gap(predicted, labels.losses, labels.subsets, 60)
    again = BENCHMARK.repeats.numbers
    ceiling = noise_ceiling(BENCHMARK.labels.losses[:, again], BENCHMARK.repeats.losses)
    assert {key: results["noise_ceiling"][key] for key in ceiling} == pytest.approx(ceiling)
    assert results["noise_ceiling"]["subsets"] == len(again)


def test_a_planted_method_is_calibrated_and_leaves_little_behind(evaluated):
    results, _ = evaluated
    truth, _ = run({"airrep": Planted(BENCHMARK.truth)})
    found = row(truth, "airrep")
    # The planted losses fall by 0.05 nats a unit of score.
    assert found["calibration"]["ci95"][0] < 0.05 < found["calibration"]["ci95"][1]
    assert found["calibration"]["slope_on_held_out"] == pytest.approx(1, abs=0.1)
    assert sum(one["count"] for one in found["calibration"]["bins"]) == 24 * 30
    assert set(found["calibration"]["bins"][0]) == {
        "predicted", "measured", "low", "high", "count"
    }  # fmt: skip
    low, high = found["linear_gap"]["ci95"]
    assert low < 0 < high
    assert found["linear_gap"]["share"] < 0.1
    share = results["linear_share_of_labels"]["share"]
    assert share > 0.5
    assert row(results, "random")["linear_gap"]["share"] == pytest.approx(share, abs=0.1)
    low, high = row(results, "airrep")["lds_of_ceiling"]["ci95"]
    of_ceiling = row(results, "airrep")["lds"] / results["noise_ceiling"]["lds"]
    assert low < row(results, "airrep")["lds_of_ceiling"]["share"] < high
    assert row(results, "airrep")["lds_of_ceiling"]["share"] == pytest.approx(of_ceiling)


def test_flipped_examples_of_the_pool_are_looked_for(evaluated):
    results, _ = evaluated
    assert all(method["mislabel"] is None for method in results["methods"])
    harm = harmfulness(BENCHMARK.truth)
    pool = [
        replace(one, meta={"flipped": True}) if harm[place] > np.quantile(harm, 0.8) else one
        for place, one in enumerate(BENCHMARK.pool)
    ]
    found = row(
        run({"airrep": Planted(BENCHMARK.truth)}, replace(BENCHMARK, pool=pool))[0], "airrep"
    )
    assert found["mislabel"] == {"auc": 1.0, "ci95": [1.0, 1.0], "flipped": 12}
    pool[1:] = BENCHMARK.pool[1:]
    assert row(run(benchmark=replace(BENCHMARK, pool=pool))[0], "airrep")["mislabel"] is None


def test_preparation_is_set_against_the_slower_methods():
    results, _ = run(prepare_seconds={"tfidf": 10.0, "random": 0.0})
    assert row(results, "airrep")["prepare_seconds"] is None
    assert row(results, "airrep")["break_even_examples"] is None
    found = row(results, "tfidf")
    assert found["prepare_seconds"] == 10.0
    rates = {method["name"]: method["examples_per_second"] for method in results["methods"]}
    sizes = {
        name: break_even(10.0, rates["tfidf"], rates[name])
        for name in ("airrep", "random")
        if rates[name] * NOTICEABLE < rates["tfidf"]
    }
    assert found["break_even_examples"] == sizes
    slower = {name for name in ("airrep", "tfidf") if rates[name] * NOTICEABLE < rates["random"]}
    assert row(results, "random")["break_even_examples"] == dict.fromkeys(slower, 0)


def test_an_ensemble_is_compared_but_is_no_baseline():
    members = [Planted(BENCHMARK.truth), "random"]
    methods = {
        "airrep": Planted(BENCHMARK.truth),
        "both": make_attributor("ensemble", members=members, weights=[1, 0]),
        "random": make_attributor("random"),
    }
    results, _ = run(methods)
    assert results["comparison"]["best_baseline"] == "random"
    assert [found["baseline"] for found in results["differences"]] == ["both", "random"]


def test_what_the_slower_method_prepares_counts_too():
    runs = [
        MethodRun(name, Planted(BENCHMARK.truth), None, {}, None, 1.0, 1.0, rate, 8)
        for name, rate in (("fast", 100.0), ("slow", 50.0), ("slower", 10.0))
    ]
    found = preparation(runs[0], runs, {"fast": 10.0, "slow": 4.0, "slower": 11.0})
    assert found["break_even_examples"] == {"slow": break_even(6.0, 100.0, 50.0), "slower": 0}


def test_work_on_the_pool_counts_whenever_it_is_done():
    class Late(Planted):
        fits_late = True

        def _score(self, targets):
            time.sleep(0.05)
            return super()._score(targets)

    results, _ = run({"airrep": Late(BENCHMARK.truth)})
    assert row(results, "airrep")["examples_per_second"] < len(BENCHMARK.pool) / 0.05


def test_rates_that_are_nearly_the_same_are_not_set_against_each_other():
    runs = [
        MethodRun(name, Planted(BENCHMARK.truth), None, {}, None, 1.0, 1.0, rate, 8)
        for name, rate in (("fast", 120.0), ("near", 101.0), ("slow", 99.0), ("unknown", None))
    ]
    assert preparation(runs[0], runs, {runs[0].name: 10.0})["break_even_examples"] == {
        "slow": break_even(10.0, 120.0, 99.0)
    }
    assert preparation(runs[3], runs, {runs[3].name: 10.0})["break_even_examples"] is None


def test_the_verdict_says_what_learning_cost(evaluated):
    results = copy.deepcopy(evaluated[0])
    learned = row(results, "airrep")

    def lead(seconds, sizes):
        learned.update(prepare_seconds=seconds, break_even_examples=sizes)
        return verdict(results)["lead"]

    unknown = "What its labels and training cost is not known, nor when AirRep pays off in time."
    assert lead(None, None).endswith(unknown)
    assert lead(1234.6, {"slow": 5000, "tfidf": 70}).endswith(
        "Labels and training took 1,235 s, which pays off in time from this number of pool "
        "examples on: 70 against TF-IDF, 5,000 against slow."
    )
    assert "AirRep prepares a pool no faster than any of these" in lead(3.0, {})


def test_a_ceiling_from_few_repeats_is_called_a_guess(evaluated):
    results = copy.deepcopy(evaluated[0])
    for repeats, warns in ((FEW_REPEATS, False), (FEW_REPEATS - 1, True)):
        results["noise_ceiling"]["subsets"] = repeats
        assert ("as a guess" in verdict(results)["lead"]) == warns
        share = next(f for f in key_figures(results) if f["name"] == "Share of the noise ceiling")
        assert ("from only 4 repeated subsets" in share["note"]) == warns


def test_what_scores_of_outside_tools_cost_is_not_known():
    given = GivenScores("a file", BENCHMARK.truth.astype(np.float32))
    results, _ = run({"mine": GivenAttributor(given), "tfidf": make_attributor("tfidf")})
    mine = row(results, "mine")
    for key in ("fit_seconds", "query_seconds", "examples_per_second", "bytes_per_example"):
        assert mine[key] is None
        assert row(results, "tfidf")[key] > 0
    assert "Examples a second" not in {figure["name"] for figure in key_figures(results)}
    assert [line.split()[-1] for line in describe(results)][1:3] == ["mine", "tfidf"]


def test_the_sign_test_counts_targets(evaluated):
    results, _ = evaluated
    for one in [results["comparison"], *results["differences"]]:
        counts = one["sign_test"]
        assert counts["wins"] + counts["losses"] + counts["ties"] == 24
    assert next(one for one in results["differences"] if one["baseline"] == "random")[
        "sign_test"
    ]["p"] < 0.001  # fmt: skip


def test_methods_and_labels_without_variation_give_null():
    flat = type("Flat", (Planted,), {"name": "flat"})(0 * BENCHMARK.truth)
    results, _ = run({"flat": flat})
    assert row(results, "flat")["calibration"] is None
    assert row(results, "flat")["linear_gap"] is None
    whole = replace(BENCHMARK.labels, subsets=[np.arange(60)] * 30)
    results, _ = run({"flat": flat}, labels=whole, repeat_labels=None)
    assert results["linear_share_of_labels"] is None
    assert row(results, "flat")["lds_of_ceiling"] is None
    json.dumps(results, allow_nan=False)


def test_retrieval_counts_targets_with_proponents(evaluated):
    results, _ = evaluated
    exact, _ = run({"airrep": Planted(BENCHMARK.truth)})
    found = row(exact, "airrep")["retrieval"]
    assert found == {
        "targets": 12, "outside_pool": 0, "recall_at_1": 1.0, "recall_at_5": 1.0,
        "recall_at_10": 1.0, "recall_at_50": 1.0, "mrr": 1.0,
        "ndcg_at_10": 1.0,
    }  # fmt: skip
    assert row(results, "random")["retrieval"]["recall_at_5"] < 0.5


def test_proponents_outside_the_pool_are_counted_and_none_known_is_null():
    stray = [replace(one, meta={"proponents": ["gone"]}) for one in BENCHMARK.targets]
    results, _ = run(benchmark=replace(BENCHMARK, targets=stray))
    assert all(method["retrieval"] is None for method in results["methods"])
    stray[0] = replace(stray[0], meta={"proponents": ["gone", "pool-3"]})
    results, _ = run(benchmark=replace(BENCHMARK, targets=stray))
    found = row(results, "airrep")["retrieval"]
    assert (found["targets"], found["outside_pool"]) == (1, 24)


def test_missing_and_constant_losses_are_reported_and_stay_finite():
    losses = BENCHMARK.labels.losses.copy()
    losses[0, :5] = np.nan
    losses[1] = np.nan
    losses[2] = 1.5
    results, _ = run(labels=replace(BENCHMARK.labels, losses=losses))
    json.dumps(results, allow_nan=False)
    assert results["missing_losses"] == 35
    assert results["constant_label_targets"] == 2
    assert row(results, "airrep")["constant_targets"] == 2


def test_the_seed_fixes_every_number_but_the_seconds():
    def numbers(results):
        timed = {"fit_seconds", "examples_per_second", "query_seconds"}
        rows = [{k: v for k, v in m.items() if k not in timed} for m in results["methods"]]
        return {**results, "methods": rows}

    first, second = (numbers(run(draws=50, seed=4)[0]) for _ in range(2))
    assert first == second
    assert first != numbers(run(draws=50, seed=5)[0])


def test_methods_that_cannot_run_here_are_skipped_with_their_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.feature_extraction.text", None)
    nameless = [replace(target, task=None) for target in BENCHMARK.targets]
    results, scores = run(benchmark=replace(BENCHMARK, targets=nameless))
    reasons = {one["name"]: one["reason"] for one in results["skipped"]}
    assert reasons["tfidf"] == "tfidf needs scikit-learn; run `pip install scikit-learn`."
    assert "24 of 24 targets have none" in reasons["same_task"]
    assert list(scores) == ["airrep", "random"]
    assert row(results, "airrep")["per_task"] == {}


@pytest.mark.parametrize("name", ["airrep", "embedding", "response_embedding"])
def test_a_broken_encoder_is_an_error_and_not_left_out(name, tmp_path):
    folder = tiny_encoder(tmp_path / "base")
    if name == "airrep":
        AirRepEncoder.from_base(folder).save_pretrained(tmp_path / "trained")
        folder = tmp_path / "trained"
    methods = {"random": make_attributor("random"), name: make_attributor(name, encoder=folder)}
    assert list(run(methods, draws=20)[1]) == ["random", name]
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match=f"{folder.name} cannot be opened as an encoder"):
        run(methods, draws=20)


def test_without_a_learned_method_or_repeats_there_is_nothing_to_compare():
    results, _ = run({"random": make_attributor("random")}, repeat_labels=None)
    assert results["comparison"] is None
    assert results["comparison_without_oracles"] is None
    assert results["differences"] == []
    assert results["noise_ceiling"] is None
    assert "not measured" in verdict(results)["lead"]
    assert key_figures(results)[0]["name"] == "LDS of Random"
    alone, _ = run({"airrep": Planted(BENCHMARK.truth)})
    assert alone["comparison"] is None
    assert len(BENCHMARK.repeats.numbers) > 1


def learner(name: str, **given) -> Planted:
    return type("Learner", (Planted,), {"name": name, "learns": True})(BENCHMARK.truth, **given)


def test_whatever_learned_is_compared_where_airrep_did_not_run():
    methods = {"random": make_attributor("random"), "kernels": learner("kernels")}
    results, _ = run(methods)
    assert results["comparison"]["method"] == "kernels"
    assert results["comparison"]["best_baseline"] == "random"
    assert [row["learns"] for row in results["methods"]] == [False, True]
    assert verdict(results)["title"].startswith("Kernels beats every baseline")


@pytest.mark.parametrize("noise", [0.0, 4.0])
def test_a_learned_method_ahead_of_airrep_is_named(noise):
    methods = {
        "kernels": learner("kernels", noise=noise),
        "airrep": learner("airrep", noise=2.0),
        "random": make_attributor("random"),
    }
    results, _ = run(methods)
    assert results["comparison"]["method"] == "airrep"
    assert verdict(results)["title"].startswith("AirRep beats every baseline")
    ahead = row(results, "kernels")["lds"] - row(results, "airrep")["lds"]
    assert (ahead > 0) == (noise == 0)
    said = (
        f"Kernels, which learned from the labels too, reaches {row(results, 'kernels')['lds']:.2f}"
    )
    assert (f"{said}: {ahead:+.2f} (95% interval +" in verdict(results)["lead"]) == (ahead > 0)


def test_one_repeated_subset_gives_no_ceiling():
    repeats = BENCHMARK.repeats
    one = replace(
        repeats,
        subsets=repeats.subsets[:1],
        losses=repeats.losses[:, :1],
        numbers=repeats.numbers[:1],
    )
    assert run(repeat_labels=one)[0]["noise_ceiling"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"labels": replace(BENCHMARK.labels, losses=BENCHMARK.labels.losses[:5])},
            "labels hold losses of 5 targets, but 24 targets were given",
        ),
        (
            {"labels": replace(BENCHMARK.labels, losses=BENCHMARK.labels.losses[:, :5])},
            "5 columns of losses for 30 subsets",
        ),
        (
            {"labels": replace(BENCHMARK.labels, subsets=[np.array([60])] * 30)},
            "Subset 0 has row 60, outside the pool of 60",
        ),
        (
            {"repeat_labels": replace(BENCHMARK.repeats, subsets=[np.array([1])] * 10)},
            "Subset 0 differs between the labels and the repeated labels",
        ),
        (
            {"repeat_labels": replace(BENCHMARK.repeats, losses=BENCHMARK.repeats.losses[:3])},
            "repeated labels hold 3 targets, the labels 24",
        ),
        ({"config": {"rate": float("nan")}}, "config cannot be written as JSON"),
        ({"draws": 0}, "draws is 0"),
        ({"prepare_seconds": {"bm25": 1.0}}, "prepare_seconds got 1.0 for 'bm25'"),
        ({"prepare_seconds": {"tfidf": -1.0}}, "give seconds of at least 0"),
        ({"methods": {}}, "No method could run. Give at least one method."),
    ],
)
def test_parts_that_do_not_belong_together_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        run(**arguments)


class Counted(Planted):
    """Says how often it was fitted to the whole pool."""

    fits = 0

    def _fit(self, pool):
        super()._fit(pool)
        type(self).fits += len(pool) == len(BENCHMARK.pool)


def known_runs(folder, *names, **inputs):
    return KnownRuns(RunFolder(folder), {name: {"of": name, **inputs} for name in names})


def without_costs(results):
    """What results say of quality."""
    costs = {"fit_seconds", "query_seconds", "examples_per_second", "break_even_examples"}
    rows = [
        {key: one for key, one in row.items() if key not in costs} for row in results["methods"]
    ]
    return {**results, "methods": rows}


def test_a_stopped_evaluation_goes_on(tmp_path):
    class Stopped(Planted):
        name = "stopped"

        def _score(self, targets):
            raise InputError("its model is damaged")

    mended = type("Mended", (Planted,), {"name": "stopped"})(BENCHMARK.truth, noise=2.0)
    first = type("First", (Counted,), {"fits": 0})
    methods = {"first": first(BENCHMARK.truth), "stopped": Stopped(BENCHMARK.truth)}
    with pytest.raises(InputError, match="damaged"):
        run(methods, known=known_runs(tmp_path, *methods))
    assert first.fits == 1
    methods["stopped"] = mended
    results, scores = run(methods, known=known_runs(tmp_path, *methods))
    assert first.fits == 1
    plain, plain_scores = run(methods)
    assert first.fits == 2
    assert without_costs(results) == without_costs(plain)
    for name, one in plain_scores.items():
        np.testing.assert_array_equal(scores[name], one)
    assert row(results, "first")["fit_seconds"] > 0
    assert row(results, "first")["bytes_per_example"] == row(plain, "first")["bytes_per_example"]


def test_a_method_that_pools_by_itself_goes_on_too(tmp_path):
    members = [Planted(BENCHMARK.truth), "tfidf"]
    methods = {"both": make_attributor("ensemble", members=members, weights=[1, 2])}
    known = known_runs(tmp_path, "both")
    results, scores = run(methods, known=known)
    methods["both"] = make_attributor("ensemble", members=members, weights=[5, 2])  # never asked
    again, same = run(methods, known=known)
    assert again["methods"] == results["methods"]
    np.testing.assert_array_equal(same["both@subsets"], scores["both@subsets"])


def test_runs_of_a_finished_evaluation_are_known(tmp_path):
    own = type("Own", (Counted,), {"fits": 0})
    folder = RunFolder(tmp_path)
    known = known_runs(tmp_path, "own")
    results, scores = run({"own": own(BENCHMARK.truth)}, known=known)
    write_results(folder, results, scores, BENCHMARK.pool, BENCHMARK.targets)
    known.settle()
    assert not (tmp_path / "scores" / "unfinished").exists()
    both = {"own": own(BENCHMARK.truth), "random": make_attributor("random")}
    run(both, known=known_runs(tmp_path, *both))
    assert own.fits == 1
    # With other inputs it is run again, and where the scores are no longer its own.
    run({"own": own(BENCHMARK.truth)}, known=known_runs(tmp_path, "own", rank=8))
    assert own.fits == 2
    np.save(folder.scores_file("own"), -scores["own"])
    run({"own": own(BENCHMARK.truth)}, known=known_runs(tmp_path, "own"))
    assert own.fits == 3


def test_damaged_runs_are_made_again(tmp_path):
    own = type("Own", (Counted,), {"fits": 0})
    for fits, damage in enumerate(("own.run.safetensors", "own.npy", None), start=1):
        run({"own": own(BENCHMARK.truth)}, known=known_runs(tmp_path, "own"))
        assert own.fits == fits
        if damage:
            (tmp_path / "scores" / "unfinished" / damage).write_bytes(b"nothing")
    run({"own": own(BENCHMARK.truth)}, known=known_runs(tmp_path, "own"))
    assert own.fits == 3


def test_given_scores_are_read_again(tmp_path):
    given = GivenAttributor(GivenScores("file", BENCHMARK.truth.astype(np.float32)), "sum", [])
    run({"mine": given}, known=known_runs(tmp_path, "mine"))
    assert not list(tmp_path.rglob("*.safetensors"))
