"""Batches of examples for a causal LM, and where in them response tokens are predicted.

One batch can serve several models at once ("stacked", see data_builders/stacked.py): each has as
many rows as the others, one model's after the other's. Rows hold one example each, or several
one after the other ("packed").
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch

from airrep.examples import TokenizedExample

NOBODY = -1  # the example of a padding token


@dataclass(frozen=True)
class ResponseBatch:
    """Examples as tensors, for K models of B rows of L tokens each.

    ids (K B, L); `texts` (K B, L): the number of each token's example, -1 for padding; `offsets`
    (K B, L): its place in that example; `places` (K, R): where, in the flattened (K B L) tokens,
    a response token is predicted; `tokens` (K, R): that token; `rows` (K, R): the number of its
    example. A model with fewer response tokens than another has -1 in `rows` and places past the
    end. `packed`: some row holds more than one example.
    """

    ids: torch.Tensor
    texts: torch.Tensor
    offsets: torch.Tensor
    places: torch.Tensor
    tokens: torch.Tensor
    rows: torch.Tensor
    packed: bool

    def to(self, device: torch.device) -> "ResponseBatch":
        """The batch on a device; nothing waits until a GPU has it."""

        def moved(part: torch.Tensor) -> torch.Tensor:
            part = part.pin_memory() if device.type == "cuda" else part
            return part.to(device, non_blocking=True)

        return ResponseBatch(
            moved(self.ids),
            moved(self.texts),
            moved(self.offsets),
            moved(self.places),
            moved(self.tokens),
            moved(self.rows),
            self.packed,
        )

    def repeat(self, models: int) -> "ResponseBatch":
        """The same examples for each of several models, from a batch for one."""
        size = self.ids.numel()
        shift = torch.arange(models, device=self.ids.device)[:, None] * size
        return replace(
            self,
            ids=self.ids.repeat(models, 1),
            texts=self.texts.repeat(models, 1),
            offsets=self.offsets.repeat(models, 1),
            places=self.places + shift,
            tokens=self.tokens.repeat(models, 1),
            rows=self.rows.repeat(models, 1),
        )

    def attention(self) -> torch.Tensor:
        """What to add to attention scores (K B, 1, L, L): a token sees its own example's past."""
        same = (self.texts[:, :, None] == self.texts[:, None, :]).tril()
        lowest = torch.finfo(torch.float32).min
        return torch.zeros(same.shape, device=same.device).masked_fill(~same, lowest)[:, None]


def response_batch(
    groups: Sequence[Sequence[TokenizedExample]], width: int | None = None
) -> ResponseBatch:
    """A batch for as many models as there are groups of examples, numbered through all groups.

    Without a width each example has a row, padded on the right. With one, rows of at most that
    many tokens (the longest example's, if that is more) hold as many examples as fit.
    """
    examples = [example for group in groups for example in group]
    lengths = np.asarray([len(example) for example in examples])
    starts = np.cumsum([0, *map(len, groups)]).tolist()
    layout = []
    for start, end in pairwise(starts):
        if width is None:
            layout.append([[number] for number in range(start, end)])
        else:
            rows = fill_rows(lengths[start:end], max(width, int(lengths.max())))
            layout.append([[number + start for number in row] for row in rows])
    return _lay_out(examples, layout)


def fill_rows(lengths: np.ndarray, width: int) -> list[list[int]]:
    """Numbers of the texts of these lengths (n,) in rows of at most `width` tokens.

    First fit, longest first: at most 11/9 of the fewest rows possible, and one.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for number in np.argsort(-lengths, kind="stable"):
        length = lengths[number]
        row = next((row for row, free in enumerate(room) if free >= length), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(width)
        rows[row].append(int(number))
        room[row] -= length
    return rows


def _lay_out(
    examples: Sequence[TokenizedExample], layout: Sequence[Sequence[Sequence[int]]]
) -> ResponseBatch:
    """The batch of `layout[model][row]`: the numbers of the examples in that row.

    The token at position i is predicted from position i - 1. A response that starts the text
    has no position to be predicted from for its first token, so that token does not count.
    """
    height = max(len(rows) for rows in layout)
    width = max(sum(len(examples[n]) for n in row) for rows in layout for row in rows)
    ids = np.zeros((len(layout) * height, width), dtype=np.int64)
    texts = np.full(ids.shape, NOBODY)
    offsets = np.zeros(ids.shape, dtype=np.int64)
    places: list[list[np.ndarray]] = [[] for _ in layout]
    tokens: list[list[np.ndarray]] = [[] for _ in layout]
    numbers: list[list[np.ndarray]] = [[] for _ in layout]
    for model, rows in enumerate(layout):
        for line, row in enumerate(rows, start=model * height):
            start = 0
            for number in row:
                example = examples[number]
                end = start + len(example)
                ids[line, start:end] = example.ids
                texts[line, start:end] = number
                offsets[line, start:end] = np.arange(len(example))
                first = max(example.response_start, 1)
                places[model].append(line * width + np.arange(start + first - 1, end - 1))
                tokens[model].append(np.asarray(example.ids[first:], dtype=np.int64))
                numbers[model].append(np.full(len(example) - first, number))
                start = end
    return ResponseBatch(
        torch.from_numpy(ids),
        torch.from_numpy(texts),
        torch.from_numpy(offsets),
        _rectangle(places, ids.size),
        _rectangle(tokens, 0),
        _rectangle(numbers, NOBODY),
        packed=any(len(row) > 1 for rows in layout for row in rows),
    )


def _rectangle(parts: Sequence[Sequence[np.ndarray]], filler: int) -> torch.Tensor:
    """Each model's parts one after the other (K, R), filled up at the end."""
    lines = [np.concatenate([*part, np.empty(0, dtype=np.int64)]) for part in parts]
    full = np.full((len(lines), max(map(len, lines))), filler, dtype=np.int64)
    for line, values in zip(full, lines, strict=True):
        line[: len(values)] = values
    return torch.from_numpy(full)
