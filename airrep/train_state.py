"""The moving parts of a training run: weights, optimiser, running mean, best step, history."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from airrep.checkpoint import (
    Checkpoint,
    group_tensors,
    named_tensors,
    optimizer_tensors,
    restore_optimizer,
)
from airrep.encoder import HEADS
from airrep.train_settings import TrainSettings

SCALE_EPSILON = 1e-4  # a gradient far below this is rounding, of an objective blind to scale


class TrainState:
    """Everything a checkpoint holds. `step` counts updates done."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], settings: TrainSettings) -> None:
        self.parameters = dict(parameters)
        self.settings = settings
        self._heads = _heads(self.parameters) if settings.scale_learning_rate else {}
        # Logarithms of the factors by which the coming step scales the heads; 0 between steps.
        self._scales = {
            f"scale/{head}": nn.Parameter(torch.zeros((), device=members[0].device))
            for head, members in self._heads.items()
        }
        self.optimizer = _adamw(self.parameters, settings, list(self._scales.values()))
        self.step = 0
        self.best_step = 0
        self.best_lds: float | None = None
        self.history: list[dict[str, Any]] = []
        self.best = self._copy()
        self.average = self._copy() if settings.average is not None else None

    def update(self) -> float:
        """One step of the optimiser along the gradients; returns their norm before clipping."""
        self._derive_scales()
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.clip_norm)
        self.step += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * group["share"]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._apply_scales()
        self._average_weights()
        return float(norm)

    @property
    def learning_rate(self) -> float:
        """The rate of update number `step`: linear warm-up, then constant."""
        warmed = min(1.0, self.step / max(1, self.settings.warmup_steps))
        return self.settings.learning_rate * warmed

    def judge(self, lds: float | None) -> None:
        """Keeps the present weights as the best when their held-out LDS is, or there is none."""
        if lds is None or self.best_lds is None or lds > self.best_lds:
            self.best_step, self.best_lds = self.step, lds
            self.best = self._copy(self.average)

    def exhausted(self) -> bool:
        """Whether the last step is reached, or patience is lost."""
        if self.step >= self.settings.max_steps:
            return True
        waited = (self.step - self.best_step) // self.settings.evaluate_every
        return self.best_lds is not None and waited >= self.settings.patience

    @contextmanager
    def judged_weights(self) -> Iterator[None]:
        """Inside, the encoder has the weights that count: their running mean if one is kept."""
        if self.average is None:
            yield
            return
        present = self._copy()
        self.load(self.average)
        try:
            yield
        finally:
            self.load(present)

    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Puts weights, by name, into the encoder."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(weights[name])

    def checkpoint(self, fingerprint: Mapping[str, Any]) -> Checkpoint:
        tensors = named_tensors("weights", self.parameters) | named_tensors("best", self.best)
        tensors |= optimizer_tensors(self.optimizer, self.parameters | self._scales)
        if self.average is not None:
            tensors |= named_tensors("average", self.average)
        state = {
            "best_step": self.best_step,
            "best_lds": self.best_lds,
            "history": self.history,
            "fingerprint": dict(fingerprint),
        }
        return Checkpoint(self.step, state, tensors)

    def restore(self, checkpoint: Checkpoint) -> None:
        self.step = checkpoint.step
        self.best_step = checkpoint.state["best_step"]
        self.best_lds = checkpoint.state["best_lds"]
        self.history = checkpoint.state["history"]
        self.load(group_tensors("weights", checkpoint.tensors))
        self.best = self._copy(group_tensors("best", checkpoint.tensors))
        if self.average is not None:
            self.average = self._copy(group_tensors("average", checkpoint.tensors))
        restore_optimizer(self.optimizer, self.parameters | self._scales, checkpoint.tensors)

    def _derive_scales(self) -> None:
        """Gradients by the scales: a head is linear in its weights, so they need no pass."""
        for scale, members in zip(self._scales.values(), self._heads.values(), strict=True):
            parts = [
                (one.grad.float() * one.detach().float()).sum()
                for one in members
                if one.grad is not None
            ]
            scale.grad = torch.stack(parts).sum()

    @torch.no_grad()
    def _apply_scales(self) -> None:
        for scale, members in zip(self._scales.values(), self._heads.values(), strict=True):
            for parameter in members:
                parameter.mul_(scale.exp())
            scale.zero_()

    def _average_weights(self) -> None:
        if self.average is None or self.settings.average is None:
            return
        # Early steps weigh more, or the mean would long remember the untrained weights.
        decay = min(self.settings.average, (1 + self.step) / (10 + self.step))
        for name, parameter in self.parameters.items():
            self.average[name].lerp_(parameter.detach(), 1 - decay)

    def _copy(self, weights: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """The weights given, or the present ones, copied where the parameters are."""
        source = self.parameters if weights is None else weights
        return {
            name: source[name].detach().to(parameter.device, copy=True)
            for name, parameter in self.parameters.items()
        }


def layer_depths(names: Iterable[str]) -> dict[str, int]:
    """The layer, from 1, of every parameter of an encoder, named in the order of its modules.

    The first number in a name is the layer's. What comes before all layers (the embeddings) is
    at 0, what comes after them (a last norm) is with the last one, and what lies on top of the
    base (the projector, the response's words) is above.
    """
    depths, layer = {}, 0
    for name in names:
        number = re.search(r"\.(\d+)\.", name)
        layer = layer if number is None else int(number[1]) + 1
        depths[name] = layer
    top = max(depths.values(), default=0) + 1
    return {name: top if name.startswith(HEADS) else depth for name, depth in depths.items()}


def _heads(parameters: Mapping[str, nn.Parameter]) -> dict[str, list[nn.Parameter]]:
    """What lies on top of the base, by the part that it is of."""
    found = {
        head: [parameter for name, parameter in parameters.items() if name.startswith(head)]
        for head in HEADS
    }
    return {head: members for head, members in found.items() if members}


def _adamw(
    parameters: Mapping[str, nn.Parameter], settings: TrainSettings, scales: list[nn.Parameter]
) -> torch.optim.AdamW:
    """Groups by weight decay and by `share`, the part of the learning rate that a layer has."""
    depths = layer_depths(parameters)
    decay = 1.0 if settings.layer_decay is None else settings.layer_decay
    groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in parameters.items():
        share = decay ** (max(depths.values()) - depths[name])
        groups[settings.weight_decay if parameter.ndim >= 2 else 0.0, share].append(parameter)
    described: list[dict[str, Any]] = [
        {"params": members, "weight_decay": weight_decay, "share": share}
        for (weight_decay, share), members in groups.items()
    ]
    if scales and settings.scale_learning_rate is not None:
        share = settings.scale_learning_rate / settings.learning_rate
        own = {"params": scales, "weight_decay": 0.0, "share": share, "eps": SCALE_EPSILON}
        described.append(own)
    return torch.optim.AdamW(described, lr=settings.learning_rate)
