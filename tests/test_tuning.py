"""Tuning: the same number of trials for all, judged on held-out training labels alone."""

import inspect
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from airrep.attributor import Attributor, NotApplicableError
from airrep.attributors import make_attributor, method_class
from airrep.attributors.ensemble import EnsembleAttributor
from airrep.examples import Example, InputError
from airrep.holdout import hold_out
from airrep.label_store import Labels
from airrep.metrics import bootstrap_lds, lds_per_target
from airrep.train_settings import TrainSettings
from airrep.tuning import describe, tune, tuned_params
from airrep.tuning_grids import GRIDS, Grid
from tests.planted import planted_benchmark
from tests.tiny_lm import save_tiny_lm

PLANTED = planted_benchmark(subset_count=60)
SETTINGS = TrainSettings(validation_subsets=0.5, validation_targets=0.5)
GRID = Grid({"width": (1, 2)}, {"damping": (0.1, 1.0)}, {"noise": (0.0, 2.0)}, ("sum", "attention"))


class Staged(Attributor):
    """Knows the planted scores up to `noise`, and says in `log` what it computes."""

    name = "staged"

    def __init__(
        self,
        log: list[str],
        width: int = 1,
        damping: float = 0.1,
        noise: float = 2.0,
        pooling: str = "sum",
        store: Path | None = None,
    ) -> None:
        self.log, self.width, self.damping, self.noise = log, width, damping, noise
        self.pooling, self.store = pooling, store

    def params(self) -> dict[str, Any]:
        return {key: value for key, value in super().params().items() if key != "log"}

    def _fit(self, pool: Sequence[Example]) -> None:
        self.rows_ = [int(example.id.split("-")[1]) for example in pool]
        if self.store is not None and not (self.store / "features").exists():
            self.log.append(f"features {self.width}")
            self.store.mkdir(parents=True)
            (self.store / "features").write_text(str(self.width))
        if self.store is not None:
            assert (self.store / "features").read_text() == str(self.width)
        self.log.append(f"fit {self.width} {self.damping}")

    def _score(self, targets: Sequence[Example]) -> np.ndarray:
        self.log.append(f"score {self.width} {self.damping} {self.noise}")
        rows = [int(target.id.split("-")[1]) for target in targets]
        blur = np.random.default_rng(1).normal(size=PLANTED.truth.shape)
        return (PLANTED.truth + self.noise * blur)[np.ix_(rows, self.rows_)]

    def _state(self) -> dict[str, np.ndarray]:
        return {"rows": np.asarray(self.rows_)}

    def _restore(self, state: dict[str, np.ndarray]) -> None:
        self.rows_ = state["rows"].tolist()


@pytest.fixture(autouse=True)
def grid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GRIDS, "staged", GRID)


def run(
    folder: Path,
    methods: dict[str, Attributor] | None = None,
    labels: Labels = PLANTED.labels,
    settings: TrainSettings = SETTINGS,
    **options: Any,
) -> dict[str, Any]:
    methods = {"staged": Staged([])} if methods is None else methods
    options = {"trials": 16, "draws": 50, "show_progress": False} | options
    return tune(folder, methods, PLANTED.pool, PLANTED.targets, labels, settings, **options)


def without_seconds(found: dict[str, Any]) -> list[dict[str, Any]]:
    rows = found["methods"]["staged"]["trials"]
    return [{key: row[key] for key in row if key != "seconds"} for row in rows]


def test_the_best_parameters_are_chosen_and_given(tmp_path: Path) -> None:
    found = run(tmp_path)
    chosen = tuned_params(tmp_path, "staged")
    assert (chosen["noise"], chosen["pooling"]) == (0.0, "sum")
    assert chosen == found["methods"]["staged"]["chosen"]
    # Equally good ones: the first that was drawn.
    lds = [row["lds"] for row in found["methods"]["staged"]["trials"]]
    assert lds.count(max(lds)) == 4
    drawn = GRID.draw(Staged([]), 16, 0)
    good = [one for one in drawn if (one["noise"], one["pooling"]) == (0.0, "sum")]
    assert chosen == good[0]
    assert json.loads((tmp_path / "tuned.json").read_text()) == found


def test_a_trials_lds_is_that_of_its_method_on_held_out_labels(tmp_path: Path) -> None:
    split = hold_out(PLANTED.labels, SETTINGS)
    targets = [PLANTED.targets[row] for row in split.held_targets]
    subsets = [PLANTED.labels.subsets[column] for column in split.held_subsets]
    losses = PLANTED.labels.losses[np.ix_(split.held_targets, split.held_subsets)]
    for row in run(tmp_path, seed=3)["methods"]["staged"]["trials"]:
        fresh = Staged([], **row["params"]).fit(PLANTED.pool)
        scores = fresh.score_subsets(targets, subsets)
        assert row["lds"] == pytest.approx(lds_per_target(scores, losses)[0].mean())
        expected = bootstrap_lds(scores, losses, 50, np.random.default_rng(3))
        assert row["ci95"] == pytest.approx(expected)


