"""Gradients as Adam would step along them (LESS, arXiv 2402.04333)."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
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
CACHED = 2**20  # numbers held at once on a CPU: few enough for its cache


@dataclass(frozen=True)
class AdamMoments:
    """Adam's running means of a weight's gradient and of its square (d_out, d_in).

    `steps` is how many updates they are of; None: so many that they need no correction.
    """

    mean: torch.Tensor
    square: torch.Tensor
    steps: int | None = None

    def output_slices(self, step: int) -> Iterator["AdamMoments"]:
        """The moments of `step` rows of the weight at a time, in their order."""
        for mean, square in zip(self.mean.split(step), self.square.split(step), strict=True):
            yield AdamMoments(mean, square, self.steps)

    def step_along(self, gradients: torch.Tensor) -> torch.Tensor:
        """The update (B, d_out, d_in) that each gradient would be, without the learning rate."""
        beta1, beta2 = BETAS
        to_mean = to_square = 1.0
        if self.steps is not None:
            to_mean /= 1 - beta1 ** (self.steps + 1)
            to_square /= 1 - beta2 ** (self.steps + 1)
        # Bound by memory: one tensor each, changed in place.
        square = torch.addcmul(
            self.square * (beta2 * to_square), gradients, gradients, value=(1 - beta2) * to_square
        )
        mean = torch.add(self.mean * (beta1 * to_mean), gradients, alpha=(1 - beta1) * to_mean)
        return mean.div_(square.sqrt_().add_(EPSILON))


class AdamFeatures:
    """Features of gradients as steps of Adam, projected by layer."""

    def __init__(self, moments: Mapping[str, AdamMoments], projections: Projections) -> None:
        self.moments, self.projections = moments, projections

    def __call__(self, layers: Mapping[str, LayerGradient]) -> torch.Tensor:
        """Features (B, d), from gradients that are not projected."""
        found = [self._project(name, layer).flatten(1) for name, layer in layers.items()]
        return torch.cat(found, dim=1)

    def _project(self, name: str, layer: LayerGradient) -> torch.Tensor:
        size, _, d_in = layer.inputs.shape
        numbers = CACHED if layer.inputs.device.type == "cpu" else BLOCK
        step = max(1, numbers // (size * d_in))
        slices = zip(layer.output_slices(step), self.moments[name].output_slices(step), strict=True)
        steps = (moments.step_along(part.full()) for part, moments in slices)
        if name not in self.projections:
            return torch.cat(list(steps), dim=1)
        p_out, p_in = self.projections[name]
        rows = zip(p_out.split(step), steps, strict=True)
        return add_up(part.T @ (one @ p_in) for part, one in rows)


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
