"""`airrep verify`: an honest run passes, forged labels and claims do not, a kill loses little."""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from airrep.attributor import Attributor
from airrep.attributors.given import GivenAttributor
from airrep.config import DataConfig, ImportConfig, RunConfig, SubsetConfig
from airrep.examples import Example, InputError, lm_template, tokenize_examples, write_examples
from airrep.label_store import LabelStore, import_npz
from airrep.lm import load_lm
from airrep.run_folder import RunFolder
from airrep.score_files import GivenScores, write_scores
from airrep.verification import claim_value
from data_builders.finetune import FineTuner
from data_builders.labels import LabelJob, make_labels
from data_builders.recipes import Recipe
from data_builders.run_data import create_stores, read_run_data
from data_builders.verify import VerifySettings, verify
from tests.tiny_lm import save_tiny_lm

RNG = np.random.default_rng(0)
POOL = [Example(f"pool-{row}", f"What is {row}?", f"It is {row % 7}.") for row in range(30)]
TARGETS = [Example(f"target-{row}", f"Say {row}!", f"It is {row % 5}.") for row in range(40)]
OTHERS = [Example("other-0", "red?", "q"), Example("other-1", "blue?", "z")]
EFFECTS = RNG.normal(size=(len(TARGETS), len(POOL)))  # nats times 10
SCORES = EFFECTS + RNG.normal(size=EFFECTS.shape)
RECIPE = Recipe(learning_rate=1e-2, batch_size=5, warmup_steps=1, epochs=1, max_length=64)
LABELS = VerifySettings(count=12, fresh=0)
CLAIMS = VerifySettings(count=10, fresh=24, epsilon=0.1)

LoadTuner = Callable[[Sequence[Example], Sequence[Example]], Any]


class LinearTuner:
    """Stands in for a FineTuner: losses are linear in the subset, but for a seed's noise."""

    notes = ()
    most_models = 4

    def __init__(self, machine: int = 0) -> None:
        self.machine = machine

    def losses_of(
        self,
        subsets: Sequence[np.ndarray],
        target_rows: np.ndarray,
        generators: Sequence[np.random.Generator],
    ) -> np.ndarray:
        found = []
        for subset, generator in zip(subsets, generators, strict=True):
            rng = np.random.default_rng([self.machine, *generator.integers(2**32, size=4)])
            noise = rng.normal(0, 0.12, len(target_rows))
            found.append(2 + noise - 0.1 * EFFECTS[np.ix_(target_rows, subset)].sum(axis=1))
        return np.asarray(found, dtype=np.float32)


def linear(machine: int = 0) -> LoadTuner:
    return lambda pool, targets: LinearTuner(machine)


def real(config: RunConfig) -> LoadTuner:
    def load(pool: Sequence[Example], targets: Sequence[Example]) -> FineTuner:
        model, tokenizer = load_lm(Path(config.lm))
        template = lm_template(tokenizer, config.recipe.template)
        tokens = [tokenize_examples(part, tokenizer, template, 64) for part in (pool, targets)]
        return FineTuner(model, *tokens, config.recipe, seed=config.seed, engine="eager")

    return load


def write_claims(folder: RunFolder, scores: np.ndarray) -> None:
    """Scores, and a results.json that says the truth about them on the stored labels."""
    labels = folder.open_labels("test").read()
    pooled = attributor(scores).score_subsets(TARGETS, labels.subsets)
    given = labels.losses, labels.subsets, len(POOL)
    slope = claim_value("slope", pooled, *given)
    row = {
        "name": "mine",
        "pooling": "sum",
        "lds": claim_value("lds", pooled, *given),
        "calibration": {"slope": slope},
        "linear_gap": {"share": claim_value("gap", pooled, *given, slope)},
    }
    folder.scores_file("mine").parent.mkdir(exist_ok=True)
    np.save(folder.scores_file("mine"), scores)
    folder.results_file.write_text(json.dumps({"methods": [row]}))


