"""What the lexical methods share: what a word is, and how a sparse matrix is stored."""

import numpy as np
from scipy import sparse

# One-letter words count: a digit is often the whole answer.
WORD_PATTERN = r"(?u)\b\w+\b"


def matrix_state(matrix: sparse.csr_array) -> dict[str, np.ndarray]:
    """A sparse matrix as the arrays of a saved state."""
    return {
        "data": matrix.data,
        "indices": matrix.indices,
        "indptr": matrix.indptr,
        "shape": np.asarray(matrix.shape, dtype=np.int64),
    }


def restore_matrix(state: dict[str, np.ndarray]) -> sparse.csr_array:
    """The matrix `matrix_state` took apart."""
    rows, columns = state["shape"].tolist()
    return sparse.csr_array(
        (state["data"], state["indices"], state["indptr"]), shape=(rows, columns)
    )
