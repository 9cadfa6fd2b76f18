"""Scores of outside tools: matched by id whatever their order, and refused when in doubt."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from airrep.attributor import Attributor, pack_text
from airrep.attributors import make_attributor
from airrep.attributors.given import GivenAttributor
from airrep.examples import Example, InputError
from airrep.score_files import GivenScores, read_scores, write_scores

POOL = [Example(f"pool-{row}", "ask", "reply") for row in range(4)]
TARGETS = [Example(f"target-{row}", "ask", "reply") for row in range(3)]
SCORES = np.arange(12, dtype=np.float32).reshape(3, 4)
SUBSET_SCORES = np.array([[1, 2, 6], [0, 0, 3], [-1, 1, 0]], dtype=np.float32)
PLAN = [[0, 1], [1, 2], [0, 2]]


def ids(examples: list[Example]) -> list[str]:
    return [example.id for example in examples]


def write_npy(path: Path, values: np.ndarray, /, **about: object) -> Path:
    """As another tool may write it: ids of the benchmark unless told otherwise."""
    np.save(path, values)
    given_ids = {"target_ids": ids(TARGETS), "pool_ids": ids(POOL)}
    Path(f"{path}.json").write_text(json.dumps(given_ids | about))
    return path


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_what_is_written_is_read(tmp_path, suffix):
    path = tmp_path / "deep" / f"scores{suffix}"
    write_scores(path, SCORES, TARGETS, POOL, method="TRAK", pooling="attention")
    found = read_scores(path)
    np.testing.assert_array_equal(found.scores, SCORES)
    assert found.subset_scores is None
    assert (found.target_ids, found.pool_ids) == (ids(TARGETS), ids(POOL))
    assert (found.method, found.pooling, found.source) == ("TRAK", "attention", str(path))
    assert found.has_ids


def test_a_plain_npy_is_written_with_a_plain_sidecar(tmp_path):
    write_scores(tmp_path / "s.npy", SCORES, TARGETS, POOL, method="ours")
    np.testing.assert_array_equal(np.load(tmp_path / "s.npy", allow_pickle=False), SCORES)
    assert json.loads((tmp_path / "s.npy.json").read_text()) == {
        "matrix": "scores",
        "pooling": "sum",
        "sign": "higher is more helpful",
        "method": "ours",
        "target_ids": ids(TARGETS),
        "pool_ids": ids(POOL),
    }


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(3)), st.permutations(range(4)))
def test_any_order_of_rows_and_columns_gives_the_same_scores(rows, columns):
    shuffled = GivenScores(
        "tool",
        SCORES[np.ix_(rows, columns)],
        target_ids=[TARGETS[row].id for row in rows],
        pool_ids=[POOL[column].id for column in columns],
    )
    shuffled.check_exact(TARGETS, POOL)
    np.testing.assert_array_equal(GivenAttributor(shuffled).fit(POOL).score(TARGETS), SCORES)


def test_a_part_of_the_targets_and_the_pool_can_be_asked_for(tmp_path):
    path = write_npy(tmp_path / "s.npy", SCORES.astype(np.int64))
    attributor = make_attributor("given", scores=path).fit(POOL[:0:-1])
    np.testing.assert_array_equal(attributor.score(TARGETS[1:2]), [[7, 6, 5]])


def test_whole_numbers_may_be_ids(tmp_path):
    pool = [Example(str(row), "ask", "reply") for row in range(4)]
    path = write_npy(tmp_path / "s.npy", SCORES, pool_ids=[3, 2, 1, 0])
    found = make_attributor("given", scores=path).fit(pool).score(TARGETS)
    np.testing.assert_array_equal(found, SCORES[:, ::-1])


def test_without_ids_only_the_exact_shape_is_taken(tmp_path):
    np.save(tmp_path / "s.npy", SCORES)
    attributor = make_attributor("given", scores=tmp_path / "s.npy")
    assert not read_scores(tmp_path / "s.npy").has_ids
    np.testing.assert_array_equal(attributor.fit(POOL).score(TARGETS), SCORES)
    with pytest.raises(InputError, match="no target ids, and 3 places for 2 target examples; add"):
        attributor.score(TARGETS[:2])
    with pytest.raises(InputError, match="no pool ids, and 4 places for 3 pool examples"):
        attributor.fit(POOL[:3])


def test_scores_pool_as_the_file_says_and_another_pooling_is_refused(tmp_path):
    write_scores(tmp_path / "s.npy", SCORES, TARGETS, POOL, pooling="attention")
    attributor = make_attributor("given", scores=tmp_path / "s.npy", pooling="attention").fit(POOL)
    weights = np.exp([4.0, 5.0])
    expected = (weights * [4, 5]).sum() / weights.sum()
    assert attributor.score_subsets(TARGETS, [[0, 1]])[1, 0] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(InputError, match="pool by 'attention', but pooling is 'sum'; give"):
        make_attributor("given", scores=tmp_path / "s.npy").fit(POOL)


# Subset scores


def subset_attributor(**arguments) -> Attributor:
    whole = {"subset_scores": SUBSET_SCORES, "target_ids": ids(TARGETS)} | arguments
    return GivenAttributor(GivenScores("tool", **whole), plan=PLAN)


def test_subset_scores_are_given_for_the_subsets_of_the_plan():
    attributor = subset_attributor().fit(POOL)
    np.testing.assert_array_equal(attributor.score_subsets(TARGETS, PLAN), SUBSET_SCORES)
    # Another order of subsets and of the rows in them.
    found = attributor.score_subsets(TARGETS[::-1], [[2, 0], [1, 0]])
    np.testing.assert_array_equal(found, SUBSET_SCORES[::-1][:, [2, 0]])
    with pytest.raises(InputError, match="Subset 1 is not in the plan that tool has subset scores"):
        attributor.score_subsets(TARGETS, [[0, 1], [0, 3]])


def test_subset_scores_alone_score_an_example_by_what_its_presence_is_worth():
    scores = subset_attributor().fit(POOL).score(TARGETS)
    # Example 0 is in the subsets 0 and 2, so (1 + 6) / 2 - 2 = 1.5; no subset holds example 3.
    np.testing.assert_allclose(scores[0], [1.5, -4.5, 3, 0])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sets(st.integers(0, 3), min_size=1), min_size=1, max_size=6))
def test_worth_of_presence_is_a_difference_of_means(plan):
    values = np.random.default_rng(0).normal(size=(1, len(plan))).astype(np.float32)
    file = GivenScores("tool", subset_scores=values)
    found = GivenAttributor(file, plan=[sorted(subset) for subset in plan]).fit(POOL)
    for row, score in enumerate(found.score(TARGETS[:1])[0]):
        held = np.array([row in subset for subset in plan])
        both = held.any() and not held.all()
        expected = values[0, held].mean() - values[0, ~held].mean() if both else 0
        assert score == pytest.approx(expected, abs=1e-5)


def test_both_matrices_serve_what_they_are_for(tmp_path):
    path = tmp_path / "s.safetensors"
    write_scores(path, SCORES, TARGETS, POOL, subset_scores=SUBSET_SCORES)
    attributor = make_attributor("given", scores=path, plan=PLAN).fit(POOL)
    attributor.save(tmp_path / "saved")
    for one in (attributor, Attributor.load(tmp_path / "saved")):
        np.testing.assert_array_equal(one.score(TARGETS), SCORES)
        np.testing.assert_array_equal(one.score_subsets(TARGETS, PLAN), SUBSET_SCORES)


def test_subset_scores_need_a_plan_of_their_size(tmp_path):
    write_scores(tmp_path / "s.npy", None, TARGETS, POOL, subset_scores=SUBSET_SCORES)
    with pytest.raises(InputError, match="scores of 3 subsets, and the plan has 0; give a column"):
        make_attributor("given", scores=tmp_path / "s.npy").fit(POOL)
    with pytest.raises(InputError, match="and the plan has 2"):
        make_attributor("given", scores=tmp_path / "s.npy", plan=PLAN[:2]).fit(POOL)


# Errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_ids": ids(TARGETS)[:2]}, "has 2 target_ids for 3 places in its matrix"),
        ({"pool_ids": ["a", "b", "a", "c"]}, "has 1 pool_ids more than once .first: 'a'"),
        ({"pool_ids": "abcd"}, "has pool_ids that are no list of ids"),
        ({"pool_ids": [["a"], "b", "c", "d"]}, "has pool_ids that are no list of ids"),
        ({"sign": "higher is worse"}, "has sign 'higher is worse'; it must be higher is more"),
        ({"pooling": "mean"}, "has pooling 'mean'; it must be sum or attention"),
        ({"matrix": "grads"}, r"s\.npy\.json must be a JSON object whose `matrix`"),
    ],
)
def test_a_wrong_sidecar_is_refused(tmp_path, changes, message):
    path = write_npy(tmp_path / "s.npy", SCORES, **changes)
    with pytest.raises(InputError, match=message):
        read_scores(path)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (SCORES[0], r"scores of shape \(4,\) and type float32; a matrix of numbers"),
        (np.zeros((3, 0)), r"scores of shape \(3, 0\)"),
        (np.full((3, 4), "x"), "of shape .3, 4. and type <U1"),
        (SCORES.astype(complex), "and type complex128"),
        (np.where(SCORES == 5, np.nan, SCORES), r"not finite in 1 of 3 rows .first: row 1"),
        (SCORES.astype(float) * 1e300, "not finite in 3 of 3 rows"),
    ],
)
def test_a_wrong_matrix_is_refused(tmp_path, matrix, message):
    np.save(tmp_path / "s.npy", matrix)
    with pytest.raises(InputError, match=message):
        read_scores(tmp_path / "s.npy")
    with pytest.raises(InputError, match=message):
        write_scores(tmp_path / "s.safetensors", matrix, TARGETS, POOL)
    assert not (tmp_path / "s.safetensors").exists()


def test_objects_are_never_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    np.save(tmp_path / "s.npy", np.array([[Trap()]], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match=r"s\.npy cannot be read as scores .*allow_pickle=False"):
        read_scores(tmp_path / "s.npy")
    assert not (tmp_path / "sprung").exists()


def test_files_that_are_none_are_named(tmp_path):
    with pytest.raises(InputError, match=r"There is no file .*s\.npy; check the path"):
        read_scores(tmp_path / "s.npy")
    (tmp_path / "s.csv").write_text("1,2")
    with pytest.raises(InputError, match=r"ends in '\.csv'; scores are \.safetensors or \.npy"):
        read_scores(tmp_path / "s.csv")
    for name in ("s.npy", "s.safetensors"):
        (tmp_path / name).write_bytes(b"not what it says")
        with pytest.raises(InputError, match="cannot be read as scores .*; write it again"):
            read_scores(tmp_path / name)
    np.savez(tmp_path / "s.npz", scores=SCORES)
    (tmp_path / "s.npz").rename(tmp_path / "s.npy")
    with pytest.raises(InputError, match="cannot be read as scores .it holds several arrays"):
        read_scores(tmp_path / "s.npy")
    write_npy(tmp_path / "s.npy", SCORES)
    (tmp_path / "s.npy.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read as scores"):
        read_scores(tmp_path / "s.npy")


def test_safetensors_without_scores_or_with_broken_ids_are_refused(tmp_path):
    path = tmp_path / "s.safetensors"
    save_file({"embeddings": SCORES}, path)
    with pytest.raises(InputError, match="has no array scores or subset_scores; give one of them"):
        read_scores(path)
    save_file({"scores": SCORES, "pool_ids": np.frombuffer(b"[oops", dtype=np.uint8)}, path)
    with pytest.raises(InputError, match="cannot be read as scores"):
        read_scores(path)
    save_file({"scores": SCORES, "subset_scores": SUBSET_SCORES[:2]}, path)
    with pytest.raises(InputError, match=r"scores and subset_scores of different targets"):
        read_scores(path)
    save_file({"scores": SCORES, "pool_ids": pack_text(["a", "b", "c", "d"])}, path)
    with pytest.raises(InputError, match="no scores of 4 of 4 pool ids .first: 'pool-0'.; add"):
        make_attributor("given", scores=path).fit(POOL)


def test_a_missing_target_and_an_extra_one_are_named(tmp_path):
    found = read_scores(write_npy(tmp_path / "s.npy", SCORES))
    stranger = Example("stranger", "ask", "reply")
    with pytest.raises(InputError, match="no scores of 1 of 3 target ids .first: 'stranger'"):
        found.check_exact([*TARGETS[:2], stranger], POOL)
    with pytest.raises(InputError, match="has 1 target ids that the benchmark has not .*target-2"):
        found.check_exact(TARGETS[:2], POOL)
    with pytest.raises(InputError, match="has 2 pool ids that the benchmark has not .*pool-0"):
        found.check_exact(TARGETS, POOL[2:])


def test_writing_checks_the_shape_and_the_suffix(tmp_path):
    with pytest.raises(InputError, match="has 2 target_ids for 3 places in its matrix"):
        write_scores(tmp_path / "s.npy", SCORES, TARGETS[:2], POOL)
    with pytest.raises(InputError, match="has no array scores or subset_scores"):
        write_scores(tmp_path / "s.npy", None, TARGETS, POOL)
    with pytest.raises(InputError, match="holds one matrix, and got two"):
        write_scores(tmp_path / "s.npy", SCORES, TARGETS, POOL, subset_scores=SUBSET_SCORES)
    with pytest.raises(InputError, match=r"ends in '\.txt'"):
        write_scores(tmp_path / "s.txt", SCORES, TARGETS, POOL)
    assert not list(tmp_path.iterdir())
