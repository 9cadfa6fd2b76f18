"""Texts ready for training: what frozen layers make of them is computed once and kept."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from airrep.encoder import HEADS, AirRepEncoder, evaluating
from airrep.examples import (
    InputError,
    TokenizedExample,
    lengths_of,
    response_mask,
    response_spans,
    token_chunks,
)

CUT_TOLERANCE = 1e-4  # of the largest number in an embedding
CHECKED_TEXTS = 4


class Texts(Protocol):
    """Texts by row, and their embeddings with the gradient of the layers that train."""

    lengths: np.ndarray  # (n,) tokens a row costs in `embed`
    layers: int  # how many layers keep activations for the gradient
    width: int  # numbers in an embedding

    def embed(self, rows: np.ndarray) -> torch.Tensor:
        """Embeddings (len(rows), d), in the encoder's present mode and gradient mode."""
        ...


def prepare_texts(
    encoder: AirRepEncoder,
    tokenized: Sequence[TokenizedExample],
    trainable_layers: int | None,
    chunk_tokens: int,
    show_progress: bool = False,
) -> Texts:
    """The texts for training the last `trainable_layers` layers (None: everything).

    Frozen layers run here, once, without dropout: their output is kept for every token, (tokens,
    d) float32 in main memory, or only its mean over tokens when no layer of the base trains.
    Raises InputError when the encoder cannot be cut between its layers.
    """
    if trainable_layers is None:
        return WholeTexts(encoder, tokenized)
    chunks = token_chunks(lengths_of(tokenized), chunk_tokens)
    bar = tqdm(chunks, desc="frozen layers", disable=not show_progress)
    with evaluating(encoder), torch.no_grad():
        if trainable_layers == 0:
            return PooledTexts(encoder, tokenized, bar)
        return CutTexts(encoder, tokenized, trainable_layers, bar)


def trainable_parameters(
    encoder: AirRepEncoder, trainable_layers: int | None
) -> dict[str, nn.Parameter]:
    """The parameters that train, by name; InputError for more layers than there are."""
    named = dict(encoder.named_parameters())
    if trainable_layers is None:
        return named
    wanted = {id(named[name]) for name in named if name.startswith(HEADS)}
    if trainable_layers > 0:
        for layer in _split_layers(encoder, trainable_layers)[1]:
            wanted |= {id(parameter) for parameter in layer.parameters()}
    return {name: parameter for name, parameter in named.items() if id(parameter) in wanted}


class _Tokens:
    """All texts' token ids on the encoder's device, where batches of them are padded."""

    def __init__(self, encoder: AirRepEncoder, tokenized: Sequence[TokenizedExample]) -> None:
        self.lengths, self._spans = lengths_of(tokenized), response_spans(tokenized)
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])
        self._pad_id = encoder.pad_id
        self._ids = torch.from_numpy(np.concatenate([text.ids for text in tokenized]))
        self._ids = self._ids.long().to(encoder.device)

    def pad(self, rows: np.ndarray) -> tuple[torch.Tensor, ...]:
        """Token ids, mask and response mask (B, L) as `AirRepEncoder.pad` makes them."""
        width = int(self.lengths[rows].max())
        mask = torch.from_numpy(np.arange(width) < self.lengths[rows][:, None])
        mask = mask.to(self._ids.device)
        ids = self._ids[self.places(rows, width).to(self._ids.device)]
        response = response_mask(self._spans[rows], width)
        return ids.masked_fill(~mask, self._pad_id), mask, response.to(self._ids.device)

    def places(self, rows: np.ndarray, width: int) -> torch.Tensor:
        """Where the tokens of these texts are among all (B, width); past a text's end its last
        token stands for padding."""
        steps = np.minimum(np.arange(width), self.lengths[rows][:, None] - 1)
        return torch.from_numpy(self.starts[rows][:, None] + steps)


class WholeTexts:
    """Every layer runs, and trains, in every step."""

    def __init__(self, encoder: AirRepEncoder, tokenized: Sequence[TokenizedExample]) -> None:
        self.encoder, self.tokens = encoder, _Tokens(encoder, tokenized)
        self.width = encoder.projector.out_features
        self.lengths = self.tokens.lengths
        self.layers = int(getattr(encoder.base.config, "num_hidden_layers", 12))

    def embed(self, rows: np.ndarray) -> torch.Tensor:
        return self.encoder(*self.tokens.pad(rows))


class PooledTexts:
    """Only what lies on top of the base runs: a step costs a product or two of (texts, d) and
    (d, d)."""

    layers = 1

    def __init__(
        self,
        encoder: AirRepEncoder,
        tokenized: Sequence[TokenizedExample],
        chunks: Sequence[np.ndarray],
    ) -> None:
        self.encoder = encoder
        self.width = encoder.projector.out_features
        self.lengths = np.ones(len(tokenized), dtype=np.int64)
        self.pooled = torch.empty(
            len(tokenized), encoder.projector.in_features, device=encoder.device
        )
        self.words: torch.Tensor | None = None
        if encoder.words_projector is not None:
            size = encoder.words_projector.in_features
            self.words = torch.empty(len(tokenized), size, device=encoder.device)
        for rows in chunks:
            places = torch.from_numpy(rows).to(encoder.device)
            pooled, words = encoder.pool_texts([tokenized[row] for row in rows])
            self.pooled[places] = pooled.float()
            if self.words is not None and words is not None:
                self.words[places] = words.float()

    def embed(self, rows: np.ndarray) -> torch.Tensor:
        places = torch.from_numpy(rows).to(self.pooled.device)
        precision = self.encoder.projector.weight.dtype
        words = None if self.words is None else self.words[places].to(precision)
        return self.encoder.project(self.pooled[places].to(precision), words)


