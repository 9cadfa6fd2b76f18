"""Influence through the language model's last layer, for pools whose responses repeat."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

import numpy as np
import torch

from airrep.attributor import NotApplicableError, pack_text, unpack_text
from airrep.attributors.language_model import LanguageModelAttributor
from airrep.examples import Example, InputError, pad
from airrep.gradients.linear_head import LinearHead, fit_linear_head
from airrep.gradients.linear_influence import HeadInfluence
from airrep.gradients.per_example import autocast

MAX_WEIGHTS = 10_000  # a Hessian of 0.8 GB


@dataclass(eq=False, repr=False)
class InfluenceAttributor(LanguageModelAttributor):
    """score(x, z) = g(x)^T H^-1 g(z): the nats that x's loss rises by when z is left out.

    For pools that are like classification: the same few responses come again and again. Each
    distinct response is a class. Features are the language model's last hidden states at the
    token before the response, so they depend on the prompt alone; they are centred and projected
    on the pool's first `dimensions` principal components, of size about 1. On them a softmax head
    with ridge `l2` is fitted to the end (losses summed over the pool), and g and H are its exact
    gradients and Hessian; the language model itself is frozen. A target whose response the pool
    does not have scores 0 everywhere.

    Raises NotApplicableError when all responses are the same, and when there are so many that
    the head has more than 10,000 weights.
    """

    name = "influence"

    _: KW_ONLY
    dimensions: int = 64
    l2: float = 1.0

    def _fit(self, pool: Sequence[Example]) -> None:
        self.classes_ = sorted({_response(one) for one in pool})
        self._check_size(len(self.classes_))
        labels = self._labels(pool)
        self.fingerprint_ = self._open().fingerprint
        hidden = self._hidden(pool)
        self.centre_ = hidden.mean(axis=0)
        _, sizes, directions = np.linalg.svd(hidden - self.centre_, full_matrices=False)
        # What is smaller is the rounding of the model's own arithmetic.
        kept = min(self.dimensions, int((sizes > 1e-5 * np.linalg.norm(hidden)).sum()))
        if kept == 0:
            raise NotApplicableError(
                f"{self.name} needs different prompts, but the language model's states in front of "
                "the responses are all the same; leave the method out."
            )
        size = np.sqrt((sizes[:kept] ** 2).sum() / (len(pool) * kept))
        self.components_ = directions[:kept] / size
        features = self._project(hidden)
        self._prepare(fit_linear_head(features, labels, self.l2).weights, features, labels)

    def _score(self, targets: Sequence[Example]) -> np.ndarray:
        features, labels, known = self._targets(targets)
        gradients = self.influence_.head.gradients(features, labels) * known[:, None]
        return self.influence_.loss_changes(gradients, self._pool_residuals())

    def _pool_residuals(self) -> np.ndarray:
        return self.influence_.residuals

    def _targets(self, targets: Sequence[Example]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Features (T, d), labels (T,) and whether the pool has that response (T,)."""
        self._check_same(self._open(), self.fingerprint_)
        labels = self._labels(targets)
        return self._project(self._hidden(targets)), labels.clip(min=0), labels >= 0

    def _labels(self, examples: Sequence[Example]) -> np.ndarray:
        """The number of each response (n,), -1 for one that the pool does not have."""
        numbers = {name: number for number, name in enumerate(self.classes_)}
        return np.asarray([numbers.get(_response(one), -1) for one in examples])

    def _project(self, hidden: np.ndarray) -> np.ndarray:
        """Features (n, d) with a column of ones for the intercept."""
        features = (hidden - self.centre_) @ self.components_.T
        return np.column_stack([features, np.ones(len(features))])

    @torch.inference_mode()
    def _hidden(self, examples: Sequence[Example]) -> np.ndarray:
        """The last hidden state (n, D) at each prompt's last token, float64."""
        opened = self._open()
        model: Any = opened.model
        device = next(model.parameters()).device
        tokens = self._tokenize(examples, opened.tokenizer)
        for example, one in zip(examples, tokens, strict=True):
            if one.response_start == 0:
                raise InputError(
                    f"Example {example.id!r} has no token in front of its response; give it a "
                    "prompt, or a template with text there."
                )
        prompts = [replace(one, ids=one.ids[: one.response_start]) for one in tokens]
        states = np.empty((len(prompts), model.config.hidden_size))
        for rows in self._batches(prompts, "hidden states"):
            batch = [prompts[row] for row in rows]
            last = torch.tensor([len(one) - 1 for one in batch], device=device)
            # Padding on the right needs no attention mask: no real token sees it.
            ids = pad(batch, pad_id=0)[0].to(device)
            with autocast(device, self.precision):
                hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            chosen = hidden[torch.arange(len(batch), device=device), last]
            states[rows] = chosen.float().cpu().numpy()
        return states

    def _check_size(self, classes: int) -> None:
        if self.dimensions < 1:
            raise InputError(
                f"{self.name} got dimensions = {self.dimensions}; give at least one dimension."
            )
        if classes < 2:
            raise NotApplicableError(
                f"{self.name} needs a pool with different responses, but all of them are the same; "
                "leave the method out."
            )
        weights = classes * (self.dimensions + 1)
        if weights > MAX_WEIGHTS:
            raise NotApplicableError(
                f"{self.name} is for pools with few distinct responses: {classes:,} of them with "
                f"{self.dimensions} dimensions make {weights:,} weights, more than "
                f"{MAX_WEIGHTS:,}; lower dimensions or leave the method out."
            )

    def _prepare(self, weights: np.ndarray, features: np.ndarray, labels: np.ndarray) -> None:
        self.labels_ = labels
        head = LinearHead(weights, len(self.classes_), self.l2)
        self.influence_ = HeadInfluence(head, features, labels)

    def _state(self) -> dict[str, np.ndarray]:
        return {
            "classes": pack_text(self.classes_),
            "lm": pack_text([self.fingerprint_]),
            "labels": self.labels_,
            "features": self.influence_.features,
            "weights": self.influence_.head.weights,
            "centre": self.centre_,
            "components": self.components_,
        }

    def _restore(self, state: dict[str, np.ndarray]) -> None:
        self.classes_ = unpack_text(state["classes"])
        self.fingerprint_ = unpack_text(state["lm"])[0]
        self.centre_, self.components_ = state["centre"], state["components"]
        self._prepare(state["weights"], state["features"], state["labels"])


def _response(example: Example) -> str:
    return example.response.strip()
