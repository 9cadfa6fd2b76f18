"""AirRep's encoder before training: the text and the response's words, no label needed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from airrep.attributor import NotApplicableError
from airrep.attributors.airrep import AirRepAttributor
from airrep.examples import Example, InputError

if TYPE_CHECKING:
    from airrep.encoder import AirRepEncoder

SAMPLE = 2_000  # pool examples that set the parts of text and words, and the scores' scale


class ResponseEmbeddingAttributor(AirRepAttributor):
    """score(x, z) = c e(x)·e(z) where training would start: e reads a text encoder's mean and the
    response's words, each normalised, and is centred on the pool (`airrep.train_start`).

    `encoder` is a folder or hub id of any text encoder, or an encoder made by
    `AirRepEncoder.from_base`, which stays as it is. `scale` c is the standard deviation of the
    scores of pool examples for each other, which attention pooling depends on.
    """

    name = "response_embedding"
    trained = learns = False

    def __init__(
        self,
        encoder: str | Path | AirRepEncoder,
        scale: float = 0.6,
        pooling: str = "attention",
        batch_size: int | None = None,
        device: str | None = None,
        show_progress: bool = False,
    ) -> None:
        super().__init__(encoder, pooling, batch_size, device, show_progress)
        self.scale = scale

    def _fit(self, pool: Sequence[Example]) -> None:
        from airrep.device import GPU_ENCODER_TOKENS, tokens_at_once
        from airrep.train_start import give_start
        from airrep.trunk import prepare_texts

        if not self.scale > 0:
            raise InputError(f"scale is {self.scale}; give a number above 0.")
        encoder = self._open_encoder()
        given = encoder is self.encoder
        self.encoder_ = self._place(copy.deepcopy(encoder) if given else encoder)
        rows = np.random.default_rng(0).permutation(len(pool))[:SAMPLE]
        some = [pool[row] for row in rows]
        if len({(one.prompt, one.response) for one in some}) < 2:
            raise NotApplicableError("response_embedding needs a pool of different examples.")
        if self.encoder_.words_projector is None:
            try:
                self.encoder_.add_response_words()
            except InputError as error:
                raise NotApplicableError(f"response_embedding: {error}") from error
        every = np.arange(len(some))
        chunk_tokens = tokens_at_once(self.encoder_.device, GPU_ENCODER_TOKENS)
        texts = prepare_texts(self.encoder_, self.encoder_.tokenize(some), 0, chunk_tokens)
        give_start(self.encoder_, lambda: texts.embed(every), len(some), every, scale=1.0)
        self.embeddings_ = self._embed(pool)

    def _score(self, targets: Sequence[Example]) -> np.ndarray:
        return self.scale * super()._score(targets)