class CutTexts:
    """The last layers run on what the frozen ones made of every token.

    The first frozen layer is made to return the kept states, the other frozen layers to hand
    them on, so masks, positions and final norms stay the architecture's own business.
    """

    def __init__(
        self,
        encoder: AirRepEncoder,
        tokenized: Sequence[TokenizedExample],
        trainable_layers: int,
        chunks: Sequence[np.ndarray],
    ) -> None:
        self.encoder, self.tokens = encoder, _Tokens(encoder, tokenized)
        self.width = encoder.projector.out_features
        self.lengths = self.tokens.lengths
        self.layers = trainable_layers
        self._frozen, self._trained = _split_layers(encoder, trainable_layers)
        self._as_tuple = False
        self.hidden = torch.empty(int(self.tokens.starts[-1]), encoder.projector.in_features)
        if not self._frozen:
            return
        for rows in chunks:
            ids, mask, _ = self.tokens.pad(rows)
            states = self._run_frozen(ids, mask).float().cpu()  # (B, L, d)
            places = self.tokens.places(rows, ids.shape[1])
            self.hidden[places[mask.cpu()]] = states[mask.cpu()]
        self._check_cut()

    def embed(self, rows: np.ndarray) -> torch.Tensor:
        ids, mask, response = self.tokens.pad(rows)
        if not self._frozen:
            return self.encoder(ids, mask, response)
        kept = self.hidden[self.tokens.places(rows, ids.shape[1])].to(ids.device)  # (B, L, d)

        def inject(*args: Any, **kwargs: Any) -> Any:
            return (kept,) if self._as_tuple else kept

        first, *others = self._frozen
        with _forwards({first: inject, **dict.fromkeys(others, self._hand_on)}):
            return self.encoder(ids, mask, response)

    def _run_frozen(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The states (B, L, d) that the first trained layer is given."""
        given: list[torch.Tensor] = []

        def record(*args: Any, **kwargs: Any) -> Any:
            given.append(_states(args, kwargs))
            return self._hand_on(*args, **kwargs)

        def see_form(module: nn.Module, args: Any, output: Any) -> None:
            self._as_tuple = isinstance(output, tuple)

        first, *others = self._trained
        hook = self._frozen[0].register_forward_hook(see_form)
        try:
            with _forwards({first: record, **dict.fromkeys(others, self._hand_on)}):
                self.encoder.pool(ids, mask)
        except (TypeError, ValueError, IndexError, AttributeError) as error:
            raise _cannot_cut(self.encoder, str(error)) from error
        finally:
            hook.remove()
        if len(given) != 1:
            raise _cannot_cut(self.encoder, "its layers do not run once each")
        return given[0]

    def _hand_on(self, *args: Any, **kwargs: Any) -> Any:
        states = _states(args, kwargs)
        return (states,) if self._as_tuple else states

    def _check_cut(self) -> None:
        """Raises InputError unless cut and whole encoder agree on a few of the texts."""
        by_length = np.argsort(self.lengths, kind="stable")
        picked = np.linspace(0, len(by_length) - 1, min(CHECKED_TEXTS, len(by_length)))
        rows = by_length[picked.astype(np.int64)]
        whole = self.encoder(*self.tokens.pad(rows))
        try:
            error = (self.embed(rows) - whole).abs().max() / whole.abs().max().clamp(min=1e-6)
        except (TypeError, ValueError, IndexError, AttributeError, RuntimeError) as failure:
            raise _cannot_cut(self.encoder, str(failure)) from failure
        if not error <= CUT_TOLERANCE:
            raise _cannot_cut(self.encoder, f"embeddings then differ by {float(error):.1e}")


@contextmanager
def _forwards(replacements: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Modules call the given functions in place of their own forward."""
    for module, function in replacements.items():
        module.forward = function
    try:
        yield
    finally:
        for module in replacements:
            del module.forward  # the class's own shows again


def _states(args: Sequence[Any], kwargs: dict[str, Any]) -> torch.Tensor:
    states = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(states, torch.Tensor):
        raise TypeError("a layer is not given hidden states first")
    return states


def _split_layers(
    encoder: AirRepEncoder, trainable_layers: int
) -> tuple[list[nn.Module], list[nn.Module]]:
    """The frozen layers and the last `trainable_layers`."""
    count = getattr(encoder.base.config, "num_hidden_layers", None)
    stacks = [
        part
        for part in encoder.base.modules()
        if isinstance(part, nn.ModuleList) and len(part) == count
    ]
    if len(stacks) != 1:
        raise _cannot_cut(encoder, f"it has {len(stacks)} lists of {count} layers")
    layers = list(stacks[0])
    if not 0 <= trainable_layers <= len(layers):
        raise InputError(
            f"trainable_layers is {trainable_layers}, but the encoder has {len(layers)} layers; "
            f"give 0 to {len(layers)}, or leave it out to train everything."
        )
    cut = len(layers) - trainable_layers
    return layers[:cut], layers[cut:]


def _cannot_cut(encoder: AirRepEncoder, reason: str) -> InputError:
    return InputError(
        f"The layers of {type(encoder.base).__name__} cannot be frozen in part ({reason}); leave "
        "trainable_layers out to train everything, or set it to 0 to train only what is on top."
    )
