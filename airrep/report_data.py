"""What the report's explorer reads: packed blocks that the page unpacks when they are wanted."""

import base64
import gzip
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from airrep.attributor import POOLINGS, subset_scores_of, top_rows
from airrep.examples import Example
from airrep.label_store import Labels
from airrep.metrics import lds_per_target
from airrep.pooling import Membership, membership, pool_scores
from airrep.verdict import label

TARGETS_A_BLOCK = 50
EXAMPLES_A_BLOCK = 250
TEXT_LIMIT = 4_000  # characters of a prompt or response; a page of a few megabytes stays one


def pack(content: bytes) -> str:
    """Bytes as base64 of gzip, the same for the same bytes."""
    return base64.b64encode(gzip.compress(content, compresslevel=6, mtime=0)).decode("ascii")


def explorer_blocks(
    methods: Sequence[Mapping[str, Any]],
    pool: Sequence[Example],
    targets: Sequence[Example],
    labels: Labels,
    scores: Mapping[str, np.ndarray],
    per_target: int,
) -> dict[str, str]:
    """Packed JSON by name; every pool example that is shown stands in it once.

    - `index`: for all targets their texts, standard deviation of losses, LDS of the first method.
    - `targets-0`, `targets-1`, ...: losses, and by method the LDS, the subsets' scores and the
      `per_target` most helpful and most harmful examples with scores, `TARGETS_A_BLOCK` each.
    - `examples-0`, ...: the texts of the examples, in the order of their first use.
    """
    members = membership(labels.subsets, len(pool))
    losses = np.asarray(labels.losses, dtype=float)
    places: dict[int, int] = {}
    blocks: dict[str, list[Any]] = {}
    leads: list[float | None] = []
    for number, start in enumerate(range(0, len(targets), TARGETS_A_BLOCK)):
        rows = slice(start, start + TARGETS_A_BLOCK)
        views = [
            _views(method, scores, rows, members, losses[rows], per_target, places)
            for method in methods
        ]
        leads += [view["lds"] for view in views[0]]
        blocks[f"targets-{number}"] = [
            {"losses": _numbers(known), "views": list(by_method)}
            for known, by_method in zip(losses[rows], zip(*views, strict=True), strict=True)
        ]
    blocks["index"] = [
        {
            **_texts(target),
            "proponents": list(target.meta.get("proponents") or []),
            "lds": lead,
            "spread": _spread(known),
        }
        for target, known, lead in zip(targets, losses, leads, strict=True)
    ]
    shown = [_texts(pool[row]) for row in places]
    for number, start in enumerate(range(0, len(shown), EXAMPLES_A_BLOCK)):
        blocks[f"examples-{number}"] = shown[start : start + EXAMPLES_A_BLOCK]
    # Escaped, so that a lone surrogate is written as what it is.
    return {name: pack(json.dumps(block).encode("ascii")) for name, block in blocks.items()}


def explorer_settings(methods: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the page must know to read `explorer_blocks` of these methods."""
    return {
        "methods": [{"name": row["name"], "label": label(row["name"])} for row in methods],
        "targetsABlock": TARGETS_A_BLOCK,
        "examplesABlock": EXAMPLES_A_BLOCK,
    }


def _views(
    method: Mapping[str, Any],
    by_name: Mapping[str, np.ndarray],
    rows: slice,
    members: Membership,
    losses: np.ndarray,
    per_target: int,
    places: dict[int, int],
) -> list[dict[str, Any]]:
    scores = np.ascontiguousarray(by_name[method["name"]][rows], dtype=np.float32)
    pooled = (
        pool_scores(torch.from_numpy(scores), members, method["pooling"]).numpy()
        if method["pooling"] in POOLINGS
        else by_name[subset_scores_of(method["name"])][rows]
    )
    lds, _ = lds_per_target(pooled, losses)
    return [
        {
            "lds": _short(lds[row]),
            "predicted": _numbers(pooled[row]),
            "helpful": _ends(scores[row], top_rows(scores[row], per_target), places),
            "harmful": _ends(scores[row], top_rows(-scores[row], per_target), places),
        }
        for row in range(len(scores))
    ]


def _ends(
    scores: np.ndarray, rows: np.ndarray, places: dict[int, int]
) -> list[tuple[int, float | None]]:
    return [(places.setdefault(row, len(places)), _short(scores[row])) for row in rows.tolist()]


def _texts(example: Example) -> dict[str, Any]:
    return {
        "id": example.id,
        "task": example.task,
        "prompt": _cut(example.prompt),
        "response": _cut(example.response),
    }


def _cut(text: str) -> str:
    more = len(text) - TEXT_LIMIT
    return text if more <= 0 else f"{text[:TEXT_LIMIT]}… ({more:,} more characters)"


def _spread(losses: np.ndarray) -> float | None:
    known = losses[np.isfinite(losses)]
    return _short(known.std()) if len(known) else None


def _numbers(values: np.ndarray) -> list[float | None]:
    return [_short(value) for value in values]


def _short(value: float) -> float | None:
    return float(f"{value:.4g}") if np.isfinite(value) else None
