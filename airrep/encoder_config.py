"""What an AirRep encoder is made of: its config, and how its base text encoder is opened."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import (
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from airrep.examples import InputError
from airrep.weights import load_failure

MAX_LENGTH = 512
HUB_ARGUMENTS = ("cache_dir", "local_files_only", "revision", "token", "trust_remote_code")
# Keys of a published checkpoint's config.json that say nothing about its BERT.
NOT_BERT = ("model_type", "architectures", "auto_map", "dtype", "torch_dtype")


class AirRepConfig(PreTrainedConfig):
    """The base text encoder's config as a dict (`base`), the most tokens of a text
    (`max_tokens`), whether the words of the response are read apart (`response_words`), and
    marks with them (`marks`, of texts whose prompts begin at token `prompt_start`).

    Reads the flat config of the published checkpoints too, which is a BERT's own.
    """

    model_type = "airrep"

    def __init__(
        self,
        base: Mapping[str, Any] | None = None,
        max_tokens: int = MAX_LENGTH,
        response_words: bool = False,
        marks: bool = False,
        prompt_start: int = 0,
        **kwargs: Any,
    ) -> None:
        if base is None and "hidden_size" in kwargs:
            flat = {key: value for key, value in kwargs.items() if key not in NOT_BERT}
            kwargs = {key: value for key, value in kwargs.items() if key not in flat}
            base = {**flat, "model_type": "bert"}
            max_tokens = min(max_tokens, flat.get("max_position_embeddings", max_tokens))
        super().__init__(**kwargs)
        self.base = dict(base or {})
        self.response_words = response_words
        self.marks, self.prompt_start = marks, prompt_start
        self.max_tokens = max_tokens  # "max_length" is a generation setting to transformers

    def base_config(self) -> PreTrainedConfig:
        """The base encoder's config; InputError for an architecture transformers lacks."""
        # The precision is that of whoever loads, not of the base it once was.
        values = {key: self.base[key] for key in self.base if key not in ("dtype", "torch_dtype")}
        model_type = values.pop("model_type", None)
        try:
            return AutoConfig.for_model(model_type, **values)
        except ValueError as error:
            raise InputError(
                f"The encoder's base is of type {model_type!r}, which this transformers does not "
                "know; update transformers, or use another base encoder."
            ) from error


def new_base(config: AirRepConfig) -> PreTrainedModel:
    """A base encoder with fresh weights, which loading then fills."""
    base_config = config.base_config()
    loader, extra = base_loader(base_config)
    attention = getattr(config, "_attn_implementation", None)
    # "sdpa" is what bases that have it take by themselves; others refuse it.
    if attention not in (None, "sdpa"):
        extra = {**extra, "attn_implementation": attention}
    return loader.from_config(base_config, **extra)


def base_loader(config: PreTrainedConfig) -> tuple[Any, dict[str, Any]]:
    """The auto class for this architecture and the arguments that leave its pooler out."""
    kind = type(config)
    loader: Any
    model_class: Any
    if kind in MODEL_FOR_TEXT_ENCODING_MAPPING:  # T5's encoder without its decoder
        loader, model_class = AutoModelForTextEncoding, MODEL_FOR_TEXT_ENCODING_MAPPING[kind]
    elif getattr(config, "is_encoder_decoder", False):
        raise InputError(
            f"{config.model_type!r} is an encoder-decoder without an encoder of its own; "
            "use a text encoder such as thenlper/gte-small."
        )
    elif kind in MODEL_MAPPING:
        loader, model_class = AutoModel, MODEL_MAPPING[kind]
    else:  # the user's own remote code
        return AutoModel, {}
    accepted = inspect.signature(model_class).parameters
    return loader, {"add_pooling_layer": False} if "add_pooling_layer" in accepted else {}


def most_tokens(base: PreTrainedModel, tokenizer: Any) -> int:
    """How long a text the base can read, special tokens included."""
    limits = [tokenizer.model_max_length]
    # Rotary positions have no table to count.
    positions = getattr(base.config, "max_position_embeddings", None)
    if positions is not None and positions > 0:
        limits.append(positions)
    for name, module in base.named_modules():
        if isinstance(module, nn.Embedding) and name.endswith("position_embeddings"):
            # RoBERTa counts positions from padding_idx + 1.
            skipped = 0 if module.padding_idx is None else module.padding_idx + 1
            limits.append(module.num_embeddings - skipped)
    return int(min(limits))


def read_base_config(source: str | Path, arguments: dict[str, Any]) -> PreTrainedConfig:
    """The config of a base text encoder, which generates nothing and so keeps no keys and values;
    InputError where it is an AirRep encoder's."""
    values, _ = PreTrainedConfig.get_config_dict(str(source), **arguments)
    if values.get("model_type") == AirRepConfig.model_type:
        raise InputError(
            f"{source} is an AirRep encoder already; open it with AirRepEncoder.from_pretrained."
        )
    config = AutoConfig.from_pretrained(str(source), **arguments)
    if getattr(config, "use_cache", False):
        config.use_cache = False
    return config


def read_config(source: str | Path, arguments: dict[str, Any]) -> AirRepConfig:
    """The config of an AirRep encoder; InputError where it is another model's."""
    values, _ = PreTrainedConfig.get_config_dict(str(source), **arguments)
    if values.get("model_type") != AirRepConfig.model_type:
        raise InputError(
            f"{source} holds a model of type {values.get('model_type')!r}, not an AirRep encoder; "
            "train one from it, or open it untrained with AirRepEncoder.from_base."
        )
    return AirRepConfig.from_dict(values)


def hub_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that config, tokenizer and weights are all fetched with."""
    return {key: arguments[key] for key in HUB_ARGUMENTS if key in arguments}


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars of single files and no reports about weights that are left out."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def clear_load_errors(source: str | Path) -> Iterator[None]:
    """What transformers raises for a bad source becomes an InputError."""
    _check_folder(source)
    try:
        with quiet_transformers():
            yield
    except InputError:
        raise
    except Exception as error:  # damaged files make transformers raise anything
        raise InputError(
            f"{source} cannot be opened as an encoder ({load_failure(error)}); give "
            "a folder with config.json, model.safetensors and a tokenizer, or a hub id."
        ) from error


def _check_folder(source: str | Path) -> None:
    folder = Path(source)
    if folder.is_dir():
        if not (folder / "config.json").exists():
            found = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
            raise InputError(
                f"{folder} has no config.json, so it is not a model (it holds {found}); "
                "give a folder that save_pretrained wrote, or a hub id."
            )
    elif folder.is_absolute() or str(source).startswith(".") or str(source).count("/") > 1:
        raise InputError(f"There is no folder {source}; give an encoder's folder or a hub id.")
