"""The index: exact to the row, whole after a kill, refused for other data, checked for damage."""

import builtins
import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import WORDS, tiny_encoder

from airrep import index as index_module
from airrep import index_search
from airrep.attributor import top_rows
from airrep.encoder import AirRepEncoder
from airrep.examples import Example, InputError
from airrep.index import EmbeddingIndex
from airrep.index_search import best_rows
from airrep.reading import read_examples

FORK = multiprocessing.get_context("fork")
DIMENSION = 8


class Letters:
    """Stands in for an encoder: the embedding of an example is a fixed function of its text."""

    name_or_path = "letters"
    projector = torch.nn.Linear(1, DIMENSION)

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale
        self.encoded = 0

    def encode(self, examples, batch_size=64):
        self.encoded += len(examples)
        rows = [np.random.default_rng(list(one.response.encode())) for one in examples]
        drawn = np.stack([row.standard_normal(DIMENSION) for row in rows])
        return torch.from_numpy(self.scale * drawn).float()


def make_examples(count: int) -> list[Example]:
    return [
        Example(f"id-{row}", f"Ask {row}?\u2028é", f"Say {row}", "sums" if row % 2 else None)
        for row in range(count)
    ]


EXAMPLES = make_examples(50)


def build(folder: Path, encoder: Any = None, examples: Any = EXAMPLES, **changes: Any):
    return EmbeddingIndex.build(
        folder,
        encoder or Letters(),
        examples,
        **{"fingerprint": "a" * 64, "source": "pool.jsonl", **changes},
    )


@pytest.fixture
def index(tmp_path: Path) -> EmbeddingIndex:
    return build(tmp_path / "index")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "BLOCK_ROWS", 16)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# The best rows


def assert_best(embeddings: np.ndarray, targets: np.ndarray, k: int) -> None:
    """The same rows and scores as sorting all of them, at both ends."""
    scores = targets @ embeddings.astype(np.float32).T
    for sign, (rows, found) in zip((1, -1), best_rows(embeddings, targets, k), strict=True):
        expected = np.stack([top_rows(sign * row, k) for row in scores])
        np.testing.assert_array_equal(rows, expected)
        np.testing.assert_array_equal(found, np.take_along_axis(scores, expected, axis=1))


def test_best_rows_by_hand() -> None:
    embeddings = np.asarray([[1, 0], [0, 2], [-3, 1], [1, 5]], dtype=np.float32)
    targets = np.asarray([[1, 0], [0, 1]], dtype=np.float32)
    (helpful, high), (harmful, low) = best_rows(embeddings, targets, 2)
    # Scores: target 0 is 1, 0, -3, 1; target 1 is 0, 2, 1, 5.
    assert helpful.tolist() == [[0, 3], [3, 1]]
    assert high.tolist() == [[1, 1], [5, 2]]
    assert harmful.tolist() == [[2, 1], [0, 2]]
    assert low.tolist() == [[-3, 0], [0, 1]]
    assert (helpful.dtype, high.dtype) == (np.int64, np.float32)


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 200),
    targets=st.integers(1, 5),
    k=st.integers(1, 200),
    values=st.sampled_from((1, 3, 50)),
    block=st.integers(1, 64),
    dtype=st.sampled_from(("float32", "float16")),
    order=st.sampled_from(("drawn", "ascending", "descending")),
    seed=st.integers(0, 2**32 - 1),
)
def test_best_rows_are_those_of_a_sort(count, targets, k, values, block, dtype, order, seed):
    # Small whole numbers: sums are exact whatever their order, and many scores are equal.
    rng = np.random.default_rng(seed)
    embeddings = rng.integers(-values, values + 1, size=(count, 3)).astype(dtype)
    wanted = rng.integers(-3, 4, size=(targets, 3)).astype(np.float32)
    if order != "drawn":
        rising = np.argsort(embeddings.astype(np.float32) @ wanted[0])
        embeddings = embeddings[rising if order == "ascending" else rising[::-1]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_search, "BLOCK_SCORES", block)
        patch.setattr(index_search, "LEAST_BLOCK_ROWS", block)
        assert_best(embeddings, wanted, min(k, count))


def test_blocks_of_real_numbers_give_the_same_rows_as_one_block() -> None:
    rng = np.random.default_rng(0)
    embeddings = rng.standard_normal((5000, 16), dtype=np.float32)
    targets = rng.standard_normal((300, 16), dtype=np.float32)
    scores = targets @ embeddings.T
    (helpful, high), (harmful, low) = best_rows(embeddings, targets, 20)
    np.testing.assert_array_equal(helpful, [top_rows(row, 20) for row in scores])
    np.testing.assert_array_equal(harmful, [top_rows(-row, 20) for row in scores])
    np.testing.assert_allclose(high, np.take_along_axis(scores, helpful, axis=1), rtol=1e-5)
    np.testing.assert_allclose(low, np.take_along_axis(scores, harmful, axis=1), rtol=1e-5)