def attributor(scores: np.ndarray) -> Attributor:
    return GivenAttributor(GivenScores("test", scores.astype(np.float32))).fit(POOL)


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run that has been described, and nothing done yet; do not write into it."""
    root = tmp_path_factory.mktemp("described")
    for name, examples in (("pool", POOL), ("test", TARGETS), ("train", OTHERS)):
        write_examples(root / f"{name}.jsonl", examples)
    return RunConfig(
        output=str(root / "run"),
        seed=1,
        lm=str(save_tiny_lm(root / "lm", layers=1, hidden=16)),
        recipe=RECIPE,
        data=DataConfig(
            examples=str(root / "pool.jsonl"),
            targets=str(root / "train.jsonl"),
            test_targets=str(root / "test.jsonl"),
        ),
        subsets=SubsetConfig(train=1, test=30, size=10, repeats=4),
    )


@pytest.fixture(scope="module")
def made(described: RunConfig) -> RunConfig:
    """The same with labels, scores and claims; do not write into it."""
    return make_run(described, linear())


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the verifier keeps, for one test."""
    monkeypatch.setenv("AIRREP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def config(made: RunConfig, tmp_path: Path) -> RunConfig:
    """A finished run to write into."""
    shutil.copytree(made.output, tmp_path / "run")
    return replace(made, output=str(tmp_path / "run"))


def make_run(config: RunConfig, load: LoadTuner) -> RunConfig:
    store = create_stores(config, read_run_data(config))["test"]
    job = LabelJob(store, np.arange(len(TARGETS)), config.subsets.repeats)
    make_labels([job], lambda: load(POOL, TARGETS), config.seed, show_progress=False)
    store.merge()
    write_claims(RunFolder(Path(config.output)), SCORES)
    return config


def run(
    config: RunConfig,
    settings: VerifySettings = LABELS,
    load: LoadTuner | None = None,
    **changes: Any,
) -> dict[str, Any]:
    return verify(config, replace(settings, **changes), load or linear(), show_progress=False)


def store_of(config: RunConfig) -> LabelStore:
    return RunFolder(Path(config.output)).open_labels("test")


def claims(found: dict[str, Any]) -> dict[str, bool]:
    return {row["claim"]: row["accepted"] for row in found["claims"]}


def test_an_honest_run_is_accepted(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(config, CLAIMS)
    assert found["accepted"]
    assert claims(found) == {"lds": True, "slope": True, "gap": True}
    slope = next(row for row in found["claims"] if row["claim"] == "slope")
    assert slope["measured"] == pytest.approx(0.05, abs=0.02)
    assert 0 < slope["best_residual"] < slope["residual"] < 1
    labels = found["labels"]
    assert labels["agreement"] == "exact"
    assert labels["labels"] == 34
    assert len(labels["reruns"]) == 10
    assert found["trained"] == 10 + 24
    assert json.loads((Path(config.output) / "verification.json").read_text()) == found
    said = capsys.readouterr().out
    assert "drawn: 10 of 34 labels and 24 fresh subsets; what is not in the cache is" in said
    assert "10 of 34 labels held against training again, 0 inconsistent: at most " in said
    assert re.search(r"ACCEPTED: 34 labels trained now in \d+ s, 0 taken from the cache", said)
    # A new draw, which trains what it has not before; the old one when it is asked for.
    assert run(config)["entropy"] != found["entropy"]
    again = run(config, CLAIMS, entropy=int(found["entropy"]))
    assert again["labels"] == labels
    assert (again["trained"], again["reused"]) == (0, 34)
    said = capsys.readouterr().out
    assert re.search(r"ACCEPTED: 0 labels trained now in \d+ s, 34 taken", said)


def test_a_real_language_model_gives_its_labels_again(described: RunConfig, tmp_path: Path) -> None:
    config = replace(described, output=str(tmp_path / "run"), subsets=SubsetConfig(1, 10, 10))
    make_run(config, real(config))
    found = run(config, LABELS, real(config), count=5)
    assert found["accepted"]
    assert found["labels"]["agreement"] == "exact"
    store = store_of(config)
    losses = store.read().losses
    store.write(3, losses[:, 4])
    found = run(config, LABELS, real(config), count=18)
    assert [row["subset"] for row in found["labels"]["reruns"] if not row["consistent"]] == [3]


def test_the_number_of_reruns_is_what_the_share_needs(config: RunConfig) -> None:
    # Four of 34 labels: 17 draws miss them with chance 0.051, 18 with 0.039.
    found = run(config, VerifySettings(share=0.1, fresh=0))
    assert len(found["labels"]["reruns"]) == 18
    assert found["labels"]["inconsistent_at_most"] < 0.1


def forge(config: RunConfig, how: str) -> None:
    store = store_of(config)
    losses = store.read().losses
    rng = np.random.default_rng(0)
    means, spread = losses.mean(axis=1), losses.std(axis=1)
    for number in range(0, 30, 2):
        store.write(
            number,
            {
                "another's": losses[:, number + 1],
                "another's + noise": losses[:, number + 1] + rng.normal(0, 0.05, len(losses)),
                "shifted": losses[:, number] + 0.5,
                "plausible": means + spread * rng.normal(size=len(losses)),
            }[how],
        )


@pytest.mark.parametrize("how", ["another's", "another's + noise", "shifted", "plausible"])
def test_forged_labels_are_caught(
    config: RunConfig, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    forge(config, how)
    # 15 of 34: twelve draws miss them with chance 1e-4, whatever they are.
    found = run(config, count=12, entropy=3)
    assert not found["accepted"]
    wrong = {row["subset"] for row in found["labels"]["reruns"] if not row["consistent"]}
    forged = {
        row["subset"]
        for row in found["labels"]["reruns"]
        if row["subset"] % 2 == 0 and row["repeat"] == 0
    }
    assert wrong == forged
    assert "REJECTED" in capsys.readouterr().out


def test_another_machine_is_told_from_forgery(config: RunConfig) -> None:
    found = run(config, load=linear(machine=1), count=20, entropy=1)
    assert found["accepted"]
    assert found["labels"]["agreement"] == "seeds"
    assert found["labels"]["false_alarm"] == pytest.approx(0.05)
    assert set(found["labels"]["limits"]) == {"order", "shift", "spread"}
    forge(config, "another's")
    found = run(config, load=linear(machine=1), count=20, entropy=1)
    assert not found["accepted"]
    for row in found["labels"]["reruns"]:
        assert row["consistent"] == (row["subset"] % 2 == 1 or row["repeat"] == 1)


def test_scaled_scores_are_caught_by_their_slope_and_not_by_their_lds(config: RunConfig) -> None:
    np.save(RunFolder(Path(config.output)).scores_file("mine"), 10 * SCORES)
    found = run(config, CLAIMS)
    assert claims(found) == {"lds": True, "slope": False, "gap": False}
    assert not found["accepted"]


def test_boosted_scores_are_caught_on_fresh_subsets(config: RunConfig) -> None:
    folder = RunFolder(Path(config.output))
    labels = store_of(config).read()
    members = np.zeros((30, len(POOL)))
    for number, rows in enumerate(labels.subsets):
        members[number, rows] = 1
    wanted = labels.losses.mean(axis=1, keepdims=True) - labels.losses
    scores = wanted @ np.linalg.pinv(members).T
    write_claims(folder, scores)
    found = run(config, CLAIMS)
    rows = {row["claim"]: row for row in found["claims"]}
    assert rows["lds"]["claimed"] > 0.95
    assert rows["lds"]["stored"] == pytest.approx(rows["lds"]["claimed"], abs=1e-3)
    assert not rows["lds"]["accepted"]
    assert not found["accepted"]


def test_a_claim_that_the_stored_labels_do_not_give_is_caught(config: RunConfig) -> None:
    found = run(config, CLAIMS, methods="mine", lds=0.99)
    assert claims(found) == {"lds": False}


@pytest.mark.parametrize(("stored", "seeds"), [(8, range(5)), (12, range(5))])
def test_honest_claims_from_few_labels_are_not_refused(
    described: RunConfig, tmp_path: Path, stored: int, seeds: range
) -> None:
    """The slope that eight labels give is far off, and says so by its own error."""
    config = replace(described, output=str(tmp_path / "run"), subsets=SubsetConfig(1, stored, 10))
    make_run(config, linear())
    for seed in seeds:
        found = run(config, CLAIMS, count=2, entropy=seed)
        assert claims(found) == {"lds": True, "slope": True, "gap": True}
    np.save(RunFolder(Path(config.output)).scores_file("mine"), 10 * SCORES)
    assert not claims(run(config, CLAIMS, count=2))["slope"]


def test_claims_from_fewer_labels_cannot_be_judged(
    described: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(described, output=str(tmp_path / "run"), subsets=SubsetConfig(1, 7, 10))
    make_run(config, linear())
    found = run(config, CLAIMS, count=2)
    assert claims(found) == {"lds": None, "slope": None, "gap": None}
    assert found["accepted"]
    said = capsys.readouterr().out
    assert "cannot be judged, for it rests on 7 stored labels, and at least 8 are needed" in said
    assert "ACCEPTED (3 claims cannot be judged)" in said
    # What the stored labels themselves do not give is refused all the same.
    assert claims(run(config, CLAIMS, count=2, methods="mine", lds=0.99)) == {"lds": False}


def test_files_of_scores(config: RunConfig, tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "mine.safetensors"
    write_scores(path, SCORES, TARGETS, POOL)
    found = run(config, CLAIMS, methods=str(path), lds=0.5)
    assert claims(found) == {"lds": True}
    assert found["claims"][0]["fresh"]
    # Scores of the stored subsets alone are tried on those that are trained again.
    subset_scores = attributor(SCORES).score_subsets(TARGETS, store_of(config).subsets)
    write_scores(path, None, TARGETS, POOL, subset_scores=subset_scores)
    shutil.rmtree(cache)
    with pytest.raises(InputError, match="tried on 1 labels, .* train at least 8 again"):
        run(config, CLAIMS, methods=str(path), lds=0.5, count=1, entropy=1)
    with pytest.raises(InputError, match="at least 8 again"):  # second seeds do not count
        run(config, CLAIMS, methods=str(path), lds=0.5, count=8, entropy=0)
    assert not list(cache.rglob("*-r*.safetensors"))  # said before anything was trained
    found = run(config, CLAIMS, methods=str(path), lds=0.5, count=20)
    assert claims(found) == {"lds": True}
    assert not found["claims"][0]["fresh"]


def test_a_killed_verification_goes_on_with_the_same_draw(
    config: RunConfig, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses_of, calls = LinearTuner.losses_of, []

    def killed(self: LinearTuner, *given: Any) -> np.ndarray:
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return losses_of(self, *given)

    monkeypatch.setattr(LinearTuner, "losses_of", killed)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    draw = next(cache.glob("verification/*/draw.json"))
    entropy = json.loads(draw.read_text())["entropy"]
    assert not (Path(config.output) / "verification.json").exists()
    monkeypatch.setattr(LinearTuner, "losses_of", losses_of)
    found = run(config)
    assert found["entropy"] == entropy
    assert not found["entropy_given"]
    assert found["trained"] == 12 - 4
    assert not draw.exists()


def test_labels_that_change_after_the_draw_are_drawn_anew(
    config: RunConfig,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(LinearTuner, "losses_of", lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(config)
    draw = next(cache.glob("verification/*/draw.json"))
    entropy = json.loads(draw.read_text())["entropy"]
    store = store_of(config)
    store.write(0, store.read().losses[:, 0] + 1)
    assert run(config)["entropy"] != entropy
    assert "have changed since the draw" in capsys.readouterr().out


def test_imported_labels_need_a_model_and_a_recipe(config: RunConfig, tmp_path: Path) -> None:
    imported = replace(config, imported=ImportConfig("train.npz", "test.npz"))
    unnamed = replace(imported, lm=RunConfig.lm, recipe=Recipe())
    with pytest.raises(InputError, match="write lm and recipe into it"):
        run(unnamed)
    store = store_of(config)
    np.savez(tmp_path / "test.npz", subsets=np.stack(store.subsets), losses=store.read().losses.T)
    fingerprint = store.fingerprint | {"lm": "elsewhere", "recipe": "elsewhere"}
    del fingerprint["plan"]
    shutil.rmtree(store.path)
    import_npz(tmp_path / "test.npz", store.path, fingerprint, {})
    assert run(imported)["accepted"]


def test_what_the_configuration_must_share_with_the_labels(
    config: RunConfig, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="recipe is .* in the folder"):
        run(replace(config, recipe=replace(RECIPE, epochs=3)))
    with pytest.raises(InputError, match="lm is .* in the folder"):
        run(replace(config, lm=str(save_tiny_lm(tmp_path / "lm", layers=1, seed=5))))
    with pytest.raises(InputError, match="seed is .* in the folder"):
        run(replace(config, seed=2))
    write_examples(Path(config.output) / "pool.jsonl", POOL[::-1])
    with pytest.raises(InputError, match="examples is .* in the folder"):
        run(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"share": 0.0}, "share is 0.0; give more than 0"),
        ({"confidence": 1.0}, "confidence is 1.0"),
        ({"count": 0}, "count is 0; give at least 1"),
        ({"count": 35}, "count is 35, of 34 whole labels"),
        ({"split": "all"}, "split is 'all'; give train or test"),
        ({"agreement": "close"}, "agreement is 'close'; give auto or exact or seeds"),
        ({"tolerance": -1.0}, "tolerance is -1.0"),
        ({"epsilon": -0.1}, "epsilon is -0.1"),
        ({"entropy": -1}, "entropy is -1"),
        ({"fresh": 7}, "fresh is 7; give at least 8, or 0"),
        ({"methods": "mine"}, "verified with split test and fresh subsets"),
        ({"fresh": 8, "gap": 0.1}, "give the slope of the scores"),
        ({"fresh": 8, "methods": "mine,other", "lds": 0.1}, "given for 2 methods"),
        ({"fresh": 8, "methods": "other"}, "Nothing is claimed of other"),
        ({"fresh": 8, "methods": "other", "lds": 0.1}, "There is no file"),
        ({"split": "train"}, "has no label that lacks no loss"),
    ],
)
def test_wrong_settings(made: RunConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(made, **changes)


def test_a_broken_results_file_is_named(config: RunConfig) -> None:
    (Path(config.output) / "results.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read as results"):
        run(config, CLAIMS)
    (Path(config.output) / "results.json").unlink()
    assert run(config, CLAIMS)["claims"] == []
