"""TF-IDF: cosine similarity of word counts weighted by rarity."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from airrep.attributor import Attributor, NotApplicableError, pack_text, unpack_text
from airrep.attributors.words import WORD_PATTERN, matrix_state, restore_matrix
from airrep.examples import Example, encoder_text


class TfidfAttributor(Attributor):
    """Cosine of TF-IDF vectors whose vocabulary and rarities come from the pool.

    Needs scikit-learn (`pip install scikit-learn`).
    """

    name = "tfidf"

    def __init__(self, sublinear_tf: bool = False, pooling: str = "sum") -> None:
        self.sublinear_tf = sublinear_tf
        self.pooling = pooling

    def _fit(self, pool: Sequence[Example]) -> None:
        self.vectorizer_ = self._vectorizer()
        try:
            self.vectors_ = self.vectorizer_.fit_transform(map(self._text, pool)).tocsr()
        except ValueError as error:  # scikit-learn's "empty vocabulary"
            raise NotApplicableError(
                f"{self.name} found no words in the pool to compare."
            ) from error

    def _score(self, targets: Sequence[Example]) -> np.ndarray:
        return (self.vectorizer_.transform(map(self._text, targets)) @ self.vectors_.T).toarray()

    def _text(self, example: Example) -> str:
        """What is read of an example."""
        return encoder_text(example)

    def _state(self) -> dict[str, np.ndarray]:
        return {
            "words": pack_text(self.vectorizer_.get_feature_names_out().tolist()),
            "idf": self.vectorizer_.idf_,
            **matrix_state(self.vectors_),
        }

    def _restore(self, state: dict[str, np.ndarray]) -> None:
        self.vectorizer_ = self._vectorizer(vocabulary=unpack_text(state["words"]))
        self.vectorizer_.idf_ = state["idf"]
        self.vectors_ = restore_matrix(state)

    def _vectorizer(self, vocabulary: list[str] | None = None) -> Any:
        try:
            from sklearn.feature_extraction.text import TfidfVectorizer
        except ImportError:
            raise NotApplicableError(
                f"{self.name} needs scikit-learn; run `pip install scikit-learn`."
            ) from None
        return TfidfVectorizer(
            token_pattern=WORD_PATTERN,
            sublinear_tf=self.sublinear_tf,
            dtype=np.float32,
            vocabulary=vocabulary,
        )
