"""`airrep explore`: a local page that shows what helps and harms a target, known or just typed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from airrep.attributor import Attributor, Ranking
from airrep.device import pick_device
from airrep.examples import Example, InputError
from airrep.explore_server import HOST, make_server
from airrep.fitted import check_source, fitted
from airrep.index import EmbeddingIndex
from airrep.reading import iter_examples, parse_columns, read_examples
from airrep.verdict import label
from airrep.weights import fingerprint_weights, resolve_model

if TYPE_CHECKING:
    from airrep.encoder import AirRepEncoder

SHOWN = 120  # characters of a target's prompt in the list


def build_index(
    encoder: str,
    examples: str,
    output: str,
    batch_size: int | None = None,
    dtype: str | None = None,
    device: str = "auto",
    columns: str | None = None,
) -> None:
    """Writes the folder `output`: embeddings and texts of a pool, for `explore`. Prints where.

    Goes on where an earlier call was stopped. `dtype` "float16" halves the file of embeddings.
    """
    model, fingerprint = _open_encoder(encoder, pick_device(device))
    index = _build(output, model, fingerprint, examples, batch_size, columns, dtype)
    print(f"{output}: {len(index):,} embeddings of {index.embeddings.shape[1]} numbers")


def explore(
    encoder: str | None = None,
    index: str | None = None,
    examples: str | None = None,
    targets: str | None = None,
    top_k: int = 10,
    port: int = 8000,
    batch_size: int | None = None,
    device: str = "auto",
    columns: str | None = None,
    method: str | None = None,
) -> None:
    """Serves a page over an index on this machine only, until Ctrl-C.

    `index` is the folder that `build_index` wrote; it is made from `examples` when it is not
    there. Without it the index of `examples` lasts as long as the page. In place of `encoder` a
    `method` that `fit` saved can answer, of `examples`. `targets` are listed in the page; any
    other target can be typed there.
    """
    from airrep.report import explorer_page

    if top_k < 1:
        raise InputError(f"explore got top_k = {top_k}; ask for at least one example.")
    check_source(encoder, method)
    if method is not None and (index is not None or examples is None):
        raise InputError("A method answers without --index; give --examples, its pool.")
    if index is None and examples is None:
        raise InputError("explore needs --index (a folder) or --examples (the pool); give one.")
    listed = [] if targets is None else read_examples(targets, parse_columns(columns))
    with TemporaryDirectory() as passing:
        if method is not None:
            pool = read_examples(str(examples), parse_columns(columns))
            saved = fitted(None, method, pool, batch_size, device)
            explorer = method_explorer(saved, pool, listed, top_k)
        else:
            model, fingerprint = _open_encoder(str(encoder), pick_device(device))
            if examples is not None:
                folder = passing if index is None else index
                opened = _build(folder, model, fingerprint, examples, batch_size, columns)
            else:
                opened = EmbeddingIndex.open(str(index))
                opened.check_encoder(fingerprint, str(encoder))
            explorer = index_explorer(opened, model, listed, top_k)
        page = explorer_page(f"{explorer.pool_size:,} training examples")
        with make_server(explorer, page, port) as server:
            print(f"http://{HOST}:{server.server_port}/ (Ctrl-C ends it)", flush=True)
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                print()


def method_explorer(
    saved: Attributor, pool: Sequence[Example], listed: Sequence[Example], top_k: int
) -> Explorer:
    """Answers by a fitted method, of its pool; `top_k` examples at either end."""

    def rank(target: Example) -> Ranking:
        return saved.rank([target], top_k)

    return Explorer(rank, lambda rows: [pool[row] for row in rows], len(pool), listed, saved.name)


def index_explorer(
    index: EmbeddingIndex, model: AirRepEncoder, listed: Sequence[Example], top_k: int
) -> Explorer:
    """Answers by an index, with the encoder that made it; `top_k` examples at either end."""

    def rank(target: Example) -> Ranking:
        return index.search(model.encode([target]).numpy(), top_k)

    return Explorer(rank, index.examples, len(index), listed)


class Explorer:
    """Answers of the page: the examples at either end that `rank` gives for a target.

    `examples` gives the examples of rows of its ranking, of a pool of `pool_size`; `targets` are
    listed in the page; `method` is the name of what ranks.
    """

    def __init__(
        self,
        rank: Callable[[Example], Ranking],
        examples: Callable[[np.ndarray], list[Example]],
        pool_size: int,
        targets: Sequence[Example],
        method: str = "airrep",
    ) -> None:
        self.rank = rank
        self.examples = examples
        self.pool_size = pool_size
        self.targets = targets
        self.method = method
        self._lock = threading.Lock()

    def list_targets(self) -> dict[str, Any]:
        """The targets given at the start, with the beginnings of their prompts."""
        return {
            "targets": [
                {
                    "row": row,
                    "id": target.id,
                    "task": target.task,
                    "text": target.prompt[:SHOWN],
                    "loss": None,
                }
                for row, target in enumerate(self.targets)
            ]
        }

    def answer(self, target: Example) -> dict[str, Any]:
        """What helps and harms a target most; raises InputError for an empty response."""
        # One at a time: the models' modes are shared, and so are the processors.
        with self._lock:
            ranking = self.rank(target)
        ends = {
            "helpful": self._found(ranking.helpful_rows[0], ranking.helpful_scores[0]),
            "harmful": self._found(ranking.harmful_rows[0], ranking.harmful_scores[0]),
        }
        return {
            "target": _shown(target) | {"loss": None},
            "methods": [{"name": self.method, "label": label(self.method)} | ends],
        }

    def _found(self, rows: np.ndarray, scores: np.ndarray) -> list[dict[str, Any]]:
        examples = self.examples(rows)
        return [
            _shown(example) | {"score": float(score)}
            for example, score in zip(examples, scores, strict=True)
        ]


def _shown(example: Example) -> dict[str, Any]:
    return {
        "id": example.id,
        "task": example.task,
        "prompt": example.prompt,
        "response": example.response,
    }


def _open_encoder(source: str, device: str) -> tuple[AirRepEncoder, str]:
    """The encoder on its device, and the fingerprint of its weights."""
    from airrep.encoder import AirRepEncoder

    folder = resolve_model(source)
    model = AirRepEncoder.from_pretrained(folder)
    model.to(device)  # type: ignore[arg-type]
    return model, fingerprint_weights(folder)


def _build(
    folder: str | Path,
    model: AirRepEncoder,
    fingerprint: str,
    examples: str,
    batch_size: int | None,
    columns: str | None,
    dtype: str | None = None,
) -> EmbeddingIndex:
    return EmbeddingIndex.build(
        folder,
        model,
        iter_examples(examples, parse_columns(columns)),
        fingerprint=fingerprint,
        source=examples,
        dtype=dtype,
        batch_size=batch_size,
        show_progress=True,
    )
