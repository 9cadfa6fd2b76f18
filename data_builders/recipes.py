"""Fine-tuning recipes: what is trained, and how."""

import hashlib
import json
from dataclasses import asdict, dataclass

import numpy as np

from airrep.examples import InputError, Template

TRAINED = ("all", "lora", "last_layers")
PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class Recipe:
    """How the language model is fine-tuned on one subset.

    Args:
        train: what is trained: "all" weights; "lora" (peft adapters on every linear layer of the
            blocks); "last_layers": the last `layers` blocks and the final norm, over stored
            activations of the frozen rest.
        layers: blocks trained by "last_layers".
        lora_rank: rank of the adapters.
        lora_alpha: scale of the adapters; the update counts alpha / rank times.
        learning_rate: highest learning rate of AdamW.
        warmup_steps: steps of linear warm-up; after them it falls linearly to 0.
        epochs: times every example of the subset is seen.
        batch_size: examples a step; the loss is the mean over the batch's response tokens.
        weight_decay: AdamW's decoupled weight decay.
        clip_norm: largest norm of the gradient.
        max_length: tokens an example has at most; a longer prompt loses its middle.
        template: text around prompt and response, with {prompt} and {response}; "auto" is the
            model's chat template.
        precision: "fp32", or "bf16" for autocast over float32 weights.
    """

    train: str = "all"
    layers: int = 4
    lora_rank: int = 8
    lora_alpha: float = 16.0
    learning_rate: float = 5e-5
    warmup_steps: int = 5
    epochs: int = 2
    batch_size: int = 32
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    max_length: int = 512
    template: str = "auto"
    precision: str = "fp32"

    def check(self) -> None:
        """Raises InputError for a value out of range, naming it."""
        for name, value, known in (
            ("train", self.train, TRAINED),
            ("precision", self.precision, PRECISIONS),
        ):
            if value not in known:
                raise InputError(f"recipe.{name} is {value!r}; choose one of {', '.join(known)}.")
        for name in ("layers", "lora_rank", "epochs", "batch_size", "max_length"):
            if getattr(self, name) < 1:
                raise InputError(f"recipe.{name} is {getattr(self, name)}; give at least 1.")
        for name in ("learning_rate", "clip_norm", "lora_alpha"):
            if not getattr(self, name) > 0:
                raise InputError(f"recipe.{name} is {getattr(self, name)}; give more than 0.")
        for name in ("warmup_steps", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise InputError(f"recipe.{name} is {getattr(self, name)}; give 0 or more.")
        if self.template != "auto":
            Template.parse(self.template)

    def relevant(self) -> dict[str, object]:
        """The settings that decide the losses: those of another `train` are left out."""
        settings = asdict(self)
        if self.train != "last_layers":
            del settings["layers"]
        if self.train != "lora":
            del settings["lora_rank"], settings["lora_alpha"]
        return settings

    def fingerprint(self) -> str:
        """sha256 of the settings that decide the losses."""
        return hashlib.sha256(json.dumps(self.relevant(), sort_keys=True).encode()).hexdigest()


def batches(subset: np.ndarray, recipe: Recipe, generator: np.random.Generator) -> list[np.ndarray]:
    """The subset's rows, shuffled anew every epoch, in batches."""
    orders = [generator.permutation(subset) for _ in range(recipe.epochs)]
    size = recipe.batch_size
    return [order[i : i + size] for order in orders for i in range(0, len(order), size)]


def schedule(step: int, steps: int, recipe: Recipe) -> float:
    """Share of the learning rate at a step: linear warm-up, then linear to 0."""
    if step < recipe.warmup_steps:
        return step / recipe.warmup_steps
    return (steps - step) / max(1, steps - recipe.warmup_steps)
