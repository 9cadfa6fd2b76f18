"""The contract, held over every attribution method."""

import inspect
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_lm import save_tiny_lm
from tiny_models import tiny_encoder

from airrep.attributor import POOLINGS, Attributor, NotApplicableError, Ranking
from airrep.attributors import available, make_attributor, method_class
from airrep.encoder import AirRepEncoder
from airrep.examples import Example, InputError
from airrep.holdout import TrainingLabels
from airrep.label_store import Labels
from airrep.pooling import attention_pool, membership
from airrep.train_settings import TrainSettings

NEEDS_ENCODER = ("airrep", "embedding", "response_embedding", "kernels")
TASKS = ("colour", "place", "number")
SUBSETS = [np.array([0, 3, 5]), np.array([1]), np.array([2, 2, 4, 11]), np.arange(12)]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def example(side: str, number: int) -> Example:
    colours, things = ["red", "green", "blue", "yellow"], ["apple", "river", "mountain"]
    words = f"{colours[number % 4]} {things[number % 3]} {number}"
    return Example(
        id=f"{side}-{number}",
        prompt=f"What is the {words}?" + " of the garden" * (number % 5),
        response=f"The {things[number % 3]} is {colours[(number + 1) % 4]}.",
        task=TASKS[number % 3],
    )


POOL = [example("pool", number) for number in range(12)]
TARGETS = [example("target", number) for number in range(20, 25)]