def test_labels_that_are_not_held_out_do_not_matter(tmp_path: Path) -> None:
    split = hold_out(PLANTED.labels, SETTINGS)
    losses = np.full_like(PLANTED.labels.losses, 7.0)
    block = np.ix_(split.held_targets, split.held_subsets)
    losses[block] = PLANTED.labels.losses[block]
    other = Labels(PLANTED.labels.subsets, losses, PLANTED.labels.numbers)
    assert without_seconds(run(tmp_path / "a")) == without_seconds(
        run(tmp_path / "b", labels=other)
    )


def test_trials_share_what_they_have_in_common(tmp_path: Path) -> None:
    log: list[str] = []
    found = run(tmp_path, {"staged": Staged(log)})
    assert len(found["methods"]["staged"]["trials"]) == 16
    kinds = [line.split()[0] for line in log]
    assert [kinds.count(kind) for kind in ("features", "fit", "score")] == [2, 4, 8]
    assert len(set(log)) == len(log)
    assert [path.name for path in tmp_path.iterdir()] == ["tuned.json"]


@given(count=st.integers(1, 20), seed=st.integers(0, 5))
def test_drawn_points_are_the_methods_own_then_others_of_the_grid(count: int, seed: int) -> None:
    own = {"width": 1, "damping": 0.5, "noise": 2.0, "pooling": "sum"}  # damping is not in the grid
    drawn = GRID.draw(Staged([], **own), count, seed)
    assert drawn[0] == own
    assert len(drawn) == min(count, 17)
    assert len({str(point) for point in drawn}) == len(drawn)
    for point in drawn[1:]:
        assert all(point[key] in values for key, values in GRID.values.items())
    assert GRID.draw(Staged([], **own), 20, seed)[:count] == drawn


def test_features_that_all_trials_share_stay_in_the_methods_own_folder(tmp_path: Path) -> None:
    log: list[str] = []
    for folder in ("first", "second"):
        method = Staged(log, width=2, store=tmp_path / "features")
        run(tmp_path / folder, {"staged": method}, fixed={"staged": ["width"]})
    assert [line for line in log if line.startswith("features")] == ["features 2"]
    # Where trials have features of their own, that folder is left to what will be chosen.
    run(tmp_path / "third", {"staged": Staged(log, store=tmp_path / "other")})
    assert not (tmp_path / "other").exists()


def test_a_method_without_parameters_has_one_trial(tmp_path: Path) -> None:
    found = run(tmp_path, {"random": make_attributor("random", seed=1)}, trials=5)
    assert [row["params"] for row in found["methods"]["random"]["trials"]] == [{}]
    assert tuned_params(tmp_path, "random") == {}
    assert describe(found)[0] == (
        "judged on 12 held-out targets x 30 held-out subsets of the training labels"
    )
    assert describe(found)[1].endswith("nothing to tune; 1 trial")


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    first = run(tmp_path, trials=4)
    log: list[str] = []
    assert run(tmp_path, {"staged": Staged(log)}, trials=4) == first
    assert log == []
    more = run(tmp_path, {"staged": Staged(log)})["methods"]["staged"]["trials"]
    assert more[:4] == first["methods"]["staged"]["trials"]
    assert len(more) == 16
    assert without_seconds(run(tmp_path / "new")) == sorted(
        without_seconds({"methods": {"staged": {"trials": more}}}),
        key=lambda row: GRID.stages(row["params"]),
    )


def test_fewer_trials_choose_among_those(tmp_path: Path) -> None:
    run(tmp_path)
    found = run(tmp_path, trials=1)["methods"]["staged"]
    assert found["chosen"] == {"width": 1, "damping": 0.1, "noise": 2.0, "pooling": "sum"}
    assert len(found["trials"]) == 16


def kill_after_six(monkeypatch: pytest.MonkeyPatch, log: list[str]) -> None:
    """Tuning the planted method is interrupted once `log` has six entries."""
    score = Staged._score

    def killed(self: Staged, targets: Sequence[Example]) -> np.ndarray:
        if len(log) >= 6:
            raise KeyboardInterrupt
        return score(self, targets)

    monkeypatch.setattr(Staged, "_score", killed)


