"""EK-FAC: influence with the Fisher matrix in Kronecker-factored eigenbases."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, fields

import numpy as np
import torch

from airrep.attributor import pack_text, unpack_text
from airrep.attributors.gradient import Arrays, GradientAttributor, Tokens
from airrep.attributors.language_model import OpenedLM, restore_tokens, tokens_state
from airrep.choices import check_choice
from airrep.examples import Example, InputError
from airrep.gradients.ekfac import (
    BLOCK,
    DrawnLabels,
    Factors,
    LayerCurvature,
    fit_curvature,
    leading_factors,
    products,
)
from airrep.gradients.layer_gradient import add_up
from airrep.gradients.layers import linear_layers
from airrep.gradients.per_example import GradientModel

FISHERS = ("true", "empirical")


@dataclass(eq=False, repr=False)
class EKFACAttributor(GradientAttributor):
    """score(x, z) = sum over layers of <(F + lambda I)^-1 g(x), g(z)> (arXiv 2308.03296).

    g is the gradient of the loss summed over the response's tokens. F is the Fisher matrix of
    each layer by itself, over `sample` examples of the pool (None: all), in EK-FAC's form: `fisher`
    "true" with labels drawn from the model (by `seed`; batches of another size draw others),
    "empirical" with the pool's own. lambda is `damping` times the layer's mean eigenvalue.

    Fitting is two passes over those, and no gradient is stored: scoring is a pass over the pool for
    each lot of targets whose preconditioned gradients fit into `memory_gb`. `target_rank` keeps
    only that many singular directions of these in every layer, so that a pass serves more targets
    (there "query batching", with 32); None keeps them whole.
    """

    name = "ekfac"

    _: KW_ONLY
    fisher: str = "true"
    sample: int | None = None
    damping: float = 0.1
    target_rank: int | None = None
    memory_gb: float = 2.0
    seed: int = 0

    @property
    def fits_late(self) -> bool:
        return True

    def _fit(self, pool: Sequence[Example]) -> None:
        self._check_settings()
        opened = self._open()
        self.fingerprint_ = opened.fingerprint
        self.tokens_ = self._tokenize(pool, opened.tokenizer)
        with self._fisher_model(opened) as model:
            self.curvature_ = fit_curvature(
                model, lambda what: self._sample(self.tokens_, self.sample, what)
            )

    def _score(self, targets: Sequence[Example]) -> np.ndarray:
        opened = self._open()
        self._check_same(opened, self.fingerprint_)
        tokenized = self._tokenize(targets, opened.tokenizer)
        scores = np.empty((len(targets), len(self.tokens_)), dtype=np.float32)
        lot = self._targets_a_pass()
        with self._gradient_model(opened) as model:
            for start in range(0, len(targets), lot):
                rows, factors = self._preconditioned(model, tokenized[start : start + lot])
                for columns in self._batches(self.tokens_, "pool gradients"):
                    layers = model.backward([self.tokens_[row] for row in columns]).layers
                    found = add_up(products(factors[name], layers[name]) for name in layers)
                    scores[np.ix_(start + rows, columns)] = found.cpu().numpy()
        return scores

    def _preconditioned(
        self, model: GradientModel, targets: Tokens
    ) -> tuple[np.ndarray, dict[str, Factors]]:
        """Which target (T,) each row is of, and preconditioned gradients by layer."""
        curvature = {name: one.to(model.device) for name, one in self.curvature_.items()}
        parts: dict[str, list[Factors]] = {name: [] for name in curvature}
        order = []
        for rows in self._batches(targets, "target gradients"):
            order.append(rows)
            for name, gradient in model.backward([targets[row] for row in rows]).layers.items():
                for some in gradient.blocks(BLOCK):
                    parts[name].append(
                        self._factors(curvature[name].precondition(some, self.damping))
                    )
        together = {
            name: tuple(map(torch.cat, zip(*parts.pop(name), strict=True))) for name in curvature
        }
        return np.concatenate(order), together

    def _factors(self, matrices: torch.Tensor) -> Factors:
        if self.target_rank is None:
            return (matrices,)
        return leading_factors(matrices, self.target_rank, self.seed)

    def _targets_a_pass(self) -> int:
        """How many targets' preconditioned gradients fit into the memory given, in float32."""
        numbers = 0
        for curvature in self.curvature_.values():
            d_out, d_in = curvature.eigenvalues.shape
            rank = self.target_rank
            numbers += d_out * d_in if rank is None else rank * (d_out + d_in)
        return max(1, int(self.memory_gb * 2**30 / (4 * numbers)))

    def _fisher_model(self, opened: OpenedLM) -> GradientModel:
        if self.fisher == "empirical":
            return self._gradient_model(opened)
        layers = linear_layers(opened.model, self.layers)
        return DrawnLabels(opened.model, layers, precision=self.precision, seed=self.seed)

    def _check_settings(self) -> None:
        check_choice("fisher", self.fisher, FISHERS)
        if self.damping <= 0:
            raise InputError(
                f"damping is {self.damping}; give a share of the mean eigenvalue above 0."
            )
        if self.target_rank is not None and self.target_rank < 1:
            raise InputError(f"target_rank is {self.target_rank}; give at least 1, or none.")
        if self.memory_gb <= 0:
            raise InputError(f"memory_gb is {self.memory_gb}; give more than 0.")

    # Saving

    def _state(self) -> Arrays:
        state = {"lm": pack_text([self.fingerprint_]), **tokens_state(self.tokens_)}
        for name, curvature in self.curvature_.items():
            for part in fields(curvature):
                state[f"{part.name}/{name}"] = getattr(curvature, part.name).cpu().numpy()
        return state

    def _restore(self, state: Arrays) -> None:
        self.fingerprint_ = unpack_text(state["lm"])[0]
        self.tokens_ = restore_tokens(state)
        names = [key.partition("/")[2] for key in state if key.startswith("eigenvalues/")]
        self.curvature_ = {
            name: LayerCurvature(
                **{
                    part.name: torch.from_numpy(state[f"{part.name}/{name}"])
                    for part in fields(LayerCurvature)
                }
            )
            for name in names
        }
