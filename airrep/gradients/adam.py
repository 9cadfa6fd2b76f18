"""Gradients as Adam would step along them (LESS, arXiv 2402.04333)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from airrep.examples import InputError, TokenizedExample
from airrep.gradients.layer_gradient import BLOCK, LayerGradient, add_up
from airrep.gradients.per_example import GradientModel, Projections
from airrep.weights import MOMENTS_FILE

BETAS = (0.9, 0.999)
EPSILON = 1e-8


@dataclass(frozen=True)
class AdamMoments:
    """Adam's running means of a weight's gradient and of its square (d_out, d_in).

    `steps` is how many updates they are of; None: so many that they need no correction.
    """

    mean: torch.Tensor
    square: torch.Tensor
    steps: int | None = None

    def step_along(self, gradients: torch.Tensor) -> torch.Tensor:
        """The update (B, d_out, d_in) that each gradient would be, without the learning rate."""
        beta1, beta2 = BETAS
        mean = beta1 * self.mean + (1 - beta1) * gradients
        square = beta2 * self.square + (1 - beta2) * gradients.square()
        if self.steps is not None:
            mean = mean / (1 - beta1 ** (self.steps + 1))
            square = square / (1 - beta2 ** (self.steps + 1))
        return mean / (square.sqrt() + EPSILON)


class AdamFeatures:
    """Features of gradients as steps of Adam, projected by layer."""

    def __init__(self, moments: Mapping[str, AdamMoments], projections: Projections) -> None:
        self.moments, self.projections = moments, projections

    def __call__(self, layers: Mapping[str, LayerGradient]) -> torch.Tensor:
        """Features (B, d), from gradients that are not projected."""
        return torch.cat(
            [
                torch.cat([self._project(name, part) for part in layer.blocks(BLOCK)])
                for name, layer in layers.items()
            ],
            dim=1,
        )

    def _project(self, name: str, layer: LayerGradient) -> torch.Tensor:
        steps = self.moments[name].step_along(layer.full())
        if name in self.projections:
            p_out, p_in = self.projections[name]
            steps = p_out.T @ steps @ p_in
        return steps.flatten(1)


def saved_moments(folder: Path, layers: Mapping[str, nn.Module]) -> dict[str, AdamMoments] | None:
    """The moments of the layers' weights in a checkpoint's `MOMENTS_FILE`; None without it.

    The file holds what `airrep.checkpoint.optimizer_tensors` makes of an AdamW optimiser and the
    model's named parameters. Raises InputError when it is damaged or lacks a layer.
    """
    path = folder / MOMENTS_FILE
    if not path.is_file():
        return None
    try:
        tensors = load_file(path)
        return {name: _moments(tensors, name, layer) for name, layer in layers.items()}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read ({error}); save the optimiser again.") from error
    except KeyError as error:
        raise InputError(
            f"{path} has no entry {error}; save the optimiser's state of every layer that is "
            "chosen, or remove the file."
        ) from None


def pool_moments(
    model: GradientModel, batches: Iterable[Sequence[TokenizedExample]]
) -> dict[str, AdamMoments]:
    """Moments as after many steps over these examples: the mean 0, the square the mean of G^2."""
    squares: dict[str, torch.Tensor] = {}
    count = 0
    for batch in batches:
        count += len(batch)
        for name, layer in model.backward(batch).layers.items():
            found = add_up(part.full().square().sum(0) for part in layer.blocks(BLOCK))
            squares[name] = squares[name] + found if name in squares else found
    return {
        name: AdamMoments(torch.zeros_like(total), total / count) for name, total in squares.items()
    }


def _moments(tensors: Mapping[str, torch.Tensor], name: str, layer: nn.Module) -> AdamMoments:
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)

    def entry(kind: str) -> torch.Tensor:
        return tensors[f"optimizer/{kind}/{name}.weight"].to(weight.device)

    mean, square = entry("exp_avg"), entry("exp_avg_sq")
    if isinstance(layer, Conv1D):
        mean, square = mean.T, square.T
    return AdamMoments(mean, square, int(entry("step")))