def test_a_killed_tuning_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    kill_after_six(monkeypatch, log)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, {"staged": Staged(log)})
    with pytest.raises(
        InputError, match="tuning of staged in .* has stopped in the middle; run `air"
    ):
        tuned_params(tmp_path, "staged")
    assert tuned_params(tmp_path, "staged", dict.fromkeys(GRID.values, 1)) == {}  # nothing to tune
    monkeypatch.undo()
    monkeypatch.setitem(GRIDS, "staged", GRID)
    before = len(log)
    found = run(tmp_path, {"staged": Staged(log)})
    assert without_seconds(found) == without_seconds(run(tmp_path / "new"))
    assert "features 1" in log[:before]
    assert "features 1" not in log[before:]  # they were on disk
    assert not (tmp_path / "tuning").exists()


def test_a_stopped_tuning_is_described_when_another_method_is_tuned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []
    kill_after_six(monkeypatch, log)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, {"staged": Staged(log)})
    found = run(tmp_path, {"random": make_attributor("random")})
    trials = len(found["methods"]["staged"]["trials"])
    assert trials > 0
    assert f"staged: stopped after {trials} trials; tune it again to go on" in describe(found)


def test_other_labels_run_again_and_say_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, trials=2)
    log: list[str] = []
    run(tmp_path, {"staged": Staged(log)}, labels=PLANTED.repeats, trials=2)
    assert "tuned.json is of other labels or settings; all trials run again" in (
        capsys.readouterr().out
    )
    assert log


def test_another_model_behind_a_method_runs_that_method_again(tmp_path: Path) -> None:
    methods = {"staged": Staged([]), "random": make_attributor("random")}
    first = run(tmp_path, methods, trials=2, sources={"staged": "sha256 of a model"})
    second = run(tmp_path, {"staged": Staged([])}, trials=2, sources={"staged": "of another"})
    assert second["methods"]["random"] == first["methods"]["random"]
    assert second["methods"]["staged"]["trials"] != first["methods"]["staged"]["trials"]
    assert without_seconds(second) == without_seconds(first)


@pytest.mark.parametrize("error", [NotApplicableError, torch.OutOfMemoryError])
def test_trials_that_cannot_run_are_recorded_and_passed(
    error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit, broken = Staged._fit, {1, 2}

    def some(self: Staged, pool: Sequence[Example]) -> None:
        if self.width in broken:
            raise error(f"width {self.width} does not go")
        fit(self, pool)

    monkeypatch.setattr(Staged, "_fit", some)
    found = run(tmp_path)
    assert tuned_params(tmp_path, "staged") == {}
    assert describe(found)[1] == "staged: no trial could run: width 1 does not go"
    broken.remove(2)  # it runs again, and does better
    found = run(tmp_path)
    rows = found["methods"]["staged"]["trials"]
    assert [row.get("error") for row in rows] == ["width 1 does not go"] * 8 + [None] * 8
    assert tuned_params(tmp_path, "staged")["width"] == 2
    assert "; 16 trials, 8 of them failed" in describe(found)[1]


def test_unequal_budgets_are_named(tmp_path: Path) -> None:
    run(tmp_path, {"random": make_attributor("random")}, trials=3)
    found = run(tmp_path, trials=2)
    assert "same budget (2, 3 trials)" in describe(found)[-1]
    assert "LDS" in describe(found)[1]
    assert len(describe(run(tmp_path, trials=3))) == 3


def test_few_held_out_labels_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    enough = replace(SETTINGS, validation_subsets=0.13, validation_targets=0.2)
    assert "little" not in describe(run(tmp_path / "enough", settings=enough, trials=1))[0]
    assert capsys.readouterr().out == ""  # 8 subsets and 5 targets
    for name, counts, change in (
        ("subsets", "7 held-out subsets and 5 targets", {"validation_subsets": 0.12}),
        ("targets", "8 held-out subsets and 4 targets", {"validation_targets": 0.17}),
    ):
        few = replace(enough, **change)
        found = run(tmp_path / name, settings=few, trials=1)
        message = f"chosen on {counts}, which is little: hold out at least 8 and 5 (make"
        assert message in capsys.readouterr().out
        run(tmp_path / name, {"random": make_attributor("random")}, settings=few, trials=1)
        assert capsys.readouterr().out == ""  # said once a file
        assert describe(found)[0].endswith("of the training labels, which is little")


def test_only_methods_with_trials_to_run_show_a_bar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = {"staged": Staged([]), "random": make_attributor("random")}
    run(tmp_path, methods, trials=2, show_progress=True)
    shown = capsys.readouterr().err
    assert "staged: 100%" in shown
    assert "2/2" in shown
    assert "random: 100%" in shown
    run(tmp_path, methods, trials=2, show_progress=True)
    assert capsys.readouterr().err == ""
    run(tmp_path, methods, trials=3, show_progress=True)
    shown = capsys.readouterr().err
    assert "1/1" in shown
    assert "random" not in shown


def test_an_ensemble_is_weighed_once_and_its_weights_are_chosen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log: list[str] = []

    def ensemble(noise: float = 0.0) -> dict[str, Attributor]:
        members = [Staged(log, noise=noise), "bm25", ("random", {"seed": 1})]
        return {"ensemble": EnsembleAttributor(members)}

    found = run(tmp_path, ensemble(), trials=5)
    (trial,) = found["methods"]["ensemble"]["trials"]
    assert found["methods"]["ensemble"]["chosen"] == trial["params"]
    members = ["staged", "bm25", "random"]
    assert tuned_params(tmp_path, "ensemble", {"members": members})["weights"][0] > 0.5
    assert tuned_params(tmp_path, "ensemble", {"members": members[:2]}) == {}
    assert log
    log.clear()
    capsys.readouterr()
    assert run(tmp_path, ensemble(), trials=5, show_progress=True) == found
    assert log == []
    assert capsys.readouterr().err == ""
    assert run(tmp_path, ensemble(noise=2.0), trials=5) != found
    assert log


def test_an_ensemble_whose_members_do_not_go_has_nothing_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Staged, pool: Sequence[Example]) -> None:
        raise NotApplicableError("does not go")

    ensemble = {"ensemble": EnsembleAttributor([Staged([], noise=0.0)])}
    with monkeypatch.context() as patch:
        patch.setattr(Staged, "_fit", refuse)
        found = run(tmp_path, ensemble)
    assert found["methods"]["ensemble"]["trials"] == [{"params": {}, "error": "does not go"}]
    assert found["methods"]["ensemble"]["chosen"] is None
    assert run(tmp_path, ensemble)["methods"]["ensemble"]["chosen"] == {"weights": [1.0]}