# Building and reading


def test_what_is_built_is_read(index: EmbeddingIndex) -> None:
    opened = EmbeddingIndex.open(index.folder)
    assert len(opened) == 50
    np.testing.assert_array_equal(opened.embeddings, Letters().encode(EXAMPLES).numpy())
    assert opened.examples([49, 0, 0]) == [EXAMPLES[49], EXAMPLES[0], EXAMPLES[0]]
    assert opened.examples([]) == []
    assert read_examples(index.folder / "texts.jsonl") == EXAMPLES
    assert json.loads((index.folder / "index.json").read_text())["versions"]["airrep"]
    numpy_reads = np.load(index.folder / "embeddings.npy", allow_pickle=False)
    np.testing.assert_array_equal(numpy_reads, opened.embeddings)


def test_odd_texts_come_back_as_they_were(tmp_path: Path) -> None:
    odd = [
        Example("half \ud800", "<script>alert(1)</script>\n\r\x00", "\u2028\U0001f600\x85", None),
        Example("b", "", "x", "t", {"proponents": ["a"], "deep": {"list": [1, None]}}),
    ]
    assert build(tmp_path / "index", examples=iter(odd)).examples([0, 1]) == odd


def test_search_ranks_like_an_attributor(index: EmbeddingIndex) -> None:
    targets = Letters().encode(make_examples(3)).numpy()
    ranking = index.search(targets, 4)
    scores = targets @ index.embeddings.T
    np.testing.assert_array_equal(ranking.helpful_rows, [top_rows(row, 4) for row in scores])
    np.testing.assert_array_equal(ranking.harmful_rows, [top_rows(-row, 4) for row in scores])
    np.testing.assert_allclose(
        ranking.harmful_scores, np.take_along_axis(scores, ranking.harmful_rows, 1), rtol=1e-5
    )


def test_more_than_the_pool_gives_the_whole_pool(index: EmbeddingIndex) -> None:
    ranking = index.search(np.ones((1, DIMENSION)), 1000)
    assert sorted(ranking.helpful_rows[0]) == list(range(50))
    np.testing.assert_array_equal(ranking.helpful_rows[0], ranking.harmful_rows[0][::-1])


def test_float16_halves_the_file_and_scores_what_is_stored(tmp_path: Path) -> None:
    index = build(tmp_path / "half", dtype="float16")
    assert index.embeddings.dtype == np.float16
    assert index.embeddings.nbytes == 50 * DIMENSION * 2
    assert_best(index.embeddings, np.eye(DIMENSION, dtype=np.float32), 7)
    # An index keeps its own type unless another is asked for.
    assert build(tmp_path / "half").embeddings.dtype == np.float16


def test_a_real_encoder_gives_its_own_embeddings(tmp_path: Path) -> None:
    encoder = AirRepEncoder.from_base(tiny_encoder(tmp_path / "base"))
    examples = [Example(word, f"what is {word}", word) for word in WORDS]
    index = build(tmp_path / "index", encoder, examples)
    np.testing.assert_array_equal(index.embeddings, encoder.encode(examples).numpy())


def test_building_again_encodes_nothing_and_changes_no_byte(index: EmbeddingIndex) -> None:
    before, encoder = files_of(index.folder), Letters()
    build(index.folder, encoder, source="moved.jsonl")
    assert encoder.encoded == 0
    assert files_of(index.folder) == before


# Killed and gone on


class Killed(Letters):
    """Kills its process, as kill -9 does, while it encodes the third block."""

    def encode(self, examples, batch_size=64):
        if self.encoded >= 32:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode(examples, batch_size)


def kill_while_building(folder: Path) -> None:
    process = FORK.Process(target=build, args=(folder, Killed()))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("torn", [0, 5])
def test_a_killed_build_goes_on_and_ends_with_the_same_bytes(tmp_path: Path, torn: int) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    build(whole)
    kill_while_building(killed)
    with (killed / "embeddings.npy").open("ab") as file:
        file.write(b"x" * torn * 10)  # a block that was being written
    with pytest.raises(InputError, match=r"not finished: 3[2-9] of 50 embeddings are written"):
        EmbeddingIndex.open(killed)
    encoder = Letters()
    build(killed, encoder)
    assert encoder.encoded == 18
    assert files_of(killed) == files_of(whole)