@pytest.fixture(scope="session")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What methods need: a trained encoder, a plain base, a file of scores, a language model."""
    folder = tmp_path_factory.mktemp("encoders")
    base = tiny_encoder(folder / "base")
    encoder = AirRepEncoder.from_base(str(base))
    encoder.save_pretrained(str(folder / "airrep"))
    return {
        "airrep": folder / "airrep",
        "embedding": base,
        "response_embedding": base,
        "kernels": base,
        "given": _outside_scores(folder),
        "lm": save_tiny_lm(folder / "lm"),
    }


def _outside_scores(folder: Path) -> Path:
    """A file of scores as another tool may write it: its own order, and no word on pooling."""
    np.save(folder / "outside.npy", np.random.default_rng(0).normal(size=(5, 12)))
    ids = {
        "target_ids": [target.id for target in reversed(TARGETS)],
        "pool_ids": [one.id for one in reversed(POOL)],
    }
    (folder / "outside.npy.json").write_text(json.dumps(ids))
    return folder / "outside.npy"


def training_labels(rows: np.ndarray | None = None) -> TrainingLabels:
    """Random losses of the targets under random subsets; `rows` are the pool's examples' rows."""
    rng = np.random.default_rng(0)
    rows = np.arange(12) if rows is None else rows
    subsets = [rows[rng.choice(12, 6, replace=False)] for _ in range(10)]
    losses = rng.normal(size=(5, 10)).astype(np.float32)
    return TrainingLabels(TARGETS, Labels(subsets, losses, np.arange(10)), TrainSettings())


def method(name: str, encoders: dict[str, Path], **params) -> Attributor:
    if name in NEEDS_ENCODER:
        params = {"encoder": str(encoders[name]), **params}
    if name == "given":
        params = {"scores": str(encoders[name]), **params}
    if name == "kernels":
        params = {"labels": training_labels(), "members": ["tfidf"], **params}
    if name == "ensemble":
        params = {"members": ["tfidf", ["random", {"seed": 1}]], **params}
    if "lm" in inspect.signature(method_class(name)).parameters:
        params = {"lm": str(encoders["lm"]), "device": "cpu", **params}
    if name == "trak":
        # A ridge of this pool's size: a smaller one would enlarge rounding errors.
        params = {"width": 64, "damping": 1.0, **params}
    return make_attributor(name, **params)


@pytest.fixture(params=available())
def unfitted(request, encoders) -> Attributor:
    return method(request.param, encoders)


@pytest.fixture(scope="module")
def fitted_once(encoders) -> dict[str, Attributor]:
    return {name: method(name, encoders).fit(POOL) for name in available()}


@pytest.fixture(params=available())
def fitted(request, fitted_once) -> Attributor:
    return fitted_once[request.param]


# Fit and score


def test_constructor_only_stores_and_fit_returns_self(unfitted):
    learned = [name for name in vars(unfitted) if name.endswith("_")]
    assert learned == []
    before = unfitted.params()
    assert unfitted.fit(POOL) is unfitted
    assert unfitted.pool_size_ == len(POOL)
    assert unfitted.params() == before


def test_scores_are_finite_float32_targets_by_pool(fitted):
    scores = fitted.score(TARGETS)
    assert scores.shape == (len(TARGETS), len(POOL))
    assert scores.dtype == np.float32
    assert np.isfinite(scores).all()
    assert len(np.unique(scores)) > 1
    np.testing.assert_array_equal(scores, fitted.score(TARGETS))


def test_a_targets_scores_do_not_depend_on_its_batch(fitted):
    together = fitted.score(TARGETS)
    alone = np.concatenate([fitted.score([target]) for target in TARGETS])
    np.testing.assert_allclose(together, alone, **CLOSE)
    np.testing.assert_allclose(together[::-1], fitted.score(TARGETS[::-1]), **CLOSE)


def test_a_shuffled_pool_shuffles_the_scores(fitted, encoders):
    order = np.random.default_rng(0).permutation(len(POOL))
    # Labels of the shuffled pool: where its rows have gone.
    moved = {"labels": training_labels(np.argsort(order))} if fitted.name == "kernels" else {}
    shuffled = method(fitted.name, encoders, **moved).fit([POOL[row] for row in order])
    np.testing.assert_allclose(shuffled.score(TARGETS), fitted.score(TARGETS)[:, order], **CLOSE)


def test_fitting_again_forgets_the_first_pool(unfitted, fitted_once):
    # Labels are of a pool of that size.
    unfitted.fit(POOL[::-1] if unfitted.name == "kernels" else POOL[:5]).score(TARGETS)
    expected = fitted_once[unfitted.name].score(TARGETS)
    np.testing.assert_allclose(unfitted.fit(POOL).score(TARGETS), expected, **CLOSE)


def test_bytes_per_example_count_the_fitted_arrays(fitted):
    total = sum(array.nbytes for array in fitted._state().values())
    assert 0 <= fitted.bytes_per_example * len(POOL) - total < len(POOL)


# Subsets


def test_additive_subset_scores_are_sums_over_the_subset(fitted_once):
    for attributor in fitted_once.values():
        scores = attributor.score(TARGETS)
        if attributor.pooling != "sum":
            continue
        expected = np.stack([scores[:, subset].sum(axis=1) for subset in SUBSETS], axis=1)
        found = attributor.score_subsets(TARGETS, SUBSETS)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, **CLOSE)


@pytest.mark.parametrize("name", available())
@pytest.mark.parametrize("pooling", ["sum", "attention"])
def test_subset_scores_are_the_one_pooling_functions(name, pooling, encoders):
    attributor = method(name, encoders)
    attributor.pooling = pooling  # as an evaluation does, of an ensemble after its fit
    attributor.poolings = POOLINGS
    attributor.fit(POOL)
    scores = attributor.score(TARGETS)
    members = membership(SUBSETS, len(POOL))
    pooled = torch.from_numpy(scores)
    expected = attention_pool(pooled, members) if pooling == "attention" else pooled @ members
    found = attributor.score_subsets(TARGETS, SUBSETS)
    assert found.shape == (len(TARGETS), len(SUBSETS))
    np.testing.assert_array_equal(found, attributor.score_subsets(TARGETS, SUBSETS, scores))
    np.testing.assert_allclose(found, expected.numpy(), **CLOSE)
    # A subset of one example scores what the example scores.
    np.testing.assert_allclose(found[:, 1], scores[:, 1], **CLOSE)


def test_methods_that_pool_in_another_way_than_adding_say_so(fitted_once):
    assert {name: one.pooling for name, one in fitted_once.items() if one.pooling != "sum"} == {
        "airrep": "attention",
        "ensemble": "members",
        "newton_step": "step",
        "response_embedding": "attention",
    }


# Rank


def test_rank_gives_both_ends_best_first(fitted):
    scores = fitted.score(TARGETS)
    ranking = fitted.rank(TARGETS, 4)
    assert isinstance(ranking, Ranking)
    for row in range(len(TARGETS)):
        helpful = np.lexsort((np.arange(len(POOL)), -scores[row]))[:4]
        harmful = np.lexsort((np.arange(len(POOL)), scores[row]))[:4]
        np.testing.assert_array_equal(ranking.helpful_rows[row], helpful)
        np.testing.assert_array_equal(ranking.harmful_rows[row], harmful)
        np.testing.assert_array_equal(ranking.helpful_scores[row], scores[row, helpful])
        np.testing.assert_array_equal(ranking.harmful_scores[row], scores[row, harmful])


def test_ranks_of_equal_scores_keep_pool_order(fitted):
    scores = np.array([[1.0, 2.0, 1.0, 2.0, 0.0, 0.0]], dtype=np.float32)
    ranking = fitted.rank(TARGETS[:1], 3, scores)
    assert ranking.helpful_rows.tolist() == [[1, 3, 0]]
    assert ranking.harmful_rows.tolist() == [[4, 5, 0]]


def test_rank_gives_the_whole_pool_when_k_is_larger(fitted):
    ranking = fitted.rank(TARGETS, 1000)
    assert ranking.helpful_rows.shape == (len(TARGETS), len(POOL))
    assert sorted(ranking.harmful_rows[0].tolist()) == list(range(len(POOL)))


# Save and load


def test_saved_methods_come_back_the_same(fitted, tmp_path):
    fitted.save(tmp_path / "saved")
    names = {path.suffix for path in (tmp_path / "saved").rglob("*") if path.is_file()}
    assert names <= {".json", ".safetensors", ".txt", ".jinja"}  # nothing that can run code
    for cls in (Attributor, type(fitted)):
        loaded = cls.load(tmp_path / "saved")
        assert type(loaded) is type(fitted)
        assert loaded.pool_fingerprint_ == fitted.pool_fingerprint_
        assert loaded.pooling == fitted.pooling
        np.testing.assert_allclose(loaded.score(TARGETS), fitted.score(TARGETS), **CLOSE)
        found = loaded.score_subsets(TARGETS, SUBSETS)
        np.testing.assert_allclose(found, fitted.score_subsets(TARGETS, SUBSETS), **CLOSE)


def test_loaded_methods_can_be_fitted_and_saved_again(fitted, tmp_path):
    fitted.save(tmp_path / "first")
    loaded = Attributor.load(tmp_path / "first").fit(POOL)
    loaded.save(tmp_path / "second")
    again = Attributor.load(tmp_path / "second")
    np.testing.assert_allclose(again.score(TARGETS), fitted.score(TARGETS), **CLOSE)


def test_loading_what_is_not_there_or_damaged_names_the_file(fitted, tmp_path):
    with pytest.raises(InputError, match=r"has no attributor\.json; give a folder that"):
        Attributor.load(tmp_path)
    fitted.save(tmp_path)
    state = tmp_path / "state.safetensors"
    state.write_bytes(state.read_bytes()[:20])
    with pytest.raises(InputError, match=r"state\.safetensors cannot be read"):
        Attributor.load(tmp_path)
    (tmp_path / "attributor.json").write_text("{")
    with pytest.raises(InputError, match=r"attributor\.json is not JSON"):
        Attributor.load(tmp_path)


def test_loading_through_another_methods_class_is_refused(fitted, tmp_path):
    fitted.save(tmp_path)
    other = type(make_attributor("random" if fitted.name != "random" else "tfidf"))
    with pytest.raises(InputError, match=f"holds the method '{fitted.name}', not '{other.name}'"):
        other.load(tmp_path)


# Errors


def test_using_a_method_before_fit_is_an_error(unfitted):
    for call in (
        lambda: unfitted.score(TARGETS),
        lambda: unfitted.score_subsets(TARGETS, SUBSETS),
        lambda: unfitted.rank(TARGETS, 3),
        lambda: unfitted.save("nowhere"),
        lambda: unfitted.bytes_per_example,
    ):
        with pytest.raises(InputError, match=r"is not fitted; call fit\(pool\) first"):
            call()


def test_empty_input_is_an_error(fitted, encoders):
    with pytest.raises(InputError, match="got an empty pool"):
        method(fitted.name, encoders).fit([])
    with pytest.raises(InputError, match="got no targets"):
        fitted.score([])
    with pytest.raises(InputError, match="k = 0"):
        fitted.rank(TARGETS, 0)


def test_unknown_pooling_is_an_error(fitted, encoders):
    attributor = method(fitted.name, encoders)
    attributor.pooling = "mean"
    known = ", ".join(attributor.poolings)
    with pytest.raises(InputError, match=f"got pooling 'mean'; choose one of {known}"):
        attributor.fit(POOL)


@pytest.mark.parametrize(
    ("subsets", "message"),
    [
        ([], "There are no subsets"),
        ([[0], []], "Subset 1 has shape"),
        ([[0.5]], "Subset 0 holds float64 values"),
        ([[0], [12]], "Subset 1 has row 12, outside the pool of 12; rows go from 0 to 11"),
        ([[-1]], "Subset 0 has row -1"),
    ],
)
def test_wrong_subsets_are_an_error(fitted, subsets, message):
    with pytest.raises(InputError, match=message):
        fitted.score_subsets(TARGETS, subsets)


@pytest.mark.parametrize(
    ("wanted", "hint"),
    [("airep", "'airrep'"), ("tf-idf", "'tfidf'"), ("BM25".lower() + "s", "'bm25'")],
)
def test_an_unknown_method_suggests_the_nearest(wanted, hint):
    with pytest.raises(InputError, match=f"There is no method '{wanted}'; did you mean {hint}"):
        make_attributor(wanted)


def test_wrong_parameters_name_those_the_method_takes():
    with pytest.raises(InputError, match="'bm25'.*it takes k1, b, pooling"):
        make_attributor("bm25", colour="red")
    with pytest.raises(InputError, match="'airrep': missing a required argument: 'encoder'"):
        make_attributor("airrep")


def test_same_task_without_tasks_names_the_first_example():
    nameless = [Example("a", "one", "two", "colour"), Example("b", "three", "four")]
    with pytest.raises(InputError, match="1 of 2 pool examples have none .first: 'b'"):
        make_attributor("same_task").fit(nameless)
    with pytest.raises(InputError, match="1 of 1 targets have none"):
        make_attributor("same_task").fit(POOL).score(nameless[1:])


@pytest.mark.parametrize("name", ["tfidf", "bm25"])
def test_a_pool_without_words_is_an_error_only_where_none_is_left(name):
    # The template's own words remain, so examples of punctuation alone still have text.
    scores = make_attributor(name).fit([Example("a", "?!", "...")]).score(TARGETS)
    assert scores.shape == (len(TARGETS), 1)


# What each method knows


def test_same_task_scores_one_for_the_same_task():
    scores = make_attributor("same_task").fit(POOL).score(TARGETS)
    expected = [[target.task == one.task for one in POOL] for target in TARGETS]
    np.testing.assert_array_equal(scores, np.asarray(expected, dtype=np.float32))


@pytest.mark.parametrize("name", ["tfidf", "bm25", "embedding", "airrep"])
def test_text_methods_find_a_repeated_text(name, encoders):
    attributor = method(name, encoders).fit(POOL)
    scores = attributor.score(POOL)
    if name == "airrep":  # dot products of an untrained encoder favour long vectors
        scores = scores / np.linalg.norm(attributor.embeddings_, axis=1)
    np.testing.assert_array_equal(scores.argmax(axis=1), np.arange(len(POOL)))


def test_response_tfidf_reads_responses_alone():
    pool = [Example("a", "one two", "red apple"), Example("b", "red apple", "four")]
    attributor = make_attributor("response_tfidf").fit(pool)
    targets = [Example("x", "four", "red apple"), Example("y", "", "four five")]
    scores = attributor.score(targets)
    np.testing.assert_allclose(scores, [[1, 0], [0, 1]], atol=1e-6)
    wordless = [Example("a", "words here", "...")]
    with pytest.raises(NotApplicableError, match="response_tfidf found no words in the pool"):
        make_attributor("response_tfidf").fit(wordless)


def test_response_embeddings_are_where_training_starts(encoders):
    fitted = method("response_embedding", encoders, scale=0.7).fit(POOL)
    scores = fitted.score(POOL)
    assert scores.std(ddof=1) == pytest.approx(0.7, rel=1e-4)
    np.testing.assert_allclose(fitted.embeddings_.mean(axis=0), 0, atol=1e-5)
    same_answer = [replace(one, prompt="Why?") for one in POOL]
    other_answer = [replace(one, response="Because.") for one in POOL]
    answers, prompts = (np.diag(fitted.score(some)) for some in (same_answer, other_answer))
    assert answers.mean() > prompts.mean() + 0.2  # openings have marks too
    words = AirRepEncoder.from_base(encoders["embedding"])
    words.add_response_words(with_marks=False)
    plain = make_attributor("response_embedding", encoder=words, scale=0.7).fit(POOL)
    answers, prompts = (np.diag(plain.score(some)) for some in (same_answer, other_answer))
    assert (answers > prompts).all()  # words have twice the text's part
    untouched = AirRepEncoder.from_base(encoders["embedding"])
    again = make_attributor("response_embedding", encoder=untouched, scale=0.7).fit(POOL)
    np.testing.assert_allclose(again.score(POOL), scores, **CLOSE)
    assert untouched.words_projector is None
    with pytest.raises(InputError, match="scale is 0"):
        method("response_embedding", encoders, scale=0.0).fit(POOL)
    for pool in (POOL[:1], [POOL[0], replace(POOL[0], id="again")]):
        with pytest.raises(NotApplicableError, match="needs a pool of different examples"):
            method("response_embedding", encoders).fit(pool)


def test_embedding_scores_are_cosines(fitted_once):
    scores = fitted_once["embedding"].score(POOL)
    np.testing.assert_allclose(np.diag(scores), 1, rtol=1e-5)
    assert np.abs(scores).max() <= 1 + 1e-5


def test_airrep_scores_are_dot_products_of_the_encoders_embeddings(fitted_once, encoders):
    encoder = AirRepEncoder.from_pretrained(str(encoders["airrep"]))
    expected = encoder.encode(TARGETS) @ encoder.encode(POOL).T
    np.testing.assert_allclose(fitted_once["airrep"].score(TARGETS), expected.numpy(), **CLOSE)


def test_an_encoder_object_serves_as_well_as_its_folder(fitted_once, encoders):
    encoder = AirRepEncoder.from_pretrained(str(encoders["airrep"]))
    scores = make_attributor("airrep", encoder=encoder, batch_size=3).fit(POOL).score(TARGETS)
    np.testing.assert_allclose(scores, fitted_once["airrep"].score(TARGETS), **CLOSE)


def test_random_scores_depend_on_the_seed_and_are_spread_evenly():
    targets = [example("target", number) for number in range(200)]
    scores = make_attributor("random").fit(targets).score(targets)
    other = make_attributor("random", seed=1).fit(targets).score(targets)
    assert abs(scores.mean()) < 0.02
    assert scores.std() == pytest.approx(3**-0.5, abs=0.01)
    assert abs(np.corrcoef(scores.ravel(), other.ravel())[0, 1]) < 0.02


def test_only_same_task_is_an_oracle(fitted_once):
    assert [name for name, one in fitted_once.items() if one.oracle] == ["same_task"]


BM25_IN_A_PROCESS = """
import sys
from airrep.attributors import make_attributor
from airrep.examples import Example
words = "one two three four five six seven eight nine ten eleven twelve".split()
pool = [Example(str(n), " ".join(words[n % 5 :: n % 4 + 1]), words[n % 12]) for n in range(40)]
method = make_attributor("bm25").fit(pool)
sys.stdout.buffer.write(method.score(pool).tobytes() + method._state()["words"].tobytes())
"""


def test_bm25_scores_the_same_in_every_process():
    """Sets of strings are ordered by a hash that every process seeds anew."""
    outputs = {
        subprocess.run(
            [sys.executable, "-c", BM25_IN_A_PROCESS],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=Path(__file__).parents[1],
            capture_output=True,
            check=True,
        ).stdout
        for seed in "123"
    }
    assert len(outputs) == 1


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("logra", {"layers": 5}, "'logra' got layers 5; it takes str, or null"),
        ("logra", {"projection_rank": 2.5}, "got projection_rank 2.5; it takes int, or null"),
        ("logra", {"damping": None}, "got damping None; it takes float"),
        ("bm25", {"b": "x"}, "'bm25' got b 'x'; it takes float"),
        ("tfidf", {"sublinear_tf": 7}, "got sublinear_tf 7; it takes bool"),
        ("random", {"seed": True}, "got seed True; it takes int"),
        ("kernels", {"encoder": "x", "components": 2.5}, "got components 2.5; it takes int"),
        ("embedding", {"encoder": "x", "batch_size": "4"}, "batch_size .4.; it takes int, or null"),
    ],
)
def test_a_parameter_of_another_type_is_named(name, params, message):
    with pytest.raises(InputError, match=message):
        make_attributor(name, **({"lm": "model"} if name == "logra" else {}), **params)


def test_numbers_of_numpy_are_numbers():
    attributor = make_attributor("logra", lm=Path("m"), damping=np.float32(1), seed=np.int64(3))
    assert attributor.damping == 1
