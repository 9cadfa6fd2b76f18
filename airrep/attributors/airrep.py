"""AirRep: dot products of learned embeddings, pooled by attention inside a subset."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from airrep.attributor import Attributor
from airrep.examples import Example

if TYPE_CHECKING:
    from airrep.encoder import AirRepEncoder


class AirRepAttributor(Attributor):
    """score(x, z) = e(x)·e(z) with a trained encoder e (arXiv 2505.18513).

    `encoder` is a folder or hub id of an AirRep encoder, or the encoder itself. Embeddings of the
    pool are kept as float32 (pool, d).
    """

    name = "airrep"
    learns = True
    trained = True  # else `encoder` is a text encoder as it comes

    def __init__(
        self,
        encoder: str | Path | AirRepEncoder,
        pooling: str = "attention",
        batch_size: int | None = None,
        device: str | None = None,
        show_progress: bool = False,
    ) -> None:
        self.encoder = encoder
        self.pooling = pooling
        self.batch_size = batch_size
        self.device = device
        self.show_progress = show_progress

    def _fit(self, pool: Sequence[Example]) -> None:
        self.encoder_ = self._place(self._open_encoder())
        self.embeddings_ = self._embed(pool)

    def _score(self, targets: Sequence[Example]) -> np.ndarray:
        return self._embed(targets) @ self.embeddings_.T

    def _open_encoder(self) -> AirRepEncoder:
        """The encoder from its folder or hub id; itself where it was given."""
        from airrep.encoder import AirRepEncoder

        if not isinstance(self.encoder, str | Path):
            return self.encoder
        load = AirRepEncoder.from_pretrained if self.trained else AirRepEncoder.from_base
        return load(str(self.encoder))

    def _embed(self, examples: Sequence[Example]) -> np.ndarray:
        """Embeddings (n, d) float32."""
        embeddings = self.encoder_.encode(
            examples, batch_size=self.batch_size, show_progress=self.show_progress
        )
        return embeddings.numpy().astype(np.float32, copy=False)

    def _place(self, encoder: AirRepEncoder) -> AirRepEncoder:
        if self.device is not None:
            encoder.to(self.device)  # type: ignore[arg-type]
        return encoder

    def _state(self) -> dict[str, np.ndarray]:
        return {"embeddings": self.embeddings_}

    def _restore(self, state: dict[str, np.ndarray]) -> None:
        self.embeddings_ = state["embeddings"]

    def _saved_params(self) -> dict[str, Any]:
        # The encoder travels in the folder; the device belongs to the machine that loads it.
        params = self.params() | {"encoder": "encoder"}
        del params["device"]
        return params

    def _save_parts(self, folder: Path) -> None:
        self.encoder_.save_pretrained(str(folder / "encoder"))

    def _load_parts(self, folder: Path) -> None:
        from airrep.encoder import AirRepEncoder

        # Kept as the argument too, so that fitting again needs no other way of opening it.
        self.encoder = AirRepEncoder.from_pretrained(str(folder / "encoder"))
        self.encoder_ = self._place(self.encoder)