@pytest.mark.usefixtures("small_blocks")
def test_a_build_killed_among_the_texts_starts_again(tmp_path: Path) -> None:
    def dying():
        yield from EXAMPLES[:20]
        os.kill(os.getpid(), signal.SIGKILL)

    process = FORK.Process(target=build, args=(tmp_path / "killed", None, dying()))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    build(tmp_path / "whole")
    build(tmp_path / "killed")
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")


# Whose embeddings


def test_another_encoder_is_refused_with_both_sides(index: EmbeddingIndex) -> None:
    other = Letters()
    other.name_or_path = "digits"
    with pytest.raises(InputError) as caught:
        build(index.folder, other, fingerprint="b" * 64)
    message = str(caught.value)
    assert f"encoder is letters (sha256 {'a' * 12}) in the folder" in message
    assert f"digits (sha256 {'b' * 12}) now" in message
    assert "examples is" not in message
    with pytest.raises(InputError, match=f"digits \\(sha256 {'c' * 12}\\) now"):
        index.check_encoder("c" * 64, "digits")
    index.check_encoder("a" * 64, "letters, moved")


def test_other_examples_are_refused_with_both_sides(index: EmbeddingIndex) -> None:
    with pytest.raises(InputError) as caught:
        build(index.folder, examples=EXAMPLES[:40], source="new.jsonl")
    message = str(caught.value)
    assert "count is 50 in the folder, 40 now" in message
    assert "examples is pool.jsonl (sha256 " in message
    assert "new.jsonl (sha256 " in message
    changed = [*EXAMPLES[:-1], Example("id-49", "Ask 49?", "Say 49", "other task")]
    with pytest.raises(InputError, match="examples is pool.jsonl"):
        build(index.folder, examples=changed)


def test_another_dtype_is_refused(index: EmbeddingIndex) -> None:
    with pytest.raises(InputError, match="dtype is float32 in the folder, float16 now"):
        build(index.folder, dtype="float16")


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(InputError, match=r"holds other files \(first: results.json\); give a new"):
        build(tmp_path)
    assert files_of(tmp_path) == {"results.json": b"{}"}
    with pytest.raises(InputError, match="results.json is not a folder; give another"):
        build(tmp_path / "results.json")


# Wrong input


def test_wrong_input_is_named(index: EmbeddingIndex, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="dtype 'int8'; choose one of float32, float16"):
        build(tmp_path / "new", dtype="int8")
    with pytest.raises(InputError, match="no examples; give at least one"):
        build(tmp_path / "new", examples=[])
    with pytest.raises(InputError, match="k = 0; ask for at least one row"):
        index.search(np.ones((1, DIMENSION)), 0)
    for shape in ((1, 3), (0, DIMENSION), (DIMENSION,)):
        with pytest.raises(InputError, match=r"needs \(targets, 8\) with at least one target"):
            index.search(np.ones(shape), 1)
    with pytest.raises(InputError, match="not finite; check the encoder's weights"):
        index.search(np.full((1, DIMENSION), np.nan), 1)
    for row in (-1, 50):
        with pytest.raises(InputError, match=f"no row {row} in the index .*rows go from 0 to 49"):
            index.examples([0, row])


def test_embeddings_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="example 'id-0' is not finite as float16"):
        build(tmp_path / "half", Letters(scale=1e6), dtype="float16")
    with pytest.raises(InputError, match="example 'id-0' is not finite as float32"):
        build(tmp_path / "whole", Letters(scale=float("nan")))
    with pytest.raises(InputError, match="not finished: 0 of 50"):
        EmbeddingIndex.open(tmp_path / "whole")


# Damage


def test_a_folder_that_is_no_index_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is not an index \(it has no index.json\)"):
        EmbeddingIndex.open(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "index.json is damaged"),
        ("[]", "has format None, but this version reads 1"),
        ('{"format": 2}', "has format 2, but this version reads 1"),
        ('{"format": 1, "count": "many"}', "no usable 'count'"),
    ],
)
def test_a_damaged_index_json_is_named(index: EmbeddingIndex, content: str, message: str) -> None:
    (index.folder / "index.json").write_text(content)
    with pytest.raises(InputError, match=message):
        EmbeddingIndex.open(index.folder)


