"""Localized multiple kernel learning: which likeness counts, and how much, for each target."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse
from tqdm.auto import tqdm

from airrep.attributor import Attributor, NotApplicableError
from airrep.attributors.airrep import AirRepAttributor
from airrep.attributors.kernel_texts import (
    GATE_SPREAD,
    PlacedTexts,
    ReadTexts,
    Space,
    mean_and_deviation,
    text_key,
)
from airrep.attributors.members import Member, WithMembers
from airrep.attributors.words import matrix_state, restore_matrix
from airrep.examples import (
    Example,
    InputError,
    TokenizedExample,
    common_start,
    response_spans,
)

if TYPE_CHECKING:
    import torch

    from airrep.encoder import AirRepEncoder
    from airrep.holdout import TrainingLabels

# Of a response's tokens: parts that are the same or not, beside the whole response.
PARTS = (slice(1), slice(2), slice(-1, None))
# Tokens of a prompt's opening that are all the same or not, behind those that all prompts open
# with: instructions of one kind open alike. The third also goes with what the response shares.
OPENINGS = (1, 2, 4, 8)
KERNELS = 30
PRODUCTS_AT_ONCE = 2**24  # of a target and a pool example: bounds the memory of scoring
LABELS_AT_ONCE = 2**28  # numbers (kernels, targets, subsets) that training holds: 1 GiB


class KernelsAttributor(WithMembers, AirRepAttributor):
    """score(x, z) = sum_h w_h(x) k_h(x, z): kernels k_h with weights that depend on the target
    (localized multiple kernel learning, Gönen and Alpaydin, ICML 2008).

    The kernels: cosines of a text encoder's mean over tokens (t) and of the response's words (r),
    both standardised on the pool, to the powers 1, 3 and 9; the cosine of TF-IDF weights of the
    response's tokens, to the powers 1 and 3; 1 where the response, its first token, its first two
    or its last are the same; t and t³ where the first token is the same, t where the response is;
    max(t, 0) r, max(t, 0) r³ and max(t, 0)³ r³; 1 where the prompt's first 1, 2, 4 or 8 tokens are
    the same, behind those that the whole pool opens with; and where 4 are, 1 where the first token
    or the whole response is the same too, and r. Five of them (t, r, TF-IDF, the response and its
    first token the same) come again times the length of z's response: the logarithm of its number
    of tokens, standardised on the pool. A member's scores s add s and s |s|.

    Scores of a subset add up. The weights of a target are linear in its first `components`
    principal components of t and of r, those of the pool, and in the lengths of its text and of
    its response. They are learned from `labels` by the correlation objective plus `penalty` times
    the sum of the squares of what depends on the target; the best step on what the labels'
    settings hold out is taken. The encoder does not train, and nothing else has weights:
    30 (3 + 2 components) of them without members.

    `encoder` is a folder or hub id of a text encoder, or one made by `AirRepEncoder.from_base`,
    which stays as it is. `labels` are of the pool that is fitted; a method from `load` has none,
    and keeps its weights for whichever pool it is fitted to. `members` are unfitted attributors
    that have not learned from labels, names of methods, or pairs (name, parameters).
    """

    name = "kernels"
    trained = False
    poolings = ("sum",)
    # Of the last fit, to fit again: its encoder and the means; its pool and members.
    _means: tuple[Any, dict[bytes, torch.Tensor]] | None = None
    _fitted: list[Any] | None = None

    def __init__(
        self,
        encoder: str | Path | AirRepEncoder,
        labels: TrainingLabels | None = None,
        members: Sequence[Member] = (),
        components: int = 10,
        penalty: float = 0.01,
        device: str | None = None,
        show_progress: bool = False,
    ) -> None:
        super().__init__(encoder, "sum", None, device, show_progress)
        self.labels = labels
        self.members = members
        self.components = components
        self.penalty = penalty

    def _fit(self, pool: Sequence[Example]) -> None:
        from airrep.holdout import check_labels

        if self.labels is None and not hasattr(self, "weights_"):
            raise InputError("kernels learns from labels; give it the labels of this pool.")
        if self.components < 0 or not self.penalty >= 0:
            raise InputError(
                f"kernels got components {self.components} and penalty {self.penalty}; give at "
                "least 0."
            )
        if self.labels is not None:
            check_labels(pool, self.labels.targets, self.labels.labels, None)
        made = self._make_members()
        learned = [member.name for member in made if member.learns]
        if learned:
            raise InputError(
                f"kernels cannot have the member {learned[0]!r}, which has seen the labels that "
                "the weights are learned from; put both into an ensemble."
            )
        encoder = self._open_encoder()
        self.encoder_ = self._place(copy.deepcopy(encoder) if encoder is self.encoder else encoder)
        if self._means is None or self._means[0] != self.encoder:
            self._means = self.encoder, {}
        if self.encoder_.means is None:
            self.encoder_.means = self._means[1]
        if self.encoder_.words_projector is None:
            try:
                self.encoder_.add_response_words(with_marks=False)
            except InputError as error:
                raise NotApplicableError(f"kernels: {error}") from error
        self._fit_members(made, pool)
        tokenized = self.encoder_.tokenize(pool)
        if self.labels is None:
            self.pool_ = self._place_texts(self._read(pool, tokenized))
            return
        self.opening_ = common_start([text.ids for text in tokenized])
        read = self._read(pool, tokenized)
        self.text_ = Space.of(read.text, self.components)
        self.words_ = Space.of(read.words, self.components)
        self.lengths_ = np.stack(mean_and_deviation(read.lengths))
        holders = np.bincount(read.tokens.indices, minlength=read.tokens.shape[1])
        self.rarity_ = np.log((len(pool) + 1) / (holders + 1)).astype(np.float32)
        self.pool_ = self._place_texts(read)
        self._learn(self.labels)

    def _fit_members(self, made: Sequence[Attributor], pool: Sequence[Example]) -> None:
        """Sets `members_`; those of the last fit, to which a pool's gradients may have gone, where
        nothing about them has changed."""
        wanted = [list(pool), [(member.name, member.params()) for member in made]]
        try:
            known = self._fitted == wanted
        except ValueError:  # arrays, of other scores
            known = False
        if not known:
            self.members_ = [member.fit(pool) for member in made]
            self._fitted = wanted

    def _learn(self, given: TrainingLabels) -> None:
        """Sets the weights (kernels, 3 + 2 components)."""
        from airrep.attributors.kernel_weights import learn_weights
        from airrep.holdout import training_labels

        labels, settings = given.labels, given.settings
        split, values, _ = training_labels(labels, settings)
        rows = split.train_targets
        kernels = KERNELS + 2 * len(self.members_)
        most = max(1, LABELS_AT_ONCE // (kernels * len(labels.subsets)))
        if len(rows) > most:  # the weights are few: a sample tells them as well
            chosen = np.sort(np.random.default_rng(settings.seed).permutation(len(rows))[:most])
            rows, values = rows[chosen], values[chosen]

        def inputs(targets: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            examples = [given.targets[row] for row in targets]
            return self._sums(examples, [labels.subsets[column] for column in columns])

        held = None
        if len(split.held_subsets):
            losses = labels.losses[np.ix_(split.held_targets, split.held_subsets)]
            held = (*inputs(split.held_targets, split.held_subsets), losses)
        trained = (*inputs(rows, split.train_subsets), values)
        self.weights_ = learn_weights(trained, held, self.penalty)

    def _sums(
        self, targets: Sequence[Example], subsets: Sequence[np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """What weights depend on (T, 3 + 2 components), and every kernel's sums over the subsets,
        less their mean (kernels, T, subsets)."""
        rows = np.concatenate(subsets)
        columns = np.repeat(np.arange(len(subsets)), [len(subset) for subset in subsets])
        ones = np.ones(len(rows), dtype=np.float32)
        shape = (len(self.pool_.text), len(subsets))
        members = sparse.csr_array((ones, (rows, columns)), shape=shape).T.tocsr()
        gates, sums = [], []
        for some, scores in self._blocks(targets):
            gates.append(some.gates)
            sums.append(np.stack([(members @ one.T).T for one in self._kernels(some, scores)]))
        joined = np.concatenate(sums, axis=1)
        centred = joined - joined.mean(axis=2, keepdims=True)
        # Rounding is no difference between subsets.
        centred[np.abs(centred) <= 1e-6 * np.abs(joined).max(axis=2, keepdims=True)] = 0
        return np.concatenate(gates), centred

    def _score(self, targets: Sequence[Example]) -> np.ndarray:
        blocks = []
        for some, scores in self._blocks(targets):
            weights = some.gates @ self.weights_.T
            block = np.zeros((len(some.text), len(self.pool_.text)), dtype=np.float32)
            for number, kernel in enumerate(self._kernels(some, scores)):
                block += weights[:, number : number + 1] * kernel
            blocks.append(block)
        return np.concatenate(blocks)

    def _blocks(self, targets: Sequence[Example]) -> Iterator[tuple[PlacedTexts, list[np.ndarray]]]:
        """Targets as `_kernels` takes them, with the members' scores, few enough at once."""
        texts = self._place_texts(self._read(targets, self.encoder_.tokenize(targets)))
        size = max(1, PRODUCTS_AT_ONCE // len(self.pool_.text))
        for start in range(0, len(targets), size):
            block = slice(start, start + size)
            yield texts.part(block), [member.score(targets[block]) for member in self.members_]

    def _kernels(self, targets: PlacedTexts, scores: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        """Every kernel (T, N) float32, in an order that stays."""
        pool = self.pool_
        text, words = targets.text @ pool.text.T, targets.words @ pool.words.T
        text3, words3 = text * text * text, words * words * words
        yield from (text, text3, text3 * text3 * text3)
        yield from (words, words3, words3 * words3 * words3)
        tokens = (targets.tokens @ pool.tokens.T).toarray()
        yield from (tokens, tokens * tokens * tokens)
        response, first, second, last, *openings = (
            (targets.keys[:, [column]] == keys).astype(np.float32)
            for column, keys in enumerate(pool.keys.T)
        )
        yield from (response, first, second, last)
        yield from (response * text, first * text, first * text3)
        near, near3 = np.maximum(text, 0), np.maximum(text3, 0)
        yield from (near * words, near * words3, near3 * words3)
        yield from openings
        yield from (openings[2] * first, openings[2] * response, openings[2] * words)
        for one in (text, words, tokens, response, first):
            yield one * pool.lengths[:, 1]
        for one in scores:
            yield from (one, one * np.abs(one))

    def _read(
        self, examples: Sequence[Example], tokenized: Sequence[TokenizedExample]
    ) -> ReadTexts:
        """The encoder's means, the responses' tokens, and hashes."""
        import torch

        from airrep.device import GPU_ENCODER_TOKENS, tokens_at_once
        from airrep.encoder import evaluating
        from airrep.examples import lengths_of, token_chunks
        from airrep.trunk import PooledTexts

        encoder = self.encoder_
        at_once = tokens_at_once(encoder.device, GPU_ENCODER_TOKENS)
        chunks = token_chunks(lengths_of(tokenized), at_once)
        bar = tqdm(chunks, desc="encode", disable=not self.show_progress)
        with evaluating(encoder), torch.no_grad():
            texts = PooledTexts(encoder, tokenized, bar)
        assert texts.words is not None
        responses = [
            text.ids[start:end]
            for text, (start, end) in zip(tokenized, response_spans(tokenized), strict=True)
        ]
        keys = [
            [
                text_key(example.response.strip().encode()),
                *(text_key(ids[part].astype(np.int64).tobytes()) for part in PARTS),
                *(
                    text_key(text.ids[: self.opening_ + size].astype(np.int64).tobytes())
                    for size in OPENINGS
                ),
            ]
            for example, text, ids in zip(examples, tokenized, responses, strict=True)
        ]
        kinds = [np.unique(ids) for ids in responses]
        ends = np.cumsum([0, *map(len, kinds)])
        vocabulary = encoder.base.get_input_embeddings().num_embeddings
        ones = np.ones(ends[-1], dtype=np.float32)
        indices = np.concatenate(kinds).astype(np.int64)
        tokens = sparse.csr_array((ones, indices, ends), shape=(len(examples), vocabulary))
        lengths = [
            (len(text.ids), len(ids)) for text, ids in zip(tokenized, responses, strict=True)
        ]
        return ReadTexts(
            texts.pooled.cpu().numpy(),
            texts.words.cpu().numpy(),
            tokens,
            np.asarray(keys),
            np.log1p(np.asarray(lengths, dtype=np.float32)),
        )

    def _place_texts(self, read: ReadTexts) -> PlacedTexts:
        """What the kernels take of texts."""
        tokens = read.tokens * self.rarity_[None]
        lengths = np.sqrt(np.asarray(tokens.multiply(tokens).sum(axis=1)))
        tokens = sparse.csr_array(tokens.multiply(1 / np.maximum(lengths, 1e-9)[:, None]))
        text, text_gates = self.text_.place(read.text)
        words, words_gates = self.words_.place(read.words)
        mean, deviation = self.lengths_
        lengths = GATE_SPREAD * (read.lengths - mean) / deviation
        ones = np.ones((len(text), 1), dtype=np.float32)
        gates = np.concatenate([ones, text_gates, words_gates, lengths], axis=1)
        return PlacedTexts(text, words, tokens, read.keys, lengths, gates)

    def _state(self) -> dict[str, np.ndarray]:
        pool = self.pool_
        state = {
            "weights": self.weights_,
            "rarity": self.rarity_,
            "opening": np.asarray([self.opening_]),
            "lengths": self.lengths_,
            "pool/text": pool.text,
            "pool/words": pool.words,
            "pool/keys": pool.keys,
            "pool/lengths": pool.lengths,
        }
        state |= {f"pool/tokens/{key}": value for key, value in matrix_state(pool.tokens).items()}
        for name, space in (("text", self.text_), ("words", self.words_)):
            state |= {f"{name}/{key}": value for key, value in vars(space).items()}
        return state | self._members_state()

    def _restore(self, state: dict[str, np.ndarray]) -> None:
        def under(prefix: str) -> dict[str, np.ndarray]:
            found = {key: value for key, value in state.items() if key.startswith(prefix)}
            return {key.removeprefix(prefix): value for key, value in found.items()}

        self.weights_, self.rarity_ = state["weights"], state["rarity"]
        self.lengths_ = state["lengths"]
        self.opening_ = int(state["opening"][0])
        self.text_, self.words_ = Space(**under("text/")), Space(**under("words/"))
        kept = {name: state[f"pool/{name}"] for name in ("text", "words", "keys", "lengths")}
        none = np.empty((len(kept["text"]), 0), dtype=np.float32)
        tokens = restore_matrix(under("pool/tokens/"))
        self.pool_ = PlacedTexts(tokens=tokens, gates=none, **kept)
        self._restore_members(state, len(none))

    def _saved_params(self) -> dict[str, Any]:
        # What was learned from the labels is in the state.
        return super()._saved_params() | {"labels": None}
