"""Where training starts: the response words' part in the scores, and the scores' scale."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from airrep.encoder import AirRepEncoder
from airrep.examples import InputError

WORDS_PART = 2.0  # spread of the words' scores to that of the text's, at the start
ROUNDING = 1e-7  # of a squared length; rounding spreads the scores of equal texts by some 1e-8


def give_start(
    encoder: AirRepEncoder,
    embed: Callable[[], torch.Tensor],
    pool_size: int,
    targets: np.ndarray,
    scale: float | None,
) -> None:
    """Gives new response words (all zeros) their part, and the scores their scale, in place.

    `embed` gives the encoder's embeddings (texts, d), pool first; `targets` are the rows whose
    scores count. New words get, turned into directions of their own, `WORDS_PART` times the spread
    of scores that the text has: measured, benchmarks/README.md. Then, for a `scale`, embeddings
    are centred on the pool's mean and scores get that standard deviation: a text encoder's
    embeddings share a large common part, and their products are of any size; attention pooling
    weighs by |score|, so it starts far off where both are left. Raises InputError for texts that
    are all alike, and scores that are not finite.
    """
    words = encoder.words_projector
    new = words is not None and not words.weight.any()
    if not new and scale is None:
        return
    with torch.no_grad():
        embeddings = embed()
        if words is not None and new:
            # A fixed turn: products of words with words stay, those with texts are small.
            turn = torch.empty(words.weight.shape, device="cpu")
            nn.init.orthogonal_(turn, generator=torch.Generator().manual_seed(0))
            words.weight.copy_(turn)
            with _silenced(encoder.projector):
                added = embed()
            spread = _spread(added, pool_size, targets)
            part = WORDS_PART * _spread(embeddings, pool_size, targets)
            factor = (part / spread) ** 0.5 if spread > 0 else 1.0
            words.weight.mul_(factor)
            embeddings = embeddings + factor * added
        if scale is None:
            return
        spread = _spread(embeddings, pool_size, targets)
        if spread == 0:
            raise InputError(
                "All texts look the same to the encoder before training; check that its "
                "tokenizer knows the examples' words, and that the examples differ."
            )
        if not 0 < spread < float("inf"):
            raise InputError(
                f"The encoder's scores spread by {spread} before training; its weights are damaged."
            )
        factor = (scale / spread) ** 0.5
        bias = encoder.projector.bias
        bias.sub_(embeddings[:pool_size].mean(dim=0).to(bias)).mul_(factor)
        encoder.projector.weight.mul_(factor)
        if words is not None:
            words.weight.mul_(factor)


def _spread(embeddings: torch.Tensor, pool_size: int, targets: np.ndarray) -> float:
    """Standard deviation of the scores of embeddings (texts, d) centred on the pool's mean; 0
    where they differ by rounding alone."""
    centred = embeddings - embeddings[:pool_size].mean(dim=0)
    rows = torch.from_numpy(targets).to(centred.device)
    spread = float((centred[rows] @ centred[:pool_size].T).std())
    return 0.0 if spread < ROUNDING * float(embeddings.square().sum(dim=1).mean()) else spread


@contextmanager
def _silenced(layer: nn.Linear) -> Iterator[None]:
    """The layer gives nothing but zeros inside."""
    weights = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    for parameter in layer.parameters():
        parameter.zero_()
    try:
        yield
    finally:
        layer.load_state_dict(weights)
