"""BM25: word overlap weighted by how rare a word is in the pool."""

from collections import Counter
from collections.abc import Sequence
from types import ModuleType

import numpy as np
from scipy import sparse

from airrep.attributor import Attributor, NotApplicableError, pack_text, unpack_text
from airrep.attributors.words import WORD_PATTERN, matrix_state, restore_matrix
from airrep.examples import Example, encoder_text


class BM25Attributor(Attributor):
    """BM25 of the pool example's text for the words of the target's text (Lucene variant).

    Needs `bm25s` (`pip install bm25s`).
    """

    name = "bm25"

    def __init__(self, k1: float = 1.5, b: float = 0.75, pooling: str = "sum") -> None:
        self.k1 = k1
        self.b = b
        self.pooling = pooling

    def _fit(self, pool: Sequence[Example]) -> None:
        index = _bm25s().BM25(k1=self.k1, b=self.b, method="lucene")
        index.index(_words(pool), show_progress=False)
        # bm25s appends an empty word to its vocabulary; it has no column in the matrix. Its order
        # is a set's, another in every process, and sums of floats depend on it.
        words = sorted(word for word in index.vocab_dict if word)
        if not words:
            raise NotApplicableError("bm25 found no words in the pool; its examples have no text.")
        self.vocabulary_ = {word: row for row, word in enumerate(words)}
        stored = index.scores
        by_word = sparse.csr_array(  # the columns of (pool, words) are the rows of (words, pool)
            (stored["data"], stored["indices"], stored["indptr"]),
            shape=(len(stored["indptr"]) - 1, len(pool)),
        )
        self.weights_ = by_word[[index.vocab_dict[word] for word in words]]

    def _score(self, targets: Sequence[Example]) -> np.ndarray:
        rows, columns, counts = [], [], []
        for row, words in enumerate(_words(targets)):
            for word, count in Counter(words).items():
                if word in self.vocabulary_:
                    rows.append(row)
                    columns.append(self.vocabulary_[word])
                    counts.append(count)
        queries = sparse.csr_array(
            (np.asarray(counts, dtype=np.float32), (rows, columns)),
            shape=(len(targets), len(self.vocabulary_)),
        )
        return (queries @ self.weights_).toarray()

    def _state(self) -> dict[str, np.ndarray]:
        return {"words": pack_text(list(self.vocabulary_)), **matrix_state(self.weights_)}

    def _restore(self, state: dict[str, np.ndarray]) -> None:
        self.vocabulary_ = {word: row for row, word in enumerate(unpack_text(state["words"]))}
        self.weights_ = restore_matrix(state)


def _words(examples: Sequence[Example]) -> list[list[str]]:
    return _bm25s().tokenize(
        [encoder_text(example) for example in examples],
        token_pattern=WORD_PATTERN,
        stopwords=None,
        return_ids=False,
        show_progress=False,
    )


def _bm25s() -> ModuleType:
    try:
        import bm25s
    except ImportError:
        raise NotApplicableError("bm25 needs bm25s; run `pip install bm25s`.") from None
    return bm25s
