"""What decides how an encoder is trained."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from airrep.choices import check_choice
from airrep.examples import InputError
from airrep.objectives import make_objective

# These change what is seen or stored on the way, not the encoder that comes out.
WITHOUT_EFFECT = ("checkpoint_every", "max_graph_tokens", "show_progress", "wandb")
ObjectiveName = Literal["correlation", "pairwise_ranking", "soft_spearman"]
Weighting = Literal["reliability"]
Precision = Literal["no", "bf16"]
WandbMode = Literal["disabled", "offline", "online"]


@dataclass(frozen=True)
class TrainSettings:
    """Settings of `train_encoder`.

    Args:
        objective: "correlation", "pairwise_ranking" (the paper's) or "soft_spearman".
        target_weighting: "reliability" weighs targets in the objective by how far their training
            labels can be trusted (`airrep.reliability`); None weighs them all the same.
        response_words: whether the encoder reads the words of the response apart as well, beside
            the mean over all tokens, in which they are few. They start with twice the
            text's part in the scores. False adds none: the paper's encoder.
        marks: whether it reads, with the response's words and as a half of their part, what two
            texts have the very same: the response, its first token, the prompt's first tokens
            (`airrep.marks`).
        start_scale: standard deviation that scores have before the first step; embeddings are
            centred on the pool's mean too. None leaves the encoder as it comes.
        learning_rate: AdamW's, after `warmup_steps` steps of linear warm-up; then constant.
        scale_learning_rate: rate of the logarithms of the scales of the two layers on top (the
            text's, bias and all, and the response words'), by which training finds how sharp
            attention should be and what each part should count, wherever they start; warmed up
            alike. None leaves that to the weights.
        warmup_steps: steps in which the learning rates rise from 0.
        layer_decay: the learning rate of each layer as a share of that of the layer above it; the
            projector has the whole rate, the token embeddings the least. None is 1.
        weight_decay: on matrices only, not on biases and norms.
        clip_norm: the gradient's largest norm.
        max_steps: most updates.
        targets_per_step: how many training targets a step takes, a fresh sample; None takes all.
        subsets_per_step: the same for training subsets.
        trainable_layers: None trains everything, k the last k layers and what lies on top of the
            encoder (the projector, the response words), 0 that alone. Frozen layers run once,
            before the first step, which makes training on a CPU possible.
        lora_rank: rank of adapters on every linear layer of those that train, whose own weights
            then stay (LoRA, arXiv 2106.09685); what lies on top trains whole. They are merged
            into the weights at the end. None trains the layers themselves.
        dropout: whether the layers that train drop units.
        chunk_tokens: padded tokens encoded at once; None is 2048 on a CPU, and up to 65536
            elsewhere, as memory allows.
        max_graph_tokens: padded tokens, times layers that train, whose activations are kept in a
            step; the rest is encoded twice. Bounds memory, changes no result; None is 65536 on a
            CPU, and what half of the free memory holds on a GPU.
        validation_subsets: share of the training subsets that is held out and chooses the best
            step; with 0 there is no early stopping, and the last step is taken.
        validation_targets: share of the training targets held out for the same; with 0 the
            training targets are used on the held-out subsets.
        evaluate_every: steps between two evaluations.
        patience: evaluations without a better one before training stops.
        average: decay of a running mean of the weights that is evaluated and returned, or None.
        seed: of the split, the samples and dropout.
        checkpoint_every: steps between two checkpoints; 0 writes none.
        mixed_precision: "no" or "bf16".
        wandb: "disabled", "offline" or "online".
        show_progress: a progress bar with the held-out LDS.
    """

    objective: ObjectiveName = "correlation"
    target_weighting: Weighting | None = None
    response_words: bool = True
    marks: bool = True
    start_scale: float | None = 0.3
    learning_rate: float = 1e-4
    scale_learning_rate: float | None = 0.02
    warmup_steps: int = 10
    layer_decay: float | None = None
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    max_steps: int = 200
    targets_per_step: int | None = None
    subsets_per_step: int | None = None
    trainable_layers: int | None = None
    lora_rank: int | None = None
    dropout: bool = False
    chunk_tokens: int | None = None
    max_graph_tokens: int | None = None
    validation_subsets: float = 0.2
    validation_targets: float = 0.2
    evaluate_every: int = 2
    patience: int = 10
    average: float | None = None
    seed: int = 0
    checkpoint_every: int = 20
    mixed_precision: Precision = "no"
    wandb: WandbMode = "disabled"
    show_progress: bool = True

    def deciding(self) -> dict[str, Any]:
        """The settings that the trained encoder depends on."""
        return {key: value for key, value in asdict(self).items() if key not in WITHOUT_EFFECT}


@dataclass(frozen=True)
class DistilSettings:
    """What the encoder learns before the labels: what another method says of random subsets.

    The targets that `train` holds out are left out, from the pool too.

    Args:
        teacher: a method's name (`airrep tune` may have chosen its parameters), or a file of
            scores as `evaluate.scores` takes them.
        pool_targets: how many examples of the pool, drawn at random, are targets beside the
            training targets; a file has scores of training targets alone, and takes none.
        pool_examples: how many examples of the pool, drawn at random, the subsets are drawn from.
        subsets: how many; each is as large as those of the labels, or half of those examples.
        steps: most updates; settings that are not here are those of `train`.
        targets_per_step: targets that a step takes, a fresh sample.
        subsets_per_step: subsets that a step takes.
        learning_rate: AdamW's; `train.learning_rate` when not given, or 3 times it where only
            what lies on top of the encoder trains, which has more to learn from than labels are.
    """

    teacher: str
    pool_targets: int = 4000
    pool_examples: int = 10000
    subsets: int = 1000
    steps: int = 300
    targets_per_step: int = 128
    subsets_per_step: int = 256
    learning_rate: float | None = None


def check_settings(settings: TrainSettings) -> None:
    """Raises InputError naming the first setting that makes no sense."""
    make_objective(settings.objective)
    _check_least(settings, 0, "weight_decay", "warmup_steps", "checkpoint_every", "seed")
    _check_least(settings, 1, "max_steps", "evaluate_every", "patience")
    optional = {
        "targets_per_step": 1,
        "subsets_per_step": 2,
        "trainable_layers": 0,
        "chunk_tokens": 1,
        "max_graph_tokens": 0,
        "lora_rank": 1,
    }
    for name, least in optional.items():
        if getattr(settings, name) is not None:
            _check_least(settings, least, name)
    for name in ("learning_rate", "clip_norm"):
        if not getattr(settings, name) > 0:
            raise InputError(f"{name} is {getattr(settings, name)}; give a number above 0.")
    for name in ("validation_subsets", "validation_targets"):
        if not 0 <= getattr(settings, name) < 1:
            raise InputError(
                f"{name} is {getattr(settings, name)}; give a share from 0 to below 1, such as 0.2."
            )
    for name in ("start_scale", "scale_learning_rate"):
        value = getattr(settings, name)
        if value is not None and not value > 0:
            raise InputError(f"{name} is {value}; give a number above 0, or none.")
    if settings.layer_decay is not None and not 0 < settings.layer_decay <= 1:
        raise InputError(
            f"layer_decay is {settings.layer_decay}; give a share above 0 up to 1, or none."
        )
    if settings.lora_rank is not None and settings.trainable_layers == 0:
        raise InputError(
            f"lora_rank is {settings.lora_rank}, but with trainable_layers 0 no layer trains; let "
            "some layers train, or leave lora_rank out."
        )
    if settings.average is not None and not 0 < settings.average < 1:
        raise InputError(f"average is {settings.average}; give a decay between 0 and 1, or none.")
    if settings.target_weighting is not None:
        check_choice("target_weighting", settings.target_weighting, get_args(Weighting))
    check_choice("mixed_precision", settings.mixed_precision, get_args(Precision))
    check_choice("wandb", settings.wandb, get_args(WandbMode))


def check_distil(distil: DistilSettings) -> None:
    """Raises InputError naming the first setting of distillation that makes no sense."""
    _check_least(distil, 0, "pool_targets")
    _check_least(distil, 1, "steps", "targets_per_step")
    _check_least(distil, 2, "pool_examples", "subsets", "subsets_per_step")
    if distil.learning_rate is not None and not distil.learning_rate > 0:
        raise InputError(f"learning_rate is {distil.learning_rate}; give a number above 0.")


def _check_least(settings: TrainSettings | DistilSettings, least: int, *names: str) -> None:
    for name in names:
        if not getattr(settings, name) >= least:
            raise InputError(f"{name} is {getattr(settings, name)}; give at least {least}.")