def test_damaged_files_are_named(index: EmbeddingIndex) -> None:
    whole = files_of(index.folder)
    cases = [
        ("embeddings.npy", whole["embeddings.npy"] + b"x", "too long"),
        ("embeddings.npy", b"x" + whole["embeddings.npy"], r"not a float32 array of shape \(50, 8"),
        ("embeddings.npy", b"", "not a float32 array"),
        ("embeddings.npy", None, "embeddings.npy is damaged"),
        ("texts.jsonl", whole["texts.jsonl"][:-1], "texts.jsonl is damaged"),
        ("texts.jsonl", b"", "texts of the index .* cannot be read"),
        ("texts.jsonl", None, "texts of the index .* cannot be read"),
        ("offsets.npy", whole["offsets.npy"][:-8], "texts of the index .* cannot be read"),
        ("offsets.npy", b"no array", "texts of the index .* cannot be read"),
    ]
    for name, content, message in cases:
        path = index.folder / name
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            EmbeddingIndex.open(index.folder)
        path.write_bytes(whole[name])
    np.save(index.folder / "offsets.npy", np.arange(4))
    with pytest.raises(InputError, match=r"\(4,\) offsets for 50 examples"):
        EmbeddingIndex.open(index.folder)


def test_a_damaged_text_is_named_when_it_is_read(index: EmbeddingIndex) -> None:
    path = index.folder / "texts.jsonl"
    path.write_bytes(b"x" + path.read_bytes()[1:])
    opened = EmbeddingIndex.open(index.folder)
    assert opened.examples([1]) == [EXAMPLES[1]]
    with pytest.raises(InputError, match="texts.jsonl is damaged \\(row 0"):
        opened.examples([0])


# Approximate search


@pytest.fixture
def with_lists(index: EmbeddingIndex) -> EmbeddingIndex:
    pytest.importorskip("faiss")
    index.build_lists()
    return index


def test_all_clusters_give_the_exact_answer(with_lists: EmbeddingIndex) -> None:
    targets = Letters().encode(make_examples(5)).numpy()
    exact = with_lists.search(targets, 6)
    near = with_lists.search_lists(targets, 6, probes=7)
    np.testing.assert_array_equal(near.helpful_rows, exact.helpful_rows)
    np.testing.assert_array_equal(near.harmful_rows, exact.harmful_rows)
    np.testing.assert_allclose(near.helpful_scores, exact.helpful_scores, rtol=1e-5)
    np.testing.assert_allclose(near.harmful_scores, exact.harmful_scores, rtol=1e-5)
    assert with_lists.recall(targets, 6, probes=7) == (1, 1)


def test_recall_counts_what_few_clusters_miss(with_lists: EmbeddingIndex) -> None:
    targets = Letters().encode(make_examples(20)).numpy()
    recalls = [with_lists.recall(targets, 10, probes) for probes in (1, 3, 7)]
    assert recalls == sorted(recalls)
    assert recalls[0] < recalls[-1] == (1, 1)
    exact, near = with_lists.search(targets, 10), with_lists.search_lists(targets, 10, 1)
    hits = [
        len(set(one) & set(other))
        for one, other in zip(exact.helpful_rows, near.helpful_rows, strict=True)
    ]
    assert recalls[0][0] == pytest.approx(np.sum(hits) / 200)
    # One cluster holds fewer than all 50 examples.
    few = with_lists.search_lists(targets[:1], 50, probes=1)
    assert few.helpful_rows[0, -1] == -1
    assert few.helpful_scores[0, -1] == 0


def test_lists_that_do_not_fit_are_refused(with_lists: EmbeddingIndex, tmp_path: Path) -> None:
    other = build(tmp_path / "other", examples=EXAMPLES[:9])
    targets = np.ones((1, DIMENSION))
    with pytest.raises(InputError, match="lists.faiss is missing or damaged; make it with"):
        other.search_lists(targets, 1)
    (other.folder / "lists.faiss").write_bytes((with_lists.folder / "lists.faiss").read_bytes())
    with pytest.raises(InputError, match="lists.faiss is of other embeddings"):
        other.search_lists(targets, 1)
    (other.folder / "lists.faiss").write_bytes(b"no lists")
    with pytest.raises(InputError, match="lists.faiss is missing or damaged"):
        other.search_lists(targets, 1)
    with pytest.raises(InputError, match="cannot be 10 lists of 9 embeddings"):
        other.build_lists(10)


def test_without_faiss_the_way_to_install_it_is_said(
    index: EmbeddingIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without_faiss(name, *arguments, **keywords):
        if name == "faiss":
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without_faiss)
    for use in (index.build_lists, lambda: index.search_lists(np.ones((1, DIMENSION)), 1)):
        with pytest.raises(InputError, match=r"needs faiss; run `pip install faiss-cpu`"):
            use()