def test_nothing_is_tuned_without_a_file(tmp_path: Path) -> None:
    assert tuned_params(tmp_path, "bm25") == {}
    run(tmp_path, trials=1)
    assert tuned_params(tmp_path, "bm25") == {}


def test_wrong_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="trials is 0; give at least 1"):
        run(tmp_path, trials=0)
    with pytest.raises(InputError, match="validation_subsets is 0, so no label is held out"):
        run(tmp_path, settings=TrainSettings(validation_subsets=0.0))
    with pytest.raises(InputError, match="The labels hold losses of shape"):
        run(tmp_path, labels=Labels(PLANTED.labels.subsets, np.zeros((2, 60)), np.arange(60)))
    for text in ("{", "[]", '{"methods": {}}', '{"inputs": {}, "methods": {"staged": {}}}'):
        (tmp_path / "tuned.json").write_text(text)
        with pytest.raises(
            InputError, match=r"tuned.json cannot be read .* run `airrep tune` again"
        ):
            tuned_params(tmp_path, "staged")


@pytest.mark.parametrize("name", [name for name in GRIDS if name != "staged"])
def test_grids_have_parameters_of_their_methods(name: str) -> None:
    grid, takes = GRIDS[name], inspect.signature(method_class(name)).parameters
    assert set(grid.values) <= set(takes)
    stages = (grid.features, grid.fit, grid.score)
    assert len(grid.values) == sum(map(len, stages)) + bool(grid.pooling)
    assert "store" in takes or not grid.features


def test_shared_work_gives_what_fresh_methods_give(tmp_path: Path) -> None:
    lm = {
        "lm": save_tiny_lm(tmp_path / "lm", layers=1, hidden=16),
        "template": "{prompt} {response}",
        "device": "cpu",
    }
    fixed: dict[str, dict[str, Any]] = {"logra": lm, "ekfac": lm, "bm25": {}, "tfidf": {}}
    methods = {name: make_attributor(name, **params) for name, params in fixed.items()}
    found = run(tmp_path, methods, trials=6, draws=2)["methods"]
    split = hold_out(PLANTED.labels, SETTINGS)
    targets = [PLANTED.targets[row] for row in split.held_targets]
    subsets = [PLANTED.labels.subsets[column] for column in split.held_subsets]
    losses = PLANTED.labels.losses[np.ix_(split.held_targets, split.held_subsets)]
    for name, params in fixed.items():
        rows = found[name]["trials"]
        assert len(rows) == (4 if name == "tfidf" else 6)
        assert len({row["lds"] for row in rows}) > 2
        for row in rows[-2:]:
            fresh = make_attributor(name, **params, **row["params"])
            scores = fresh.fit(PLANTED.pool).score_subsets(targets, subsets)
            lds = lds_per_target(scores, losses)[0].mean()
            assert row["lds"] == pytest.approx(lds, abs=5e-3)


def test_fixed_parameters_are_not_tuned() -> None:
    grid = Grid({"a": (1, 2)}, {"b": (1, 2)}, {"c": (1, 2)}, ("sum", "attention"))
    assert list(grid.without({"a", "c"}).values) == ["b", "pooling"]
    assert list(grid.without({"b", "pooling"}).values) == ["a", "c"]
