"""The untrained start of AirRep: cosine similarity of a text encoder's embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from airrep.attributors.airrep import AirRepAttributor
from airrep.examples import Example

if TYPE_CHECKING:
    from airrep.encoder import AirRepEncoder


class EmbeddingAttributor(AirRepAttributor):
    """score(x, z) = cosine of the mean-pooled embeddings of an encoder nobody trained for this.

    `encoder` is a folder or hub id of any text encoder, or an encoder made by
    `AirRepEncoder.from_base`.
    """

    name = "embedding"
    trained = learns = False

    def __init__(
        self,
        encoder: str | Path | AirRepEncoder,
        pooling: str = "sum",
        batch_size: int | None = None,
        device: str | None = None,
        show_progress: bool = False,
    ) -> None:
        super().__init__(encoder, pooling, batch_size, device, show_progress)

    def _embed(self, examples: Sequence[Example]) -> np.ndarray:
        embeddings = super()._embed(examples)
        norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
        return embeddings / np.maximum(norms, np.finfo(np.float32).tiny)
